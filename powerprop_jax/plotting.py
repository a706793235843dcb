"""Figures of the dicts that `analysis` makes: the paper's Figure 1.

The only module that imports matplotlib. It uses figures as objects, without
pyplot: they need no display and are freed like any other object. Colours are
those of Okabe and Ito, which colour-blind readers can tell apart; lines have
markers of their own as well.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  Figure 1.
  Okabe and Ito, `Color universal design <https://jfly.uni-koeln.de/color/>`_.
"""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import os
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker
import numpy as np

Axes = mpl_axes.Axes
Figure = mpl_figure.Figure

_DPI = 150
_BLACK, _GREY, _BLUE, _VERMILLION = '#000000', '#7f7f7f', '#0072b2', '#d55e00'
_COLOURS = ('#e69f00', '#56b4e9', '#009e73', _BLUE, _VERMILLION, '#cc79a7')
_MARKERS = 'osD^vPX*'
_GROUPS = {'pruned': _GREY, 'survivors': _VERMILLION}


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
  """Writes a figure as a PNG file, at 150 dots per inch."""
  figure.savefig(path, dpi=_DPI, format='png')


def _alpha(label: str) -> float | None:
  """The power that a label starts with: 2.0 of '2.0 chain_rule'."""
  try:
    return float(label.split()[0])
  except (ValueError, IndexError):
    return None


def _name(label: str) -> str:
  """A label in words."""
  alpha, (_, *rest) = _alpha(label), label.split() or ['']
  if alpha is None:
    return label.replace('_', ' ')
  words = ' '.join(rest).replace('_', ' ')
  baseline = ' (baseline)' if alpha == 1 else ''
  return rf'$\alpha$ = {alpha:g}{", " if words else ""}{words}{baseline}'


def _styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
  """A line style for each label; black and dashed at alpha = 1."""
  colours, markers = itertools.cycle(_COLOURS), itertools.cycle(_MARKERS)
  return {
    label: {'color': _BLACK, 'linestyle': '--', 'marker': next(markers)}
    if _alpha(label) == 1
    else {'color': next(colours), 'linestyle': '-', 'marker': next(markers)}
    for label in labels
  }


def _tidy(axes: Axes) -> Axes:
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(True, color='0.9', linewidth=0.8)
  axes.set_axisbelow(True)
  return axes


def _line(
  axes: Axes,
  kept: Sequence[float],
  mean: Sequence[float],
  std: Sequence[float],
  **style: Any,
) -> None:
  """A line in percent, in a band of one standard deviation to either side."""
  x, y, band = (100 * np.asarray(v) for v in (kept, mean, std))
  axes.plot(x, y, markersize=4.5, linewidth=1.6, **style)
  if np.any(band):
    axes.fill_between(
      x, y - band, y + band, color=style['color'], alpha=0.18, linewidth=0
    )
    note = 'bands: ± one standard deviation over seeds'
    axes.set_title(note, loc='right', fontsize=8.5, color=_GREY)


def _finish(axes: Axes, title: str, ylabel: str) -> None:
  """Titles, a legend, and weights kept from all (left) to few (right)."""
  axes.set_xscale('log')
  axes.invert_xaxis()
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel('Weights kept after pruning (%)')
  axes.set_ylabel(ylabel)
  axes.set_title(title, loc='left')
  axes.legend(frameon=False)


def accuracy_against_kept(summary: Mapping[str, Any]) -> Figure:
  """Accuracy of pruned networks against the weights they keep (Figure 1a).

  Args:
    summary: a dict of `analysis.summarise`.

  Returns:
    A figure with a line for each label, the mean over seeds, in a band of one
    standard deviation.
  """
  figure = Figure(figsize=(6.4, 4.2), layout='constrained')
  axes = _tidy(figure.subplots())
  results = summary['results']
  for label, style in _styles(results).items():
    mean, std = results[label]['mean'], results[label]['std']
    _line(axes, summary['kept'], mean, std, label=_name(label), **style)
  _finish(axes, 'Accuracy after pruning', 'Test accuracy (%)')
  return figure


def mask_overlap(overlaps: Mapping[Any, Mapping[str, Any]]) -> Figure:
  """How far training changes which weights survive pruning (Figure 1b).

  Args:
    overlaps: dicts of `analysis.mask_overlap`, or of `analysis.average_overlap`
      over seeds, by alpha or label.

  Returns:
    A figure with a line for each alpha, and one for the chance level.
  """
  figure = Figure(figsize=(6.4, 4.2), layout='constrained')
  axes = _tidy(figure.subplots())
  named = {str(label): overlap for label, overlap in overlaps.items()}
  for label, style in _styles(named).items():
    mean = named[label]['overlap']
    std = named[label].get('std', np.zeros(len(mean)))
    _line(axes, named[label]['kept'], mean, std, label=_name(label), **style)
  # The chance level depends on the architecture and not on alpha.
  first = next(iter(named.values()))
  axes.plot(
    100 * np.asarray(first['kept']),
    100 * np.asarray(first['chance']),
    color=_GREY,
    linestyle=':',
    label='random masks',
  )
  axes.set_ylim(0, 103)
  _finish(
    axes,
    'Masks before and after training',
    'Survivors that pruning at\ninitialisation would keep (%)',
  )
  return figure


def _scatter(axes: Axes, distribution: Mapping[str, Any]) -> None:
  """Initial against trained values, survivors in front."""
  initial, trained = (np.array(distribution[k]) for k in ('initial', 'trained'))
  survives = np.array(distribution['survives'], bool)
  names = 'pruned', f'survive (largest {100 * distribution["density"]:g} %)'
  for group, name, colour in zip(
    (~survives, survives), names, _GROUPS.values()
  ):
    axes.scatter(
      *(initial[group], trained[group]),
      s=5,
      color=colour,
      alpha=0.5,
      linewidths=0,
      label=name,
    )
  axes.axline(
    (0, 0), slope=1, color=_BLACK, linewidth=1, linestyle=':', label='unchanged'
  )
  shares = distribution['sign_changes']
  lines = [
    f'{100 * shares[group]:.1f} % of {name}'
    for group, name in (('all', 'all weights'), ('survivors', 'survivors'))
    if shares[group] is not None
  ]
  axes.text(
    *(0.97, 0.03, 'sign changed:\n' + '\n'.join(lines)),
    transform=axes.transAxes,
    ha='right',
    va='bottom',
    fontsize=8.5,
  )
  axes.set_xlabel('Initial value')


def _margins(top: Axes, right: Axes, kde: Mapping[str, Any]) -> None:
  """Densities of initial values above a scatter, of trained ones beside it."""
  for name, colour in _GROUPS.items():
    x, y = kde[name]['x'], kde[name]['density']
    top.plot(x, y, color=colour, linewidth=1.4)
    top.fill_between(x, y, color=colour, alpha=0.25, linewidth=0)
  x, y = kde['trained']['x'], kde['trained']['density']
  right.plot(y, x, color=_BLUE, linewidth=1.4)
  right.fill_betweenx(x, y, color=_BLUE, alpha=0.25, linewidth=0)
  right.set_xlabel('Density')
  for axes, base in ((top, 'bottom'), (right, 'left')):
    axes.spines[:].set_visible(False)
    axes.spines[base].set_visible(True)
    axes.tick_params(length=0, labelleft=False, labelbottom=False)


def weight_scatter(distributions: Mapping[Any, Mapping[str, Any]]) -> Figure:
  """Weights before and after training, and which survive (Figures 1c, 1d).

  Args:
    distributions: dicts of `analysis.weight_distribution`, by alpha or label.

  Returns:
    A figure with a panel for each alpha, side by side on the same axes. Above
    each, the densities of the initial values of survivors and of pruned
    weights, each of area 1; on its right, the density of all trained values.
  """
  n = len(distributions)
  figure = Figure(figsize=(4.2 * n + 0.6, 4.8), layout='constrained')
  grid = figure.subplots(
    *(2, 2 * n),
    sharex='col',
    sharey='row',
    squeeze=False,
    width_ratios=[5, 1] * n,
    height_ratios=[1, 4],
  )
  panels = [grid[:, i : i + 2].ravel() for i in range(0, 2 * n, 2)]
  for (label, distribution), panel in zip(distributions.items(), panels):
    top, corner, main, right = panel
    corner.set_axis_off()
    _scatter(_tidy(main), distribution)
    _margins(top, right, distribution['kde'])
    top.set_title(_name(str(label)), loc='left')
  # The densities of trained values are not on one scale: where most weights end
  # near zero, their peak would leave nothing to see of the others.
  mains = [panel[2] for panel in panels]
  low, high = zip(*(axes.get_xlim() for axes in mains))
  for axes in mains:
    axes.set_xlim(min(low), max(high))
  panels[0][0].set_ylabel('Density')
  mains[0].set_ylabel('Trained value')
  figure.legend(
    *mains[0].get_legend_handles_labels(),
    loc='outside lower center',
    ncols=3,
    columnspacing=1.2,
    handletextpad=0.4,
    frameon=False,
    markerscale=3,
  )
  return figure

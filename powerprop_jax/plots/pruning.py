"""Figures of the numbers that `analysis` and the experiments make.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  Figure 1.
"""

from collections.abc import Mapping, Sequence
import itertools
import os
from typing import Any

import numpy as np

from powerprop_jax import extras
from powerprop_jax.plots import style as style_lib

with extras.needed('plots'):
  from matplotlib import ticker

Axes = style_lib.Axes
Figure = style_lib.Figure

_DPI = 150
_GROUPS = {'pruned': style_lib.GREY, 'survivors': style_lib.VERMILLION}


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
  """Writes a figure as a PNG file, at 150 dots per inch."""
  figure.savefig(path, dpi=_DPI, format='png')


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
  figure, axes = style_lib.panel()
  results, kept = summary['results'], 100 * np.asarray(summary['kept'])
  for label, style in style_lib.styles(results).items():
    mean, std = results[label]['mean'], results[label]['std']
    style_lib.line(axes, kept, mean, std, label=style_lib.name(label), **style)
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
  figure, axes = style_lib.panel()
  named = {str(label): overlap for label, overlap in overlaps.items()}
  for label, style in style_lib.styles(named).items():
    mean, kept = named[label]['overlap'], 100 * np.array(named[label]['kept'])
    std = named[label].get('std', np.zeros(len(mean)))
    style_lib.line(axes, kept, mean, std, label=style_lib.name(label), **style)
  # The chance level depends on the architecture and not on alpha.
  first = next(iter(named.values()))
  axes.plot(
    100 * np.asarray(first['kept']),
    100 * np.asarray(first['chance']),
    color=style_lib.GREY,
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
    (0, 0),
    slope=1,
    color=style_lib.BLACK,
    linewidth=1,
    linestyle=':',
    label='unchanged',
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
  right.plot(y, x, color=style_lib.BLUE, linewidth=1.4)
  right.fill_betweenx(x, y, color=style_lib.BLUE, alpha=0.25, linewidth=0)
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
    _scatter(style_lib.tidy(main), distribution)
    _margins(top, right, distribution['kde'])
    top.set_title(style_lib.name(str(label)), loc='left')
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


def one_weight(paths: Mapping[Any, Any], target: float) -> Figure:
  """Weights on their way to a target, from several starts (section 2).

  Args:
    paths: the weights after each step, of shape [steps, starts], by alpha.
    target: where they are pulled to.

  Returns:
    A figure with a panel for each alpha; a start has one colour in all panels.
  """
  figure = Figure(figsize=(2.6 * len(paths) + 0.6, 3.2), layout='constrained')
  panels = figure.subplots(1, len(paths), sharey=True, squeeze=False)[0]
  for axes, (alpha, weights) in zip(panels, paths.items()):
    style_lib.tidy(axes).axhline(target, color=style_lib.GREY, linestyle=':')
    colours = itertools.cycle(style_lib.COLOURS)
    for weight, colour in zip(np.asarray(weights).T, colours):
      axes.plot(weight, color=colour, linewidth=1.6)
    axes.set_title(style_lib.name(str(alpha)), loc='left')
    axes.set_xlabel('Step')
  panels[0].set_ylabel('Weight')
  return figure


def accuracy_against_sparsity(
  results: Mapping[str, Mapping[str, Sequence[float]]],
) -> Figure:
  """Accuracy of sparse training: a colour a method, a line style an alpha.

  Args:
    results: for each label, alpha and method as in '2.0 RigL', a dict of lists
      'sparsity', 'mean' and 'std', all in [0, 1]. A method that is given at
      sparsity 0 alone is a level across the figure.

  Returns:
    A figure with bars of one standard deviation.
  """
  figure, axes = style_lib.panel(8.0, 4.8)
  method = {label: label.split(maxsplit=1)[-1] for label in results}
  sparse = [label for label in results if any(results[label]['sparsity'])]
  style_lib.scale_sparsities(
    axes, {s for k in sparse for s in results[k]['sparsity']}
  )
  style_lib.scale_errors(axes)
  names = list(dict.fromkeys(method[label] for label in sparse))
  order = list(dict.fromkeys(method.values()))
  alphas = sorted({style_lib.alpha_of(label) or 1.0 for label in results})
  for label in sorted(results, key=lambda label: order.index(method[label])):
    x, y, std = (
      100 * np.asarray(results[label][k]) for k in ('sparsity', 'mean', 'std')
    )
    line = ('--', '-', ':', '-.')[
      alphas.index(style_lib.alpha_of(label) or 1.0)
    ]
    style: Any = {
      'linestyle': line,
      'label': style_lib.name(label, baseline=False),
    }
    if label not in sparse:
      axes.axhline(y[0], color=style_lib.BLACK, linewidth=1.2, **style)
      continue
    i = names.index(method[label])
    colour = style_lib.COLOURS[i % len(style_lib.COLOURS)]
    axes.errorbar(
      # A little apart, for bars not to hide each other.
      (100 - x) * 1.015 ** (i - (len(names) - 1) / 2),
      y,
      std if std.any() else None,
      color=colour,
      marker=style_lib.MARKERS[i],
      markerfacecolor='white' if line == '--' else colour,
      markersize=4.5,
      elinewidth=1,
      **style,
    )
  # By the means: the bar of a run that collapsed would leave no room for more.
  errors = [100 * (1 - y) for r in results.values() for y in r['mean']]
  top, bottom = (max(0.1, f(errors)) for f in (min, max))
  axes.set_ylim(100 - 1.3 * bottom, 100 - 0.7 * top)
  axes.set_title('Accuracy of sparse training', loc='left')
  figure.legend(loc='outside right upper', frameon=False)
  return figure

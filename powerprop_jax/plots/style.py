"""The look that all figures share.

Figures are objects, without pyplot: they need no display and are freed like any
other object. Colours are those of Okabe and Ito, which colour-blind readers can
tell apart; lines have markers of their own as well.

References:
  Okabe and Ito, `Color universal design <https://jfly.uni-koeln.de/color/>`_.
"""

from collections.abc import Iterable
import itertools
from typing import Any

import numpy as np

from powerprop_jax import extras

with extras.needed('plots'):
  from matplotlib import axes as mpl_axes
  from matplotlib import figure as mpl_figure
  from matplotlib import ticker

Axes = mpl_axes.Axes
Figure = mpl_figure.Figure

BLACK, GREY, BLUE, VERMILLION = '#000000', '#7f7f7f', '#0072b2', '#d55e00'
COLOURS = ('#e69f00', '#56b4e9', '#009e73', BLUE, VERMILLION, '#cc79a7')
MARKERS = 'osD^vPX*'


def alpha_of(label: str) -> float | None:
  """The power that a label starts with: 2.0 of '2.0 chain_rule'."""
  try:
    return float(label.split()[0])
  except (ValueError, IndexError):
    return None


def name(label: str, baseline: bool = True) -> str:
  """A label in words."""
  alpha, (_, *rest) = alpha_of(label), label.split() or ['']
  if alpha is None:
    return label.replace('_', ' ')
  words = ' '.join(rest).replace('_', ' ')
  note = ' (baseline)' if baseline and alpha == 1 else ''
  return rf'$\alpha$ = {alpha:g}{", " if words else ""}{words}{note}'


def styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
  """A line style for each label; black and dashed at alpha = 1."""
  colours, markers = itertools.cycle(COLOURS), itertools.cycle(MARKERS)
  return {
    label: {'color': BLACK, 'linestyle': '--', 'marker': next(markers)}
    if alpha_of(label) == 1
    else {'color': next(colours), 'linestyle': '-', 'marker': next(markers)}
    for label in labels
  }


def panel(width: float = 6.4, height: float = 4.2) -> tuple[Figure, Axes]:
  """A figure of one panel, its sides in inches."""
  figure = Figure(figsize=(width, height), layout='constrained')
  return figure, tidy(figure.subplots())


def tidy(axes: Axes) -> Axes:
  """Takes off what does not help reading, and adds a grid behind."""
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(True, color='0.9', linewidth=0.8)
  axes.set_axisbelow(True)
  return axes


def line(axes: Axes, x: Any, mean: Any, std: Any, **style: Any) -> None:
  """A line in percent, in a band of one standard deviation to either side."""
  y, band = 100 * np.asarray(mean), 100 * np.asarray(std)
  axes.plot(x, y, markersize=4.5, linewidth=1.6, **style)
  if np.any(band):
    axes.fill_between(
      x, y - band, y + band, color=style['color'], alpha=0.18, linewidth=0
    )
    note = 'bands: ± one standard deviation over seeds'
    axes.set_title(note, loc='right', fontsize=8.5, color=GREY)


# Errors in percent at which an axis of accuracy has ticks.
_ERRORS = (100, 70, 50, 30, 20, 10, 7, 5, 4, 3, 2.5, 2, 1.5, 1, 0.5, 0.2, 0.1)


def scale_errors(axes: Axes) -> None:
  """An axis of accuracy on which each halving of the error is as far."""
  log_error = lambda y: -np.log10(np.maximum(100 - y, 0.01))
  axes.set_yscale('function', functions=(log_error, lambda z: 100 - 10**-z))
  axes.yaxis.set_major_locator(ticker.FixedLocator([100 - e for e in _ERRORS]))
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axes.set_ylabel('Test accuracy (%), log scale of the error')


def scale_sparsities(axes: Axes, sparsities: Iterable[float]) -> None:
  """A logarithmic axis of weights kept, labelled by the weights removed."""
  kept = {100 * (1 - s): f'{100 * s:g}' for s in sorted(sparsities)}
  axes.set_xscale('log')
  axes.invert_xaxis()
  axes.set_xticks(list(kept), list(kept.values()))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel('Weights removed (%)')

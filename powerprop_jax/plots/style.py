"""The look that all figures share.

What matplotlib can keep in a file is in `powerprop.mplstyle`; this module has
the rest: the styles of lines by their labels, and the scales of the axes.
Figures are objects, without pyplot: they need no display and are freed like any
other object. The colours are those of Okabe and Ito, which colour-blind readers
can tell apart; lines have markers of their own as well.

References:
  Okabe and Ito, `Color universal design <https://jfly.uni-koeln.de/color/>`_.
"""

from collections.abc import Iterable
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from powerprop_jax import extras

with extras.needed('plots'):
  import matplotlib as mpl
  from matplotlib import axes as mpl_axes
  from matplotlib import figure as mpl_figure
  from matplotlib import style as mpl_style
  from matplotlib import ticker

Axes = mpl_axes.Axes
Figure = mpl_figure.Figure

BLACK, GREY, BLUE, VERMILLION = '#000000', '#7f7f7f', '#0072b2', '#d55e00'
#: The colours of lines, in this order.
COLOURS = ('#e69f00', '#56b4e9', '#009e73', BLUE, VERMILLION, '#cc79a7')
# The colours of lines at alpha = 1, the first of which stands for most of them.
_GREYS = (BLACK, GREY, '#bdbdbd')
#: The markers of lines, in this order.
MARKERS = 'osD^vPX*'

#: Decorates the functions that draw, so that they draw in the common style.
styled = mpl_style.context('powerprop_jax.plots.powerprop')


def alpha_of(label: str) -> float | None:
  """The power that a label starts with.

  >>> alpha_of('2.0 chain_rule'), alpha_of('RigL')
  (2.0, None)

  Args:
    label: the label of a line.

  Returns:
    The power, or None if the label starts with no number.
  """
  try:
    return float(label.split()[0])
  except (ValueError, IndexError):
    return None


def name(label: str, baseline: bool = True) -> str:
  """A label in words, for a legend.

  >>> name('1.0'), name('2.0 chain_rule')
  ('$\\\\alpha$ = 1 (baseline)', '$\\\\alpha$ = 2, chain rule')

  Args:
    label: the label of a line.
    baseline: whether alpha = 1, without further words, is called the baseline.

  Returns:
    The words, with the alpha as a formula.
  """
  alpha, (_, *rest) = alpha_of(label), label.split() or ['']
  if alpha is None:
    return label.replace('_', ' ')
  words = ' '.join(rest).replace('_', ' ')
  is_baseline = baseline and alpha == 1 and not words
  note = ' (baseline)' if is_baseline else ''
  return rf'$\alpha$ = {alpha:g}{", " if words else ""}{words}{note}'


def styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
  """A line style for each label, dashed and black or grey at alpha = 1.

  >>> looks = styles(['1.0', '2.0'])
  >>> looks['1.0']['linestyle'], looks['2.0']['color']
  ('--', '#e69f00')

  Args:
    labels: the labels of the lines of a figure.

  Returns:
    The keyword arguments of `Axes.plot` by label.
  """
  colours, greys = itertools.cycle(COLOURS), itertools.cycle(_GREYS)
  looks = {}
  for label, marker in zip(labels, itertools.cycle(MARKERS)):
    is_baseline = alpha_of(label) == 1
    looks[label] = {
      'color': next(greys if is_baseline else colours),
      'linestyle': '--' if is_baseline else '-',
      'marker': marker,
    }
  return looks


def panel(width: float = 6.4, height: float = 4.2) -> tuple[Figure, Axes]:
  """A figure of one panel with a grid.

  >>> figure, axes = panel(4.0, 3.0)
  >>> figure.get_size_inches().tolist()
  [4.0, 3.0]

  Args:
    width: the width of the figure in inches.
    height: its height in inches.

  Returns:
    The figure and its axes.
  """
  figure = Figure(figsize=(width, height))
  return figure, with_grid(figure.subplots())


def with_grid(axes: Axes) -> Axes:
  """Adds a grid behind what is drawn.

  >>> with_grid(Figure().subplots()).get_axisbelow()
  'line'

  Args:
    axes: the axes of a panel.

  Returns:
    The same axes.
  """
  # Ticks are made when a figure is drawn, and would read the style of that
  # time.
  axes.grid(
    True,
    color=mpl.rcParams['grid.color'],
    linewidth=mpl.rcParams['grid.linewidth'],
  )
  return axes


def line(
  axes: Axes,
  x: npt.ArrayLike,
  mean: npt.ArrayLike,
  std: npt.ArrayLike,
  **style: Any,
) -> None:
  """Draws a line in percent, in a band of ± one standard deviation.

  >>> axes = Figure().subplots()
  >>> line(axes, [1, 2], [0.9, 0.8], [0.0, 0.0], color='black')
  >>> axes.lines[0].get_ydata().tolist()
  [90.0, 80.0]

  Args:
    axes: where to draw.
    x: the positions of the n points.
    mean: the n values, as fractions.
    std: their n standard deviations; there is no band where all of them are 0.
    **style: keyword arguments of `Axes.plot`, of which `color` is needed.
  """
  y, band = 100 * np.asarray(mean), 100 * np.asarray(std)
  axes.plot(x, y, **style)
  if np.any(band):
    axes.fill_between(
      x, y - band, y + band, color=style['color'], alpha=0.18, linewidth=0
    )
    note = 'bands: ± one standard deviation over seeds'
    axes.set_title(note, loc='right', fontsize=8.5, color=GREY)


# Errors in percent at which an axis of accuracy has ticks.
_ERRORS = (90, 70, 50, 30, 20, 15, 10, 7, 5, 4, 3, 2, 1.5, 1, 0.5, 0.2, 0.1)


def _accuracy_ticks(low: float, high: float) -> list[float]:
  """Accuracies in [low, high]: at least four, unless the view is a point."""
  low, high = low - 1e-6, high + 1e-6  # The scale rounds its own limits.
  ticks = [100.0 - error for error in _ERRORS if low <= 100 - error <= high]
  if len(ticks) < 4:
    # Between values so close the scale is nearly linear.
    even = ticker.MaxNLocator(nbins=7, steps=[1, 2, 5, 10])
    ticks = [round(float(x), 6) for x in even.tick_values(low, high)]
  return [x for x in ticks if low <= x <= high]


class _AccuracyLocator(ticker.Locator):
  """Puts the ticks of `_accuracy_ticks` on the visible part of the axis."""

  def __call__(self) -> list[float]:
    assert self.axis is not None
    return self.tick_values(*sorted(self.axis.get_view_interval()))

  def tick_values(self, vmin: float, vmax: float) -> list[float]:
    return _accuracy_ticks(vmin, vmax)


def scale_errors(axes: Axes, lowest: float | None = None) -> None:
  """Makes a y axis of accuracy that is logarithmic in the error.

  >>> axes = Figure().subplots()
  >>> scale_errors(axes, lowest=84.0)
  >>> axes.set_ylim(top=98.5)
  (80.0, 98.5)

  Args:
    axes: the axes, of which y is an accuracy in percent.
    lowest: the lowest accuracy that is drawn. If given, the axis begins at the
      next tick below it.
  """
  log_error = lambda y: -np.log10(np.maximum(100 - y, 0.01))
  axes.set_yscale('function', functions=(log_error, lambda z: 100 - 10**-z))
  axes.yaxis.set_major_locator(_AccuracyLocator())
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axes.set_ylabel('Test accuracy (%), log scale of the error')
  if lowest is not None:
    below = [100.0 - e for e in _ERRORS if 100 - e <= lowest]
    axes.set_ylim(bottom=max(below, default=0.0))


def scale_sparsities(axes: Axes, sparsities: Iterable[float]) -> None:
  """Makes a logarithmic axis of weights kept, labelled by the weights removed.

  >>> axes = Figure().subplots()
  >>> scale_sparsities(axes, [0.9, 0.99])
  >>> [text.get_text() for text in axes.get_xticklabels()]
  ['90', '99']

  Args:
    axes: the axes, of which x is the percentage of the weights that are kept.
    sparsities: the sparsities in [0, 1) at which the axis has ticks.
  """
  kept = {100 * (1 - s): f'{100 * s:g}' for s in sorted(sparsities)}
  axes.set_xscale('log')
  if not axes.xaxis_inverted():
    axes.invert_xaxis()
  axes.set_xticks(list(kept), list(kept.values()))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel('Weights removed (%)')

"""Figures of the numbers that `continual_report` makes of a sequence of tasks.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  section 4.
"""

from collections.abc import Mapping
import itertools
from typing import Any

import numpy as np

from powerprop_jax import extras
from powerprop_jax.plots import style as style_lib

with extras.needed('plots'):
  from matplotlib import ticker


def _over_tasks(
  results: Mapping[str, Any], title: str, xlabel: str
) -> style_lib.Figure:
  """A line in percent for each label over tasks; dashed at alpha = 1."""
  figure, axes = style_lib.panel(8.0, 4.2)
  looks = zip(
    itertools.cycle((*style_lib.COLOURS, style_lib.BLACK)),
    itertools.cycle(style_lib.MARKERS),
  )
  for (label, runs), (colour, marker) in zip(results.items(), looks):
    values = np.atleast_2d(np.asarray(runs, float))
    std = values.std(axis=0, ddof=min(1, len(values) - 1))
    tasks = np.arange(1, values.shape[1] + 1)
    style_lib.line(
      *(axes, tasks, values.mean(axis=0), std),
      label=style_lib.name(label, baseline=False),
      color=colour,
      marker=marker,
      linestyle='--' if style_lib.alpha_of(label) == 1 else '-',
      markevery=max(1, len(tasks) // 20),
    )
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.set_xlabel(xlabel)
  axes.set_title(title, loc='left')
  figure.legend(loc='outside right upper', frameon=False)
  return figure


def _matrix(
  values: np.ndarray, low: float, title: str, *names: str
) -> style_lib.Figure:
  """A matrix over tasks in percent, with colours from `low`; NaN is blank."""
  figure, axes = style_lib.panel(5.6, 4.6)
  rows, columns = values.shape
  extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
  image = axes.imshow(values, cmap='cividis', vmin=low, extent=extent)
  for (i, j), value in np.ndenumerate(values):
    if columns <= 12 and np.isfinite(value):
      colour = 'white' if value < np.mean(image.get_clim()) else style_lib.BLACK
      style = {'ha': 'center', 'va': 'center', 'fontsize': 7, 'color': colour}
      axes.text(j + 1, i + 1, f'{value:.1f}', style)
  figure.colorbar(image, label=names[2])
  for axis, name in zip((axes.xaxis, axes.yaxis), names):
    axis.set_major_locator(ticker.MaxNLocator(integer=True))
    axis.set_label_text(name)
  axes.grid(False)
  axes.set_title(title, loc='left')
  return figure


def accuracy_by_task(results: Mapping[str, Any]) -> style_lib.Figure:
  """Accuracy on each task in the end, a line for each method.

  Args:
    results: for each label, such as 'PackNet' or '2.0 EPN', the accuracies in
      [0, 1], of shape [tasks] or [seeds, tasks].

  Returns:
    A figure; over seeds, the mean in a band of one standard deviation.
  """
  figure = _over_tasks(results, 'Accuracy after the last task', 'Task')
  style_lib.scale_errors(figure.axes[0])
  return figure


def capacity(results: Mapping[str, Any]) -> style_lib.Figure:
  """The share of the weights that some task uses, over the tasks learned.

  Args:
    results: for each label the shares in [0, 1] after each task, of shape
      [tasks] or [seeds, tasks].

  Returns:
    A figure; over seeds, the mean in a band of one standard deviation.
  """
  figure = _over_tasks(results, 'Capacity used', 'Tasks learned')
  figure.axes[0].set_ylim(0, 103)
  figure.axes[0].set_ylabel('Weights in use (%)')
  return figure


def accuracy_matrix(matrix: Any) -> style_lib.Figure:
  """Accuracy on every task (columns) after every task learned (rows).

  Args:
    matrix: accuracies in [0, 1], NaN for tasks that are not learned yet.

  Returns:
    A figure. Nothing was forgotten if every column has one colour.
  """
  values = 100 * np.asarray(matrix, float)
  # A tenth of a point must not look like all the difference there is.
  low = min(np.nanmin(values), np.nanmax(values) - 5)
  names = 'Task evaluated', 'Tasks learned', 'Test accuracy (%)'
  return _matrix(values, low, 'Accuracy over the sequence', *names)


def overlap_matrix(matrix: Any) -> style_lib.Figure:
  """The share of their weights that the masks of two tasks have in common.

  Args:
    matrix: intersection over union of the masks of all pairs, in [0, 1].

  Returns:
    A figure.
  """
  values, title = 100 * np.asarray(matrix, float), 'Overlap of masks'
  names = 'Task', 'Task', 'Weights in both masks, of those in either (%)'
  return _matrix(values, 0.0, title, *names)

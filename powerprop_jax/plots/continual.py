"""Figures of the numbers that `continual.report` returns for a run of tasks.

Tasks are counted from 1 here, as in tables and in the files of programs; in
Python the first task of a sequence has the index 0.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  section 4.
"""

from collections.abc import Mapping
import itertools

import numpy as np
import numpy.typing as npt

from powerprop_jax import extras
from powerprop_jax.plots import style as style_lib

with extras.needed('plots'):
  from matplotlib import axis as mpl_axis

Axis = mpl_axis.Axis
Figure = style_lib.Figure


def _task_ticks(axis: Axis, num_tasks: int) -> None:
  """Marks the first task and round numbers, twelve at most, and no others."""
  steps = (m * 10**e for e in range(9) for m in (1, 2, 5))
  step = next(step for step in steps if num_tasks <= 11 * step)
  axis.set_ticks(sorted({1, *range(step, num_tasks + 1, step)}))


def _over_tasks(
  results: Mapping[str, npt.ArrayLike], title: str, xlabel: str
) -> Figure:
  """Draws a line in percent over tasks for each label; dashed at alpha = 1."""
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
      axes,
      tasks,
      values.mean(axis=0),
      std,
      label=style_lib.name(label, baseline=False),
      color=colour,
      marker=marker,
      linestyle='--' if style_lib.alpha_of(label) == 1 else '-',
      markevery=max(1, len(tasks) // 20),
    )
  longest = max(np.shape(runs)[-1] for runs in results.values())
  _task_ticks(axes.xaxis, longest)
  axes.set_xlabel(xlabel)
  axes.set_title(title)
  if len(results) > 4:
    figure.legend(loc='outside right upper')
  else:  # Below, a few of them leave the lines the whole width.
    figure.legend(loc='outside lower center', ncols=2)
  return figure


def _matrix(values: np.ndarray, low: float, title: str, *names: str) -> Figure:
  """Draws a matrix over tasks in percent, with colours from `low`.

  NaN is blank.
  """
  figure = Figure(figsize=(5.6, 4.6))
  axes = figure.subplots()
  rows, columns = values.shape
  extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
  image = axes.imshow(values, cmap='cividis', vmin=low, extent=extent)
  for (i, j), value in np.ndenumerate(values):
    if columns <= 12 and np.isfinite(value):
      colour = 'white' if value < np.mean(image.get_clim()) else style_lib.BLACK
      style = {'ha': 'center', 'va': 'center', 'fontsize': 7, 'color': colour}
      axes.text(j + 1, i + 1, f'{value:.1f}', style)
  figure.colorbar(image, label=names[2])
  for axis, count, name in zip(
    (axes.xaxis, axes.yaxis), (columns, rows), names
  ):
    _task_ticks(axis, count)
    axis.set_label_text(name)
  axes.set_title(title)
  return figure


@style_lib.styled
def accuracy_by_task(results: Mapping[str, npt.ArrayLike]) -> Figure:
  """Accuracy on each task after the last one, with a line for each method.

  >>> figure = accuracy_by_task({'2.0 EPN': [0.98, 0.97]})
  >>> figure.axes[0].lines[0].get_xydata().tolist()
  [[1.0, 98.0], [2.0, 97.0]]

  Args:
    results: for each label, such as 'PackNet' or '2.0 EPN', the accuracies in
      [0, 1], of shape [tasks] or [seeds, tasks].

  Returns:
    A figure with the mean over the seeds in a band of one standard deviation.
  """
  figure = _over_tasks(results, 'Accuracy after the last task', 'Task')
  (axes,) = figure.axes
  lowest = min(np.min(np.asarray(line.get_ydata())) for line in axes.lines)
  style_lib.scale_errors(axes, lowest=float(lowest))
  return figure


@style_lib.styled
def capacity(results: Mapping[str, npt.ArrayLike]) -> Figure:
  """The share of the weights that some task uses, over the tasks learned.

  >>> figure = capacity({'2.0 EPN': [0.1, 0.2, 0.25]})
  >>> figure.axes[0].lines[0].get_ydata().tolist()
  [10.0, 20.0, 25.0]

  Args:
    results: for each label the shares in [0, 1] after each task, of shape
      [tasks] or [seeds, tasks].

  Returns:
    A figure with the mean over the seeds in a band of one standard deviation.
  """
  figure = _over_tasks(results, 'Capacity used', 'Last task learned')
  figure.axes[0].set_ylim(0, 103)
  figure.axes[0].set_ylabel('Weights in use (%)')
  return figure


@style_lib.styled
def accuracy_matrix(matrix: npt.ArrayLike) -> Figure:
  """Accuracy on every task (columns) after every task learned (rows).

  >>> figure = accuracy_matrix([[0.98, float('nan')], [0.98, 0.97]])
  >>> [text.get_text() for text in figure.axes[0].texts]
  ['98.0', '98.0', '97.0']

  Args:
    matrix: accuracies in [0, 1], of shape [tasks, tasks], NaN for tasks that
      are not learned yet.

  Returns:
    A figure. Nothing was forgotten if every column has one colour.
  """
  values = 100 * np.asarray(matrix, float)
  # A tenth of a point must not span the whole range of colours.
  low = min(np.nanmin(values), np.nanmax(values) - 5)
  names = 'Task evaluated', 'Last task learned', 'Test accuracy (%)'
  return _matrix(values, low, 'Accuracy over the sequence', *names)


@style_lib.styled
def overlap_matrix(matrix: npt.ArrayLike) -> Figure:
  """The share of their weights that the masks of two tasks have in common.

  >>> figure = overlap_matrix([[1.0, 0.4], [0.4, 1.0]])
  >>> figure.axes[0].images[0].get_clim()
  (0.0, 100.0)

  Args:
    matrix: for all pairs of tasks the weights in both masks as a share of those
      in either, in [0, 1], of shape [tasks, tasks].

  Returns:
    A figure.
  """
  values, title = 100 * np.asarray(matrix, float), 'Overlap of masks'
  names = 'Task', 'Task', 'Weights in both masks, of those in either (%)'
  return _matrix(values, 0.0, title, *names)

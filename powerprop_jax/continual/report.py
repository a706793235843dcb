"""Reports on accuracy, capacity and masks over a sequence of tasks, as dicts.

Section 4 of the paper asks two things of continual learning: that nothing is
forgotten, and that the weights of one network last for many tasks. Both are
measured from what a run records: the accuracy on every task after every task,
who owns each weight, and the masks of the tasks. Only weights are counted. All
results can be written to a JSON file as they are: what was not measured is
None.

References:
  Chaudhry et al, `Riemannian walk for incremental learning
  <https://arxiv.org/abs/1801.10112>`_, 2018 (forgetting).
  Lopez-Paz and Ranzato, `Gradient episodic memory for continual learning
  <https://arxiv.org/abs/1706.08840>`_, 2017 (backward transfer, and forward
  transfer before a task is learned).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tabulate

_BLOCK = 1 << 20


def _square(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
  """A square matrix of rows, of which shorter ones are filled up with NaN."""
  matrix = np.full((len(rows), len(rows)), np.nan)
  for i, row in enumerate(rows):
    if len(row) > len(rows):
      raise ValueError(
        f'Row {i} of the accuracy matrix has {len(row)} tasks, but {len(rows)}'
        ' were learned. Give one row and one column per task that was learned.'
      )
    matrix[i, : len(row)] = np.asarray(row, float)
  return matrix


def _plain(matrix: np.ndarray) -> list[list[float | None]]:
  """Nested lists with None for NaN, which JSON does not know."""
  return [[None if np.isnan(x) else float(x) for x in row] for row in matrix]


def accuracy_report(
  rows: Sequence[Sequence[float | None]],
  independent: Sequence[float] | None = None,
  initial: Sequence[float] | None = None,
) -> dict[str, Any]:
  """Accuracy, forgetting and transfer over a sequence of tasks.

  With R[i][t], the accuracy on task t after task i was learned, and T tasks
  that are counted from 0:

    * *Forgetting* of task t (Chaudhry et al. 2018) is the best accuracy on it
      before the last task less that after the last task, max_i R[i][t] -
      R[T - 1][t] over t <= i < T - 1. It is negative if later tasks helped, and
      0 for the last task.
    * *Backward transfer* (Lopez-Paz and Ranzato 2017) is R[T - 1][t] - R[t][t]:
      what all later tasks did to task t. Its mean is over all but the last.
    * *Forward transfer*, as it is defined here, is R[t][t] - a[t], where a[t]
      is the accuracy of a network that learned task t alone: what all earlier
      tasks did to the learning of task t.
    * *Zero-shot transfer* is what Lopez-Paz and Ranzato, and the library
      Avalanche, call forward transfer: R[t - 1][t] - b[t], the accuracy on task
      t before it is learned, less that of the network at its initialisation.
      It means nothing for networks with a head for every task, since the head
      is still untrained.

  Args:
    rows: row i holds the accuracies in [0, 1] on all tasks after task i was
      learned. What was not measured, or not learned yet, may be None, NaN or
      missing at the end of the row; the last row is complete.
    independent: the accuracies a[t] of networks that learned a single task
      each.
    initial: the accuracies b[t] on every task of a network that was just
      initialised. With them, row i must hold the accuracy on task i + 1.

  Returns:
    A dict of 'accuracy_matrix', lists with None where nothing was measured;
    'average_accuracy' and 'worst_accuracy' after the last task; 'forgetting'
    and 'backward_transfer', lists, with 'mean_forgetting' and
    'mean_backward_transfer' over all tasks but the last; with `independent`,
    'forward_transfer', a list, and 'mean_forward_transfer' over all tasks but
    the first; and with `initial`, 'zero_shot_transfer', a list that starts with
    None, and 'mean_zero_shot_transfer'. A mean over no task is None.

  Raises:
    ValueError: if there are no rows, if a row is longer than their number, if
      the last row or the diagonal is incomplete, if `independent` or `initial`
      is too short, or if `initial` is given and the accuracy on a task before
      it was learned is missing.

  >>> from powerprop_jax.continual import report
  >>> rows = [[0.75, 0.25], [0.5, 1.0]]
  >>> found = report.accuracy_report(rows, initial=[0.125, 0.125])
  >>> found['average_accuracy'], found['mean_forgetting']
  (0.75, 0.25)
  >>> found['mean_backward_transfer'], found['mean_zero_shot_transfer']
  (-0.25, 0.125)
  """
  matrix = _square(rows)
  if not len(matrix):
    raise ValueError('No task was learned: there is nothing to report.')
  final, learned = matrix[-1], np.diagonal(matrix)
  for name, x in ('after the last task', final), ('when learned', learned):
    if np.isnan(x).any():
      tasks = np.flatnonzero(np.isnan(x)).tolist()
      raise ValueError(f'Tasks {tasks} must be evaluated {name}.')
  best = [
    np.nanmax(matrix[t : max(t + 1, len(matrix) - 1), t])
    for t in range(len(matrix))
  ]
  forgetting = np.array(best) - final
  backward = final - learned
  report = {
    'accuracy_matrix': _plain(matrix),
    'average_accuracy': float(final.mean()),
    'worst_accuracy': float(final.min()),
    'forgetting': forgetting.tolist(),
    'mean_forgetting': _mean(forgetting[:-1]),
    'backward_transfer': backward.tolist(),
    'mean_backward_transfer': _mean(backward[:-1]),
  }
  if independent is not None:
    if len(independent) < len(matrix):
      raise ValueError(
        f'independent has {len(independent)} accuracies, but {len(matrix)}'
        ' tasks were learned. Learn each of them alone.'
      )
    transfer = learned - np.asarray(independent, float)[: len(matrix)]
    report['forward_transfer'] = transfer.tolist()
    report['mean_forward_transfer'] = _mean(transfer[1:])
  if initial is not None:
    if len(initial) < len(matrix):
      raise ValueError(
        f'initial has {len(initial)} accuracies, but {len(matrix)} tasks were'
        ' learned. Evaluate a new network on each of them.'
      )
    before = np.diagonal(matrix, 1)
    if np.isnan(before).any():
      tasks = (1 + np.flatnonzero(np.isnan(before))).tolist()
      raise ValueError(
        f'Tasks {tasks} must be evaluated before they are learned, after the'
        ' task before them, to be compared with initial.'
      )
    transfer = before - np.asarray(initial, float)[1 : len(matrix)]
    report['zero_shot_transfer'] = [None, *transfer.tolist()]
    report['mean_zero_shot_transfer'] = _mean(transfer)
  return report


def _mean(values: np.ndarray) -> float | None:
  return float(values.mean()) if len(values) else None


def capacity_report(
  owners: Mapping[str, Any], num_tasks: int
) -> dict[str, Any]:
  """How many weights each task was the first to use, and how many are free.

  Args:
    owners: an integer array for each layer's weights, by path: 0 where a weight
      is free, and t + 1 where task t was the first to use it.
    num_tasks: how many tasks were learned.

  Returns:
    A dict of 'layers', {path: {'size', 'used', 'free', 'new_weights'}}; of
    'capacity_used', the share of all weights that are in use; and of lists with
    an entry for each task: 'new_weights', how many it was the first to use;
    'used', the share of weights in use after it; and 'backward_masked', the
    share that no update could move while it was trained.

  Raises:
    ValueError: if there are no weights, or if an owner is a task that was not
      learned.

  >>> import numpy as np
  >>> from powerprop_jax.continual import report
  >>> found = report.capacity_report({'w': np.array([0, 1, 1, 2])}, num_tasks=2)
  >>> found['new_weights'], found['used'], found['backward_masked']
  ([2, 1], [0.5, 0.75], [0.0, 0.5])
  """
  layers, new, size = {}, np.zeros(num_tasks, int), 0
  for path, owner in owners.items():
    counts = np.bincount(np.ravel(owner), minlength=num_tasks + 1)
    if len(counts) > num_tasks + 1:
      raise ValueError(
        f'A weight of {path!r} belongs to task {len(counts) - 2}, but only'
        f' {num_tasks} tasks were learned, the first being 0.'
      )
    free, *counts = counts.tolist()
    layers[path] = {
      'size': free + sum(counts),
      'used': sum(counts),
      'free': free,
      'new_weights': counts,
    }
    new, size = new + np.array(counts, int), size + free + sum(counts)
  if not size:
    raise ValueError('There are no owners: no weights are kept for tasks.')
  used = np.cumsum(new) / size
  return {
    'layers': layers,
    'capacity_used': float(new.sum() / size),
    'new_weights': new.tolist(),
    'used': used.tolist(),
    'backward_masked': [0.0, *used.tolist()][:num_tasks],
  }


def _unpacked(packed: Any, size: int) -> np.ndarray:
  """The boolean vector from which `masks.pack` made bytes."""
  return np.unpackbits(np.asarray(packed), count=size).astype(bool)


def _common(bits: np.ndarray) -> np.ndarray:
  """How many weights each pair of masks has in common: [tasks, tasks]."""
  total = np.zeros((len(bits), len(bits)), int)
  # Counts are exact in float32 below 2^24, and products in float32 are fast.
  for start in range(0, bits.shape[1], _BLOCK):
    block = bits[:, start : start + _BLOCK].astype(np.float32)
    total += (block @ block.T).astype(int)
  return total


def mask_report(
  packed: Sequence[Mapping[str, Any]], owners: Mapping[str, Any]
) -> dict[str, Any]:
  """What the masks of the tasks keep, and how much of it they share.

  Args:
    packed: the masks of the tasks in the order of learning, by path, as
      `masks.pack` returns them.
    owners: as in `capacity_report`.

  Returns:
    A dict of 'density', a list, and 'layer_density', {path: list}, the share of
    weights that each task uses; of 'overlap', a matrix: the weights in both
    masks as a share of those in either; and of 'reused', a list: the share of
    its weights that each task took from earlier ones.

  >>> import numpy as np
  >>> from powerprop_jax.continual import report
  >>> packed = [{'w': np.uint8([0b1100_0000])}, {'w': np.uint8([0b0110_0000])}]
  >>> found = report.mask_report(packed, {'w': np.array([1, 1, 2, 0])})
  >>> found['density'], found['reused'], found['overlap'][0][1]
  ([0.5, 0.5], [0.0, 0.5], 0.3333333333333333)
  """
  common = np.zeros((len(packed), len(packed)), int)
  reused, layers, size = np.zeros(len(packed), int), {}, 0
  for path, owner in owners.items():
    owner = np.ravel(owner)
    bits = np.stack([_unpacked(p[path], owner.size) for p in packed])
    common += _common(bits)
    for t, mask in enumerate(bits):
      reused[t] += np.count_nonzero(mask & (owner > 0) & (owner <= t))
    layers[path] = bits.mean(axis=1).tolist()
    size += owner.size
  kept = np.diagonal(common)
  either = kept[:, None] + kept - common
  return {
    'density': (kept / size).tolist(),
    'layer_density': layers,
    'overlap': (common / np.maximum(either, 1)).tolist(),
    'reused': (reused / np.maximum(kept, 1)).tolist(),
  }


def table(runs: Sequence[Mapping[str, Any]]) -> str:
  """A text table that compares methods, in percent.

  Args:
    runs: a dict for each run: 'method', 'alpha', 'average_accuracy' and
      'worst_accuracy', as `accuracy_report` returns them, and 'capacity_used',
      as `capacity_report` returns it, or None. Runs of one method and alpha are
      its seeds. A run may also have 'mean_forward_transfer'.

  Returns:
    A heading, and a line for each method and alpha, in the order in which they
    first occur: the average accuracy ± its standard deviation over seeds, and
    the means over seeds of the accuracy on the worst task, of the weights in
    use, and of the forward transfer, if there is any.

  >>> from powerprop_jax.continual import report
  >>> run = {'method': 'epn', 'alpha': 2.0, 'capacity_used': 0.5}
  >>> run |= {'average_accuracy': 0.96, 'worst_accuracy': 0.94}
  >>> print(report.table([run]))
  method      alpha    average    worst    in use
  epn             2      96.00    94.00      50.0
  """
  groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
  for run in runs:
    groups.setdefault((run['method'], run['alpha']), []).append(run)
  headers = ['method', 'alpha', 'average', 'worst', 'in use', 'transfer']
  rows = []
  for (method, alpha), seeds in groups.items():
    average = 100 * np.array([run['average_accuracy'] for run in seeds])
    worst = 100 * np.mean([run['worst_accuracy'] for run in seeds])
    used = np.array([run.get('capacity_used') for run in seeds], float)
    several = len(seeds) > 1
    spread = f' ± {average.std(ddof=1):.2f}' if several else ''
    capacity = '-' if np.isnan(used).any() else f'{100 * used.mean():.1f}'
    gains = [run.get('mean_forward_transfer') for run in seeds]
    gain = 100 * np.mean(np.array(gains, float))
    rows.append(
      [
        method,
        f'{alpha:g}',
        f'{average.mean():.2f}{spread}',
        f'{worst:.2f}',
        capacity,
        '-' if np.isnan(gain) else f'{gain:.2f}',
      ]
    )
  if all(row[-1] == '-' for row in rows):
    headers, rows = headers[:-1], [row[:-1] for row in rows]
  return tabulate.tabulate(
    rows,
    headers,
    tablefmt='plain',
    # The cells are texts, in which numbers are rounded already.
    disable_numparse=True,
    colalign=['left', *['right'] * (len(headers) - 1)],
  )

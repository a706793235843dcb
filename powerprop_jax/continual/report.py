"""What a sequence of tasks did to accuracy and to a network, as plain dicts.

Section 4 of the paper asks two things of continual learning: that nothing is
forgotten, and that the weights of one network last for many tasks. Both are
measured from what a run records: the accuracy on every task after every task,
who owns each weight, and the masks of the tasks. Weights only are counted. All
results go straight into a JSON file: what was not measured is None.

References:
  Chaudhry et al, `Riemannian walk for incremental learning
  <https://arxiv.org/abs/1801.10112>`_, 2018 (forgetting).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_BLOCK = 1 << 20


def _square(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
  """Rows of any length up to their number, filled up with NaN."""
  matrix = np.full((len(rows), len(rows)), np.nan)
  for i, row in enumerate(rows):
    if len(row) > len(rows):
      raise ValueError(
        f'Row {i} of the accuracy matrix has {len(row)} tasks, of {len(rows)}'
        ' that were learned. Give a row for each, and no others.'
      )
    matrix[i, : len(row)] = np.asarray(row, float)
  return matrix


def _plain(matrix: np.ndarray) -> list[list[float | None]]:
  """Nested lists with None for NaN, which JSON does not know."""
  return [[None if np.isnan(x) else float(x) for x in row] for row in matrix]


def accuracy_report(
  rows: Sequence[Sequence[float | None]],
  independent: Sequence[float] | None = None,
) -> dict[str, Any]:
  """Accuracy, forgetting and transfer over a sequence of tasks.

  What is forgotten of a task is the best accuracy on it, at any time before the
  last task, less that after the last task; it is negative if later tasks
  helped, and 0 for the last task. Forward transfer is the accuracy on a task
  when it was just learned, less that of a network that learned it alone.

  Args:
    rows: row i holds the accuracies in [0, 1] on all tasks after task i was
      learned. What was not measured, or not learned yet, may be None, NaN or
      missing at the end of the row; the last row is complete.
    independent: the accuracies of networks that learned a single task each.

  Returns:
    A dict of 'accuracy_matrix', lists with None where nothing was measured;
    'average_accuracy' and 'worst_accuracy' after the last task; 'forgetting',
    a list, and 'mean_forgetting', over all tasks but the last; and, with
    `independent`, 'forward_transfer', a list, and 'mean_forward_transfer', over
    all tasks but the first. A mean over no task is None.

  Raises:
    ValueError: if the last row or the diagonal is incomplete, or `independent`
      is too short.
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
  report = {
    'accuracy_matrix': _plain(matrix),
    'average_accuracy': float(final.mean()),
    'worst_accuracy': float(final.min()),
    'forgetting': forgetting.tolist(),
    'mean_forgetting': _mean(forgetting[:-1]),
  }
  if independent is not None:
    if len(independent) < len(matrix):
      raise ValueError(
        f'independent has {len(independent)} accuracies, {len(matrix)} tasks'
        ' were learned. Learn each of them alone.'
      )
    transfer = learned - np.asarray(independent, float)[: len(matrix)]
    report['forward_transfer'] = transfer.tolist()
    report['mean_forward_transfer'] = _mean(transfer[1:])
  return report


def _mean(values: np.ndarray) -> float | None:
  return float(values.mean()) if len(values) else None


def capacity_report(
  owners: Mapping[str, Any], num_tasks: int
) -> dict[str, Any]:
  """Who uses how many weights.

  Args:
    owners: an integer array for each layer's weights, by path: 0 where a weight
      is free, and t + 1 where task t was the first to use it.
    num_tasks: how many tasks were learned.

  Returns:
    A dict of 'layers', {path: {'size', 'used', 'free', 'new_weights'}}; of
    'capacity_used', the share of all weights; and of lists with an entry for
    each task: 'new_weights', how many it was the first to use; 'used', the
    share of weights in use after it; and 'backward_masked', the share that no
    update could move while it was trained.

  Raises:
    ValueError: if there are no weights, or other owners.
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
  """The boolean vector of which `masks.pack` made bytes."""
  return np.unpackbits(np.asarray(packed), count=size).astype(bool)


def _common(bits: np.ndarray) -> np.ndarray:
  """How many weights each pair of masks has in common: [tasks, tasks]."""
  total = np.zeros((len(bits), len(bits)), int)
  # Counts in float32 are exact below 2^24, and its products fast.
  for start in range(0, bits.shape[1], _BLOCK):
    block = bits[:, start : start + _BLOCK].astype(np.float32)
    total += (block @ block.T).astype(int)
  return total


def mask_report(
  packed: Sequence[Mapping[str, Any]], owners: Mapping[str, Any]
) -> dict[str, Any]:
  """What the masks of the tasks keep, and how far they are the same.

  Args:
    packed: the masks of the tasks in the order of learning, by path, as of
      `masks.pack`.
    owners: as in `capacity_report`.

  Returns:
    A dict of 'density', a list, and 'layer_density', {path: list}, the share of
    weights that each task uses; of 'overlap', a matrix: the weights in both
    masks as a share of those in either; and of 'reused', a list: the share of
    its weights that each task took from earlier ones.
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
  """Methods side by side as text, in percent.

  Args:
    runs: a dict for each run: 'method', 'alpha', 'average_accuracy' and
      'worst_accuracy' as of `accuracy_report`, and 'capacity_used', as of
      `capacity_report`, or None. Runs of one method and alpha are seeds. They
      may have 'mean_forward_transfer'.

  Returns:
    A line for each method and alpha, in the order in which they first occur:
    the average accuracy ± its standard deviation over seeds, and the means over
    seeds of the accuracy on the worst task, of the capacity used, and of the
    forward transfer, if there is any.
  """
  groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
  for run in runs:
    groups.setdefault((run['method'], run['alpha']), []).append(run)
  lines = [['method', 'alpha', 'average', 'worst', 'capacity used', 'transfer']]
  for (method, alpha), seeds in groups.items():
    average = 100 * np.array([run['average_accuracy'] for run in seeds])
    worst = 100 * np.mean([run['worst_accuracy'] for run in seeds])
    used = np.array([run.get('capacity_used') for run in seeds], float)
    several = len(seeds) > 1
    spread = f' ± {average.std(ddof=1):.2f}' if several else ''
    capacity = '-' if np.isnan(used).any() else f'{100 * used.mean():.1f}'
    gains = [run.get('mean_forward_transfer') for run in seeds]
    gain = 100 * np.mean(np.array(gains, float))
    lines.append(
      [
        method,
        f'{alpha:g}',
        f'{average.mean():.2f}{spread}',
        f'{worst:.2f}',
        capacity,
        '-' if np.isnan(gain) else f'{gain:.2f}',
      ]
    )
  if all(line[-1] == '-' for line in lines[1:]):
    lines = [line[:-1] for line in lines]
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join(
    '  '.join(
      [line[0].ljust(widths[0])]
      + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
    )
    for line in lines
  )

"""The results of continual learning, as people read them: table and figures."""

from collections.abc import Iterable, Sequence
import pathlib
from typing import Any

import numpy as np

from experiments import common
from powerprop_jax import plots
from powerprop_jax.continual import report as continual_report


def with_transfer(
  run: dict[str, Any], runs: Iterable[dict[str, Any]]
) -> dict[str, Any]:
  """Adds forward transfer, if there is a network a task to compare with.

  Args:
    run: a run of any method.
    runs: all there are. Of those of `independent` with its seed, and no fewer
      tasks, one of the same alpha is preferred.

  Returns:
    The run, with or without the transfer of `accuracy_report`.
  """
  alone = [
    other
    for other in runs
    if (other['method'], other['seed']) == ('independent', run['seed'])
    and other['num_tasks'] >= run['num_tasks']
  ]
  if not alone:
    return run
  rows = min(alone, key=lambda other: other['alpha'] != run['alpha'])[
    'accuracy_matrix'
  ]
  return run | continual_report.accuracy_report(
    run['accuracy_matrix'], [row[t] for t, row in enumerate(rows)]
  )


def _by_label(runs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
  """The seeds of every method and power; '2.0 epn' is a label."""
  groups: dict[str, list[Any]] = {}
  for run in runs:
    groups.setdefault(f'{run["alpha"]} {run["method"]}', []).append(run)
  return groups


def _over_seeds(seeds: Sequence[dict[str, Any]], values: Any) -> np.ndarray:
  """One list a seed, as long as all of them are."""
  length = min(run['num_tasks'] for run in seeds)
  return np.array([values(run)[:length] for run in seeds], float)


def compare(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The figures of methods side by side, by file name."""
  groups, figures = _by_label(runs), {}
  figures['accuracy.png'] = plots.accuracy_by_task(
    {
      label: _over_seeds(seeds, lambda run: run['accuracy_matrix'][-1])
      for label, seeds in groups.items()
    }
  )
  pruned = {k: v for k, v in groups.items() if 'used' in v[0]}
  if pruned:
    figures['capacity.png'] = plots.capacity(
      {
        label: _over_seeds(seeds, lambda run: run['used'])
        for label, seeds in pruned.items()
      }
    )
  return figures


def make_figures(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The figures of an experiment by file name."""
  figures = compare(runs)
  for label, (run, *_) in _by_label(runs).items():
    name = label.replace(' ', '-')
    figures[f'matrix-{name}.png'] = plots.accuracy_matrix(
      np.array(run['accuracy_matrix'], float)
    )
    if 'overlap' in run:
      figures[f'overlap-{name}.png'] = plots.overlap_matrix(run['overlap'])
  return figures


def details(run: dict[str, Any]) -> str:
  """What the table has no room for, of one run."""
  seconds = {k: round(v, 1) for k, v in run['seconds'].items() if v >= 0.05}
  lines = [
    f'forgotten (%): {100 * max([0.0, *run["forgetting"]]):.2f} at most',
    f'bytes a task: {run["bytes_per_task"]}',
    'seconds: ' + ', '.join(f'{k} {v}' for k, v in seconds.items()),
  ]
  if 'capacity_used' in run:
    density = ', '.join(f'{100 * p:.1f}' for p in run['density'][:10])
    new = ', '.join(map(str, run['new_weights'][:10]))
    more = ', ...' if run['num_tasks'] > 10 else ''
    lines.insert(1, f'density (%): {density}{more}')
    lines.insert(2, f'new weights: {new}{more}')
  before = [task.get('pruned_test_accuracy') for task in run['tasks']]
  if before[0] is not None:
    lines.append(f'pruned, before retraining (%): {100 * np.mean(before):.2f}')
  for count, rules in run['task_inference'].items():
    for rule, row in rules.items():
      cells = (f'{100 * x:.1f} (batches of {n})' for n, x in row.items())
      lines.append(f'task of {count} found by {rule} (%): ' + ', '.join(cells))
  return '\n'.join(lines)


def write(results: dict[str, dict[str, Any]], out_dir: pathlib.Path) -> None:
  """Writes summary.json and the figures, and prints the table."""
  runs = results.values()
  results = {n: with_transfer(run, runs) for n, run in results.items()}
  common.write_json(out_dir / 'summary.json', {'runs': results})
  runs = list(results.values())
  figures = make_figures(runs)
  for name, figure in figures.items():
    plots.save(figure, out_dir / name)
  print('\nTest accuracy after the last task, and capacity, in percent:\n')
  print(continual_report.table(runs))
  first = runs[0]
  print(
    f'\n{first["method"]}, alpha = {first["alpha"]:g}, seed {first["seed"]}:'
  )
  print(details(first))
  print(f'\nIn {out_dir}: summary.json, {", ".join(figures)}')

"""Compares runs of continual learning: forward transfer and figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from powerprop_jax import plots
from powerprop_jax.continual import report as continual_report

# The result of a run, as `continual_learning` writes it.
Run = dict[str, Any]

# The names of the methods in legends.
_TITLES = {
  'epn': 'EfficientPackNet',
  'packnet': 'PackNet',
  'ewc': 'EWC',
  'finetune': 'fine-tuning',
  'independent': 'one network per task',
}


def with_transfer(run: Run, runs: Iterable[Run]) -> Run:
  """Adds the forward transfer, if there are networks of single tasks.

  Args:
    run: a run of any method.
    runs: all runs. `run` is compared with one of `independent` that has the
      same seed, no fewer tasks and, if there is one, the same alpha.

  Returns:
    The run, with or without the forward transfer of `accuracy_report`.
  """
  alone = [
    other
    for other in runs
    if (other['method'], other['seed']) == ('independent', run['seed'])
    and other['num_tasks'] >= run['num_tasks']
  ]
  if not alone:
    return run
  nearest = min(alone, key=lambda other: other['alpha'] != run['alpha'])
  rows = nearest['accuracy_matrix']
  return run | continual_report.accuracy_report(
    run['accuracy_matrix'], [row[t] for t, row in enumerate(rows)]
  )


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Groups runs that differ in their seeds alone.

  Args:
    runs: what `continual_learning` wrote of each run.

  Returns:
    The runs of every power and method, by labels such as '2.0 epn'.
  """
  groups: dict[str, list[Run]] = {}
  for run in runs:
    groups.setdefault(f'{run["alpha"]} {run["method"]}', []).append(run)
  return groups


def in_words(groups: Mapping[str, Sequence[Run]]) -> dict[str, Sequence[Run]]:
  """Labels groups with the names of their methods, for a legend.

  Args:
    groups: runs by label. A run that `continual_compare` has renamed has its
      method in 'learnt_by'.

  Returns:
    The groups by labels such as '2.0 EfficientPackNet'. Two groups of the same
    power and method are told apart by their names.
  """
  titles = {}
  for label, (run, *_) in groups.items():
    method = run.get('learnt_by', run['method'])
    titles[label] = f'{run["alpha"]} {_TITLES.get(method, method)}'
  return {
    title
    if [*titles.values()].count(title) == 1
    else f'{title} ({groups[label][0]["method"]})': groups[label]
    for label, title in titles.items()
  }


def _over_seeds(
  seeds: Sequence[Run], values: Callable[[Run], Sequence[float]]
) -> np.ndarray:
  """An array [seeds, tasks], of as many tasks as every seed has."""
  length = min(run['num_tasks'] for run in seeds)
  return np.array([values(run)[:length] for run in seeds], float)


def figures(runs: Sequence[Run]) -> dict[str, Any]:
  """The figures that show methods side by side.

  Args:
    runs: what `continual_learning` wrote of each run.

  Returns:
    Figures by the name of their file.
  """
  groups, found = in_words(by_label(runs)), {}
  found['accuracy.png'] = plots.accuracy_by_task(
    {
      label: _over_seeds(seeds, lambda run: run['accuracy_matrix'][-1])
      for label, seeds in groups.items()
    }
  )
  pruned = {k: v for k, v in groups.items() if 'used' in v[0]}
  if pruned:
    found['capacity.png'] = plots.capacity(
      {
        label: _over_seeds(seeds, lambda run: run['used'])
        for label, seeds in pruned.items()
      }
    )
  return found

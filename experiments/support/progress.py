"""The progress of a run of continual learning, and its checkpoints.

Between two tasks everything is in a `Progress`, which is written to a
checkpoint whose step is the number of tasks: a run that was killed goes on with
the task that was being learnt, and ends with the same numbers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import continual
from powerprop_jax.training import checkpoint


class Progress(NamedTuple):
  """The state of a run between two tasks.

  Attributes:
    memory: what the network carries on from task to task.
    anchors: what EWC pulls the weights to; None for other methods.
    tasks: the tasks that were learnt.
    records: a dict of results for each of these tasks.
    matrix: row i has the test accuracies of the tasks 0 to i after task i was
      learnt, with None where there was no evaluation.
    history: (step, metrics) of every report.
  """

  memory: continual.Memory
  anchors: Any
  tasks: list[continual.Task]
  records: list[dict[str, Any]]
  matrix: list[list[float | None]]
  history: list[tuple[int, dict[str, Any]]]


def start(memory: continual.Memory, anchors: Any) -> Progress:
  """The progress before the first task.

  Args:
    memory: the network before the first task.
    anchors: what EWC pulls its weights to; None for other methods.

  Returns:
    A `Progress` without tasks.
  """
  return Progress(memory, anchors, [], [], [], [])


def _stacked(progress: Progress) -> dict[str, Any]:
  """The content of a checkpoint: few arrays, however many tasks there are."""
  stack = lambda *x: np.stack([np.asarray(a) for a in x])
  return {
    'memory': progress.memory,
    'anchors': progress.anchors,
    'tasks': jax.tree.map(stack, *progress.tasks),
  }


def save(manager: checkpoint.Manager, progress: Progress) -> None:
  """Writes a checkpoint.

  Args:
    manager: that of the run.
    progress: the progress after at least one task.
  """
  extra = {
    name: getattr(progress, name) for name in ('records', 'matrix', 'history')
  }
  checkpoint.save(manager, len(progress.tasks), _stacked(progress), extra)


def _like(first: Progress, layout: continual.Layout, count: int) -> Any:
  """A tree with the structure and shapes of a checkpoint of `count` tasks."""
  none = {p: jnp.zeros(x.shape, bool) for p, x in first.memory.owners.items()}
  # With many tasks, owners have an integer type of more than a byte.
  owners = continual.claim(first.memory.owners, none, count - 1)
  memory = first.memory._replace(owners=owners)
  task = continual.store(memory, none, layout)
  return _stacked(first._replace(memory=memory, tasks=[task] * count))


def read(
  found: checkpoint.Checkpoint, first: Progress, layout: continual.Layout
) -> Progress:
  """The progress that a checkpoint holds.

  Args:
    found: the checkpoint.
    first: the progress before the first task.
    layout: how every leaf is kept.

  Returns:
    A `Progress`.

  Raises:
    ValueError: if the checkpoint is one of another network.
  """
  state = checkpoint.fill(_like(first, layout, found.step), found)
  return _progress(state, found.extra, found.step)


def _progress(state: dict[str, Any], extra: Any, count: int) -> Progress:
  learnt = [
    jax.tree.map(lambda x, t=t: jnp.asarray(x[t]), state['tasks'])
    for t in range(count)
  ]
  return Progress(state['memory'], state['anchors'], learnt, **extra)


def restore(
  manager: checkpoint.Manager, first: Progress, layout: continual.Layout
) -> Progress:
  """Restores the progress of the newest whole checkpoint, if there is one.

  Args:
    manager: that of the run.
    first: the progress before the first task.
    layout: how every leaf is kept.

  Returns:
    A `Progress`, which is `first` if there is no checkpoint.

  Raises:
    ValueError: if the checkpoints are those of a run with other settings.
    FileNotFoundError: if there are checkpoints, and all of them are damaged.
  """
  try:
    count = checkpoint.load(manager.directory).step
  except FileNotFoundError:
    # Either there is no checkpoint, or all are damaged, which raises below.
    like: Any = first.memory
    count = 0
  else:
    like = _like(first, layout, count)
  found = checkpoint.restore_latest(manager, like)
  if found is None:
    return first
  _, state, extra = found
  return _progress(state, extra, count)

"""The progress of a run of continual learning, and its checkpoints."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import continual
from powerprop_jax.continual import layouts
from powerprop_jax.training import checkpoint


class Progress(NamedTuple):
  """Where a run is at the boundary of two tasks.

  Attributes:
    memory: what the network carries on.
    anchors: what EWC holds it to; None for other methods.
    tasks: the tasks that were learnt.
    records: a dict for each of them.
    matrix: the test accuracies of all tasks so far after each of them, None
      where there was no evaluation.
    history: (step, metrics) of every report.
  """

  memory: continual.Memory
  anchors: Any
  tasks: list[continual.Task]
  records: list[dict[str, Any]]
  matrix: list[list[float | None]]
  history: list[tuple[int, dict[str, Any]]]


def _stacked(progress: Progress) -> dict[str, Any]:
  """What a checkpoint holds: few arrays, however many tasks there are."""
  stack = lambda *x: np.stack([np.asarray(a) for a in x])
  return {
    'memory': progress.memory,
    'anchors': progress.anchors,
    'tasks': jax.tree.map(stack, *progress.tasks),
  }


def save(manager: checkpoint.Manager, progress: Progress) -> None:
  """Writes a checkpoint, whose step is the number of tasks."""
  extra = {
    'records': progress.records,
    'matrix': progress.matrix,
    'history': progress.history,
  }
  checkpoint.save(manager, len(progress.tasks), _stacked(progress), extra)


def start(memory: continual.Memory, anchors: Any) -> Progress:
  """The progress before the first task."""
  return Progress(memory, anchors, [], [], [], [])


def _like(first: Progress, layout: layouts.Layout, count: int) -> Any:
  """A tree as the checkpoint of so many tasks holds."""
  none = {p: jnp.zeros(x.shape, bool) for p, x in first.memory.owners.items()}
  # A weight's owner may have outgrown a byte.
  owners = continual.claim(first.memory.owners, none, count - 1)
  memory = first.memory._replace(owners=owners)
  task = continual.store(memory, none, layout)
  return _stacked(first._replace(memory=memory, tasks=[task] * count))


def _progress(state: dict[str, Any], extra: Any, count: int) -> Progress:
  learnt = [
    jax.tree.map(lambda x, t=t: jnp.asarray(x[t]), state['tasks'])
    for t in range(count)
  ]
  return Progress(
    state['memory'],
    state['anchors'],
    learnt,
    *(extra[name] for name in ('records', 'matrix', 'history')),
  )


def read(
  found: checkpoint.Checkpoint, first: Progress, layout: layouts.Layout
) -> Progress:
  """The progress that a checkpoint holds; `first` as of `restore`."""
  state = checkpoint.fill(_like(first, layout, found.step), found)
  return _progress(state, found.extra, found.step)


def restore(
  manager: checkpoint.Manager, first: Progress, layout: layouts.Layout
) -> Progress:
  """The progress of the newest checkpoint, or the start.

  Args:
    manager: of this run.
    first: the progress before the first task.
    layout: a `Layout`.

  Returns:
    A `Progress`.
  """
  try:
    count = checkpoint.load(manager.directory).step
  except FileNotFoundError:
    return first
  found = checkpoint.restore_latest(manager, _like(first, layout, count))
  if found is None:
    return first
  _, state, extra = found
  return _progress(state, extra, count)

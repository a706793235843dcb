"""The progress of a run of continual learning, and its checkpoints."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import checkpoint
from powerprop_jax import continual
from powerprop_jax import layouts


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


def restore(
  manager: checkpoint.Manager, start: Progress, layout: layouts.Layout
) -> Progress:
  """The progress of the newest checkpoint, or the start.

  Args:
    manager: of this run.
    start: the progress before the first task.
    layout: a `Layout`.

  Returns:
    A `Progress`.
  """
  try:
    count = checkpoint.load(manager.directory).step
  except FileNotFoundError:
    return start
  none = {p: jnp.zeros(x.shape, bool) for p, x in start.memory.owners.items()}
  # A weight's owner may have outgrown a byte.
  owners = continual.claim(start.memory.owners, none, count - 1)
  memory = start.memory._replace(owners=owners)
  task = continual.store(memory, none, layout)
  like = _stacked(start._replace(memory=memory, tasks=[task] * count))
  found = checkpoint.restore_latest(manager, like)
  if found is None:
    return start
  _, state, extra = found
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

"""PackNet: every task takes an equal share of the weights.

PackNet (Mallya and Lazebnik 2018) is what EfficientPackNet improves upon
(section 4 of the paper). It has to know how many tasks will come: each of T
takes 1/T of the weights of every layer, the largest among those that are free,
and uses all weights of the tasks before it besides.

References:
  Mallya and Lazebnik, `PackNet: Adding multiple tasks to a single network by
  iterative pruning <https://arxiv.org/abs/1711.05769>`_, CVPR 2018.
"""

from collections.abc import Collection, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax.continual import memory as memory_lib
from powerprop_jax.sparse import masks
from powerprop_jax.types import ByPath
from powerprop_jax.types import Params


def packnet_counts(
  sizes: Mapping[str, int], index: int, num_tasks: int
) -> dict[str, int]:
  """How many weights PackNet gives task `index` in each layer.

  A task gets 1/T of all weights, which is 1 / (T - index) of those that are
  free; the shares differ by at most one weight and add up to the layer.

  Args:
    sizes: the number of weights of each masked leaf, by path.
    index: the task, from 0.
    num_tasks: T, known in advance.

  Returns:
    The number of weights to take of each leaf, by path.

  Raises:
    ValueError: if there is no such task.

  >>> from powerprop_jax import continual
  >>> [continual.packnet_counts({'w': 10}, t, 3) for t in range(3)]
  [{'w': 3}, {'w': 3}, {'w': 4}]
  """
  if not 0 <= index < num_tasks:
    raise ValueError(
      f'PackNet was set up for {num_tasks} tasks and has no weights for task'
      f' {index}, the first being 0. Set num_tasks higher from the start.'
    )
  return {
    path: n * (index + 1) // num_tasks - n * index // num_tasks
    for path, n in sizes.items()
  }


def packnet_mask(
  params: Params,
  owners: ByPath,
  counts: Mapping[str, Any],
  omit: Collection[str] = (),
) -> ByPath:
  """PackNet's mask: the largest free weights of each layer, and all owned ones.

  Args:
    params: the trained weights. Since magnitudes are compared within a layer
      only, theta and phi give the same mask.
    owners: who owns each weight, by path, as in a `Memory`.
    counts: how many free weights to take of each leaf, as `packnet_counts`
      returns them; Python integers, or traced ones.
    omit: the paths of leaves of which owned weights are left out.

  Returns:
    Boolean arrays by path, of the shapes of the owners.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> owners = {'w': jnp.array([1, 0, 0, 0], jnp.uint8)}
  >>> weights = {'w': jnp.array([0.1, -3.0, 2.0, 1.0])}
  >>> continual.packnet_mask(weights, owners, {'w': 2})
  {'w': Array([ True,  True,  True, False], dtype=bool)}
  """

  def mask(path, x):
    free = owners[path] == 0
    # -1 is below every magnitude, so that nothing owned is taken twice.
    scores = jnp.where(free, jnp.abs(x), -1.0)
    taken = masks.top_count_mask(scores, counts[path])
    return taken if path in omit else ~free | taken

  found = leaves.by_path(params, owners)
  return {path: mask(path, x) for path, x in found.items()}


def packnet(num_tasks: int, omit: Collection[str] = ()) -> memory_lib.Choose:
  """Makes the function by which PackNet chooses masks, for `learn_task`.

  Args:
    num_tasks: T, how many tasks will come.
    omit: the paths of leaves of which a task takes only free weights. They have
      to be those that `learn_task` is given. The published method omits none.

  Returns:
    A function of (memory, index) that returns the mask of the task by path, and
    None, as there is nothing to record. It ignores validation data, which it is
    given if `learn_task` has some.

  Raises:
    ValueError: if num_tasks is below 1; and, when the function is called, if
      there is no such task.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> phi = {'w': jnp.array([0.1, -3.0, 2.0, 1.0])}
  >>> owners = {'w': jnp.array([1, 0, 0, 0], jnp.uint8)}
  >>> choose = continual.packnet(num_tasks=4)
  >>> choose(continual.Memory(phi, {}, owners), 1)
  ({'w': Array([ True,  True, False, False], dtype=bool)}, None)
  """
  if num_tasks < 1:
    raise ValueError(f'num_tasks must be at least 1, got {num_tasks}.')
  # The counts are arguments: all tasks share one compiled function.
  mask = jax.jit(functools.partial(packnet_mask, omit=frozenset(omit)))

  def choose(memory, index, *valid):
    del valid
    sizes = {path: owner.size for path, owner in memory.owners.items()}
    counts = packnet_counts(sizes, index, num_tasks)
    counts = {path: jnp.int32(count) for path, count in counts.items()}
    return mask(memory.phi, memory.owners, counts), None

  return choose

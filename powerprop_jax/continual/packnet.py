"""PackNet: every task takes an equal share of the weights.

References:
  Mallya and Lazebnik, `PackNet: Adding multiple tasks to a single network by
  iterative pruning <https://arxiv.org/abs/1711.05769>`_, CVPR 2018.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from powerprop_jax.continual import layouts
from powerprop_jax.sparse import masks

Params = Any  # A pytree of arrays.
ByPath = layouts.ByPath


def packnet_counts(
  sizes: Mapping[str, int], index: int, num_tasks: int
) -> dict[str, int]:
  """How many weights PackNet gives task `index` in each layer.

  1/T of all weights, which is 1 / (T - index) of those that are free; the parts
  differ by at most one and add up to the layer.

  Args:
    sizes: the number of weights of each masked leaf.
    index: the task, from 0.
    num_tasks: T, known in advance.

  Returns:
    A dict of ints.

  Raises:
    ValueError: if there is no such task.
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


def packnet_mask(theta: Params, owners: ByPath, counts: Any) -> ByPath:
  """PackNet's mask: its share of the free weights by layer, and all earlier.

  Args:
    theta: the trained weights.
    owners: who owns what.
    counts: how many free weights to take of each leaf, as of `packnet_counts`;
      ints or traced.

  Returns:
    Boolean arrays by path.
  """

  def mask(path, x):
    free = owners[path] == 0
    # -1 is below every magnitude, so that nothing owned is taken twice.
    scores = jnp.where(free, jnp.abs(x), -1.0)
    return ~free | masks.top_count_mask(scores, counts[path])

  found = layouts.by_path(theta, owners)
  return {path: mask(path, x) for path, x in found.items()}

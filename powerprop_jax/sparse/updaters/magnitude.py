"""Iterative magnitude pruning: what is pruned stays pruned.

Training starts dense, and the smallest weights are pruned gradually. Section 1
of the paper names iterative pruning among the methods that Powerpropagation
improves.

References:
  Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_,
  2017.
"""

import dataclasses

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax import types
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import pruning
from powerprop_jax.sparse.updaters import protocol


def _kept(
  done: jax.Array | None, size: int, final: masks_lib.Count
) -> masks_lib.Count:
  """How many are kept on the way; the number pruned so far is rounded down."""
  if done is None or (isinstance(final, int) and final == size):
    return final
  if isinstance(final, masks_lib.NOfM):
    pruned = masks_lib.floor_multiply(done, final.m - final.n)
    return dataclasses.replace(final, n=final.m - pruned)
  return size - masks_lib.floor_multiply(done, jnp.asarray(size - final))


def magnitude(
  counts: protocol.Counts,
  progress: protocol.Schedule | None = None,
  scope: str = 'layer',
  is_weight: types.IsWeight = leaves.is_weight,
) -> protocol.MaskUpdater:
  """Prunes the weights of smallest |theta|; what is pruned stays pruned.

  Args:
    counts: maps parameters to how many weights each leaf keeps in the end; only
      the sum over the weights matters if the scope is global. A pattern of n of
      every m keeps all m at the start and n in the end.
    progress: maps the step to the fraction of the pruning that is done, from 0
      to 1, such as `schedules.cubic(start, stop)`. None prunes all at once, at
      the first update.
    scope: 'layer' ranks each layer by itself, 'global' all weights together.
    is_weight: a function of (path, leaf).

  Returns:
    A `MaskUpdater` that starts dense.

  Raises:
    ValueError: if there is no such scope; from `update`, if the scope is global
      and a leaf keeps n of every m weights.

  >>> updater = magnitude(lambda theta: {'w': 1})
  >>> theta = {'w': jnp.array([3.0, 9.0])}
  >>> masks = updater.init(None, theta, None)
  >>> updater.update(None, 0, theta, masks, None)[1].forward
  {'w': Array([False,  True], dtype=bool)}
  """
  masks_lib.check_scope(scope)

  def init(key, theta, grads):
    del key, grads
    return masks_lib.dense(theta)

  def update(key, step, theta, masks, grads):
    del key, grads
    done = None if progress is None else jnp.asarray(progress(step))
    final = counts(theta)
    # Pruned weights rank last. Their value is still there, and what remains may
    # have become smaller.
    scores = jax.tree.map(
      lambda x, m: jnp.where(m, jnp.abs(x), -1.0), theta, masks.forward
    )
    if scope == 'layer':

      def wanted(x, n):
        groups = masks_lib.num_groups(n)
        return _kept(done, x.size // groups, n)

      kept = jax.tree.map(wanted, theta, final)
      mask = masks_lib.layerwise_topk(scores, kept)
    else:
      chosen = leaves.weight_mask(theta, is_weight)
      rows = zip(jax.tree.leaves(theta), jax.tree.leaves(chosen))
      size = sum(x.size for x, is_chosen in rows if is_chosen)
      number = _kept(done, size, pruning.total(final, theta, is_weight))
      mask = masks_lib.global_topk(scores, number, chosen)
    # The network may have been sparser from the start than it has to be.
    mask = jax.tree.map(jnp.logical_and, mask, masks.forward)
    return theta, protocol.same(mask)

  return protocol.MaskUpdater(init, update)

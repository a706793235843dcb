"""Iterative magnitude pruning: what is pruned stays pruned.

References:
  Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_,
  2017.
"""

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse.updaters import protocol

Params = protocol.Params


def magnitude(
  counts: protocol.Counts,
  progress: protocol.Schedule | None = None,
  scope: str = 'layer',
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> protocol.MaskUpdater:
  """Prunes the weights of smallest |theta|; what is pruned stays pruned.

  Args:
    counts: how many weights each leaf keeps in the end; their sum if the scope
      is global.
    progress: maps the step to the fraction of the pruning that is done, from 0
      to 1, such as `schedules.cubic(start, stop)`. None prunes all at once, at
      the first update.
    scope: 'layer' ranks each leaf by itself, 'global' all weights together.
    is_weight: which leaves are weights.

  Returns:
    A `MaskUpdater` that starts dense.

  Raises:
    ValueError: if there is no such scope.
  """
  protocol.check_scope(scope)

  def kept(done, size, final):
    # Counted in integers: what is left to prune is rounded down.
    if done is None or final == size:
      return final
    return size - masks_lib.floor_multiply(done, size - final)

  def still(mask, masks):
    # The network may have been sparser from the start than it has to be.
    return protocol.same(jax.tree.map(jnp.logical_and, mask, masks.forward))

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
      wanted = jax.tree.map(lambda x, n: kept(done, x.size, n), theta, final)
      return theta, still(masks_lib.layerwise_topk(scores, wanted), masks)
    chosen = leaves.weight_mask(theta, is_weight)
    triples = zip(*map(jax.tree.leaves, (chosen, theta, final)))
    sizes = [(x.size, n) for w, x, n in triples if w]
    size, total = (sum(column) for column in zip(*sizes))
    number = kept(done, size, total)
    return theta, still(masks_lib.global_topk(scores, number, chosen), masks)

  return protocol.MaskUpdater(init, update)

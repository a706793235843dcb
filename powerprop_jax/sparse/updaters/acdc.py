"""AC/DC: phases of training with all weights, and with the largest only.

Training alternates between decompressed phases, in which all weights are used
and updated, and compressed ones, in which only the weights of largest magnitude
at the start of the phase are. What was pruned has the chance to come back in
the next dense phase, and both a dense and a sparse network are trained.
Powerpropagation combines with it as with the methods of section 1 of the paper:
magnitudes are those of theta.

References:
  Peste et al, `AC/DC: Alternating compressed/decompressed training of deep
  neural networks <https://arxiv.org/abs/2106.12379>`_, NeurIPS 2021.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax import types
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse.updaters import protocol


def acdc(
  counts: protocol.Counts,
  compressed: schedules.Cadence,
  regrow: Callable[[jax.Array], types.Params] | None,
  scope: str = 'global',
  is_weight: types.IsWeight = leaves.is_weight,
) -> protocol.MaskUpdater:
  """AC/DC: alternates dense phases and sparse ones of the largest |theta|.

  Update masks at the first step of each phase; an update within a phase changes
  nothing.

  Args:
    counts: maps parameters to how many weights each leaf keeps in compressed
      phases; only the sum over the weights matters if the scope is global.
    compressed: whether a step belongs to a compressed phase, such as
      `schedules.alternating(boundaries)`.
    regrow: maps a key to a tree of weights theta, with which pruned weights
      enter a dense phase. None lets each go on from the value it had when it
      was pruned. As published they start at zero, from which they would never
      move for alpha > 1 (section 2 of the paper).
    scope: 'global' ranks all weights together, as published; 'layer' each layer
      by itself.
    is_weight: a function of (path, leaf).

  Returns:
    A `MaskUpdater` that starts dense.

  Raises:
    ValueError: if there is no such scope; from `update`, if the scope is global
      and a leaf keeps n of every m weights.

  >>> compressed = schedules.alternating([10])
  >>> updater = acdc(lambda theta: {'w': 1}, compressed, regrow=None)
  >>> theta = {'w': jnp.array([3.0, 9.0])}
  >>> masks = updater.init(None, theta, None)
  >>> updater.update(jax.random.key(0), 10, theta, masks, None)[1].forward
  {'w': Array([False,  True], dtype=bool)}
  """
  masks_lib.check_scope(scope)

  def init(key, theta, grads):
    del key, grads
    return masks_lib.dense(theta)

  def update(key, step, theta, masks, grads):
    del grads
    is_compressed = jnp.asarray(compressed(step))
    was_dense = jnp.array(True)
    for mask in jax.tree.leaves(masks.forward):
      was_dense &= jnp.all(mask)
    scores = jax.tree.map(jnp.abs, theta)
    chosen = protocol.largest(scores, counts(theta), scope, is_weight)

    def choose(new, old):
      # The mask of a compressed phase is chosen once.
      sparse = jnp.where(was_dense, new, old)
      return jnp.where(is_compressed, sparse, masks_lib.ones_like(old))

    forward = jax.tree.map(choose, chosen, masks.forward)
    fresh = None if regrow is None else regrow(key)
    theta = protocol.grown_values(theta, masks.forward, forward, fresh)
    return theta, protocol.same(forward)

  return protocol.MaskUpdater(init, update)

"""Masks that are chosen once, at the start, and kept.

They are the baselines of sparse training (section 1 of the paper): all weights,
a random choice of them, a given one, and SNIP's, which ranks weights by how
much the loss depends on them at initialisation.

References:
  Lee et al, `SNIP <https://arxiv.org/abs/1810.02340>`_, 2019.
"""

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax import types
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import pruning
from powerprop_jax.sparse.updaters import protocol


def dense() -> protocol.MaskUpdater:
  """Keeps all weights: the dense baseline.

  Returns:
    A `MaskUpdater`.

  >>> dense().init(jax.random.key(0), {'w': jnp.zeros(2)}, None).forward
  {'w': Array([ True,  True], dtype=bool)}
  """

  def init(key, theta, grads):
    del key, grads
    return masks_lib.dense(theta)

  return protocol.MaskUpdater(init, protocol.unchanged)


def given(mask: types.Mask) -> protocol.MaskUpdater:
  """Keeps a given mask, to train on from a sparse network.

  Args:
    mask: a pytree of boolean arrays, such as that of a finished run.

  Returns:
    A `MaskUpdater`.

  Raises:
    ValueError: if a leaf of the mask is not boolean; and from its init, if the
      mask is one of other parameters.

  >>> mask = {'w': jnp.array([True, False])}
  >>> given(mask).init(jax.random.key(0), {'w': jnp.zeros(2)}, None).forward
  {'w': Array([ True, False], dtype=bool)}
  """
  for path, leaf in zip(leaves.paths(mask), jax.tree.leaves(mask)):
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.bool_):
      raise ValueError(
        f'The mask of {str(path)!r} must be boolean, got {dtype}. Convert it,'
        ' for example by jax.tree.map(lambda m: m > 0, mask).'
      )

  def init(key, theta, grads):
    del key, grads
    masks_lib.check_shapes(theta, mask)  # It may be of another network.
    # The mask is sharded as the weights are, wherever it comes from.
    shard = lambda m, x: jnp.logical_and(m, masks_lib.ones_like(x))
    return protocol.same(jax.tree.map(shard, mask, theta))

  return protocol.MaskUpdater(init, protocol.unchanged)


def random(counts: protocol.Counts) -> protocol.MaskUpdater:
  """Keeps a random mask.

  Args:
    counts: maps parameters to how many weights each leaf keeps, such as
      `distributions.erdos_renyi(0.9)`.

  Returns:
    A `MaskUpdater`.

  >>> updater = random(lambda theta: {'w': 2})
  >>> made = updater.init(jax.random.key(0), {'w': jnp.ones(9)}, None)
  >>> made.forward['w'].sum()
  Array(2, dtype=int32)
  """
  return protocol.MaskUpdater(protocol.random_masks(counts), protocol.unchanged)


def snip(
  counts: protocol.Counts,
  scope: str = 'global',
  is_weight: types.IsWeight = leaves.is_weight,
) -> protocol.MaskUpdater:
  """SNIP: keeps the weights of largest |theta dL/dtheta| at initialisation.

  Args:
    counts: maps parameters to how many weights each leaf keeps; only the sum
      over the weights matters if the scope is global.
    scope: 'global' ranks all weights together, as published; 'layer' each layer
      by itself.
    is_weight: a function of (path, leaf).

  Returns:
    A `MaskUpdater` that starts from a gradient.

  Raises:
    ValueError: if there is no such scope; from `init`, if the scope is global
      and a leaf keeps n of every m weights.

  >>> theta, grads = {'w': jnp.array([1.0, 2.0])}, {'w': jnp.array([3.0, 1.0])}
  >>> updater = snip(lambda theta: {'w': 1})
  >>> updater.init(jax.random.key(0), theta, grads).forward
  {'w': Array([ True, False], dtype=bool)}
  """
  masks_lib.check_scope(scope)

  def init(key, theta, grads):
    del key
    scores = pruning.taylor_scores(theta, grads, is_weight)
    return protocol.same(
      protocol.largest(scores, counts(theta), scope, is_weight)
    )

  return protocol.MaskUpdater(
    init, protocol.unchanged, starts_from_gradient=True
  )

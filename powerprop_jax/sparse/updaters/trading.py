"""SET and RigL: trade the smallest active weights for others.

Every update drops a fraction of the active weights of each layer, those of
smallest |theta|, and grows as many: SET at random, RigL where the gradient of
the loss is largest. Section 1 of the paper combines such sparse-to-sparse
training with Powerpropagation.

References:
  Mocanu et al, `Scalable training of artificial neural networks with adaptive
  sparse connectivity <https://arxiv.org/abs/1707.04780>`_, 2018 (SET).
  Evci et al, `Rigging the lottery <https://arxiv.org/abs/1911.11134>`_, 2020
  (RigL), Algorithm 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax import types
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import pruning
from powerprop_jax.sparse.updaters import protocol


def _drop_and_grow(
  theta: jax.Array,
  growth: jax.Array,
  active: jax.Array,
  wanted: masks_lib.Count,
  fraction: jax.Array,
  regrow_dropped: bool,
) -> jax.Array:
  """The mask of a leaf after it trades its smallest weights for others.

  The number of active weights stays what it is, whoever has chosen them.
  `wanted` says only which weights are ranked by themselves: those of the leaf,
  or of each layer of a stack. In a pattern of n of every m, weights are dropped
  wherever they are smallest, and each group grows as many as it has lost.
  """
  pattern = isinstance(wanted, masks_lib.NOfM)
  groups = 0 if pattern else wanted
  count = masks_lib.count_by_group(active, groups)
  changes = masks_lib.floor_multiply(fraction, count)
  if not regrow_dropped:
    size = theta.size // masks_lib.num_groups(groups)
    changes = jnp.minimum(changes, size - count)
  remaining = masks_lib.top_count_mask(
    jnp.where(active, jnp.abs(theta), -1.0), count - changes
  )
  # The lowest ranks are of weights that stay active, the next of those just
  # dropped if they may not come back, and the highest of the others. If there
  # are too few others, a dropped weight comes back at once all the same.
  just_dropped = active & ~remaining
  growth = jnp.where(jnp.isnan(growth), 0.0, growth)  # NaN ranks below -inf.
  growth = jnp.where(remaining, -jnp.inf, growth)
  if not regrow_dropped:
    growth = jnp.where(just_dropped, -1.0, growth)
  if pattern:
    lost = jnp.sum(
      just_dropped.reshape(masks_lib.groups_shape(theta.shape, wanted)),
      axis=wanted.axis + 1,
      keepdims=True,
      dtype=jnp.int32,
    )
    grown = masks_lib.n_of_m_mask(
      growth, masks_lib.NOfM(lost, wanted.m, wanted.axis)
    )
  else:
    grown = masks_lib.top_count_mask(growth, changes)
  return remaining | grown


def _trading(
  growth_scores: Callable[..., types.Params],
  counts: protocol.Counts,
  drop: protocol.Schedule,
  regrow: Callable[[jax.Array], types.Params] | None,
  regrow_dropped: bool,
  is_weight: types.IsWeight,
) -> protocol.MaskUpdater:
  """The method of both SET and RigL, which differ in `growth_scores` alone."""

  def update(key, step, theta, masks, grads):
    score_key, value_key = jax.random.split(key)
    fraction = jnp.asarray(drop(step))

    def trade(path, x, growth, active, wanted):
      if not is_weight(path, x):
        return active
      return _drop_and_grow(x, growth, active, wanted, fraction, regrow_dropped)

    growth, wanted = growth_scores(score_key, theta, grads), counts(theta)
    pruning.check_counts(wanted, theta, is_weight)
    forward = leaves.map_with_path(trade, theta, growth, masks.forward, wanted)
    fresh = None if regrow is None else regrow(value_key)
    theta = protocol.grown_values(theta, masks.forward, forward, fresh)
    return theta, protocol.same(forward)

  return protocol.MaskUpdater(protocol.random_masks(counts), update)


def set_(
  counts: protocol.Counts,
  drop_fraction: protocol.Schedule,
  regrow: Callable[[jax.Array], types.Params] | None,
  regrow_dropped: bool = True,
  is_weight: types.IsWeight = leaves.is_weight,
) -> protocol.MaskUpdater:
  """SET: drops the smallest active weights and grows as many at random.

  Args:
    counts: maps parameters to how many weights each leaf has, such as
      `distributions.erdos_renyi(0.9)`. It decides the first mask; from then on,
      and in a network that was sparse before, the number of active weights of a
      layer does not change.
    drop_fraction: maps the step to the fraction of active weights to trade,
      such as `schedules.drop_fraction(0.3, stop)`.
    regrow: maps a key to a tree of weights theta, from which grown weights take
      their values, such as the network's initialisation. None lets each go on
      from the value it had when it was dropped.
    regrow_dropped: whether a weight that is dropped competes for growth in the
      same update, as published. It keeps its value if it is grown. False is a
      variant of this package: whatever is dropped is traded for another, as
      long as there are others.
    is_weight: a function of (path, leaf); the masks of other leaves stay.

  Returns:
    A `MaskUpdater` that starts from a random mask.

  >>> updater = set_(lambda theta: {'w': 2}, lambda step: 0.5, regrow=None)
  >>> theta = {'w': jnp.arange(8.0)}
  >>> masks = updater.init(jax.random.key(0), theta, None)
  >>> _, masks = updater.update(jax.random.key(1), 100, theta, masks, None)
  >>> masks.forward['w'].sum()
  Array(2, dtype=int32)
  """
  return _trading(
    lambda key, theta, grads: protocol.uniform(key, theta),
    counts,
    drop_fraction,
    regrow,
    regrow_dropped,
    is_weight,
  )


def rigl(
  counts: protocol.Counts,
  drop_fraction: protocol.Schedule,
  regrow: Callable[[jax.Array], types.Params] | None,
  regrow_dropped: bool = True,
  is_weight: types.IsWeight = leaves.is_weight,
) -> protocol.MaskUpdater:
  """RigL: drops the smallest active weights and grows by the gradient.

  As published, grown weights start at zero, from which they would never move
  for alpha > 1 (section 2 of the paper); here `regrow` gives their values.

  Args:
    counts: as in `set_`.
    drop_fraction: as in `set_`.
    regrow: as in `set_`.
    regrow_dropped: as in `set_`.
    is_weight: a function of (path, leaf); the masks of other leaves stay.

  Returns:
    A `MaskUpdater` that starts from a random mask.

  >>> updater = rigl(lambda theta: {'w': 1}, lambda step: 1.0, regrow=None)
  >>> theta, grads = {'w': jnp.ones(3)}, {'w': jnp.array([0.0, 0.1, -2.0])}
  >>> masks = updater.init(jax.random.key(0), theta, grads)
  >>> updater.update(jax.random.key(1), 100, theta, masks, grads)[1].forward
  {'w': Array([False, False,  True], dtype=bool)}
  """
  return _trading(
    lambda key, theta, grads: jax.tree.map(jnp.abs, grads),
    counts,
    drop_fraction,
    regrow,
    regrow_dropped,
    is_weight,
  )

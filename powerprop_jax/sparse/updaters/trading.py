"""SET and RigL: trade the smallest active weights for others.

References:
  Mocanu et al, `Scalable training of artificial neural networks with adaptive
  sparse connectivity <https://arxiv.org/abs/1707.04780>`_, 2018 (SET).
  Evci et al, `Rigging the lottery <https://arxiv.org/abs/1911.11134>`_, 2020
  (RigL).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse.updaters import protocol

Params = protocol.Params


def _drop_and_grow(
  theta: jax.Array,
  growth: jax.Array,
  active: jax.Array,
  fraction: jax.Array,
  regrow_dropped: bool,
) -> jax.Array:
  """The mask of a leaf after it trades its smallest weights for others.

  The number of active weights stays what it is, whoever has chosen them. A
  weight that was just dropped comes back at once only if it may, or if there
  are too few others.
  """
  count = jnp.sum(active, dtype=jnp.int32)
  changes = jnp.minimum(
    masks_lib.floor_multiply(fraction, count), theta.size - count
  )
  remaining = masks_lib.top_count_mask(
    jnp.where(active, jnp.abs(theta), -1.0), count - changes
  )
  # Ranks, from the last: what stays active, what was just dropped, the others.
  just_dropped = active & ~remaining
  growth = jnp.where(jnp.isnan(growth), 0.0, growth)  # NaN ranks below -inf.
  growth = jnp.where(remaining, -jnp.inf, growth)
  if not regrow_dropped:
    growth = jnp.where(just_dropped, -1.0, growth)
  return remaining | masks_lib.top_count_mask(growth, changes)


def _grown_values(theta, masks, forward, fresh):
  if fresh is None:
    return theta
  return jax.tree.map(
    lambda x, was, now, new: jnp.where(now & ~was, new, x),
    theta,
    masks.forward,
    forward,
    fresh,
  )


def _trading(growth_scores, counts, drop, regrow, regrow_dropped, is_weight):
  """What SET and RigL have in common: all but the scores of growth."""

  def update(key, step, theta, masks, grads):
    score_key, value_key = jax.random.split(key)
    fraction = jnp.asarray(drop(step))

    def trade(path, x, growth, active):
      if not is_weight(path, x):
        return active
      return _drop_and_grow(x, growth, active, fraction, regrow_dropped)

    forward = leaves.map_with_path(
      trade, theta, growth_scores(score_key, theta, grads), masks.forward
    )
    fresh = None if regrow is None else regrow(value_key)
    theta = _grown_values(theta, masks, forward, fresh)
    return theta, protocol.same(forward)

  return protocol.MaskUpdater(protocol.random_masks(counts), update)


def set_(
  counts: protocol.Counts,
  drop_fraction: protocol.Schedule,
  regrow: Callable[[jax.Array], Params] | None,
  regrow_dropped: bool = False,
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> protocol.MaskUpdater:
  """SET: drops the smallest active weights and grows as many at random.

  Args:
    counts: how many weights each leaf has, as of `distributions`. It decides
      the first mask; from then on, and in a network that was sparse before, the
      number of active weights of a leaf does not change.
    drop_fraction: maps the step to the fraction of active weights to trade,
      such as `schedules.drop_fraction(0.3, stop)`.
    regrow: maps a key to a tree of weights theta, from which grown weights take
      their values, such as the network's initialisation. None lets each go on
      from the value it had when it was dropped.
    regrow_dropped: whether a weight that is dropped may be grown in the same
      update.
    is_weight: which leaves are weights; the masks of others stay.

  Returns:
    A `MaskUpdater` that starts from a random mask.
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
  regrow: Callable[[jax.Array], Params] | None,
  regrow_dropped: bool = False,
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> protocol.MaskUpdater:
  """RigL: drops the smallest active weights, grows the largest gradients.

  Arguments and result are those of `set_`. As published, grown weights start
  at zero, from which they would never move for alpha > 1.
  """
  return _trading(
    lambda key, theta, grads: jax.tree.map(jnp.abs, grads),
    counts,
    drop_fraction,
    regrow,
    regrow_dropped,
    is_weight,
  )

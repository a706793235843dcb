"""Which weights a sparse network has, and when it trades them for others.

Section 1 of the paper combines Powerpropagation with weight pruning and with
sparse-to-sparse training. Each method is a `MaskUpdater`: a pair of pure
functions, as an optax transformation is, that choose masks at the start and
change them now and then. They see the weights theta and the gradient at theta,
and know nothing of phi: scores of methods with and without Powerpropagation are
the same functions. (RigL grows by |dL/dtheta|; |dL/dphi| is zero at phi = 0.)

A weight that is grown starts from a value that is given. It must not start from
zero, which is a critical point for alpha > 1 (section 2): it would never move.

References:
  Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_,
  2017 (iterative magnitude pruning).
  Lee et al, `SNIP <https://arxiv.org/abs/1810.02340>`_, 2019.
  Mocanu et al, `Scalable training of artificial neural networks with adaptive
  sparse connectivity <https://arxiv.org/abs/1707.04780>`_, 2018 (SET).
  Evci et al, `Rigging the lottery <https://arxiv.org/abs/1911.11134>`_, 2020
  (RigL).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax import masks as masks_lib

Params = Any
Grads = Any
Counts = Callable[[Params], Any]  # As of `distributions`.
Schedule = Callable[[jax.Array], jax.Array]
Masks = masks_lib.Masks


class MaskUpdater(NamedTuple):
  """A sparse training method, as two pure functions.

  Attributes:
    init: maps (key, theta, grads) to `Masks`. The gradient is that of the dense
      network.
    update: maps (key, step, theta, masks, grads) to (theta, masks). The
      gradient is taken at the masked weights, with respect to all of them.
      `theta` holds all weights, those that are masked included, and is returned
      with the values of grown weights replaced.
  """

  init: Callable[[jax.Array, Params, Grads], Masks]
  update: Callable[
    [jax.Array, jax.Array, Params, Masks, Grads], tuple[Params, Masks]
  ]


def _same(mask: Any) -> Masks:
  # Two sets of arrays, so that a state that holds both can be donated.
  return Masks(forward=mask, backward=jax.tree.map(jnp.copy, mask))


def _unchanged(key, step, theta, masks, grads):
  del key, step, grads
  return theta, masks


def _magnitudes(theta: Params) -> Params:
  return jax.tree.map(jnp.abs, theta)


def _uniform(key: jax.Array, theta: Params) -> Params:
  """Independent uniform scores for every entry of a tree."""
  flat, treedef = jax.tree.flatten(theta)
  keys = jax.random.split(key, len(flat))
  scores = [jax.random.uniform(k, jnp.shape(x)) for k, x in zip(keys, flat)]
  return jax.tree.unflatten(treedef, scores)


def dense() -> MaskUpdater:
  """All weights, always: the baseline."""

  def init(key, theta, grads):
    del key, grads
    return masks_lib.dense(theta)

  return MaskUpdater(init, _unchanged)


def fixed(mask: Any) -> MaskUpdater:
  """A given mask, kept; for training on from a sparse network.

  Args:
    mask: a pytree of boolean arrays, such as `masks.nonzero(theta)`.

  Returns:
    A `MaskUpdater`.
  """

  def init(key, theta, grads):
    del key, theta, grads
    return _same(mask)

  return MaskUpdater(init, _unchanged)


def _random(counts: Counts):
  def init(key, theta, grads):
    del grads
    return _same(masks_lib.layerwise(_uniform(key, theta), counts(theta)))

  return init


def static(counts: Counts) -> MaskUpdater:
  """A random mask, kept.

  Args:
    counts: how many weights each leaf keeps, as of `distributions`.

  Returns:
    A `MaskUpdater`.
  """
  return MaskUpdater(_random(counts), _unchanged)


def snip(
  counts: Counts, scope: str = 'global', is_weight=leaves.is_weight
) -> MaskUpdater:
  """The weights of largest |theta dL/dtheta| at initialisation, kept.

  Args:
    counts: how many weights each leaf keeps; their sum if the scope is global.
    scope: 'global' ranks all weights together, as published; 'layer' each leaf
      by itself.
    is_weight: which leaves are weights.

  Returns:
    A `MaskUpdater`.

  Raises:
    ValueError: if there is no such scope.
  """
  _check_scope(scope)

  def init(key, theta, grads):
    del key
    scores = jax.tree.map(lambda x, g: jnp.abs(x * g), theta, grads)
    return _same(_largest(scores, counts(theta), scope, is_weight))

  return MaskUpdater(init, _unchanged)


def _check_scope(scope: str) -> None:
  if scope not in ('layer', 'global'):
    raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}.")


def _largest(scores, wanted, scope, is_weight):
  if scope == 'layer':
    return masks_lib.layerwise(scores, wanted)
  chosen = leaves.weights(scores, is_weight)
  flags = jax.tree.leaves(chosen)
  total = sum(n for n, w in zip(jax.tree.leaves(wanted), flags) if w)
  return masks_lib.globally(scores, total, chosen)


def magnitude(
  counts: Counts,
  progress: Schedule | None = None,
  scope: str = 'layer',
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> MaskUpdater:
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
  _check_scope(scope)

  def kept(done, size, final):
    # Counted in integers: what is left to prune is rounded down.
    if done is None or final == size:
      return final
    return size - masks_lib.floor_multiply(done, size - final)

  def still(mask, masks):
    # The network may have been sparser from the start than it has to be.
    return _same(jax.tree.map(jnp.logical_and, mask, masks.forward))

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
      return theta, still(masks_lib.layerwise(scores, wanted), masks)
    chosen = leaves.weights(theta, is_weight)
    triples = zip(*map(jax.tree.leaves, (chosen, theta, final)))
    sizes = [(x.size, n) for w, x, n in triples if w]
    size, total = (sum(column) for column in zip(*sizes))
    number = kept(done, size, total)
    return theta, still(masks_lib.globally(scores, number, chosen), masks)

  return MaskUpdater(init, update)


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
    return theta, _same(forward)

  return MaskUpdater(_random(counts), update)


def set_(
  counts: Counts,
  drop_fraction: Schedule,
  regrow: Callable[[jax.Array], Params] | None,
  regrow_dropped: bool = False,
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> MaskUpdater:
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
    lambda key, theta, grads: _uniform(key, theta),
    counts,
    drop_fraction,
    regrow,
    regrow_dropped,
    is_weight,
  )


def rigl(
  counts: Counts,
  drop_fraction: Schedule,
  regrow: Callable[[jax.Array], Params] | None,
  regrow_dropped: bool = False,
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> MaskUpdater:
  """RigL: drops the smallest active weights, grows the largest gradients.

  Arguments and result are those of `set_`. As published, grown weights start
  at zero, from which they would never move for alpha > 1.
  """
  return _trading(
    lambda key, theta, grads: _magnitudes(grads),
    counts,
    drop_fraction,
    regrow,
    regrow_dropped,
    is_weight,
  )

"""Sparse training in anybody's loop: an updater around an optax optimiser.

`sparsify` makes a gradient transformation from an optimiser and a method of
`updaters`. The parameters stay those of the caller, ordinary dense weights
theta; the masks lie in the state of the transformation. A loop changes in two
places, the optimiser and the weights that the loss reads:

  tx = sparsify(powerprop(optax.adam(1e-3), 2.0), rigl, key=key, due=due)
  state = tx.init(params)
  ...
  loss = lambda params: loss_fn(tx.weights(params, state), batch)
  grads = jax.grad(loss)(params)
  updates, state = tx.update(grads, state, params)
  params = optax.apply_updates(params, updates)

Zeros among the parameters do not stand for masks. With Powerpropagation (and
the methods of sparse training that section 1 of the paper combines it with)
zero is a fixed point: a weight that is zero when it is grown would never move.
Instead a grown weight gets its value through the update, which is the new value
minus the old one plus the step of the optimiser.

An update of masks at step t uses the gradient of that step, taken at the masked
weights with respect to all of them, and comes before the step of the optimiser,
which goes on from the same gradient under the new masks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import optax

from powerprop_jax import transforms
from powerprop_jax import types
from powerprop_jax.sparse import masking
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import updaters


class SparseState(NamedTuple):
  """The state of a transformation made by `sparsify`.

  Attributes:
    count: the number of updates, an int32 scalar.
    masks: `masks.Masks`, of the structure and the shapes of the parameters.
    inner_state: the state of the inner optimiser.
  """

  count: jax.typing.ArrayLike
  masks: masks_lib.Masks
  inner_state: optax.OptState


#: Maps (gradients, state, params) to (updates, state) with other masks.
UpdateMasks = Callable[
  [types.Updates, optax.OptState, types.Params],
  tuple[types.Updates, optax.OptState],
]


@jax.tree_util.register_static
class Sparse(optax.GradientTransformationExtraArgs):
  """An optax transformation that trains a sparse network; see `sparsify`.

  It is a pair of `init` and `update`, as optax and its users expect it, with
  two functions beside them.

  Attributes:
    weights: maps (params, state) to the weights that the network uses, zero
      where the forward mask is False. The state may be that of a larger
      transformation of which this one is a part. The derivative of each weight
      with respect to its parameter is 1, also where the weight is cut, so that
      the gradient of a loss of `weights(params, state)` at the parameters is
      that at the masked weights, with respect to all of them; methods that grow
      weights by their gradient need it, and `update` masks it.
    update_masks: maps (grads, state, params) to (updates, state), as `update`
      does, but changes the masks and makes no step. It is a second function to
      compile, for masks that change when the host decides it.
  """

  weights: Callable[[types.Params, optax.OptState], types.Params]
  update_masks: UpdateMasks

  def __new__(cls, init, update, weights, update_masks):
    self = super().__new__(cls, init, update)
    self.weights = weights
    self.update_masks = update_masks
    return self

  def __getnewargs__(self):  # For `copy.copy` and `copy.deepcopy`.
    return *self, self.weights, self.update_masks


@jax.custom_jvp
def _cut(x, mask):
  """x where the mask is True and zero elsewhere, with the derivative 1."""
  return jnp.where(mask, x, jnp.zeros_like(x))


@_cut.defjvp
def _cut_jvp(primals, tangents):
  return _cut(*primals), tangents[0]


def _is_sparse_state(x: Any) -> bool:
  return isinstance(x, SparseState)


def _is_missing(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)


def _states(state: optax.OptState) -> list[SparseState]:
  """All states of `sparsify` in the state of a transformation."""
  nodes = jax.tree.leaves(state, is_leaf=_is_sparse_state)
  found = [x for x in nodes if _is_sparse_state(x)]
  if not found:
    raise ValueError(
      'There is no state of `sparsify` in this state. Give the state that'
      ' `init` or `update` returned.'
    )
  return found


def _weights(params: types.Params, state: optax.OptState) -> types.Params:
  """The weights that the network uses, by all masks in a state."""

  def cut(mask, x):
    # Each part of an `optax.partition` has masks for its own leaves only.
    if _is_missing(mask):
      return x
    if not jax.tree_util.all_leaves([x]):
      raise ValueError('There is one mask for a container.')
    return _cut(x, mask)

  for found in _states(state):
    mask = found.masks.forward
    try:  # `optax.masked` may take out a whole branch, which is one leaf here.
      params = jax.tree.map(cut, mask, params, is_leaf=_is_missing)
    except ValueError as e:
      # Flax nnx has other containers in the state than among the parameters.
      masks = jax.tree.leaves(mask, is_leaf=_is_missing)
      leaves, treedef = jax.tree.flatten(params)
      fits = len(masks) == len(leaves) and all(
        _is_missing(m) or m.shape == x.shape for m, x in zip(masks, leaves)
      )
      if not fits:
        raise ValueError(
          'These are not the parameters that `init` was given. Give `weights`'
          ' the arrays alone, and put the rest back: by `equinox.partition` and'
          ' `combine`, or by `nnx.split` and `merge`.'
        ) from e
      params = jax.tree.unflatten(treedef, map(cut, masks, leaves))
  return params


def _short_of_zero(update: jax.Array, old: jax.Array, new: Any) -> jax.Array:
  """An update of half precision that does not lead to zero by rounding.

  What is small is lost beside a large old value: 1 - 0.999 is 0 in bfloat16.
  A power never moves a weight from zero. The weight gets a small value instead,
  of the sign of the new one, to which an update can lead.
  """
  info = jnp.finfo(old.dtype)

  def rounded(x):  # XLA may leave out the rounding of a cast.
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)

  old, new = (x.astype(jnp.float32) for x in (old, new))
  is_lost = (old + rounded(update.astype(jnp.float32)) == 0) & (new != 0)
  least = jnp.copysign(jnp.abs(old) * float(info.eps), new)
  return jnp.where(is_lost, (least - old).astype(update.dtype), update)


def _is_half(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def _difference(new: types.Params, old: types.Params) -> types.Updates:
  """The updates from old values to new ones; exactly 0 where they are equal."""

  def difference(x, y):
    update = jnp.where(x == y, jnp.zeros_like(y), x - y)
    return _short_of_zero(update, y, x) if _is_half(y) else update

  return jax.tree.map(difference, new, old)


def _added(new: jax.Array, old: jax.Array, step: Any) -> Any:
  """The update from an old value to a new one and on by a step."""
  if step is None:  # There is no gradient, and nothing changes.
    return None
  move = (new - old) + step
  if _is_half(old):
    move = _short_of_zero(move, old, new + step)
  # Not new - old + step, which would round where nothing was grown.
  return jnp.where(new == old, step, move).astype(step.dtype)


def sparsify(
  inner: optax.GradientTransformation,
  updater: updaters.MaskUpdater,
  *,
  key: chex.PRNGKey,
  due: Callable[[jax.Array], chex.Numeric] | None,
) -> Sparse:
  """A method of sparse training as an optax transformation.

  The loss reads `tx.weights(params, state)`; all else is an ordinary loop of
  optax. The parameters are dense, and what is cut keeps its value among them:
  evaluate, export and prune `tx.weights(params, state)`.

  Masks change inside `update` where `due` says so. Or the host calls
  `tx.update_masks(grads, state, params)` before `update`, and due is None; then
  the step compiles faster, and the masks may be scored by the mean gradient of
  several batches. With the same gradients both give the same masks.

  Average the gradients over devices first, so that all choose the same masks.
  With `optax.MultiSteps` around this transformation masks follow the
  accumulated gradient; inside, they follow that of each small batch. Any
  transformation may be inside, and any that scales or adds up updates outside,
  except that what is outside must not move frozen weights nor change the values
  that grown weights get: clipping and weight decay belong inside.

  >>> import jax, jax.numpy as jnp, optax
  >>> from powerprop_jax.sparse import updaters
  >>> params = {'w': jnp.array([1.0, 2.0, 3.0])}
  >>> given = updaters.given({'w': jnp.array([True, True, False])})
  >>> tx = sparsify(optax.sgd(0.1), given, key=jax.random.key(0), due=None)
  >>> state = tx.init(params)
  >>> loss = lambda params: jnp.sum(tx.weights(params, state)['w'] ** 2)
  >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
  >>> params = optax.apply_updates(params, updates)
  >>> print(params['w'], tx.weights(params, state)['w'])
  [0.8 1.6 3. ] [0.8 1.6 0. ]

  Args:
    inner: an optimiser whose parameters are theta, such as
      `powerprop(optax.adam(1e-3), 2.0)` or any of optax. It trains the network
      without the weights that may not move (see `masking`).
    updater: a method of `updaters`. Those that start from a gradient, as SNIP
      does, are dense up to the first change of masks, which takes place at the
      first update, whatever due says, or at the first `update_masks`.
    key: a PRNG key for the random choices of the updater.
    due: maps the number of the update, from 0 on, to whether the masks change
      before it, such as `schedules.every(100, stop=7_500)`. None leaves all
      changes to `update_masks`. A sparsity that rises by a schedule, as that of
      `magnitude`, is reached by a change of masks at the end of the schedule or
      after it.

  Returns:
    A `Sparse`, which is an `optax.GradientTransformationExtraArgs` whose state
    is a `SparseState`. Its init raises ValueError if the state of the inner
    optimiser cannot follow masks (see `masking.check_resettable`), its update
    if it is not given the parameters, and its other functions if they are given
    the state of another transformation.

  References:
    Schwarz et al, `Powerpropagation`, NeurIPS 2021, section 1.
    Lee et al, `JaxPruner <https://arxiv.org/abs/2304.14082>`_, 2023, which had
    the idea of the wrapper.
  """
  if due is not None and not callable(due):
    raise ValueError(
      'due must be a function of the step, such as'
      f' `schedules.every(100)`, or None, got {due!r}.'
    )
  inner = transforms.check_optimiser(inner)
  init_key, update_key = jax.random.split(key)

  def init_fn(params):
    count = jnp.zeros([], jnp.int32)
    inner_state = inner.init(params)
    if not jax.tree.leaves(params):  # Optax looks into states this way.
      return SparseState(count, masks_lib.Masks(params, params), inner_state)
    masking.check_resettable(inner, params)
    masks = masks_lib.dense(params)
    if not updater.starts_from_gradient:
      # Copies, because a mask of the caller's must not be donated.
      none = cast(types.Updates, None)  # The method does not read it.
      start = jax.tree.map(jnp.copy, updater.init(init_key, params, none))
      inner_state = masking.change_masks(
        inner, inner_state, params, masks, start
      )
      masks = start
    return SparseState(count, masks, inner_state)

  def change(grads, state, params):
    """The parameters and the masks after a change of masks."""
    count, masks, _ = state
    # What is frozen has no gradient; nothing grows there.
    grads = jax.tree.map(
      lambda x, g: jnp.zeros_like(x) if g is None else g, params, grads
    )

    def update(_):
      step_key = jax.random.fold_in(update_key, count)
      return updater.update(step_key, count, params, masks, grads)

    def start(_):
      return params, updater.init(init_key, params, grads)

    if updater.starts_from_gradient:
      # The count does not tell: the host may have made steps before.
      started = jnp.array(False)
      for mask in jax.tree.leaves(masks.forward):
        started |= ~jnp.all(mask)
      values, new = jax.lax.cond(started, update, start, None)
    else:
      values, new = update(None)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), values, params), new

  def with_masks(state, values, new):
    """The state under new masks; the same if the masks have not changed."""
    count, masks, inner_state = state
    inner_state = masking.change_masks(inner, inner_state, values, masks, new)
    return SparseState(count, new, inner_state)

  def update_masks(grads, state, params):
    found = _states(state)
    if len(found) > 1:
      raise ValueError(
        'There are several states of `sparsify` in this state. Give'
        ' `update_masks` that of its own transformation.'
      )
    values, masks = change(grads, found[0], params)
    new = with_masks(found[0], values, masks)
    state = jax.tree.map(
      lambda x: new if _is_sparse_state(x) else x,
      state,
      is_leaf=_is_sparse_state,
    )
    return _difference(values, params), state

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        'Sparse training needs the parameters. Call `update(grads, state,'
        ' params)`.'
      )
    values = params
    if due is not None:
      now = due(jnp.asarray(state.count))
      if updater.starts_from_gradient:
        now = now | (state.count == 0)
      values, masks = jax.lax.cond(
        now,
        lambda: change(updates, state, params),
        lambda: (params, state.masks),
      )
      # The moments are reset outside, in one pass with their update: what goes
      # through the condition is copied in every step.
      state = with_masks(state, values, masks)
    steps, inner_state = masking.masked_update(
      inner, updates, state.inner_state, values, state.masks, **extra_args
    )
    count = optax.safe_increment(state.count)
    state = state._replace(count=count, inner_state=inner_state)
    if due is None:
      return steps, state
    return jax.tree.map(_added, values, params, steps), state

  return Sparse(init_fn, update_fn, _weights, update_masks)

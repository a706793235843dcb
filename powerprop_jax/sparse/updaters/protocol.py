"""What a sparse training method is, and what the methods have in common.

Section 1 of the paper combines Powerpropagation with methods of sparse
training. Each is a `MaskUpdater`: a pair of pure functions, as an optax
transformation is, that choose masks at the start and change them now and then.
How many weights a method keeps is told by a distribution, leaf by leaf: by an
int, by an array with a number for each layer of a stack, or by a pattern of n
of every m. The counts also tell the methods which weights are ranked by
themselves.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from powerprop_jax import leaves
from powerprop_jax import types
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import pruning

#: Maps parameters to counts, as the functions do that `distributions` makes.
Counts = Callable[[types.Params], types.Counts]
Schedule = optax.Schedule
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
    starts_from_gradient: whether `init` reads the gradient, which is not known
      before training. Where it does not, the gradient may be None.

  >>> def init(key, theta, grads):  # Half of the weights, the largest ones.
  ...   mask = pruning.prune(theta, 0.5)
  ...   return Masks(forward=mask, backward=mask)
  >>> updater = MaskUpdater(init, unchanged)
  >>> theta = {'w': jnp.array([1.0, -3.0, 2.0, 0.0])}
  >>> updater.init(jax.random.key(0), theta, None).forward['w'].tolist()
  [False, True, True, False]
  """

  init: Callable[[jax.Array, types.Params, types.Updates], Masks]
  update: Callable[
    [jax.Array, jax.Array, types.Params, Masks, types.Updates],
    tuple[types.Params, Masks],
  ]
  starts_from_gradient: bool = False


def same(mask: types.Mask) -> Masks:
  """Masks of which the forward and the backward one are the same.

  Args:
    mask: a pytree of boolean arrays.

  Returns:
    `Masks` of two sets of arrays, so that a state that holds them can be
    donated.

  >>> same({'w': jnp.array([True])}).backward
  {'w': Array([ True], dtype=bool)}
  """
  return Masks(forward=mask, backward=jax.tree.map(jnp.copy, mask))


def unchanged(
  key: jax.Array,
  step: jax.Array,
  theta: types.Params,
  masks: Masks,
  grads: types.Updates,
) -> tuple[types.Params, Masks]:
  """The update of a method that keeps its masks.

  Args:
    key: not used.
    step: not used.
    theta: all weights.
    masks: the masks.
    grads: not used.

  Returns:
    theta and the masks.

  >>> unchanged(None, 0, {'w': 1.0}, masks_lib.dense({'w': 1.0}), None)[0]
  {'w': 1.0}
  """
  del key, step, grads
  return theta, masks


def uniform(key: jax.Array, theta: types.Params) -> types.Params:
  """Independent uniform scores for every entry of a tree.

  Args:
    key: a PRNG key.
    theta: a pytree of arrays.

  Returns:
    A pytree of float32 arrays in [0, 1) of the shapes and shardings of theta.

  >>> uniform(jax.random.key(0), {'w': jnp.ones([2, 3])})['w'].shape
  (2, 3)
  """
  flat, treedef = jax.tree.flatten(theta)
  keys = jax.random.split(key, len(flat))
  scores = [
    # The selection selects everything, and shards the scores as x is sharded.
    jnp.where(masks_lib.ones_like(x), jax.random.uniform(k, jnp.shape(x)), 0.0)
    for k, x in zip(keys, flat)
  ]
  return jax.tree.unflatten(treedef, scores)


def random_masks(
  counts: Counts,
) -> Callable[[jax.Array, types.Params, types.Updates], Masks]:
  """The `init` of methods that start from a random mask.

  Args:
    counts: maps parameters to how many weights each leaf keeps.

  Returns:
    A function of (key, theta, grads) that returns `Masks`.

  >>> init = random_masks(lambda theta: {'w': 2})
  >>> init(jax.random.key(0), {'w': jnp.ones(5)}, None).forward['w'].sum()
  Array(2, dtype=int32)
  """

  def init(key, theta, grads):
    del grads
    return same(masks_lib.layerwise_topk(uniform(key, theta), counts(theta)))

  return init


def largest(
  scores: types.Params,
  counts: types.Counts,
  scope: str,
  is_weight: types.IsWeight,
) -> types.Mask:
  """The mask of the largest scores, layer by layer or of all layers together.

  Args:
    scores: a pytree of arrays.
    counts: how many entries each leaf keeps, a tree; only the sum over the
      weights matters if the scope is global.
    scope: 'layer' or 'global'.
    is_weight: a function of (path, leaf).

  Returns:
    A pytree of boolean arrays of the structure and the shapes of scores.

  Raises:
    ValueError: if the scope is global and a leaf keeps n of every m weights.

  >>> scores = {'a': {'w': jnp.array([1.0, 2.0])}, 'b': {'w': jnp.array([3.0])}}
  >>> counts = {'a': {'w': 1}, 'b': {'w': 1}}
  >>> largest(scores, counts, 'layer', leaves.is_weight)['a']['w']
  Array([False,  True], dtype=bool)
  """
  if scope == 'layer':
    return masks_lib.layerwise_topk(scores, counts)
  total = pruning.total(counts, scores, is_weight)
  chosen = leaves.weight_mask(scores, is_weight)
  return masks_lib.global_topk(scores, total, chosen)


def grown_values(
  theta: types.Params,
  before: types.Mask,
  after: types.Mask,
  fresh: types.Params | None,
) -> types.Params:
  """The weights, with new values where an update has grown some.

  Args:
    theta: all weights.
    before: the mask before the update, a pytree of boolean arrays.
    after: the mask after it.
    fresh: a tree of values for what is grown, of the structure and the shapes
      of theta; None leaves theta as it is.

  Returns:
    A pytree of the structure of theta.

  >>> was, now = {'w': jnp.array([True, False])}, {'w': jnp.array([True, True])}
  >>> theta, fresh = {'w': jnp.array([1.0, 2.0])}, {'w': jnp.array([8.0, 9.0])}
  >>> grown_values(theta, was, now, fresh)
  {'w': Array([1., 9.], dtype=float32)}
  """
  if fresh is None:
    return theta

  def leaf(x, was, now, new):
    # Adding zeros shards new values as x is, which explicit axes ask for.
    new = jnp.asarray(new)
    return jnp.where(now & ~was, new + jnp.zeros_like(x, new.dtype), x)

  return jax.tree.map(leaf, theta, before, after, fresh)

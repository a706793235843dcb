"""What a sparse training method is, and what the methods have in common.

A method is a `MaskUpdater`: a pair of pure functions, as an optax
transformation is, that choose masks at the start and change them now and then.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.sparse import masks as masks_lib

Params = Any
Grads = Any
# Maps parameters to counts, as the functions that `distributions` makes.
Counts = Callable[[Params], Any]
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
  """

  init: Callable[[jax.Array, Params, Grads], Masks]
  update: Callable[
    [jax.Array, jax.Array, Params, Masks, Grads], tuple[Params, Masks]
  ]
  starts_from_gradient: bool = False


def same(mask: Any) -> Masks:
  # Two sets of arrays, so that a state that holds both can be donated.
  return Masks(forward=mask, backward=jax.tree.map(jnp.copy, mask))


def unchanged(key, step, theta, masks, grads):
  del key, step, grads
  return theta, masks


def check_scope(scope: str) -> None:
  if scope not in ('layer', 'global'):
    raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}.")


def uniform(key: jax.Array, theta: Params) -> Params:
  """Independent uniform scores for every entry of a tree."""
  flat, treedef = jax.tree.flatten(theta)
  keys = jax.random.split(key, len(flat))
  scores = [jax.random.uniform(k, jnp.shape(x)) for k, x in zip(keys, flat)]
  return jax.tree.unflatten(treedef, scores)


def random_masks(counts: Counts):
  def init(key, theta, grads):
    del grads
    return same(masks_lib.layerwise_topk(uniform(key, theta), counts(theta)))

  return init

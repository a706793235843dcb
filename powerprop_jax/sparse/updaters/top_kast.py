"""Top-KAST: sparse training whose backward pass is wider than its forward pass.

The network uses the set A of its largest weights and updates a larger set B, so
that weights outside of A learn from the gradient they would have. Section 1 of
the paper combines it with Powerpropagation.

References:
  Jayakumar et al, `Top-KAST <https://arxiv.org/abs/2106.03517>`_, 2020.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import leaves
from powerprop_jax import types
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import pruning
from powerprop_jax.sparse.updaters import protocol


def _check_inside(
  path: str, shape: tuple[int, ...], a: masks_lib.Count, b: masks_lib.Count
) -> None:
  """Raises ValueError if a leaf's set A cannot be inside of its set B."""
  remedy = ''
  if isinstance(a, masks_lib.NOfM) and isinstance(b, masks_lib.NOfM):
    inside = a.m == b.m and a.axis == b.axis and a.n <= b.n
    remedy = ' Give both the same groups.'
  elif isinstance(a, masks_lib.NOfM) or isinstance(b, masks_lib.NOfM):
    # A dense backward pass has every set inside.
    inside = masks_lib.num_entries(b, shape) == math.prod(shape)
    remedy = ' Give both a pattern, or none.'
  else:
    inside = not np.any(np.greater(a, b))
  if not inside:
    raise ValueError(
      f'Top-KAST updates at least the weights it uses, but {path!r} has {a} in'
      f' the forward and {b} in the backward pass.{remedy}'
    )


def top_kast(
  forward: protocol.Counts,
  backward: protocol.Counts,
  is_weight: types.IsWeight = leaves.is_weight,
) -> protocol.MaskUpdater:
  """Top-KAST: uses the largest |theta| (A), and updates a larger set (B).

  Weights of B that are not in A learn from the gradient they would have, and
  enter A if they outgrow its smallest. Weights outside of B do not change. Add
  `exploration_penalty` to the gradient.

  Args:
    forward: maps parameters to how many weights of each leaf are in A, such as
      `distributions.erdos_renyi(0.9)`. It decides the first A; from then on,
      and in a network that was sparse before, the number of weights in A does
      not change. A pattern of n of every m holds at every update.
    backward: maps parameters to how many weights of each leaf are in B. If A
      has more by then, an update gives B as many as A has.
    is_weight: a function of (path, leaf); the masks of other leaves stay.

  Returns:
    A `MaskUpdater`.

  Raises:
    ValueError: from `init`, if B is smaller than A in a leaf.

  >>> updater = top_kast(lambda theta: {'w': 1}, lambda theta: {'w': 2})
  >>> updater.init(None, {'w': jnp.array([1.0, -3.0, 2.0])}, None)
  Masks(forward={'w': Array([False,  True, False], dtype=bool)},
        backward={'w': Array([False,  True,  True], dtype=bool)})
  """

  def choose(theta, counts_a, counts_b):
    # Both rank alike, ties included, so A is inside B.
    scores = jax.tree.map(jnp.abs, theta)
    return masks_lib.Masks(
      forward=masks_lib.layerwise_topk(scores, counts_a),
      backward=masks_lib.layerwise_topk(scores, counts_b),
    )

  def init(key, theta, grads):
    del key, grads
    counts_a, counts_b = forward(theta), backward(theta)
    pruning.check_counts(counts_a, theta, is_weight)
    flat = (
      jax.tree.leaves(counts, is_leaf=masks_lib.is_count)
      for counts in (counts_a, counts_b)
    )
    for path, x, a, b in zip(
      leaves.paths(theta), jax.tree.leaves(theta), *flat
    ):
      _check_inside(str(path), x.shape, a, b)
    return choose(theta, counts_a, counts_b)

  def update(key, step, theta, masks, grads):
    del key, step, grads

    def count(path, x, a, wanted, least=0):
      if not is_weight(path, x) or isinstance(wanted, masks_lib.NOfM):
        return wanted
      return jnp.maximum(masks_lib.count_by_group(a, wanted), least)

    def counts(wanted, *least):
      return leaves.map_with_path(count, theta, masks.forward, wanted, *least)

    wanted_b = backward(theta)
    return theta, choose(
      theta, counts(forward(theta)), counts(wanted_b, wanted_b)
    )

  return protocol.MaskUpdater(init, update)


def exploration_penalty(
  theta: types.Params,
  masks: masks_lib.Masks,
  strength: float,
  is_weight: types.IsWeight = leaves.is_weight,
  axes: types.AxesOf = leaves.axes,
) -> types.Updates:
  """The gradient of the exploration penalty of Top-KAST, an L2 penalty.

  Weights in A are decayed by `strength` and those in B but not in A by
  `strength / density of A`, which keeps A from freezing to its first choice: a
  newcomer must be worth it.

  Args:
    theta: all weights, masked or not.
    masks: the masks, of which the forward one is A and the backward one B.
    strength: the factor of the penalty, which is strength / 2 |theta|^2 in A.
    is_weight: a function of (path, leaf); other leaves have no penalty.
    axes: a function of (path, leaf) that tells which layers are stacked, each
      of which has a density of its own.

  Returns:
    A pytree of the structure, shapes and dtypes of theta, to be added to the
    gradient at theta.

  >>> theta = {'w': jnp.array([1.0, 2.0])}
  >>> a, b = {'w': jnp.array([False, True])}, {'w': jnp.array([True, True])}
  >>> exploration_penalty(theta, masks_lib.Masks(a, b), strength=0.5)
  {'w': Array([1., 1.], dtype=float32)}
  """

  def leaf(path, x, a, b):
    if not is_weight(path, x):
      return jnp.zeros_like(x)
    stack = axes(path, x).stack
    layer = tuple(i for i in range(x.ndim) if i not in stack)
    size = math.prod(x.shape[i] for i in layer)
    kept = jnp.sum(a, axis=layer, keepdims=bool(stack), dtype=jnp.int32)
    density = kept / max(size, 1)
    factor = jnp.where(a, strength, jnp.where(b, strength / density, 0.0))
    return (factor * x).astype(x.dtype)

  return leaves.map_with_path(leaf, theta, masks.forward, masks.backward)

"""Top-KAST: sparse training whose backward pass is wider than its forward pass.

The network uses the set A of its largest weights and updates a larger set B, so
that weights outside of A learn from the gradient they would have. Section 1 of
the paper combines it with Powerpropagation.

References:
  Jayakumar et al, `Top-KAST <https://arxiv.org/abs/2106.03517>`_, 2020.
"""

from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse.updaters import protocol

Params = Any


def top_kast(
  forward: protocol.Counts,
  backward: protocol.Counts,
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> protocol.MaskUpdater:
  """Top-KAST: uses the largest |theta| (A), and updates a larger set (B).

  Weights of B that are not in A learn from the gradient they would have, and
  enter A if they outgrow its smallest. Weights outside of B do not change. Add
  `exploration_penalty` to the gradient.

  Args:
    forward: how many weights of each leaf are in A, as of `distributions`. It
      decides the first A; from then on, and in a network that was sparse
      before, the number of weights in A does not change.
    backward: how many are in B, if they are not fewer than those in A.
    is_weight: which leaves are weights; the masks of others stay.

  Returns:
    A `MaskUpdater`.

  Raises:
    ValueError: from `init`, if B is smaller than A in a leaf.
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
    for path, a, b in zip(
      jax.tree.leaves(leaves.map_with_path(lambda p, x: str(p), theta)),
      jax.tree.leaves(counts_a),
      jax.tree.leaves(counts_b),
    ):
      if a > b:
        raise ValueError(
          f'Top-KAST updates at least the weights it uses, but {path!r} has {a}'
          f' in the forward and {b} in the backward pass.'
        )
    return choose(theta, counts_a, counts_b)

  def update(key, step, theta, masks, grads):
    del key, step, grads

    def count(path, x, a, least=0):
      if not is_weight(path, x):
        return x.size
      return jnp.maximum(jnp.sum(a, dtype=jnp.int32), least)

    counts_a = leaves.map_with_path(count, theta, masks.forward)
    counts_b = leaves.map_with_path(
      count, theta, masks.forward, backward(theta)
    )
    return theta, choose(theta, counts_a, counts_b)

  return protocol.MaskUpdater(init, update)


def exploration_penalty(
  theta: Params,
  masks: masks_lib.Masks,
  strength: float,
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> Params:
  """The gradient of Top-KAST's exploration penalty, an L2 one.

  Weights in A are decayed by `strength` and those in B but not in A by
  `strength / density of A`, which keeps A from freezing to its first choice: a
  newcomer must be worth it.

  Args:
    theta: all weights, masked or not.
    masks: forward A and backward B.
    strength: of the penalty strength / 2 |theta|^2 in A.
    is_weight: which leaves are weights; others have no penalty.

  Returns:
    A pytree to add to the gradient at theta.
  """

  def leaf(path, x, a, b):
    if not is_weight(path, x):
      return jnp.zeros_like(x)
    density = jnp.sum(a, dtype=jnp.int32) / a.size
    factor = jnp.where(a, strength, jnp.where(b, strength / density, 0.0))
    return (factor * x).astype(x.dtype)

  return leaves.map_with_path(leaf, theta, masks.forward, masks.backward)

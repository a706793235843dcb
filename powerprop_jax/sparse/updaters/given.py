"""Masks that are chosen once, at the start, and kept.

References:
  Lee et al, `SNIP <https://arxiv.org/abs/1810.02340>`_, 2019.
"""

from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse.updaters import protocol

Params = protocol.Params


def dense() -> protocol.MaskUpdater:
  """All weights, always: the baseline."""

  def init(key, theta, grads):
    del key, grads
    return masks_lib.dense(theta)

  return protocol.MaskUpdater(init, protocol.unchanged)


def given(mask: Any) -> protocol.MaskUpdater:
  """A given mask, kept; for training on from a sparse network.

  Args:
    mask: a pytree of boolean arrays, such as that of a finished run.

  Returns:
    A `MaskUpdater`.
  """

  def init(key, theta, grads):
    del key, theta, grads
    return protocol.same(mask)

  return protocol.MaskUpdater(init, protocol.unchanged)


def random(counts: protocol.Counts) -> protocol.MaskUpdater:
  """A random mask, kept.

  Args:
    counts: how many weights each leaf keeps, as of `distributions`.

  Returns:
    A `MaskUpdater`.
  """
  return protocol.MaskUpdater(protocol.random_masks(counts), protocol.unchanged)


def snip(
  counts: protocol.Counts, scope: str = 'global', is_weight=leaves.is_weight
) -> protocol.MaskUpdater:
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
  protocol.check_scope(scope)

  def init(key, theta, grads):
    del key
    scores = jax.tree.map(lambda x, g: jnp.abs(x * g), theta, grads)
    return protocol.same(_largest(scores, counts(theta), scope, is_weight))

  return protocol.MaskUpdater(
    init, protocol.unchanged, starts_from_gradient=True
  )


def _largest(scores, wanted, scope, is_weight):
  if scope == 'layer':
    return masks_lib.layerwise_topk(scores, wanted)
  chosen = leaves.weight_mask(scores, is_weight)
  flags = jax.tree.leaves(chosen)
  total = sum(n for n, w in zip(jax.tree.leaves(wanted), flags) if w)
  return masks_lib.global_topk(scores, total, chosen)

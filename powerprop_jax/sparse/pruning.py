"""One-shot pruning by magnitude, and the accuracy it leaves.

Section 3 of the paper removes the weights of least magnitude once, after
training. Weights are always theta, never phi: across layers of different alpha
only |theta| compares.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  section 3.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax.sparse import masks

Params = Any  # A pytree of arrays.
Mask = Any  # A pytree of boolean arrays.


@jax.jit
def _num_not_finite(params: Params) -> Any:
  return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x)), params)


def check_finite(params: Params) -> None:
  """Raises ValueError if a parameter is NaN or infinite, and names the leaf."""
  paths = jax.tree.leaves(leaves.map_with_path(lambda p, _: p, params))
  found = jax.tree.leaves(jax.device_get(_num_not_finite(params)))
  for path, number in zip(paths, found):
    if number:
      raise ValueError(
        f'{number} entries of {str(path)!r} are NaN or infinite. If training'
        ' diverged, lower the learning rate or clip the gradients.'
      )


def _check_options(
  scope: str = 'layer',
  density_scale: Mapping[str, float] | None = None,
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> None:
  """Raises ValueError if `prune` would refuse its options for any theta."""
  del is_weight
  if scope not in ('layer', 'global'):
    raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}.")
  if scope == 'global' and density_scale:
    raise ValueError(
      f"density_scale = {density_scale} needs scope='layer': under 'global' a"
      ' layer has no density of its own.'
    )
  for pattern, factor in (density_scale or {}).items():
    if not 0 < factor < math.inf:
      raise ValueError(
        'density_scale must be positive and finite, got'
        f' {{{pattern!r}: {factor}}}.'
      )


def kept_counts(
  theta: Params,
  density: float | jax.Array,
  scope: str = 'layer',
  density_scale: Mapping[str, float] | None = None,
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> Any:
  """How many weights to keep: in all, or a tree for `layerwise_topk`."""
  _check_options(scope, density_scale)
  if not isinstance(density, jax.Array):
    density = masks.check_density(density)
  rows, scale = leaves.weight_rows(theta, is_weight), density_scale or {}
  if scope == 'global':
    return masks.num_kept(density, sum(x.size for _, x in rows))
  for pattern in scale:
    if not any(re.search(pattern, path) for path, _ in rows):
      raise ValueError(
        f'The pattern {pattern!r} of density_scale matches none of the weights'
        f' {[str(path) for path, _ in rows]}.'
      )

  def number(path, leaf):
    if not is_weight(path, leaf):
      return None
    factor = next((f for p, f in scale.items() if re.search(p, path)), 1.0)
    least = jnp.minimum if isinstance(density, jax.Array) else min
    return masks.num_kept(least(factor * density, 1.0), leaf.size)

  return leaves.map_with_path(number, theta)


@functools.partial(jax.jit, static_argnums=2)
def largest(theta: Params, counts: Any, is_weight: leaves.IsWeight) -> Mask:
  """The mask of the largest |theta|, as many as `kept_counts` says."""
  chosen = leaves.weight_mask(theta, is_weight)
  scores = jax.tree.map(lambda w, x: jnp.abs(x) if w else x, chosen, theta)
  if isinstance(counts, int | jax.Array):
    return masks.global_topk(scores, counts, chosen)
  return masks.layerwise_topk(scores, counts)


def prune(
  theta: Params,
  density: float | jax.Array,
  *,
  scope: str = 'layer',
  density_scale: Mapping[str, float] | None = None,
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> Mask:
  """The mask of the weights of largest magnitude: one-shot pruning, section 3.

  Args:
    theta: the parameters. NaN is pruned first: see `check_finite`.
    density: the fraction of the weights to keep, in (0, 1]; static or traced.
    scope: 'layer' keeps floor(density * size) weights of every layer, 'global'
      floor(density * total size) of all weights, wherever they are.
    density_scale: factors of the density by regular expression, searched in the
      '/'-joined path; the first that matches counts. The layer then keeps the
      fraction min(1, factor * density). `{'logits': 2.0}` is the output layer
      of the paper's MNIST experiment.
    is_weight: a function of (path, leaf); other leaves are kept whole.

  Returns:
    A pytree of boolean arrays of the structure of theta; exact counts, ties go
    to the lower index.

  Raises:
    ValueError: if the scope, a factor or a static density is impossible, a
      pattern matches no weight, or there is no weight.
  """
  counts = kept_counts(theta, density, scope, density_scale, is_weight)
  return largest(theta, counts, is_weight)


def floats(scalars: Iterable[Any]) -> list[float]:
  """Waits for the device once, after everything has been dispatched."""
  return [float(x) for x in jax.device_get(list(scalars))]


def make_prune_sweep(
  evaluate: Callable[..., Any], kept: Sequence[float], **options: Any
) -> Callable[..., list[float]]:
  """A function that evaluates a network pruned to each of several densities.

  Compiled once for all densities and all networks of one architecture.

  Args:
    evaluate: a function of (theta, *args) to a scalar, such as the accuracy, to
      be compiled. Data are args: closed over, they become constants.
    kept: the fractions of weights to keep, each in (0, 1].
    **options: as of `prune`.

  Returns:
    A function of (theta, *args) that returns one float for each fraction, and
    raises ValueError if theta is not finite.

  Raises:
    ValueError: if a fraction or an option is impossible.
  """
  _check_options(**options)
  fractions = [masks.check_density(p) for p in kept]
  is_weight = options.get('is_weight', leaves.is_weight)

  # Counts are traced and not densities, for they are then those of `prune`: a
  # density of 0.7 is less in float32, and would keep 6 weights of 10.
  @jax.jit
  def evaluate_pruned(theta, counts, args):
    mask = largest(theta, counts, is_weight)
    return evaluate(masks.apply_mask(theta, mask), *args)

  def sweep(theta: Params, *args: Any) -> list[float]:
    check_finite(theta)
    counts = [kept_counts(theta, p, **options) for p in fractions]
    return floats(evaluate_pruned(theta, n, args) for n in counts)

  return sweep

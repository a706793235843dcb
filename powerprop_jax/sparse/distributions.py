r"""How many weights each layer keeps.

A sparse network of a given total sparsity can spread its weights over the
layers in many ways. The same sparsity everywhere is the simplest; Erdos-Renyi
gives a layer of n_in inputs and n_out outputs a density proportional to
(n_in + n_out) / (n_in n_out), so that the number of weights grows with the sum
of the layer's dimensions rather than with their product; its kernel form (ERK)
takes all dimensions of a convolution's kernel. Small layers would ask for a
density above one: they are capped to dense, and the others share what is left.

A distribution is a function from parameters to *counts*: a pytree of Python
ints, the number of entries that each leaf keeps, which is its size where the
leaf is not a weight. Counts and not fractions, since `floor(density * size)` of
a rounded fraction is off by one here and there, while counts add up to exactly
`round((1 - sparsity) * size)` over all weights: fractions of weights are
rounded by largest remainder. Only shapes are read, so `jax.eval_shape` of an
initialisation will do. For a sparsity that grows, prune
`round(s_t / s * (size - count))` entries of each leaf on the way to s.

References:
  Mocanu et al, `Scalable training of artificial neural networks with adaptive
  sparse connectivity <https://arxiv.org/abs/1707.04780>`_, 2018 (Erdos-Renyi).
  Evci et al, `Rigging the lottery <https://arxiv.org/abs/1911.11134>`_, 2020,
  section 3 (ERK, the cap, and the dense first layer of uniform sparsity).
"""

from collections.abc import Callable, Iterable, Mapping
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from powerprop_jax import leaves

Params = Any  # A pytree of arrays, or of anything with shape and dtype.
Counts = Any  # A pytree of Python ints of the same structure.
Distribution = Callable[[Params], Counts]
IsWeight = leaves.IsWeight


class _Weight(NamedTuple):
  path: str
  shape: tuple[int, ...]
  size: int


def _weights(params: Params, is_weight: IsWeight) -> list[_Weight]:
  """The leaves that are weights, in the order of the tree."""

  def describe(path, leaf):
    shape = tuple(np.shape(leaf))
    weight = _Weight(str(path), shape, math.prod(shape))
    return weight if is_weight(path, leaf) else None

  found = jax.tree.leaves(
    leaves.map_with_path(describe, params),
    is_leaf=lambda x: isinstance(x, _Weight),
  )
  if not any(w.size for w in found):
    raise ValueError('There are no weights to make sparse in the parameters.')
  return found


def _tree(params: Params, kept: Mapping[str, int]) -> Counts:
  """The counts of the whole tree from those of its weights, by path."""
  return leaves.map_with_path(
    lambda path, x: kept.get(str(path), math.prod(np.shape(x))), params
  )


def _check_sparsity(sparsity: float) -> float:
  if not 0.0 <= float(sparsity) < 1.0:
    raise ValueError(
      f'sparsity must be in [0, 1), got {sparsity}. It is the fraction of the'
      ' weights that are removed.'
    )
  return float(sparsity)


def _compile(patterns: Iterable[str]) -> list[re.Pattern[str]]:
  try:
    return [re.compile(p) for p in patterns]
  except re.error as e:
    raise ValueError(f'{e.pattern!r} is not a regular expression: {e}.') from e


def _match(
  patterns: list[re.Pattern[str]], weights: list[_Weight]
) -> list[int | None]:
  """For each weight the first pattern found in its path, by position."""
  paths = [w.path for w in weights]
  for p in patterns:
    if not any(p.search(path) for path in paths):
      raise ValueError(
        f'The pattern {p.pattern!r} matches no weight; there are {paths}.'
      )
  hits = [[i for i, p in enumerate(patterns) if p.search(x)] for x in paths]
  return [h[0] if h else None for h in hits]


def _quotas(
  sizes: list[int], ratios: list[float], fixed: list[bool], total: int
) -> list[float]:
  """Densities proportional to ratios, capped at 1, as fractional counts."""
  dense = list(fixed)
  while not all(dense):
    free = [i for i, d in enumerate(dense) if not d]
    left = total - sum(n for n, d in zip(sizes, dense) if d)
    scale = left / sum(ratios[i] * sizes[i] for i in free)
    over = [i for i in free if scale * ratios[i] > 1.0]
    if not over:
      return [
        n if d else scale * r * n for n, r, d in zip(sizes, ratios, dense)
      ]
    # What a capped layer leaves over only raises the scale: none comes back.
    for i in over:
      dense[i] = True
  return [float(n) for n in sizes]


def _round(
  quotas: list[float], sizes: list[int], fixed: list[bool], total: int
) -> list[int]:
  """Counts in [1, size] that add up to total, by largest remainder."""
  counts = [min(max(math.floor(q), 1), n) for q, n in zip(quotas, sizes)]
  while gap := total - sum(counts):
    step = 1 if gap > 0 else -1
    movable = [
      i
      for i, c in enumerate(counts)
      if not fixed[i] and 1 <= c + step <= sizes[i]
    ]
    i = max(movable, key=lambda i: step * (quotas[i] - counts[i]))
    counts[i] += step
  return counts


def _proportional(
  sparsity: float,
  ratio: Callable[[_Weight], float],
  dense: str | Iterable[str],
  is_weight: IsWeight,
) -> Distribution:
  """The distribution with densities proportional to `ratio`, capped at 1."""
  sparsity = _check_sparsity(sparsity)
  patterns = _compile((dense,) if isinstance(dense, str) else dense)

  def distribution(params: Params) -> Counts:
    weights = _weights(params, is_weight)
    sizes = [w.size for w in weights]
    fixed = [hit is not None for hit in _match(patterns, weights)]
    total = round((1.0 - sparsity) * sum(sizes))
    least = sum(n if f else min(n, 1) for n, f in zip(sizes, fixed))
    if total < least:
      largest = math.floor(1e6 * (1.0 - least / sum(sizes))) / 1e6
      raise ValueError(
        f'A sparsity of {sparsity} is impossible: the dense layers and one'
        f' weight in each of the others make {least} of {sum(sizes)} weights,'
        f' {total} were asked for. The largest possible sparsity is {largest}.'
      )
    quotas = _quotas(sizes, [ratio(w) for w in weights], fixed, total)
    counts = _round(quotas, sizes, fixed, total)
    return _tree(params, {w.path: n for w, n in zip(weights, counts)})

  return distribution


def uniform(
  sparsity: float,
  dense: str | Iterable[str] = (),
  is_weight: IsWeight = leaves.is_weight,
) -> Distribution:
  """The same sparsity in every layer.

  Args:
    sparsity: fraction of all weights that are removed, in [0, 1).
    dense: regular expressions searched for in the '/'-joined paths of the
      weights; layers with a match stay dense, and the others bear the total
      sparsity. The literature keeps the first layer dense: `'initial'` in the
      package's networks. It cannot be told from the tree, whose order is that
      of the names.
    is_weight: a function of (path, leaf).

  Returns:
    A function from parameters to counts.

  Raises:
    ValueError: if sparsity is outside [0, 1) or a pattern is not a regular
      expression; from the distribution, if a pattern matches no weight or the
      sparsity is impossible with the dense layers and one weight elsewhere.
  """
  return _proportional(sparsity, lambda w: 1.0, dense, is_weight)


def _erdos_renyi_ratio(weight: _Weight, kernel: bool) -> float:
  """(n_1 + n_2 + ...) / (n_1 n_2 ...) over the dimensions that count."""
  shape = weight.shape
  if not kernel:
    # Haiku and Flax end a shape with inputs and outputs; PyTorch and Equinox,
    # whose weights are named so, begin with outputs and inputs.
    outputs_first = weight.path.rsplit('/', 1)[-1] == 'weight'
    shape = shape[:2] if outputs_first else shape[-2:]
  return (sum(shape) or 1) / (math.prod(shape) or 1)


def erdos_renyi(
  sparsity: float,
  kernel: bool = True,
  dense: str | Iterable[str] = (),
  is_weight: IsWeight = leaves.is_weight,
) -> Distribution:
  """Sparser large layers: Erdos-Renyi and its kernel form (ERK).

  Args:
    sparsity: fraction of all weights that are removed, in [0, 1).
    kernel: whether all dimensions of a convolution's kernel count (ERK), or
      only its numbers of inputs and outputs.
    dense: as in `uniform`.
    is_weight: a function of (path, leaf).

  Returns:
    A function from parameters to counts.

  Raises:
    ValueError: as in `uniform`.
  """
  return _proportional(
    sparsity, lambda w: _erdos_renyi_ratio(w, kernel), dense, is_weight
  )


def custom(
  sparsities: Mapping[str, float],
  default: float = 0.0,
  is_weight: IsWeight = leaves.is_weight,
) -> Distribution:
  """A sparsity for each layer, by a pattern of its path.

  Args:
    sparsities: sparsity in [0, 1) by regular expression, searched for in the
      '/'-joined path of a weight. The first that is found decides.
    default: sparsity of the weights in which none is found.
    is_weight: a function of (path, leaf).

  Returns:
    A function from parameters to counts: each layer keeps the number of weights
    nearest to what is asked for, but one at least.

  Raises:
    ValueError: if a sparsity is outside [0, 1) or a pattern is not a regular
      expression; from the distribution, if a pattern matches no weight.
  """
  patterns = _compile(sparsities)
  values = [_check_sparsity(s) for s in sparsities.values()]
  default = _check_sparsity(default)

  def distribution(params: Params) -> Counts:
    weights = _weights(params, is_weight)
    kept = {}
    for weight, hit in zip(weights, _match(patterns, weights)):
      sparsity = default if hit is None else values[hit]
      kept[weight.path] = max(
        min(weight.size, 1), round((1.0 - sparsity) * weight.size)
      )
    return _tree(params, kept)

  return distribution


def sparsities(params: Params, counts: Counts) -> Any:
  """The sparsity of every leaf, 1 - count / size, as a pytree of floats."""

  def sparsity(leaf, count):
    size = math.prod(np.shape(leaf))
    return 1.0 - count / size if size else 0.0

  return jax.tree.map(sparsity, params, counts)

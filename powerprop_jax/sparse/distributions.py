r"""How many weights each layer keeps.

A sparse network of a given total sparsity can spread its weights over the
layers in many ways. The same sparsity everywhere is the simplest; Erdos-Renyi
gives a layer of n_in inputs and n_out outputs a density proportional to
(n_in + n_out) / (n_in n_out), so that the number of weights grows with the sum
of the layer's dimensions rather than with their product; its kernel form (ERK)
takes all dimensions of a convolution's kernel. Small layers would ask for a
density above one: they are capped to dense, and the others share what is left.

A distribution is a function from parameters to *counts*: a pytree of the number
of entries that each leaf keeps, a Python int, which is its size where the leaf
is not a weight. It returns counts and not fractions, since
`floor(density * size)` of a rounded fraction is off by one here and there,
while counts add up to exactly `round((1 - sparsity) * size)` over all weights:
fractions of weights are rounded by largest remainder. Only shapes are read, so
`jax.eval_shape` of an initialisation will do. For a sparsity that grows, prune
`round(s_t / s * (size - count))` entries of each leaf on the way to s.

What the dimensions of a leaf mean is told by `axes`, and not by their number. A
leaf in which whole layers are stacked, as the scanned layers of a transformer,
has a count for each of them, the same as in the network without the scan: an
array of ints of as many dimensions as the leaf has, of length 1 along all but
the axes of the stack.

References:
  Mocanu et al, `Scalable training of artificial neural networks with adaptive
  sparse connectivity <https://arxiv.org/abs/1707.04780>`_, 2018 (Erdos-Renyi).
  Evci et al, `Rigging the lottery <https://arxiv.org/abs/1911.11134>`_, 2020,
  section 3 (ERK, the cap, and the dense first layer of uniform sparsity).
"""

from collections.abc import Callable, Iterable, Mapping
import math
import re
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from powerprop_jax import leaves
from powerprop_jax import types
from powerprop_jax.sparse import masks

#: Maps parameters to the number of weights to keep of each leaf.
Distribution: TypeAlias = Callable[[types.Params], types.Counts]


class _Layer(NamedTuple):
  """A layer: a leaf that is a weight, or one of those stacked in it.

  Attributes:
    path: the path of the leaf.
    size: the number of weights.
    dims: the numbers of inputs and of outputs, as far as there are any.
    taps: the lengths of the dimensions that are neither.
  """

  path: str
  size: int
  dims: tuple[int, ...]
  taps: tuple[int, ...]


class _Leaf(NamedTuple):
  """How many layers a leaf holds, and the shape of their counts."""

  layer: _Layer
  number: int
  counts_shape: tuple[int, ...]


def _leaf(path: types.Path, leaf: jax.Array, axes: types.AxesOf) -> _Leaf:
  shape = tuple(np.shape(leaf))
  stack, inputs, outputs = axes(path, leaf)
  named = {*stack, *inputs, *outputs}
  number = math.prod(shape[i] for i in stack)
  layer = _Layer(
    path=str(path),
    size=math.prod(n for i, n in enumerate(shape) if i not in stack),
    dims=tuple(math.prod(shape[i] for i in d) for d in (inputs, outputs) if d),
    taps=tuple(n for i, n in enumerate(shape) if i not in named),
  )
  ones = [n if i in stack else 1 for i, n in enumerate(shape)]
  return _Leaf(layer, number, tuple(ones) if stack else ())


def _weights(
  params: types.Params, is_weight: types.IsWeight, axes: types.AxesOf
) -> list[_Leaf]:
  """The leaves that are weights, in the order of the tree."""
  leaves.by_path(params)  # Raises if two have one path, by which counts go.
  rows = leaves.weight_rows(params, is_weight)
  found = [_leaf(path, leaf, axes) for path, leaf in rows]
  if not any(leaf.number * leaf.layer.size for leaf in found):
    raise ValueError(
      'There are no weights to make sparse in the parameters: all of'
      f' {[leaf.layer.path for leaf in found]} are of size 0.'
    )
  return found


def _layers(weights: Iterable[_Leaf]) -> list[_Layer]:
  return [leaf.layer for leaf in weights for _ in range(leaf.number)]


def _tree(
  params: types.Params, weights: Iterable[_Leaf], kept: Iterable[int]
) -> types.Counts:
  """The counts of the whole tree from those of its layers."""
  kept, counts = iter(kept), {}
  for leaf in weights:
    numbers = [next(kept) for _ in range(leaf.number)]
    counts[leaf.layer.path] = (
      np.reshape(np.array(numbers, int), leaf.counts_shape)
      if leaf.counts_shape
      else numbers[0]
    )
  return leaves.map_with_path(
    lambda path, x: counts.get(str(path), math.prod(np.shape(x))), params
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
  patterns: list[re.Pattern[str]], weights: list[_Leaf]
) -> list[int | None]:
  """The index of the first pattern found in the path of each layer, or None."""
  paths = [leaf.layer.path for leaf in weights]
  for p in patterns:
    if not any(p.search(path) for path in paths):
      raise ValueError(
        f'The pattern {p.pattern!r} matches no weight; there are {paths}.'
      )
  paths = [layer.path for layer in _layers(weights)]
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
    # What a capped layer leaves over only raises the scale, so that no layer
    # that was capped falls below its cap again.
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
  ratio: Callable[[_Layer], float],
  dense: str | Iterable[str],
  is_weight: types.IsWeight,
  axes: types.AxesOf,
) -> Distribution:
  """The distribution with densities proportional to `ratio`, capped at 1."""
  sparsity = _check_sparsity(sparsity)
  patterns = _compile((dense,) if isinstance(dense, str) else dense)

  def distribution(params: types.Params) -> types.Counts:
    weights = _weights(params, is_weight, axes)
    layers = _layers(weights)
    sizes = [layer.size for layer in layers]
    fixed = [hit is not None for hit in _match(patterns, weights)]
    total = round((1.0 - sparsity) * sum(sizes))
    least = sum(n if f else min(n, 1) for n, f in zip(sizes, fixed))
    if total < least:
      largest = math.floor(1e6 * (1.0 - least / sum(sizes))) / 1e6
      raise ValueError(
        f'A sparsity of {sparsity} is impossible: the dense layers and one'
        f' weight in each of the others make {least} of {sum(sizes)} weights,'
        f' but {total} were asked for. The largest possible sparsity is'
        f' {largest}.'
      )
    quotas = _quotas(sizes, [ratio(layer) for layer in layers], fixed, total)
    return _tree(params, weights, _round(quotas, sizes, fixed, total))

  return distribution


def uniform(
  sparsity: float,
  dense: str | Iterable[str] = (),
  is_weight: types.IsWeight = leaves.is_weight,
  axes: types.AxesOf = leaves.axes,
) -> Distribution:
  """The same sparsity in every layer.

  Args:
    sparsity: the fraction of all weights that are removed, in [0, 1).
    dense: regular expressions searched for in the '/'-joined paths of the
      weights; layers with a match stay dense, and the others bear the total
      sparsity. The literature keeps the first layer dense: `'initial'` in the
      package's networks. The tree does not tell which layer is the first, since
      its order is that of the names.
    is_weight: a function of (path, leaf).
    axes: a function of (path, leaf) that tells which layers are stacked.

  Returns:
    A function from parameters to counts.

  Raises:
    ValueError: if sparsity is outside [0, 1) or a pattern is not a regular
      expression; from the distribution, if there is no weight, a pattern
      matches none, or the sparsity is impossible with the dense layers and one
      weight in each of the others.

  >>> params = {'a': {'w': np.zeros([10, 2])}, 'b': {'w': np.zeros([5, 4])}}
  >>> uniform(0.9)(params)
  {'a': {'w': 2}, 'b': {'w': 2}}
  """
  return _proportional(sparsity, lambda layer: 1.0, dense, is_weight, axes)


def _erdos_renyi_ratio(layer: _Layer, kernel: bool) -> float:
  """(n_1 + n_2 + ...) / (n_1 n_2 ...) over the dimensions that count."""
  dims = (*layer.dims, *layer.taps) if kernel else layer.dims
  return (sum(dims) or 1) / (math.prod(dims) or 1)


def erdos_renyi(
  sparsity: float,
  kernel: bool = True,
  dense: str | Iterable[str] = (),
  is_weight: types.IsWeight = leaves.is_weight,
  axes: types.AxesOf = leaves.axes,
) -> Distribution:
  """Erdos-Renyi and its kernel form (ERK), by which large layers are sparser.

  Args:
    sparsity: the fraction of all weights that are removed, in [0, 1).
    kernel: whether the taps of a convolution's kernel count as well (ERK), or
      only its numbers of inputs and outputs.
    dense: as in `uniform`.
    is_weight: a function of (path, leaf).
    axes: a function of (path, leaf) that tells which dimensions are inputs,
      outputs and stacked layers. An attention kernel of [32, 4, 8] is a layer
      of 32 inputs and 32 outputs.

  Returns:
    A function from parameters to counts.

  Raises:
    ValueError: as in `uniform`.

  >>> params = {'a': {'w': np.zeros([2, 2])}, 'b': {'w': np.zeros([10, 10])}}
  >>> erdos_renyi(0.75)(params)
  {'a': {'w': 4}, 'b': {'w': 22}}
  """
  return _proportional(
    sparsity,
    lambda layer: _erdos_renyi_ratio(layer, kernel),
    dense,
    is_weight,
    axes,
  )


def custom(
  sparsities: Mapping[str, float],
  default: float = 0.0,
  is_weight: types.IsWeight = leaves.is_weight,
  axes: types.AxesOf = leaves.axes,
) -> Distribution:
  """A sparsity for each layer, chosen by a pattern that its path matches.

  Args:
    sparsities: sparsity in [0, 1) by regular expression, searched for in the
      '/'-joined path of a weight. The first that is found decides.
    default: the sparsity of the weights in whose paths none is found.
    is_weight: a function of (path, leaf).
    axes: a function of (path, leaf) that tells which layers are stacked.

  Returns:
    A function from parameters to counts: each layer keeps the number of weights
    nearest to what is asked for, but one at least.

  Raises:
    ValueError: if a sparsity is outside [0, 1) or a pattern is not a regular
      expression; from the distribution, if there is no weight, or a pattern
      matches none.

  >>> params = {'a': {'w': np.zeros([2, 2])}, 'b': {'w': np.zeros([10, 10])}}
  >>> custom({'a': 0.5}, default=0.9)(params)
  {'a': {'w': 2}, 'b': {'w': 10}}
  """
  patterns = _compile(sparsities)
  values = [_check_sparsity(s) for s in sparsities.values()]
  default = _check_sparsity(default)

  def distribution(params: types.Params) -> types.Counts:
    weights = _weights(params, is_weight, axes)
    kept = []
    for layer, hit in zip(_layers(weights), _match(patterns, weights)):
      sparsity = default if hit is None else values[hit]
      kept.append(max(min(layer.size, 1), round((1.0 - sparsity) * layer.size)))
    return _tree(params, weights, kept)

  return distribution


def n_of_m(
  n: int,
  m: int,
  axis: int | None = None,
  is_weight: types.IsWeight = leaves.is_weight,
  axes: types.AxesOf = leaves.axes,
) -> Distribution:
  """Keeps n of every m neighbours, such as the 2 of 4 of sparse tensor cores.

  The counts of the weights are `masks.NOfM`, which say along which axis the
  groups lie; `masks.n_of_m_axes` finds the axis of a mask. They are for
  rankings by layer in `pruning.prune` and in the updaters.

  On several devices, let m divide the length of each shard along the axis. If
  it does not, weights travel between devices when they are ranked, and meshes
  whose axes are explicit refuse it.

  Args:
    n: how many weights of each group are kept, at least 1.
    m: the size of a group, which divides the axis of every weight.
    axis: the axis along which groups lie. None stands for the last axis of the
      inputs, over which a layer sums, as the hardware needs it.
    is_weight: a function of (path, leaf).
    axes: a function of (path, leaf) that tells which dimensions are inputs.

  Returns:
    A function from parameters to counts.

  Raises:
    ValueError: if 1 <= n <= m does not hold; from the distribution, if there is
      no weight, m does not divide an axis, or a weight has no axis of inputs.

  References:
    Mishra et al, `Accelerating sparse deep neural networks
    <https://arxiv.org/abs/2104.08378>`_, 2021.

  >>> n_of_m(2, 4)({'linear': {'w': np.zeros([8, 3]), 'b': np.zeros(3)}})
  {'linear': {'b': 3, 'w': NOfM(n=2, m=4, axis=0)}}
  """
  if not 1 <= n <= m:
    raise ValueError(f'1 <= n <= m must hold, got {n=} and {m=}.')

  def count(path, leaf):
    shape = np.shape(leaf)
    if not is_weight(path, leaf):
      return math.prod(shape)
    inputs = axes(path, leaf).inputs if axis is None else (axis,)
    if not inputs:
      raise ValueError(
        f'The weight {str(path)!r} of the shape {shape} has no axis of inputs.'
        ' Give the axis of the pattern, or axes that tell it.'
      )
    last = inputs[-1]
    pattern = masks.NOfM(n, m, last + len(shape) if last < 0 else last)
    try:
      masks.groups_shape(shape, pattern)
    except ValueError as e:
      raise ValueError(f'{str(path)!r}: {e}') from e
    return pattern

  def distribution(params: types.Params) -> types.Counts:
    leaves.weight_rows(params, is_weight)
    return leaves.map_with_path(count, params)

  return distribution


def sparsities(params: types.Params, counts: types.Counts) -> types.Params:
  """The sparsity of every leaf, 1 - count / size.

  Args:
    params: a pytree of arrays, or of their shapes.
    counts: the counts of these parameters.

  Returns:
    A pytree of floats of the structure of params. The sparsity of a leaf of
    stacked layers is their mean.

  >>> params = {'w': np.zeros([4, 5]), 'b': np.zeros(5)}
  >>> sparsities(params, {'w': 5, 'b': 5})
  {'b': 0.0, 'w': 0.75}
  """

  def sparsity(leaf, count):
    shape = np.shape(leaf)
    size = math.prod(shape)
    return 1.0 - masks.num_entries(count, shape) / size if size else 0.0

  return jax.tree.map(sparsity, params, counts)

"""Masks of weights, and the exact selection of the largest scores.

Sparse networks are kept as a dense tree and a tree of masks of the same
structure. Two masks tell every sparse training method apart: the `forward` one
says which weights the network uses, the `backward` one which weights an update
may move. Section 3 of the paper prunes by magnitude: it keeps the largest
|theta|.

Selection is exact: it keeps k weights, not about k, and ties go to the lower
index. XLA's sort takes seconds for the weights of a ResNet-50 on a CPU, and
none is needed: floats are ordered as integers that are made of their bits, so
the k-th largest score is found bit by bit, by counting how many scores reach a
candidate threshold. Scores that tie at the threshold are ranked by their index
in the same way. Nothing is reshaped, sorted or put together, so that scores may
be sharded over devices along any of their axes, and lie in any number of
leaves: counts are added over leaves and devices, weights do not travel, and a
mask is sharded as its scores are.
"""

from collections.abc import Callable, Sequence
import dataclasses
import fractions
import functools
import math
import operator
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import types

_Tree = TypeVar('_Tree')


class Masks(NamedTuple):
  """The masks of a sparse network, a boolean array for every leaf.

  Leaves that are not weights have masks of ones.

  Attributes:
    forward: the weights in use, theta_used = where(forward, psi(phi), 0).
    backward: the parameters an update moves, phi += where(backward, update, 0).

  >>> mask = {'w': jnp.array([True, False]), 'b': jnp.array([True])}
  >>> masks = Masks(forward=mask, backward=mask)
  >>> apply_mask({'w': jnp.ones(2), 'b': jnp.ones(1)}, masks.forward)['w']
  Array([1., 0.], dtype=float32)
  """

  forward: types.Mask
  backward: types.Mask


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['n'],
  meta_fields=['m', 'axis'],
)
@dataclasses.dataclass(frozen=True)
class NOfM:
  """The count of a leaf that keeps n of every m neighbours along an axis.

  Attributes:
    n: how many of each group are kept, from 0 to m; static or traced.
    m: the size of a group, which divides the length of the axis.
    axis: the axis along which the groups lie, from 0.

  >>> num_entries(NOfM(n=2, m=4, axis=0), (8, 3))  # 6 groups of 4 neighbours.
  12
  """

  n: int | jax.Array
  m: int
  axis: int


#: How many entries of a leaf are kept: a number for the leaf as a whole; or an
#: array of numbers that broadcasts against the leaf, one number for each layer
#: of a stack, whose entries are ranked by themselves; or a pattern.
Count: TypeAlias = int | np.ndarray | jax.Array | NOfM


def is_count(x: Any) -> bool:
  """Whether x is one `Count`, to be passed as `is_leaf` over trees of counts.

  Args:
    x: a node of a tree of counts.

  Returns:
    True for None, which keeps a leaf whole, and for a pattern. Numbers and
    arrays are leaves anyway.

  >>> jax.tree.leaves({'w': NOfM(2, 4, 0), 'b': 7}, is_leaf=is_count)
  [7, NOfM(n=2, m=4, axis=0)]
  """
  return x is None or isinstance(x, NOfM)


def num_entries(count: Count, shape: Sequence[int]) -> int:
  """How many entries of a leaf a count keeps in all.

  Args:
    count: the count, static.
    shape: the shape of the leaf.

  Returns:
    An int.

  >>> num_entries(NOfM(2, 4, axis=0), (8, 3))
  12
  """
  if isinstance(count, NOfM):
    return math.prod(shape) // count.m * int(count.n)
  return int(np.sum(count))


def ones_like(x: Any) -> jax.Array:
  """A mask of ones, sharded as x is.

  A constant would be replicated: under automatic sharding the compiler places
  values by what they are computed from. This one is computed from x.

  Args:
    x: an array, a number, or anything with a shape.

  Returns:
    A boolean array of the shape of x.

  >>> ones_like(jnp.array([2.0, jnp.nan]))
  Array([ True,  True], dtype=bool)
  """
  if not isinstance(x, jax.Array | np.ndarray | np.number):
    return jnp.ones(jnp.shape(x), bool)
  return _is_anything(x)


@functools.partial(jax.jit, inline=True)
def _is_anything(x):
  return (x == x) | (x != x)


def dense(params: types.Params) -> Masks:
  """Masks of ones for every leaf.

  Args:
    params: a pytree of arrays.

  Returns:
    Masks of the structure, the shapes and the shardings of params.

  >>> dense({'w': jnp.zeros(2)}).forward
  {'w': Array([ True,  True], dtype=bool)}
  """
  # Two sets of arrays: a state that held one array twice could not be donated.
  ones = lambda: jax.tree.map(ones_like, params)
  return Masks(forward=ones(), backward=ones())


def check_shapes(tree: Any, mask: types.Mask) -> None:
  """Checks that every mask has the shape of its leaf.

  Args:
    tree: a pytree of arrays, or None where it has no leaf.
    mask: a pytree of boolean arrays.

  Raises:
    ValueError: if a mask has another shape than its leaf.

  >>> check_shapes({'w': jnp.ones(2)}, {'w': jnp.array([False, True])})
  """

  def check(key_path, m, x):
    # Another mask would be broadcast, and the mistake would go unnoticed.
    if x is not None and jnp.shape(m) != jnp.shape(x):
      path = jax.tree_util.keystr(key_path, simple=True, separator='/')
      raise ValueError(
        f'The mask of {path!r} has the shape {jnp.shape(m)}, but the leaf has'
        f' {jnp.shape(x)}. Make the mask from these parameters.'
      )

  jax.tree_util.tree_map_with_path(check, mask, tree)


def apply_mask(tree: _Tree, mask: types.Mask) -> _Tree:
  """Zeroes the entries of a tree where the mask is False.

  It selects and does not multiply: 0 * NaN is NaN, and one diverged update
  would reach weights that the mask protects.

  Args:
    tree: a pytree of arrays. Where it has None, as a gradient has for what is
      frozen, so has the result.
    mask: a pytree of boolean arrays of the same structure and shapes.

  Returns:
    A pytree of the structure, shapes and dtypes of tree.

  Raises:
    ValueError: if a mask has another shape than its leaf.

  >>> tree, mask = {'w': jnp.array([3.0, 4.0])}, {'w': jnp.array([False, True])}
  >>> apply_mask(tree, mask)
  {'w': Array([0., 4.], dtype=float32)}
  """

  def leaf(m, x):
    if x is None:  # An optimiser may have no update for a leaf.
      return None
    # One zero for all shapes, outside of traced functions, compiles once.
    return jnp.where(m, x, jnp.zeros((), jnp.result_type(x)))

  check_shapes(tree, mask)
  return jax.tree.map(leaf, mask, tree)


def check_scope(scope: str, scopes: Sequence[str] = ('layer', 'global')) -> str:
  """Returns the scope of a ranking if it is one of the allowed ones.

  Args:
    scope: 'layer', by which each layer is ranked by itself, or 'global', by
      which all weights are ranked together.
    scopes: the scopes that are allowed.

  Returns:
    The scope.

  Raises:
    ValueError: if the scope is none of them.

  >>> check_scope('layer')
  'layer'
  """
  if scope not in scopes:
    *first, last = map(repr, scopes)
    raise ValueError(
      f'scope must be {", ".join(first)} or {last}, got {scope!r}.'
    )
  return scope


def check_density(density: float) -> float:
  """Returns a density if it is possible.

  Args:
    density: the fraction of weights that are kept, 1 - sparsity.

  Returns:
    The density as a float: of a number of less than double precision, such as
    those of an array of densities, the shortest decimal that rounds to it.

  Raises:
    ValueError: if it is not in (0, 1].

  >>> check_density(1), check_density(jnp.float32(0.7))
  (1.0, 0.7)
  """
  value = _float(density)
  if not 0.0 < value <= 1.0:
    raise ValueError(
      f'density must be in (0, 1], got {density}. It is the fraction of weights'
      ' that are kept, 1 - sparsity.'
    )
  return value


def _float(number: Any) -> float:
  """The decimal that a number stands for, as a float."""
  if isinstance(number, str) or callable(number):
    raise ValueError(f'density must be a number, got {number!r}.')
  array = np.asarray(number)
  return float(str(array[()]) if array.dtype.itemsize < 8 else array)


# How far a float may be off from the number that it stands for: 1 - 0.9 is less
# than 1/10 by 2.2e-17, and 0.29 is less than 29/100 by 2.0e-17.
_ROUNDING = fractions.Fraction(1, 2**51)
# The same for float32, in units of 2^-12 millionths, is 4.5e-8. A number in
# [0, 1] is off by 2^-25 at most, and its difference from 1 by one and a half
# times as much.
_ROUNDING_FLOAT32 = 185
# Decimals of six places are further apart than that.
_DECIMALS = 10**6


def floor_multiply(
  fraction: float | jax.Array, size: int | jax.Array
) -> int | jax.Array:
  """floor(fraction * size), counted in integers.

  Floats stand for the numbers that they were rounded from. The float 0.29 is
  less than 29/100 and `1 - 0.9` is less than 1/10, so that the floor of their
  products with 100 and 1000 would be 28 and 99. An integer therefore counts as
  reached if the product falls short of it by no more than rounding explains.
  Decimals of up to six places, their differences from 1, and `k / size` count
  exactly.

  Args:
    fraction: a number in [0, 1]. An array is taken as a float32 number: as the
      decimal of six places that lies within its rounding error, if there is
      one, and as it is otherwise. It is multiplied exactly, for a float32
      product is off by more than one beyond 2^24 entries.
    size: the number of entries, below 2^31; an int, or an integer scalar if the
      fraction is an array.

  Returns:
    An int, or an int32 scalar if the fraction is an array, traced or not.

  >>> floor_multiply(0.29, 100), floor_multiply(1 - 0.9, 1000)
  (29, 100)
  """
  if not isinstance(fraction, jax.Array):
    exact = fractions.Fraction(_float(fraction)) + _ROUNDING
    return min(math.floor(exact * int(size)), int(size))
  fraction = jnp.clip(fraction.astype(jnp.float32), 0.0, 1.0)
  size = jnp.asarray(size).astype(jnp.uint32)
  # In units of 2^-12 millionths, rounded to the nearest millionth.
  nearest = _binary_floor(fraction, jnp.uint32(_DECIMALS << 12)) + (1 << 11)
  off = jnp.abs((nearest & 0xFFF).astype(jnp.int32) - (1 << 11))
  nearest >>= 12
  # A number below a millionth has more digits than these places can hold.
  decimal = (off <= _ROUNDING_FLOAT32) & (nearest > 0)
  return jnp.where(
    decimal, _decimal_floor(nearest, size), _binary_floor(fraction, size)
  ).astype(jnp.int32)


def _binary_floor(fraction: jax.Array, size: jax.Array) -> jax.Array:
  """floor(fraction * size) for a float32 fraction in [0, 1], exactly."""
  bits = jax.lax.bitcast_convert_type(fraction, jnp.uint32)
  exponent, mantissa = bits >> 23, (bits & 0x7FFFFF) | 0x800000
  # fraction = mantissa / 2^(150 - exponent). mantissa * size takes 55 bits: add
  # it up by the bytes of size, lowest first, and drop 24 bits on the way.
  product = jnp.uint32(0)
  for byte in (0, 8, 16):
    product = (product + mantissa * ((size >> byte) & 0xFF)) >> 8
  product += mantissa * (size >> 24)
  # 126 - exponent wraps around for NaN and -0, and the shift by 31 leaves 0.
  kept = product >> jnp.minimum(126 - exponent, 31)
  return jnp.where(fraction == 1.0, size, kept)


def _decimal_floor(millionths: jax.Array, size: jax.Array) -> jax.Array:
  """floor(millionths * size / 10^6), exactly."""
  millions, rest = size // _DECIMALS, size % _DECIMALS
  # millionths * rest takes 40 bits: add it up by digits to the base of 1000,
  # lowest first, and drop them on the way.
  product = millionths % 1000 * rest // 1000
  return millionths * millions + (product + millionths // 1000 * rest) // 1000


def num_kept(density: float | jax.Array, size: int) -> int | jax.Array:
  """floor(density * size): how many entries a density keeps.

  Args:
    density: the fraction to keep, in (0, 1], read as `floor_multiply` reads it:
      decimal fractions count exactly.
    size: the number of entries, below 2^31.

  Returns:
    An int, or an int32 scalar if the density is an array.

  Raises:
    ValueError: if a density that is not an array is outside (0, 1].

  >>> num_kept(0.07, 100)
  7
  """
  if not isinstance(density, jax.Array):
    density = check_density(density)
  return floor_multiply(density, size)


def check_rankable(size: int) -> int:
  """Raises ValueError for a number of weights that int32 cannot count.

  >>> check_rankable(5)
  5
  """
  if size >= 2**31:
    raise ValueError(
      f'At most 2^31 - 1 weights can be ranked together, got {size:,}. Rank'
      " fewer of them at once, by scope='layer' or by parts of the tree."
    )
  return size


def _ordered_bits(scores: jax.Array) -> jax.Array:
  """Unsigned integers in the order of the scores; NaN lowest, -0 with 0."""
  if scores.dtype in (jnp.bfloat16, jnp.float16):
    scores = scores.astype(jnp.float32)
  uint = jnp.uint64 if scores.dtype == jnp.float64 else jnp.uint32
  top = uint(1 << (jnp.iinfo(uint).bits - 1))
  bits = jax.lax.bitcast_convert_type(scores, uint)
  # Not by `scores == 0`: XLA on a CPU takes every denormal for equal to zero.
  bits = jnp.where(bits == top, uint(0), bits)
  bits = jnp.where(bits & top != 0, ~bits, bits | top)
  return jnp.where(jnp.isnan(scores), uint(0), bits)


def _add(x: Sequence[Any], y: Sequence[Any]) -> tuple[Any, ...]:
  return tuple(a + b for a, b in zip(x, y))


def _kth_largest(
  reach: Callable[[jax.Array], list[jax.Array]],
  k: jax.Array,
  axes: Sequence[int] | None,
  width: int,
  needed: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The largest t that at least k of some values reach.

  Args:
    reach: which values reach a candidate, a uint32 or uint64 in the shape of k,
      as boolean arrays. The values are ranked together and are below 2^width.
    k: a number; or an array that broadcasts against the values, with a number
      for each group of them that is ranked by itself.
    axes: the axes over which a group extends; None for all axes.
    width: the number of bits, which is even.
    needed: whether to look for t at all, or to return 0.

  Returns:
    t, how many values reach it, and how many exceed it, in the shape of k.
  """
  uint = jnp.uint64 if width > 32 else jnp.uint32

  def count(candidates):
    def of(*reached):
      reached = tuple(r.astype(jnp.int32) for r in reached)
      zero, over = (jnp.zeros([], jnp.int32),) * 3, range(reached[0].ndim)
      counts = jax.lax.reduce(reached, zero, _add, tuple(axes or over))
      return [c if axes is None else jnp.expand_dims(c, axes) for c in counts]

    return functools.reduce(_add, map(of, *map(reach, candidates)))

  # Two bits at a time: one pass over memory counts for three candidates.
  def body(i, carry):
    t, reached, above = carry
    shift = jnp.asarray(width - 2 - 2 * i, uint)
    counts = count([t | (uint(d) << shift) for d in (1, 2, 3)])
    digit = sum((c >= k).astype(uint) for c in counts)

    def at(xs):
      return sum(jnp.where(digit == d, x, 0) for d, x in enumerate(xs))

    return t | (digit << shift), at([reached, *counts]), at([*counts, above])

  values = reach(jnp.zeros(k.shape, uint))
  size = sum(x.size for x in values) // max(k.size, 1)
  # Sharded as the counts are, and varying over the axes of a shard_map as they
  # do, which loops ask for.
  zeros = jnp.zeros_like(k, jnp.int32)
  for x in values:
    none = jnp.zeros_like(x, jnp.int32)
    zeros += jnp.sum(none, axes, jnp.int32, keepdims=axes is not None)
  start = zeros.astype(uint), zeros + size, zeros
  return jax.lax.fori_loop(0, jnp.where(needed, width // 2, 0), body, start)


def _ties(
  bits: Sequence[jax.Array], threshold: jax.Array, place: jax.Array
) -> list[jax.Array]:
  """Which values equal the threshold, and are not beyond a place in the order.

  Args:
    bits: arrays of unsigned integers.
    threshold: the value of interest.
    place: the place of the last one, counted from the end, from 1.

  Returns:
    Boolean arrays of the shapes of bits.
  """
  # Without this barrier the index of every entry, which does not depend on the
  # place, would be computed once, ahead of the loop over places, and be written
  # to memory, which is twice as much as a pass over the values takes.
  one, threshold, place = jax.lax.optimization_barrier(
    (jnp.uint32(1), threshold, place)
  )
  left, found = sum(b.size for b in bits), []
  for b in bits:
    index, stride = jnp.uint32(0), b.size
    for axis, n in enumerate(b.shape):
      stride //= max(n, 1)
      along = jax.lax.broadcasted_iota(jnp.uint32, b.shape, axis)
      index += along * (stride * one)
    found.append((b == threshold) & (left - index >= place))
    left -= b.size
  return found


# Leaves of one shape are traced once. XLA compiles each of them all the same.
@functools.partial(jax.jit, static_argnums=2)
def _compiled_largest(
  scores: Sequence[jax.Array], count: jax.Array, axes: Sequence[int] | None
) -> list[jax.Array]:
  dtype = jnp.result_type(*scores)
  bits = [_ordered_bits(s.astype(dtype)) for s in scores]
  threshold, reached, above = _kth_largest(
    lambda t: [b >= t for b in bits],
    count,
    axes,
    jnp.iinfo(bits[0].dtype).bits,
  )

  width = sum(s.size for s in scores).bit_length()
  last, _, _ = _kth_largest(
    functools.partial(_ties, bits, threshold),
    count - above,
    axes,
    width + width % 2,
    # Scores that differ seldom tie at the threshold.
    needed=jnp.any(reached != count),
  )
  ties = _ties(bits, threshold, last)
  return [(b > threshold) | tie for b, tie in zip(bits, ties)]


def _largest(
  scores: Sequence[jax.Array], count: Any, axes: Sequence[int] | None
) -> list[jax.Array]:
  """The masks of the largest scores, which are ranked together."""
  check_rankable(sum(s.size for s in scores))
  return _compiled_largest(scores, jnp.asarray(count, jnp.int32), axes)


def group_axes(count: Any, ndim: int) -> tuple[int, ...]:
  """The axes over which the entries of a leaf are ranked together.

  Args:
    count: a number, or an array that broadcasts against the leaf.
    ndim: the number of the leaf's dimensions.

  Returns:
    The axes: all of them for a number, and for an array those along which its
    length is 1.

  >>> group_axes(np.array([[[3]], [[2]]]), ndim=3)
  (1, 2)
  """
  shape = jnp.shape(count)
  return tuple(i for i in range(ndim) if not shape or shape[i] == 1)


def num_groups(count: Count | int) -> int:
  """How many groups of a leaf are ranked by themselves.

  Args:
    count: a number or a pattern, or an array with a number for each group.

  Returns:
    An int; 1 for a pattern, whose groups are not layers.

  >>> num_groups(3), num_groups(np.ones([4, 1, 1]))
  (1, 4)
  """
  return 1 if isinstance(count, NOfM) else max(math.prod(np.shape(count)), 1)


def count_by_group(mask: jax.Array, count: Any) -> jax.Array:
  """How many entries of a mask are True, group by group.

  Args:
    mask: a boolean array.
    count: a number or an array, which says what the groups are (`group_axes`).

  Returns:
    An int32 array of the shape of count.

  >>> count_by_group(jnp.array([[True, True], [True, False]]), np.ones([2, 1]))
  Array([[2],
         [1]], dtype=int32)
  """
  axes = group_axes(count, mask.ndim)
  keep = bool(jnp.shape(count))
  return jnp.sum(mask, axis=axes, keepdims=keep, dtype=jnp.int32)


def _check_scores(scores: Any) -> jax.Array:
  scores = jnp.asarray(scores)
  if not jnp.issubdtype(scores.dtype, jnp.floating):
    raise ValueError(f'scores must be floating point, got {scores.dtype}.')
  return scores


def _check_count(count: Any, shape: Sequence[int]) -> Any:
  """The count, as an int or an array; raises ValueError if it is impossible."""
  counts = np.shape(count)
  if counts and not (
    len(counts) == len(shape)
    and all(n in (1, size) for n, size in zip(counts, shape))
  ):
    raise ValueError(
      f'A count of the shape {counts} does not broadcast against scores of the'
      f' shape {tuple(shape)}. Its axes must have the length 1, or that of the'
      ' scores where each layer of a stack is ranked by itself.'
    )
  if isinstance(count, jax.Array):
    return count
  # `operator.index` takes integers of numpy too.
  count = np.asarray(count) if counts else operator.index(count)
  size = math.prod(shape) // max(math.prod(counts), 1)
  if np.any(np.less(count, 0) | np.greater(count, size)):
    raise ValueError(f'count must be in [0, {size}], got {count}.')
  return count


def top_count_mask(
  scores: jax.Array, count: int | np.ndarray | jax.Array
) -> jax.Array:
  """The mask of exactly `count` largest scores; ties go to the lower index.

  The function can be jit-compiled, with a static or traced count, and vmapped.
  It takes a dozen passes over the scores, twice as many if there are ties at
  the smallest score that is kept, and no sort. The mask is sharded as the
  scores are.

  Args:
    scores: a floating point array of any shape. NaN ranks below -inf.
    count: how many to keep, from 0 to the size of scores. An array has as many
      dimensions as the scores, each of length 1 or of the length that the
      scores have there, and each of its entries counts for a part of the scores
      that is ranked by itself: a count of shape [layers, 1, 1] does so for the
      layers of a stack of shape [layers, inputs, outputs].

  Returns:
    A boolean array of the shape of scores, of which `count` entries are True.

  Raises:
    ValueError: if scores are not floats, or a count is out of range or of
      another shape.

  >>> top_count_mask(jnp.array([0.1, 0.5, 0.3, 0.5]), 2)
  Array([False,  True, False,  True], dtype=bool)
  >>> top_count_mask(jnp.array([[0.1, 0.5], [3.0, 4.0]]), np.array([[1], [0]]))
  Array([[False,  True],
         [False, False]], dtype=bool)
  """
  scores = _check_scores(scores)
  count = _check_count(count, scores.shape)
  if isinstance(count, int):
    if count in (0, scores.size):
      whole = ones_like(scores)
      return whole if count else ~whole
  elif not scores.size:
    return ones_like(scores)
  # Over all axes at once the compiler is quicker than over each of them.
  axes = group_axes(count, scores.ndim) if jnp.shape(count) else None
  return _largest([scores], count, axes)[0]


def n_of_m_mask(scores: jax.Array, count: NOfM) -> jax.Array:
  """The mask of the n largest of every m neighbours.

  Ties go to the lower index.

  Args:
    scores: a floating point array of any shape. NaN ranks below -inf.
    count: the pattern. Its n may be an array that broadcasts against the shape
      of the scores in which the axis is split in two, [groups, 1].

  Returns:
    A boolean array of the shape of scores.

  Raises:
    ValueError: if scores are not floats, or m does not divide the axis.

  >>> n_of_m_mask(jnp.array([0.1, 0.5, 0.3, 0.5]), NOfM(1, 2, axis=0))
  Array([False,  True, False,  True], dtype=bool)
  """
  scores = _check_scores(scores)
  grouped = _ordered_bits(scores).reshape(groups_shape(scores.shape, count))
  axis = count.axis + 1
  places = jax.lax.broadcasted_iota(jnp.int32, grouped.shape, axis)
  ahead = jnp.zeros(grouped.shape, jnp.int32)
  for i in range(count.m):
    other = jax.lax.slice_in_dim(grouped, i, i + 1, axis=axis)
    first = (other > grouped) | ((other == grouped) & (i < places))
    ahead += first.astype(jnp.int32)
  return (ahead < count.n).reshape(scores.shape)


def groups_shape(shape: Sequence[int], count: NOfM) -> tuple[int, ...]:
  """The shape of a leaf in which the axis of a pattern is split into groups.

  Args:
    shape: the shape of the leaf.
    count: the pattern.

  Returns:
    The shape with the length d of the axis as two lengths, d / m and m.

  Raises:
    ValueError: if m does not divide the axis, or there is no such axis.

  >>> groups_shape((3, 8), NOfM(2, 4, axis=1))
  (3, 2, 4)
  """
  shape, axis, m = tuple(shape), count.axis, count.m
  if not 0 <= axis < len(shape) or shape[axis] % m:
    raise ValueError(
      f'{m} does not divide the axis {axis} of the shape {shape}. Choose'
      ' another pattern for this leaf, or leave it out by is_weight.'
    )
  return (*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])


def n_of_m_axes(mask: jax.Array | np.ndarray, n: int, m: int) -> list[int]:
  """The axes along which a mask keeps no more than n of every m neighbours.

  Args:
    mask: a boolean array, not traced.
    n: how many of each group may be True.
    m: the size of a group.

  Returns:
    The axes, in order. Those whose length m does not divide are left out.

  >>> n_of_m_axes(np.array([[True, True], [False, False]]), 1, 2)
  [0]
  """

  mask = np.asarray(mask)

  def holds(axis):
    grouped = mask.reshape(groups_shape(mask.shape, NOfM(n, m, axis)))
    return bool((grouped.sum(axis + 1) <= n).all())

  axes = range(mask.ndim)
  return [i for i in axes if mask.shape[i] % m == 0 and holds(i)]


def topk_mask(scores: jax.Array, density: float | jax.Array) -> jax.Array:
  """The mask of the floor(density * size) largest scores.

  Args:
    scores: a floating point array of any shape. NaN ranks below -inf.
    density: the fraction to keep, in (0, 1]; static or traced. Decimal
      fractions count exactly, as in `num_kept`.

  Returns:
    A boolean array of the shape of scores; exactly floor(density * size)
    entries are True, and ties go to the lower index.

  Raises:
    ValueError: if scores are not floats, or a density that is not an array is
      outside (0, 1].

  >>> topk_mask(jnp.array([0.1, 0.5, 0.3, 0.5]), 0.5)
  Array([False,  True, False,  True], dtype=bool)
  """
  return top_count_mask(
    scores, num_kept(density, check_rankable(jnp.size(scores)))
  )


def layerwise_topk(scores: types.Params, counts: types.Counts) -> types.Mask:
  """The mask of the largest scores, where every layer is ranked by itself.

  Args:
    scores: a pytree of floating point arrays.
    counts: a `Count` for each leaf; None keeps the leaf whole.

  Returns:
    A pytree of boolean arrays of the structure and the shapes of scores.

  Raises:
    ValueError: as `top_count_mask` and `n_of_m_mask`.

  >>> scores = {'w': jnp.array([1.0, 3.0, 2.0]), 'b': jnp.zeros(1)}
  >>> layerwise_topk(scores, {'w': 2, 'b': None})['w']
  Array([False,  True,  True], dtype=bool)
  """

  def mask(n, s):
    if s is None:  # There is no leaf, as where Equinox has filtered one out.
      return None
    # What is kept whole is not ranked, and may be of any dtype.
    if n is None or (isinstance(n, int) and n == jnp.size(s)):
      return ones_like(s)
    if isinstance(n, NOfM):
      return n_of_m_mask(s, n)
    return top_count_mask(s, n)

  return jax.tree.map(mask, counts, scores, is_leaf=is_count)


def global_topk(scores: types.Params, count: Count, weights: Any) -> types.Mask:
  """The mask of the largest scores, where all weights are ranked together.

  Args:
    scores: a pytree of floating point arrays. Across layers, compare |theta|
      and not |phi|: the order is the same only where alpha is.
    count: the total number of entries to keep.
    weights: a pytree of bools, as `leaves.weight_mask` returns it; leaves at
      False are kept whole and not counted.

  Returns:
    A pytree of boolean arrays of the structure and the shapes of scores, of
    which `count` entries are True at weights. Ties go to the earlier leaf, and
    to the lower index within a leaf.

  Raises:
    ValueError: if scores are not floats or a static count is out of range.

  >>> scores = {'a': jnp.array([1.0, 3.0]), 'b': jnp.array([2.0])}
  >>> global_topk(scores, 2, {'a': True, 'b': True})
  {'a': Array([False,  True], dtype=bool), 'b': Array([ True], dtype=bool)}
  """
  flat, treedef = jax.tree.flatten(scores)
  chosen = jax.tree.leaves(weights)
  ranked = [_check_scores(s) for s, w in zip(flat, chosen) if w]
  size = sum(s.size for s in ranked)
  count = _check_count(count, (size,))
  if isinstance(count, int) and count in (0, size):
    wholes = map(ones_like, ranked)
    found = iter([whole if count else ~whole for whole in wholes])
  else:
    found = iter(_largest(ranked, count, None))
  return jax.tree.unflatten(
    treedef,
    [next(found) if w else ones_like(s) for s, w in zip(flat, chosen)],
  )


def count(mask: types.Mask, weights: Any) -> tuple[jax.Array, int]:
  """The number of weights that are kept, and the number of weights.

  Args:
    mask: a pytree of boolean arrays.
    weights: a pytree of bools, as `leaves.weight_mask` returns it. Leaves at
      False, such as biases, are left out of both numbers.

  Returns:
    An int32 scalar, or one of float32 if the second number is 2^31 or more, and
    an int.

  >>> mask = {'w': jnp.array([True, False]), 'b': jnp.array([True])}
  >>> count(mask, {'w': True, 'b': False})
  (Array(1, dtype=int32), 2)
  """
  chosen = [
    m for m, w in zip(jax.tree.leaves(mask), jax.tree.leaves(weights)) if w
  ]
  size = sum(m.size for m in chosen)
  if size < 2**31:
    kept = sum(jnp.sum(m, dtype=jnp.int32) for m in chosen)
    return jnp.asarray(kept), size
  # Rows by integers, which are exact, and their sums by floats.
  rows = (jnp.sum(m, axis=-1, dtype=jnp.int32) for m in chosen)
  kept = sum(jnp.sum(n, dtype=jnp.float32) for n in rows)
  return jnp.asarray(kept), size


def overlap(a: types.Mask, b: types.Mask, weights: Any) -> jax.Array:
  """The fraction of the weights kept by a that b keeps too.

  Two random masks of density p overlap by p, the chance level. The number is
  symmetric if both keep equally many.

  Args:
    a: a pytree of boolean arrays.
    b: a pytree of boolean arrays of the same structure.
    weights: a pytree of bools: the leaves that count.

  Returns:
    A float scalar in [0, 1]; NaN if a keeps nothing.

  >>> a, b = {'w': jnp.array([True, True])}, {'w': jnp.array([True, False])}
  >>> float(overlap(a, b, {'w': True}))
  0.5
  """
  both = jax.tree.map(jnp.logical_and, a, b)
  return count(both, weights)[0] / count(a, weights)[0]


def pack(mask: types.Mask) -> Any:
  """Packs a tree of masks to one bit per entry.

  Args:
    mask: a pytree of boolean arrays.

  Returns:
    A pytree of uint8 vectors of ceil(size / 8) bytes.

  >>> pack({'w': jnp.array([[True, False], [True, True]])})
  {'w': Array([176], dtype=uint8)}
  """
  return jax.tree.map(lambda m: jnp.packbits(m.ravel()), mask)


def unpack(packed: Any, like: types.Params) -> types.Mask:
  """The tree of masks that `pack` packed.

  Args:
    packed: a pytree of uint8 vectors.
    like: a pytree of arrays of the shapes of the masks.

  Returns:
    A pytree of boolean arrays of the structure and the shapes of like.

  >>> unpack({'w': jnp.array([176], jnp.uint8)}, {'w': jnp.zeros([2, 2])})['w']
  Array([[ True, False],
         [ True,  True]], dtype=bool)
  """
  return jax.tree.map(
    lambda p, x: (
      jnp.unpackbits(p, count=jnp.size(x)).astype(bool).reshape(jnp.shape(x))
    ),
    packed,
    like,
  )

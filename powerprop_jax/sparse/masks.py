"""Masks of weights, and the exact selection of the largest scores.

Sparse networks are kept as a dense tree and a tree of masks of the same
structure. Two masks tell every sparse training method apart: the `forward` one
says which weights the network uses, the `backward` one which weights an update
may move. Section 3 of the paper prunes by magnitude: keep the largest |theta|.

Selection is exact: k weights, not about k; ties go to the lower index. XLA's
sort takes seconds for the weights of a ResNet-50 on a CPU, and none is needed:
non-negative floats are ordered as the integers that share their bits, so the
k-th largest score is found bit by bit, by counting how many scores reach a
candidate threshold.
"""

import fractions
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any  # A pytree of arrays.
Mask = Any  # A pytree of boolean arrays.


class Masks(NamedTuple):
  """The masks of a sparse network, a boolean array for every leaf.

  Leaves that are not weights have masks of ones.

  Attributes:
    forward: the weights in use, theta_used = where(forward, psi(phi), 0).
    backward: the parameters an update moves, phi += where(backward, update, 0).
  """

  forward: Mask
  backward: Mask


def dense(params: Params) -> Masks:
  """Masks of ones for every leaf of params."""
  # Two sets of arrays: a state that held one array twice could not be donated.
  ones = lambda: jax.tree.map(lambda x: jnp.ones(jnp.shape(x), bool), params)
  return Masks(forward=ones(), backward=ones())


def apply_mask(tree: Params, mask: Mask) -> Params:
  """Zeroes the entries of a tree where the mask is False.

  A selection and not a product: 0 * NaN is NaN, and one diverged update would
  reach weights that the mask protects.

  Args:
    tree: a pytree of arrays. Where it has None, as a gradient has for what is
      frozen, so has the result.
    mask: a pytree of boolean arrays of the same structure and shapes.

  Returns:
    A pytree of the structure, shapes and dtypes of tree.
  """
  return jax.tree.map(
    lambda m, x: None if x is None else jnp.where(m, x, jnp.zeros_like(x)),
    mask,
    tree,
  )


def check_density(density: float) -> float:
  """Returns density as a float; raises ValueError if it is not in (0, 1]."""
  if not 0.0 < float(density) <= 1.0:
    raise ValueError(
      f'density must be in (0, 1], got {density}. It is the fraction of weights'
      ' that are kept, 1 - sparsity.'
    )
  return float(density)


# How far a float may be off from the number that it stands for: 1 - 0.9 is less
# than 1/10 by 2.2e-17, and 0.29 is less than 29/100 by 2.0e-17.
_ROUNDING = fractions.Fraction(1, 2**51)
# In 2^-12 of millionths: 4.5e-8. A float32 number in [0, 1] is off by 2^-25 at
# most, and its difference from 1 by one and a half times as much.
_ROUNDING_FLOAT32 = 185
# The decimals of six places are further apart than that.
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
    exact = fractions.Fraction(float(fraction)) + _ROUNDING
    return min(math.floor(exact * int(size)), int(size))
  fraction = jnp.clip(fraction.astype(jnp.float32), 0.0, 1.0)
  size = jnp.asarray(size).astype(jnp.uint32)
  # In 2^-12 of millionths, rounded to the nearest millionth.
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


def _kth_largest(bits: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The largest t that k of the unsigned integers reach; how many exceed it."""
  width, uint = jnp.iinfo(bits.dtype).bits, bits.dtype.type
  zero = jnp.zeros([], jnp.int32)

  def add(x, y):
    return tuple(a + b for a, b in zip(x, y))

  # Two bits at a time: one pass over memory counts for three candidates.
  def body(i, carry):
    t, above = carry
    shift = jnp.asarray(width - 2 - 2 * i, bits.dtype)
    reached = [bits >= (t | (uint(d) << shift)) for d in (1, 2, 3)]
    counts = jax.lax.reduce(
      tuple(r.astype(jnp.int32) for r in reached), (zero,) * 3, add, (0,)
    )
    digit = sum((c >= k).astype(bits.dtype) for c in counts)
    return t | (digit << shift), jnp.stack([*counts, above])[digit]

  return jax.lax.fori_loop(0, width // 2, body, (uint(0), zero))


_BLOCK = 1024


def _nth(chosen: jax.Array, n: jax.Array) -> jax.Array:
  """The index of the n-th True of a boolean vector, n >= 1.

  A running sum over every entry is slow in XLA on a CPU; one over the counts of
  blocks, and one over the block in which the n-th lies, are not.
  """
  blocks = jnp.pad(chosen, (0, -chosen.size % _BLOCK)).reshape(-1, 16, 64)
  # In bytes first, along the slower axis: eight times faster than in int32.
  counts = jnp.sum(blocks, axis=1, dtype=jnp.uint8)
  counts = jnp.sum(counts, axis=1, dtype=jnp.int32)
  ends = jnp.cumsum(counts)
  block = jnp.minimum(jnp.sum(ends < n), len(counts) - 1)
  running = jnp.cumsum(blocks[block].ravel().astype(jnp.int32))
  inside = jnp.sum(running < n - (ends[block] - counts[block]))
  return block * _BLOCK + inside


def top_count_mask(scores: jax.Array, count: int | jax.Array) -> jax.Array:
  """The mask of exactly `count` largest scores; ties go to the lower index.

  Can be jit-compiled, with a static or traced count, and vmapped. Takes a dozen
  passes over the scores and no sort.

  Args:
    scores: a floating point array of any shape. NaN ranks below -inf.
    count: how many to keep, from 0 to the size of scores.

  Returns:
    A boolean array of the shape of scores with `count` True.

  Raises:
    ValueError: if scores are not floats or a static count is out of range.
  """
  scores = jnp.asarray(scores)
  if not jnp.issubdtype(scores.dtype, jnp.floating):
    raise ValueError(f'scores must be floating point, got {scores.dtype}.')
  if not isinstance(count, jax.Array):
    count = operator.index(count)  # Integers of numpy too.
    if not 0 <= count <= scores.size:
      raise ValueError(f'count must be in [0, {scores.size}], got {count}.')
    if count in (0, scores.size):
      return jnp.full(scores.shape, count > 0)
  return _top_count(scores, jnp.asarray(count, jnp.int32))


# Leaves of one shape are traced once. XLA compiles each of them all the same.
@jax.jit
def _top_count(scores, count):
  bits = _ordered_bits(scores.ravel())
  threshold, above = _kth_largest(bits, count)
  ties = bits == threshold
  # Fewer than count are above, so that at least one tie is kept.
  last = _nth(ties, count - above)
  kept = ties & (jnp.arange(scores.size) <= last)
  return ((bits > threshold) | kept).reshape(scores.shape)


def topk_mask(scores: jax.Array, density: float | jax.Array) -> jax.Array:
  """The mask of the floor(density * size) largest scores.

  Args:
    scores: a floating point array of any shape. NaN ranks below -inf.
    density: the fraction to keep, in (0, 1]; static or traced.

  Returns:
    A boolean array of the shape of scores; exactly floor(density * size)
    entries are True, and ties go to the lower index.

  Raises:
    ValueError: if a density that is not traced is outside (0, 1].
  """
  return top_count_mask(scores, num_kept(density, jnp.size(scores)))


def layerwise_topk(scores: Params, counts: Any) -> Mask:
  """Ranks every leaf by itself.

  Args:
    scores: a pytree of floating point arrays.
    counts: the number of entries to keep of each leaf, a pytree of ints; None
      keeps the leaf whole.

  Returns:
    A pytree of boolean arrays.
  """

  def mask(n, s):
    if s is None:  # No leaf, as where Equinox has filtered one out.
      return None
    # What is kept whole is not ranked, and may be of any dtype.
    if n is None or (not isinstance(n, jax.Array) and n == jnp.size(s)):
      return jnp.ones(jnp.shape(s), bool)
    return top_count_mask(s, n)

  return jax.tree.map(mask, counts, scores, is_leaf=lambda n: n is None)


def global_topk(scores: Params, count: int | jax.Array, weights: Any) -> Mask:
  """Ranks the entries of all weights together.

  Args:
    scores: a pytree of floating point arrays. Across layers, compare |theta|
      and not |phi|: the order is the same only where alpha is.
    count: the total number of entries to keep.
    weights: a pytree of bools, as of `leaves.weight_mask`; leaves at False are
      kept whole and not counted.

  Returns:
    A pytree of boolean arrays, `count` True at weights.
  """
  leaves, treedef = jax.tree.flatten(scores)
  chosen = jax.tree.leaves(weights)
  ranked = [s for s, w in zip(leaves, chosen) if w]
  flat = top_count_mask(jnp.concatenate([s.ravel() for s in ranked]), count)
  ends = [0]
  for s in ranked:
    ends.append(ends[-1] + s.size)
  parts = iter(
    flat[a:b].reshape(s.shape) for a, b, s in zip(ends, ends[1:], ranked)
  )
  return jax.tree.unflatten(
    treedef,
    [
      next(parts) if w else jnp.ones(s.shape, bool)
      for s, w in zip(leaves, chosen)
    ],
  )


def count(mask: Mask, weights: Any) -> tuple[jax.Array, int]:
  """The number of weights that are kept, and the number of weights.

  Args:
    mask: a pytree of boolean arrays.
    weights: a pytree of bools. Biases are no weights, and a zero bias is not a
      pruned one: leaves at False are left out of both numbers.

  Returns:
    An int32 scalar and an int.
  """
  chosen = [
    m for m, w in zip(jax.tree.leaves(mask), jax.tree.leaves(weights)) if w
  ]
  kept = sum(jnp.sum(m, dtype=jnp.int32) for m in chosen)
  return jnp.asarray(kept), sum(m.size for m in chosen)


def overlap(a: Mask, b: Mask, weights: Any) -> jax.Array:
  """The fraction of the weights kept by a that b keeps too.

  Two random masks of density p overlap by p, the chance level. The number is
  symmetric if both keep equally many.

  Args:
    a: a pytree of boolean arrays.
    b: a pytree of boolean arrays of the same structure.
    weights: a pytree of bools: the leaves that count.

  Returns:
    A float scalar in [0, 1]; NaN if a keeps nothing.
  """
  both = jax.tree.map(jnp.logical_and, a, b)
  return count(both, weights)[0] / count(a, weights)[0]


def pack(mask: Mask) -> Any:
  """Packs a tree of masks to one bit an entry: uint8 vectors."""
  return jax.tree.map(lambda m: jnp.packbits(m.ravel()), mask)


def unpack(packed: Any, like: Params) -> Mask:
  """The tree of masks that `pack` packed; the shapes are those of `like`."""
  return jax.tree.map(
    lambda p, x: (
      jnp.unpackbits(p, count=jnp.size(x)).astype(bool).reshape(jnp.shape(x))
    ),
    packed,
    like,
  )

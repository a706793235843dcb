r"""Codes of the positions in a mask, close to the shortest that are possible.

A mask with k of n entries kept takes at least log2 C(n, k) bits, if nothing is
known of it but k: eight bits per kept weight at a density of 1 %. The gaps
between the kept entries are nearly geometric, and for those a Rice code is
short: a gap g is written as its r lowest bits and, in unary, as g >> r zeros
and a one. At r = 0 this is the mask itself, bit by bit, which is the shortest
code for densities around a half; the encoder tries every r. Whatever the mask,
there are at most n >> r zeros, so that clustered weights cost less than two
bits each above the bound. Above a density of one half the pruned entries are
coded in place of the kept ones.

All low bits come first, plane by plane, and then the unary part: as these are
not mixed, encoding and decoding are a few operations on whole arrays.

References:
  Rice and Plaunt, `Adaptive variable-length coding for efficient compression of
  spacecraft television data <https://doi.org/10.1109/TCOM.1971.1090789>`_,
  1971.
"""

import math

import numpy as np


def entropy_bits(size: int, count: int) -> float:
  """log2 C(size, count): the bits it takes to tell which entries are kept.

  Args:
    size: the number of entries.
    count: how many of them are kept.

  Returns:
    The number of bits, which need not be whole.

  >>> round(entropy_bits(4, 2), 3)  # There are six such masks.
  2.585
  """
  log = [math.lgamma(n + 1) for n in (size, count, size - count)]
  return max(0.0, (log[0] - log[1] - log[2]) / math.log(2))


def _inverted(size: int, count: int) -> bool:
  """Whether the positions of the pruned entries are coded."""
  return 2 * count > size


def encode(mask: np.ndarray) -> tuple[int, np.ndarray]:
  """Encodes a mask by the shortest of its Rice codes.

  Args:
    mask: a boolean array of any shape.

  Returns:
    The parameter r of the Rice code, and the code, a uint8 vector.

  >>> import numpy as np
  >>> rice, code = encode(np.array([False, False, True, False, False, True]))
  >>> rice, code.tolist()
  (0, [36])
  """
  mask = np.ravel(mask)
  inverted = _inverted(mask.size, int(np.count_nonzero(mask)))
  marked = np.flatnonzero(mask != inverted)
  gaps = np.diff(marked, prepend=-1) - 1
  choices = range(int(gaps.max(initial=0)).bit_length() + 1)
  rice = min(choices, key=lambda r: gaps.size * r + int((gaps >> r).sum()))
  ends = np.cumsum((gaps >> rice) + 1)
  unary = np.zeros(ends[-1] if ends.size else 0, bool)
  unary[ends - 1] = True
  planes = [(gaps >> bit) & 1 != 0 for bit in range(rice)]
  return rice, np.packbits(np.concatenate([*planes, unary]))


def decode(code: np.ndarray, size: int, count: int, rice: int) -> np.ndarray:
  """Decodes a mask.

  Args:
    code: the uint8 vector that `encode` returned.
    size: the number of entries of the mask.
    count: how many of them are kept.
    rice: the parameter r of the code.

  Returns:
    A boolean vector of shape [size].

  Raises:
    ValueError: if the code is not that of such a mask.

  >>> import numpy as np
  >>> decode(np.array([36], np.uint8), size=6, count=2, rice=0).tolist()
  [False, False, True, False, False, True]
  """
  inverted = _inverted(size, count)
  number = size - count if inverted else count
  wrong = f'{code.size} bytes are no code of {count} of {size} positions.'
  if not 0 <= rice < 64 or not 0 <= count <= size:
    raise ValueError(wrong)
  bits = np.unpackbits(code).astype(bool)
  # What is left of the last byte is zeros, and adds no end.
  ends = np.flatnonzero(bits[number * rice :])
  used = number * rice + int(ends[-1]) + 1 if ends.size else 0
  if ends.size != number or code.size != -(-used // 8):
    raise ValueError(wrong)
  gaps = (np.diff(ends, prepend=-1) - 1) << rice
  for bit, plane in enumerate(bits[: number * rice].reshape(rice, number)):
    gaps |= plane.astype(gaps.dtype) << bit
  marked = np.cumsum(gaps + 1) - 1
  # Gaps of a damaged code can be so large that their sum overflows.
  if number and not (
    (gaps >= 0).all() and (np.diff(marked) > 0).all() and marked[-1] < size
  ):
    raise ValueError(f'A position is outside of {size} positions.')
  mask = np.full(size, inverted)
  mask[marked] = not inverted
  return mask

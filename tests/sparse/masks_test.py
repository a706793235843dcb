"""Tests of masks: exact, against hand-worked tables and a stable sort."""

import contextlib
import fractions
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.sparse import masks

INF, NAN = np.inf, np.nan
DTYPES = ('float32', 'bfloat16', 'float16', 'float64')
# Sizes around the blocks of 1024 in which ties are counted.
SIZES = (1, 1023, 1024, 1025, 2048, 2600)


def _x64_for(dtype):
  return (
    jax.enable_x64(True) if dtype == 'float64' else contextlib.nullcontext()
  )


def _by_sorting(scores, count):
  """The mask from a stable sort, in which NaN comes last and -0 equals 0."""
  flat = np.asarray(scores).astype(np.float64).ravel()
  missing = np.isnan(flat)
  order = np.lexsort((-np.where(missing, 0.0, flat), missing))
  mask = np.zeros(flat.size, bool)
  mask[order[:count]] = True
  return mask.reshape(np.shape(scores))


def _scores(kind, size):
  rng = np.random.default_rng(size)
  normal = rng.standard_normal(size)
  return {
    'normal': normal,
    'magnitudes': np.abs(normal),
    'tied': np.round(2 * normal),
    'zeros': np.zeros(size),
    'zeros of both signs': np.where(normal > 0, 0.0, -0.0),
    'equal': np.full(size, -1.5),
    'wide': normal * 10.0 ** rng.integers(-30, 30, size),
    'odd': rng.choice([NAN, -NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0], size),
    'missing': np.full(size, NAN),
  }[kind]


KINDS = (
  'normal',
  'magnitudes',
  'tied',
  'zeros',
  'zeros of both signs',
  'equal',
  'wide',
  'odd',
  'missing',
)
_traced = jax.jit(masks.top_count_mask)
_static = jax.jit(masks.top_count_mask, static_argnums=1)


WEIGHTS_AB = {'a': True, 'b': True}

# Each row has scores, a count and the mask.
TABLE = [
  ([3, 1, 2], 0, [0, 0, 0]),
  ([3, 1, 2], 1, [1, 0, 0]),
  ([3, 1, 2], 2, [1, 0, 1]),
  ([3, 1, 2], 3, [1, 1, 1]),
  ([1, 1, 1, 1], 2, [1, 1, 0, 0]),
  ([1, 2, 1, 2, 1], 3, [1, 1, 0, 1, 0]),
  ([0, 0, 5, 0], 2, [1, 0, 1, 0]),
  ([0.0, 0.0, 0.0], 1, [1, 0, 0]),
  ([-1, -3, -2], 1, [1, 0, 0]),
  ([-1, -3, -2], 2, [1, 0, 1]),
  ([-1, 0, 1], 2, [0, 1, 1]),
  ([-0.0, 0.0, -1], 1, [1, 0, 0]),
  ([-1, 0.0, -0.0], 2, [0, 1, 1]),
  ([0.0, -0.0, 0.0], 2, [1, 1, 0]),
  ([INF, 1, INF], 1, [1, 0, 0]),
  ([-INF, INF, 0], 2, [0, 1, 1]),
  ([NAN, -INF, 1], 2, [0, 1, 1]),
  ([NAN, -INF, NAN], 2, [1, 1, 0]),
  ([-NAN, NAN, INF], 2, [1, 0, 1]),
  ([1e-45, 0, 3e-45], 1, [0, 0, 1]),
  ([0, 1e-45, 0, 3e-45], 2, [0, 1, 0, 1]),
  ([-1e-45, 0, -3e-45], 2, [1, 1, 0]),
  ([1, 1 + 2**-23, 1], 1, [0, 1, 0]),
]


@pytest.mark.parametrize('scores, count, mask', TABLE)
def test_hand_worked(scores, count, mask):
  scores = jnp.asarray(scores, jnp.float32)
  expected = np.asarray(mask, bool)
  np.testing.assert_array_equal(_traced(scores, count), expected)
  np.testing.assert_array_equal(_by_sorting(scores, count), expected)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', SIZES)
def test_equals_a_stable_sort(size, kind):
  scores = _scores(kind, size).astype(np.float32)
  for count in {0, 1, size // 3, size - 1, size}:
    mask = _traced(scores, count)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, _by_sorting(scores, count))


@pytest.mark.parametrize(
  'dtype, kind',
  [
    (dtype, kind)
    for dtype in DTYPES
    for kind in KINDS
    if (dtype, kind) != ('float16', 'wide')  # Its range is smaller.
  ],
)
def test_equals_a_stable_sort_in_every_dtype(dtype, kind):
  with _x64_for(dtype):
    scores = jnp.asarray(_scores(kind, 1500), dtype)
    for count in (0, 1, 500, 1499, 1500):
      expected = _by_sorting(scores, count)
      np.testing.assert_array_equal(_traced(scores, count), expected)


def test_float64_is_ranked_in_full():
  with jax.enable_x64(True):
    scores = jnp.asarray([1.0, 1.0 + 2**-52, 1.0])
    np.testing.assert_array_equal(_traced(scores, 1), [False, True, False])


def test_small_float16_is_ranked():
  # Subnormal numbers of float16, of bfloat16 and of float32.
  for dtype, unit in (
    ('float16', 2.0**-24),
    ('bfloat16', 2.0**-133),
    ('float32', 2.0**-149),
  ):
    scores = jnp.asarray(np.asarray([0, 2, 1, 3]) * unit, dtype)
    np.testing.assert_array_equal(
      _traced(scores, 2), [False, True, False, True], err_msg=dtype
    )


@pytest.mark.parametrize('count', (0, 7, 2100))
def test_static_count(count):
  scores = _scores('tied', 2100).astype(np.float32).reshape(30, 70)
  expected = _by_sorting(scores, count)
  mask = _static(scores, count)
  assert mask.shape == (30, 70)
  np.testing.assert_array_equal(mask, expected)


def _stacked_counts(counts, ndim=3):
  return np.reshape(counts, (-1, *[1] * (ndim - 1)))


@pytest.mark.parametrize('kind', ['normal', 'tied', 'zeros', 'odd'])
def test_layers_of_a_stack_are_ranked_by_themselves(kind):
  size = 5 * 7 * 11
  scores = _scores(kind, size).astype(np.float32).reshape(5, 7, 11)
  counts = np.array([0, 1, 30, 76, 77])
  expected = np.stack([_by_sorting(s, n) for s, n in zip(scores, counts)])
  stacked = _stacked_counts(counts)
  np.testing.assert_array_equal(masks.top_count_mask(scores, stacked), expected)
  np.testing.assert_array_equal(_traced(scores, stacked), expected)
  # A stack along another axis, or along two.
  last = _traced(jnp.moveaxis(scores, 0, 2), stacked.reshape(1, 1, 5))
  np.testing.assert_array_equal(jnp.moveaxis(last, 2, 0), expected)
  rows = np.arange(35).reshape(5, 7, 1) % 12
  both = np.stack(
    [[_by_sorting(r, n) for r, n in zip(*x)] for x in zip(scores, rows[..., 0])]
  )
  np.testing.assert_array_equal(_traced(scores, rows), both)


def test_a_count_of_another_shape_is_an_error():
  scores = jnp.ones((3, 4))
  for shape in ((3,), (2, 1), (3, 1, 1)):
    with pytest.raises(ValueError, match='does not broadcast'):
      masks.top_count_mask(scores, np.ones(shape, int))
  with pytest.raises(ValueError, match=r'count must be in \[0, 4\]'):
    masks.top_count_mask(scores, np.array([[1], [5], [0]]))


# Each row has scores, n and m, an axis and the mask.
PATTERNS = [
  ([3, 1, 2, 4], (1, 2), 0, [1, 0, 0, 1]),
  ([3, 1, 2, 4], (1, 4), 0, [0, 0, 0, 1]),
  ([1, 1, 1, 1], (2, 4), 0, [1, 1, 0, 0]),
  ([0.0, -0.0, NAN, -INF], (3, 4), 0, [1, 1, 0, 1]),
  ([[1, 2], [3, 0]], (1, 2), 0, [[0, 1], [1, 0]]),
  ([[1, 2], [3, 0]], (1, 2), 1, [[0, 1], [1, 0]]),
  ([[1, 2], [3, 4]], (1, 2), 0, [[0, 0], [1, 1]]),
  ([[1, 2], [3, 4]], (1, 2), 1, [[0, 1], [0, 1]]),
]


@pytest.mark.parametrize('scores, pattern, axis, mask', PATTERNS)
def test_n_of_m(scores, pattern, axis, mask):
  count = masks.NOfM(*pattern, axis)
  scores = jnp.asarray(scores, jnp.float32)
  for f in (masks.n_of_m_mask, jax.jit(masks.n_of_m_mask)):
    np.testing.assert_array_equal(f(scores, count), np.asarray(mask, bool))
  assert masks.num_entries(count, scores.shape) == np.sum(mask)


def test_the_axis_of_a_pattern_is_found():
  scores = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)))
  for axis in (0, 1):
    mask = masks.n_of_m_mask(scores, masks.NOfM(2, 4, axis))
    assert masks.n_of_m_axes(mask, 2, 4) == [axis]
    assert masks.n_of_m_axes(mask, 1, 4) == []
    assert masks.n_of_m_axes(mask, 2, 5) == []
  with pytest.raises(ValueError, match=r'5 does not divide the axis 0 of .*8'):
    masks.n_of_m_mask(scores, masks.NOfM(2, 5, 0))


def test_leaves_without_entries():
  empty = jnp.zeros((0, 3))
  for count in (0, jnp.int32(0)):
    assert masks.top_count_mask(empty, count).shape == (0, 3)
  assert masks.topk_mask(empty, 0.5).shape == (0, 3)
  mask = masks.global_topk({'a': empty, 'b': jnp.arange(3.0)}, 1, WEIGHTS_AB)
  assert mask['a'].shape == (0, 3)
  assert mask['b'].tolist() == [False, False, True]


def test_arguments_of_numpy():
  # numpy makes these float64, while JAX computes in float32.
  scores: Any = np.asarray([0.25, 2.0, 1.0])
  count: Any = np.int64(2)
  for mask in (
    masks.topk_mask(scores, 0.7),
    masks.top_count_mask(scores, count),
  ):
    np.testing.assert_array_equal(mask, [False, True, True])


@pytest.mark.parametrize('shape', [(), (2, 3, 5), (1200, 3)])
def test_shapes(shape):
  size = math.prod(shape)
  scores = _scores('tied', size).astype(np.float32).reshape(shape)
  for count in {0, (size + 1) // 2, size}:
    np.testing.assert_array_equal(
      _traced(scores, count), _by_sorting(scores, count)
    )


def test_vmap():
  size = 1030
  scores = np.stack(
    [_scores(k, size).astype(np.float32) for k in ('normal', 'tied', 'zeros')]
  )
  counts = np.asarray([size // 2, 1, size - 2])
  both = jax.jit(jax.vmap(masks.top_count_mask))(scores, counts)
  many = jax.jit(jax.vmap(masks.top_count_mask, (None, 0)))(scores[1], counts)
  for i, count in enumerate(counts):
    np.testing.assert_array_equal(both[i], _by_sorting(scores[i], count))
    np.testing.assert_array_equal(many[i], _by_sorting(scores[1], count))


@pytest.mark.parametrize('count', (-1, 4, np.int64(-1), np.int32(4)))
def test_bad_count_is_an_error(count):
  with pytest.raises(
    ValueError, match=rf'count must be in \[0, 3\], .*{count}'
  ):
    masks.top_count_mask(jnp.ones(3), count)


@pytest.mark.parametrize('dtype', ('int32', 'bool'))
def test_scores_that_are_no_floats_are_an_error(dtype):
  with pytest.raises(ValueError, match=f'floating point, got {dtype}'):
    masks.top_count_mask(jnp.ones(3, dtype), 1)


# Each row has a size, a density, and how many are kept.
COUNTS = [
  (10, 0.3, 3),
  (10, 0.7, 7),
  (3, 0.5, 1),
  (3, 1.0, 3),
  (3, 1e-9, 0),
  (266_200, 0.01, 2662),
  # The floats are less than these decimals, and so are the products.
  (1000, 1 - 0.9, 100),
  (100, 0.29, 29),
  (10, 1 - 0.7, 3),
  (49, 1 / 49, 1),
  (10, 3 * 0.1, 3),
  # In float32 these would be 16777216 and 1073741824.
  (2**24 + 1, 1.0, 2**24 + 1),
  (2**31 - 1, 0.5, 2**30 - 1),
  (2**31 - 1, 1.0, 2**31 - 1),
]


@pytest.mark.parametrize('size, density, kept', COUNTS)
def test_num_kept(size, density, kept):
  count = masks.num_kept(density, size)
  assert isinstance(count, int)
  assert count == kept


BIG_SIZES = (2**24 - 1, 2**24 + 1, 25_500_000, 2**30, 2**31 - 2, 2**31 - 1)


def _percents(places):
  # Decimals are as written, or differences from 1.
  q = 10**places
  return [(k, q, x) for k in range(1, q) for x in (k / q, 1 - (q - k) / q)]


@pytest.mark.parametrize('size', (1, 7, 100, 1000, 266_200, *BIG_SIZES))
def test_decimals_count_exactly(size):
  for k, q, density in _percents(2) + _percents(3):
    assert masks.num_kept(density, size) == k * size // q, density


@pytest.mark.parametrize('size', (1, 7, 100, 1000, 266_200, *BIG_SIZES))
def test_decimals_of_arrays_count_exactly(size):
  millionths = np.random.default_rng(size).integers(1, 10**6, 1000)
  millionths = np.append(millionths, np.arange(10**4, 10**6, 10**4))
  expected = [int(k) * size // 10**6 for k in millionths]
  density = (millionths / 10**6).astype(np.float32)
  difference = 1 - (1 - millionths / 10**6).astype(np.float32)
  count = jax.jit(jax.vmap(lambda d: masks.num_kept(d, size)))
  for densities in (density, difference):
    found = count(densities)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('size', (1, 3, 255, 256, 2**16 + 1, *BIG_SIZES))
def test_a_traced_fraction_that_is_no_decimal_is_multiplied_exactly(size):
  rng = np.random.default_rng(size)
  densities = rng.uniform(0, 1, 300) ** rng.integers(1, 12, 300)
  # The nearest to k / size from below and above, where rounding shows.
  k = rng.integers(0, size, 100) / size
  edges = [np.nextafter(np.float32(k), np.float32(d)) for d in (0, 1)]
  special = [0.0, 1.0, 1 - 2**-24, 0.5, 2**-24, 2**-31, 2**-32, 1e-30, 1e-40]
  densities = np.concatenate([densities, k, *edges, special])
  densities = densities.astype(np.float32)
  found = jax.jit(jax.vmap(lambda d: masks.floor_multiply(d, size)))(densities)
  tried = 0
  for density, count in zip(densities.tolist(), found.tolist()):
    exact = fractions.Fraction(density)
    decimal = fractions.Fraction(round(exact * 10**6), 10**6)
    if decimal and abs(exact - decimal) < 4.5e-8:
      assert count == math.floor(decimal * size), density
    elif not decimal or abs(exact - decimal) > 4.6e-8:
      assert count == math.floor(exact * size), density
      tried += 1
  assert tried > 250


def test_num_kept_of_an_array_is_that_of_a_float():
  traced = jax.jit(masks.num_kept, static_argnums=1)
  for density in (0.7, 0.25, 0.001, 1.0):
    kept = masks.num_kept(jnp.asarray(density), 1000)
    assert isinstance(kept, jax.Array)
    assert kept.dtype == np.int32
    assert kept == traced(density, 1000) == masks.num_kept(density, 1000)


def test_floor_multiply():
  assert masks.floor_multiply(0.0, 5) == 0
  assert masks.floor_multiply(0.5, 5) == 2
  assert masks.floor_multiply(1.0, 2**31 - 1) == 2**31 - 1
  numpy_one: Any = np.float32(1.0)
  assert masks.floor_multiply(numpy_one, 2**24 + 1) == 2**24 + 1
  assert masks.floor_multiply(jnp.float32(0.5), 5) == 2


def test_traced_fraction_out_of_range_is_clipped():
  f = jax.jit(masks.floor_multiply, static_argnums=1)
  for density, kept in [
    *((-0.5, 0), (-0.0, 0), (-INF, 0), (NAN, 0)),
    *((1.5, 1000), (300.0, 1000), (3e38, 1000), (INF, 1000)),
  ]:
    assert f(jnp.float32(density), 1000) == kept, density


@pytest.mark.parametrize('density', (0.0, -0.1, 1.0001, NAN, INF))
def test_bad_density_is_an_error(density):
  for f in (
    masks.check_density,
    lambda d: masks.num_kept(d, 3),
    lambda d: masks.topk_mask(jnp.ones(3), d),
  ):
    with pytest.raises(ValueError, match=r'density must be in \(0, 1\], got'):
      f(density)


def test_topk_mask():
  scores = jnp.asarray([[1.0, 5.0, 1.0], [5.0, 0.0, 1.0]])
  table = [
    (0.1, [[0, 0, 0], [0, 0, 0]]),
    (0.2, [[0, 1, 0], [0, 0, 0]]),
    (0.34, [[0, 1, 0], [1, 0, 0]]),
    (0.5, [[1, 1, 0], [1, 0, 0]]),
    (0.99, [[1, 1, 1], [1, 0, 1]]),
    (1.0, [[1, 1, 1], [1, 1, 1]]),
  ]
  traced = jax.jit(masks.topk_mask)
  for density, mask in table:
    for f in (masks.topk_mask, traced):
      np.testing.assert_array_equal(f(scores, density), np.asarray(mask, bool))
  static = jax.jit(masks.topk_mask, static_argnums=1)
  np.testing.assert_array_equal(static(scores, 0.34), traced(scores, 0.34))


def test_topk_mask_does_not_compile_again_for_another_traced_density():
  traces = []

  @jax.jit
  def f(scores, density):
    traces.append(density)
    return masks.topk_mask(scores, density)

  for density in (0.1, 0.5, 1.0):
    assert f(jnp.arange(100.0), density).sum() == round(100 * density)
  assert len(traces) == 1


def _tree():
  return {
    'linear': {
      'w': jnp.asarray([[0.1, 0.4], [0.3, 0.2]]),
      'b': jnp.asarray([9.0, 9.0]),
    },
    'out': {'w': jnp.asarray([0.5, 0.0, 0.3, 0.3])},
  }


WEIGHTS = {'linear': {'w': True, 'b': False}, 'out': {'w': True}}


def _assert_masks(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert a.dtype == bool
    np.testing.assert_array_equal(a, b)


def _mask(linear_w, linear_b, out_w):
  return {
    'linear': {
      'w': np.asarray(linear_w, bool),
      'b': np.asarray(linear_b, bool),
    },
    'out': {'w': np.asarray(out_w, bool)},
  }


def test_layerwise():
  counts = {'linear': {'w': 1, 'b': None}, 'out': {'w': 2}}
  expected = _mask([[0, 1], [0, 0]], [1, 1], [1, 0, 1, 0])
  _assert_masks(masks.layerwise_topk(_tree(), counts), expected)
  traced = jax.jit(
    lambda s, n: masks.layerwise_topk(
      s, {'linear': {'w': n, 'b': None}, 'out': {'w': 2 * n}}
    )
  )
  _assert_masks(traced(_tree(), 1), expected)
  counts = {'linear': {'w': None, 'b': 0}, 'out': {'w': 3}}
  expected = _mask([[1, 1], [1, 1]], [0, 0], [1, 0, 1, 1])
  _assert_masks(masks.layerwise_topk(_tree(), counts), expected)


def test_layerwise_passes_over_missing_leaves():
  # Equinox filters out leaves that are no arrays, and a layer may have no bias.
  scores = {'linear': {'w': jnp.asarray([1.0, 2.0, 0.0]), 'b': None}}
  mask = masks.layerwise_topk(scores, {'linear': {'w': 1, 'b': None}})
  assert mask['linear']['b'] is None
  np.testing.assert_array_equal(mask['linear']['w'], [False, True, False])


_globally = jax.jit(lambda s, n: masks.global_topk(s, n, WEIGHTS))


@pytest.mark.parametrize(
  'count, expected',
  [
    (0, _mask([[0, 0], [0, 0]], [1, 1], [0, 0, 0, 0])),
    (1, _mask([[0, 0], [0, 0]], [1, 1], [1, 0, 0, 0])),
    (2, _mask([[0, 1], [0, 0]], [1, 1], [1, 0, 0, 0])),
    # Of three equal scores the one of the first leaf wins.
    (3, _mask([[0, 1], [1, 0]], [1, 1], [1, 0, 0, 0])),
    (4, _mask([[0, 1], [1, 0]], [1, 1], [1, 0, 1, 0])),
    (8, _mask([[1, 1], [1, 1]], [1, 1], [1, 1, 1, 1])),
  ],
)
def test_globally(count, expected):
  _assert_masks(masks.global_topk(_tree(), count, WEIGHTS), expected)
  _assert_masks(_globally(_tree(), count), expected)


@pytest.mark.parametrize('kind', ['normal', 'tied', 'zeros', 'odd'])
def test_globally_is_a_ranking_of_all_entries_in_order(kind):
  scores = _scores(kind, 1000).astype(np.float32)
  parts = np.split(scores, [100, 101, 700])
  tree = {f'{i}': p.reshape(-1, 1, len(p)) for i, p in enumerate(parts)}
  weights = dict.fromkeys(tree, True)
  for count in (0, 1, 99, 333, 999, 1000):
    expected = _by_sorting(scores, count)
    for n in (count, jnp.int32(count)):
      found = masks.global_topk(tree, n, weights)
      flat = np.concatenate([np.ravel(m) for m in found.values()])
      np.testing.assert_array_equal(flat, expected)


def test_globally_ranks_different_dtypes():
  tree = {'a': jnp.asarray([1.0, 2.0], jnp.bfloat16), 'b': jnp.asarray([1.001])}
  mask = masks.global_topk(tree, 2, WEIGHTS_AB)
  assert (mask['a'].tolist(), mask['b'].tolist()) == ([False, True], [True])


@pytest.mark.parametrize('count', (-1, 9))
def test_globally_of_a_bad_count_is_an_error(count):
  with pytest.raises(ValueError, match=r'count must be in \[0, 8\]'):
    masks.global_topk(_tree(), count, WEIGHTS)


def test_count_is_of_weights_only():
  mask = _mask([[0, 1], [0, 1]], [0, 0], [1, 0, 0, 0])
  kept, size = masks.count(mask, WEIGHTS)
  assert (int(kept), size) == (3, 8)
  assert isinstance(size, int)
  biases_too = jax.tree.map(lambda _: True, WEIGHTS)
  assert tuple(map(int, masks.count(mask, biases_too))) == (3, 10)
  only_biases = {'linear': {'w': False, 'b': True}, 'out': {'w': False}}
  assert tuple(map(int, masks.count(mask, only_biases))) == (0, 2)
  assert int(jax.jit(lambda m: masks.count(m, WEIGHTS)[0])(mask)) == 3


@pytest.mark.parametrize('density', ['0.1', abs])
def test_densities_are_numbers(density):
  with pytest.raises(ValueError, match='density must be a number, got'):
    masks.check_density(density)
  assert masks.check_density(fractions.Fraction(1, 4)) == 0.25


def test_more_weights_than_int32_counts():
  half = jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32)
  tree, weights = {'a': half, 'b': half}, {'a': True, 'b': True}
  for kept in (100, jnp.int32(100)):
    choose = functools.partial(masks.global_topk, count=kept, weights=weights)
    with pytest.raises(ValueError, match='got 2,147,483,648'):
      jax.eval_shape(choose, tree)
  for density in (0.1, jnp.float32(0.1)):
    choose = functools.partial(masks.topk_mask, density=density)
    with pytest.raises(ValueError, match='got 2,147,483,648'):
      jax.eval_shape(choose, jax.ShapeDtypeStruct((2**31,), jnp.float32))
  # The counts of such trees are floats, and those of halves of them are not.
  mask = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, bool), tree)
  kept = jax.eval_shape(lambda m: masks.count(m, weights)[0], mask)
  assert kept.dtype == jnp.float32
  only = {'a': True, 'b': False}
  assert (
    jax.eval_shape(lambda m: masks.count(m, only)[0], mask).dtype == 'int32'
  )


def test_overlap():
  a = _mask([[0, 1], [0, 1]], [1, 1], [1, 1, 0, 0])
  b = _mask([[0, 1], [1, 0]], [1, 1], [0, 0, 0, 0])
  empty = _mask([[0, 0], [0, 0]], [1, 1], [0, 0, 0, 0])
  # a keeps 4 weights, b keeps 2, and both keep 1.
  assert masks.overlap(a, b, WEIGHTS) == 0.25
  assert masks.overlap(b, a, WEIGHTS) == 0.5
  assert masks.overlap(a, a, WEIGHTS) == 1.0
  assert masks.overlap(a, empty, WEIGHTS) == 0.0
  assert np.isnan(masks.overlap(empty, a, WEIGHTS))


def test_overlap_of_random_masks_is_their_density():
  rng = np.random.default_rng(0)
  a, b = ({'w': rng.uniform(size=100_000) < 0.3} for _ in range(2))
  assert abs(masks.overlap(a, b, {'w': True}) - 0.3) < 0.01


def test_pack_and_unpack():
  mask = _mask([[0, 1], [1, 1]], [0, 1], [1, 0, 0, 0])
  mask |= {'long': np.arange(17) % 3 == 0, 'scalar': np.asarray(True)}
  packed = masks.pack(mask)
  np.testing.assert_array_equal(packed['linear']['w'], [0b01110000])
  assert [x.dtype for x in jax.tree.leaves(packed)] == [np.uint8] * 5
  assert [x.shape for x in jax.tree.leaves(packed)] == [
    *((1,), (1,), (3,), (1,), (1,))
  ]
  like = jax.tree.map(lambda m: np.zeros(m.shape), mask)
  _assert_masks(masks.unpack(packed, like), mask)
  _assert_masks(jax.jit(masks.unpack)(jax.jit(masks.pack)(mask), like), mask)


def test_dense():
  tree = _tree() | {'scalar': 2.0}
  both = masks.dense(tree)
  assert both == masks.Masks(both.forward, both.backward)
  for mask in both:
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    for m, x in zip(jax.tree.leaves(mask), jax.tree.leaves(tree)):
      assert (m.dtype, m.shape) == (bool, np.shape(x))
      assert jnp.all(m)


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16', 'int32'))
def test_apply_mask(dtype):
  tree = {'w': jnp.asarray([[1, -2], [3, 4]], dtype), 'b': jnp.ones(1, dtype)}
  mask = {'w': np.asarray([[0, 1], [1, 0]], bool), 'b': np.asarray([True])}
  out = masks.apply_mask(tree, mask)
  assert out['w'].dtype == dtype
  np.testing.assert_array_equal(
    np.asarray(out['w'], float), [[0.0, -2.0], [3.0, 0.0]]
  )
  np.testing.assert_array_equal(np.asarray(out['b'], float), [1.0])


@pytest.mark.parametrize('shape', [(), (1,), (1, 2), (2, 1), (2, 2)])
def test_apply_mask_refuses_a_mask_of_another_shape(shape):
  tree, mask = {'a': {'w': jnp.ones(2)}}, {'a': {'w': jnp.ones(shape, bool)}}
  for f in (masks.apply_mask, jax.jit(masks.apply_mask)):
    with pytest.raises(ValueError, match=r"'a/w' has the shape .*\(2,\)"):
      f(tree, mask)


def test_apply_mask_stops_nan():
  update = {'w': jnp.asarray([NAN, INF, -INF, NAN])}
  mask = {'w': jnp.asarray([False, False, False, True])}
  out = masks.apply_mask(update, mask)['w']
  np.testing.assert_array_equal(out, [0.0, 0.0, 0.0, NAN])
  grad = jax.grad(lambda u: jnp.sum(masks.apply_mask({'w': u}, mask)['w']))
  np.testing.assert_array_equal(grad(update['w']), [0.0, 0.0, 0.0, 1.0])

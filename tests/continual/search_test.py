"""Tests of the searches for the density of a task."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.continual import search
from powerprop_jax.sparse import masks

_GRID = [0.1, 0.2, 0.4, 0.6, 0.8, 1.0]


def _example():
  """Two leaves; task 0 owns the weights -4, 3 and 1."""
  weights = {
    'a': jnp.array([[-4.0, 0.5], [2.0, 1.0]]),
    'b': jnp.array([3.0, 5]),
  }
  owners = {
    'a': jnp.array([[1, 0], [0, 1]], jnp.uint8),
    'b': jnp.array([1, 0], jnp.uint8),
  }
  return weights, owners


def _kept(weights, mask):
  chosen = [np.asarray(weights[p])[np.asarray(m)] for p, m in mask.items()]
  return sorted(np.concatenate(chosen).tolist())


def test_places_by_hand():
  ranking = search.rank(*_example())
  np.testing.assert_array_equal(ranking.place['a'], [[1, 5], [3, 4]])
  np.testing.assert_array_equal(ranking.place['b'], [2, 0])
  # 5, 2 and 0.5 are free; weights that are owned do not count for the limit.
  np.testing.assert_array_equal(ranking.free_place['a'], [[-1, 2], [1, -1]])
  np.testing.assert_array_equal(ranking.free_place['b'], [-1, 0])


@pytest.mark.parametrize(
  ('count', 'max_new', 'kept'),
  [
    (0, 6, []),
    (3, 6, [-4, 3, 5]),
    (5, 6, [-4, 1, 2, 3, 5]),
    (6, 6, [-4, 0.5, 1, 2, 3, 5]),
    (3, 0, [-4, 3]),
    (6, 1, [-4, 1, 3, 5]),
    (4, 1, [-4, 3, 5]),
  ],
)
def test_select_by_hand(count, max_new, kept):
  weights, owners = _example()
  ranking = search.rank(weights, owners)
  assert _kept(weights, search.select(ranking, count, max_new)) == sorted(kept)
  traced = jax.jit(search.select)(ranking, count, max_new)
  assert _kept(weights, traced) == sorted(kept)


@pytest.mark.parametrize(
  ('count', 'kept'), [(1, [5]), (2, [3, 5]), (6, [0.5, 2, 3, 5])]
)
def test_omitted_weights_are_never_chosen(count, kept):
  weights, owners = _example()
  # -4 and 1 are of an earlier task and in a leaf to be left out.
  ranking = search.rank(weights, owners, omit=['a'])
  assert _kept(weights, search.select(ranking, count, 6)) == kept


def test_every_count_selects_what_topk_does():
  rng = np.random.default_rng(0)
  # Values are rounded, for ties within and across leaves.
  values = [rng.normal(size=s).round(1) for s in ((4, 7), (13,), (3, 2, 2))]
  weights = {str(i): jnp.asarray(x) for i, x in enumerate(values)}
  owners = {p: jnp.zeros(x.shape, jnp.uint8) for p, x in weights.items()}
  ranking, size = search.rank(weights, owners), 53
  scores, ones = jax.tree.map(jnp.abs, weights), dict.fromkeys(weights, True)
  for count in range(size + 1):
    expected = masks.global_topk(scores, count, ones)
    found = search.select(ranking, count, size)
    for path in weights:
      np.testing.assert_array_equal(found[path], expected[path])


def test_not_a_number_comes_last():
  weights = {'a': jnp.array([jnp.nan, 0.0, 1.0])}
  ranking = search.rank(weights, {'a': jnp.zeros(3, jnp.uint8)})
  np.testing.assert_array_equal(ranking.place['a'], [2, 1, 0])


def _table(values):
  """An evaluation that looks up a table and counts its calls."""
  calls = []

  def evaluate(density):
    calls.append(density)
    return values[_GRID.index(density)]

  return evaluate, calls


_RISING = [0.5, 0.7, 0.9, 0.92, 0.95, 0.95]


@pytest.mark.parametrize(
  ('target', 'density', 'evaluated'),
  [
    (0.9, 0.4, [1.0, 0.8, 0.6, 0.4, 0.2]),
    (0.0, 0.1, [1.0, 0.8, 0.6, 0.4, 0.2, 0.1]),
    (0.95, 0.8, [1.0, 0.8, 0.6]),  # Reaching the target is enough.
    (0.96, 1.0, [1.0]),  # It is the densest, if none meets it.
  ],
)
def test_linear_by_hand(target, density, evaluated):
  evaluate, calls = _table(_RISING)
  found = search.linear(evaluate, _GRID, target)
  assert found.density == density
  assert calls == evaluated
  assert [p for p, _ in found.evaluated] == evaluated
  assert found.performance == _RISING[_GRID.index(density)]
  assert found.met == (found.performance >= target)


def test_linear_stops_at_the_first_miss():
  evaluate, calls = _table([0.9, 0.9, 0.9, 0.5, 0.9, 0.9])
  found = search.linear(evaluate, _GRID, 0.8)
  assert (found.density, calls) == (0.8, [1.0, 0.8, 0.6])


@pytest.mark.parametrize('target', [0.0, 0.5, 0.6, 0.9, 0.93, 0.95, 0.96, 1.0])
def test_binary_agrees_with_linear(target):
  linear = search.linear(_table(_RISING)[0], _GRID, target)
  evaluate, calls = _table(_RISING)
  binary = search.binary(evaluate, _GRID, target, 3)
  assert binary[:3] == linear[:3]
  assert len(calls) <= 4


@pytest.mark.parametrize(
  ('num_steps', 'density', 'evaluated'),
  [(0, 1.0, [1.0]), (1, 0.4, [0.4]), (2, 0.2, [0.4, 0.2])],
)
def test_binary_with_few_steps(num_steps, density, evaluated):
  evaluate, calls = _table(_RISING)
  found = search.binary(evaluate, _GRID, 0.6, num_steps)
  assert (found.density, calls) == (density, evaluated)
  assert found.met


@pytest.mark.parametrize(
  ('predicted', 'density', 'evaluated'),
  [
    ([9, 0.3, 0.1, 0, 0, 0], 0.4, [0.4]),  # One evaluation confirms.
    ([9, 0.1, 0.1, 0, 0, 0], 0.4, [0.2, 0.4]),  # Too bold: goes up again.
    ([9, 9, 9, 9, 0.1, 0], 0.8, [0.8]),  # Too shy: lower ones are not tried.
    ([0, 0, 9, 0, 0, 0], 0.6, [0.6]),  # No prediction below a peak is trusted.
    ([9, np.nan, 0, 0, 0, 0], 0.4, [0.4]),
    ([9, 9, 9, 9, 9, 9], 1.0, [1.0]),
  ],
)
def test_taylor_by_hand(predicted, density, evaluated):
  evaluate, calls = _table(_RISING)
  found = search.taylor(evaluate, _GRID, 0.9, predicted, 0.2)
  assert (found.density, calls) == (density, evaluated)
  assert found.met


def test_taylor_that_no_density_confirms():
  evaluate, calls = _table(_RISING)
  found = search.taylor(evaluate, _GRID, 0.99, [0.0] * 6, 0.1)
  assert (found.density, found.met) == (1.0, False)
  assert calls == _GRID


def test_tolerance_is_that_of_the_likelihood():
  assert search.loss_tolerance(1.0) == 0.0
  assert search.loss_tolerance(0.0) == float('inf')
  # A rise of the loss by the tolerance multiplies every probability by gamma.
  np.testing.assert_allclose(np.exp(-search.loss_tolerance(0.98)), 0.98)


@pytest.mark.parametrize(
  ('densities', 'message'),
  [
    ([0.5, 0.2], 'must rise'),
    ([0.2, 0.2], 'must rise'),
    ([0.0, 0.5], r'\(0, 1\]'),
    ([0.5, 1.5], r'\(0, 1\]'),
    ([float('nan')], r'\(0, 1\]'),
    ([0.05, 0.95], 'None of the densities'),
    ([], 'None of the densities'),
  ],
)
def test_impossible_densities(densities, message):
  with pytest.raises(ValueError, match=message):
    search.check_densities(densities, 0.1, 0.9)


def test_bounds_of_the_densities():
  assert search.check_densities(_GRID) == _GRID
  assert search.check_densities(_GRID, 0.2, 0.6) == [0.2, 0.4, 0.6]


def _regression(theta, scale, batch):
  x, y = batch
  return scale * jnp.mean((x @ theta['w'] - y) ** 2)


def test_saliency_by_hand():
  theta = {'w': jnp.array([1.0, 2.0])}
  # Errors 1 and -1 of batches of one example: gradients (2, 0) and (0, -6).
  x = jnp.array([[[1.0, 0.0]], [[0.0, 3.0]]])
  y = jnp.array([[0.0], [7.0]])
  found = search.make_saliency(_regression)(theta, 1.0, (x, y))
  # g theta = (2, 0) and (0, -12): half of the mean squares, less the means.
  np.testing.assert_allclose(found['w'], [4 / 4 - 2 / 2, 144 / 4 + 12 / 2])


def test_saliency_of_half_precision_is_that_of_single():
  def loss(theta, args, batch):
    return jnp.mean(batch[0].astype(theta['w'].dtype)) * theta['w'].sum()

  theta = {'w': jnp.array([0.25, 0.5])}
  batches = (jnp.ones((1000, 1)),)
  wanted = search.make_saliency(loss)(theta, None, batches)['w']
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), theta)
  found = search.make_saliency(loss)(half, None, batches)['w']
  np.testing.assert_allclose(found, wanted, rtol=0.01)


def test_saliency_does_not_depend_on_the_size_of_batches():
  """It does not if the mean gradient vanishes, as it does after training."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(40_000, 3)).astype(np.float32)
  theta = {'w': jnp.array([1.0, -2.0, 0.5])}
  y = x @ np.asarray(theta['w']) + rng.normal(size=40_000).astype(np.float32)
  saliency = jax.jit(search.make_saliency(_regression))
  found = [
    saliency(theta, 1.0, (x.reshape(-1, n, 3), y.reshape(-1, n)))['w']
    for n in (1, 20)
  ]
  np.testing.assert_allclose(found[0], found[1], rtol=0.1)
  # g = -2 e x with e normal: E[(g theta)^2] / 2 = 2 theta^2.
  np.testing.assert_allclose(found[0], [2.0, 8.0, 0.5], rtol=0.1)


def test_predicted_rise_adds_up_what_is_pruned():
  weights, owners = _example()
  saliency = {'a': jnp.array([[1.0, 2], [4, 8]]), 'b': jnp.array([16.0, 32])}
  ranking = search.rank(weights, owners)
  counts = [0, 1, 3, 6]
  found = search.predicted_rise(saliency, ranking, jnp.array(counts), 6)
  np.testing.assert_array_equal(found, [63, 31, 14, 0])
  found = search.predicted_rise(saliency, ranking, jnp.array(counts), 1)
  np.testing.assert_array_equal(found, [63, 31, 14, 6])
  for count, max_new in itertools.product(counts, (0, 2)):
    mask = search.select(ranking, count, max_new)
    pruned = sum(float(jnp.sum(saliency[p] * ~m)) for p, m in mask.items())
    found = search.predicted_rise(
      saliency, ranking, jnp.array([count]), max_new
    )
    assert found[0] == pruned


def test_predicted_rise_of_a_logistic_model():
  """The estimate is near the true rise, for weights that matter little."""
  rng = np.random.default_rng(1)
  x = rng.normal(size=(4_000, 8)).astype(np.float32)
  theta = {'w': jnp.asarray([2, -1.5, 1, 0.2, -0.15, 0.1, 0.05, 0.02])}
  y = rng.uniform(size=4_000) < jax.nn.sigmoid(x @ theta['w'])

  def loss(theta, args, batch):
    del args
    x, y = batch
    return jnp.mean(jnp.logaddexp(0.0, jnp.where(y, -1, 1) * (x @ theta['w'])))

  batches = x.reshape(400, 10, 8), np.asarray(y).reshape(400, 10)
  saliency = search.make_saliency(loss)(theta, None, batches)
  ranking = search.rank(theta, {'w': jnp.zeros(8, jnp.uint8)})
  predicted = search.predicted_rise(
    saliency, ranking, jnp.array([3, 4, 5, 8]), 8
  )
  for count, found in zip((3, 4, 5), predicted):
    pruned = masks.apply_mask(theta, search.select(ranking, count, 8))
    rise = loss(pruned, None, (x, y)) - loss(theta, None, (x, y))
    np.testing.assert_allclose(found, rise, rtol=0.25, atol=2e-4)
  assert predicted[3] == 0

"""Tests of the cadence and of the schedules of sparsity and drop fraction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.sparse import schedules


@pytest.mark.parametrize(
  'n, start, stop', [(1, 0, None), (3, 0, None), (5, 0, 20), (7, 7, 8)]
)
def test_every_is_true_on_the_steps_of_a_range(n, start, stop):
  due = schedules.every(n, start, stop)
  expected = range(start, 50 if stop is None else stop, n)
  assert [t for t in range(50) if due(t)] == list(expected)


@pytest.mark.parametrize(
  'n, start, stop, message',
  [(0, 0, None, 'n must'), (1, -1, None, 'start'), (1, 5, 5, 'stop must')],
)
def test_every_rejects(n, start, stop, message):
  with pytest.raises(ValueError, match=message):
    schedules.every(n, start, stop)


def test_every_takes_traced_steps():
  due = schedules.every(3, start=2, stop=9)
  traced = jax.jit(jax.vmap(due))(jnp.arange(12))
  assert traced.tolist() == [due(t) for t in range(12)]
  assert [type(due(t)) for t in (2, 3)] == [bool, bool]


def test_cubic_by_hand():
  progress = schedules.cubic(2, 6)
  actual = [float(progress(t)) for t in (0, 2, 3, 4, 6, 9)]
  np.testing.assert_allclose(actual, [0, 0, 37 / 64, 7 / 8, 1, 1], rtol=1e-6)
  assert actual[-1] == 1.0
  with pytest.raises(ValueError, match='start < stop must hold'):
    schedules.cubic(3, 3)


@pytest.mark.parametrize('start, stop', [(0, 100), (-30, 70), (-99, 1)])
def test_cubic_is_the_formula_from_a_negative_start_too(start, stop):
  steps = np.arange(0, stop + 5)
  done = np.clip((steps - start) / (stop - start), 0, 1)
  found = jax.vmap(schedules.cubic(start, stop))(steps)
  np.testing.assert_allclose(found, 1 - (1 - done) ** 3, rtol=0, atol=2e-7)


def test_cubic_counts_steps_beyond_the_reach_of_float32():
  start = 2**24
  schedule = schedules.cubic(start, start + 4)
  at = jax.jit(schedule)(jnp.int32(start + 1))
  np.testing.assert_allclose(at, 1 - (3 / 4) ** 3, rtol=1e-6)


def test_drop_fraction_follows_the_hand_worked_table():
  steps = [0, 25, 50, 75, 100, 300]
  cosine = schedules.drop_fraction(0.3, 100)
  root = np.sqrt(0.5)
  expected = [0.3, 0.15 * (1 + root), 0.15, 0.15 * (1 - root), 0.0, 0.0]
  np.testing.assert_allclose([cosine(t) for t in steps], expected, atol=1e-7)
  assert cosine(100) == 0.0
  constant = schedules.drop_fraction(0.3, 100, 'constant')
  np.testing.assert_allclose(
    [constant(t) for t in steps], [0.3] * 4 + [0.0] * 2, rtol=1e-6
  )


@pytest.mark.parametrize(
  'initial, stop, kind',
  [
    (1.5, 10, 'cosine'),
    (-0.1, 10, 'cosine'),
    (0.3, 0, 'cosine'),
    (0.3, 1, 'x'),
  ],
)
def test_drop_fraction_rejects(initial, stop, kind):
  with pytest.raises(ValueError, match='must be'):
    schedules.drop_fraction(initial, stop, kind)


@pytest.mark.parametrize(
  'schedule',
  [
    schedules.cubic(-3, 11),
    schedules.drop_fraction(0.4, 9),
    schedules.drop_fraction(0.4, 9, 'constant'),
  ],
)
def test_traced_and_python_steps_agree(schedule):
  traced = jax.jit(jax.vmap(schedule))(jnp.arange(20))
  eager = [schedule(t) for t in range(20)]
  assert all(isinstance(x, jax.Array) and x.shape == () for x in eager)
  np.testing.assert_allclose(traced, eager, rtol=1e-6, atol=1e-7)


def test_alternating_by_hand():
  compressed = schedules.alternating([2, 4, 5])
  expected = [False, False, True, True, False, True, True]
  assert [compressed(t) for t in range(7)] == expected
  assert jax.jit(jax.vmap(compressed))(jnp.arange(7)).tolist() == expected


@pytest.mark.parametrize(
  'boundaries, message',
  [([], 'odd number'), ([1, 2], 'odd number'), ([0], 'rise'), ([3, 3], 'rise')],
)
def test_alternating_rejects(boundaries, message):
  with pytest.raises(ValueError, match=message):
    schedules.alternating(boundaries)

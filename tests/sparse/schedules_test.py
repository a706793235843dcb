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


def test_cubic_sparsity_follows_the_hand_worked_table():
  schedule = schedules.cubic_sparsity(0.9, 100, 200, initial=0.1)
  steps = [0, 100, 125, 150, 200, 500]
  # Remaining distance 0.8 times (1, 1, 27/64, 1/8, 0, 0).
  expected = [0.1, 0.1, 0.5625, 0.8, 0.9, 0.9]
  np.testing.assert_allclose([schedule(t) for t in steps], expected, rtol=1e-6)


def test_cubic_sparsity_counts_steps_beyond_the_reach_of_float32():
  start = 2**24
  schedule = schedules.cubic_sparsity(0.5, start, start + 4)
  at = jax.jit(schedule)(jnp.int32(start + 1))
  np.testing.assert_allclose(at, 0.5 * (1 - (3 / 4) ** 3), rtol=1e-6)


@pytest.mark.parametrize(
  'final, start, stop, initial',
  [
    (1.0, 0, 10, 0.0),
    (0.5, 0, 10, 0.6),
    (0.5, 0, 10, -0.1),
    (float('nan'), 0, 10, 0.0),
    (0.5, 10, 10, 0.0),
    (0.5, -1, 10, 0.0),
  ],
)
def test_cubic_sparsity_rejects(final, start, stop, initial):
  with pytest.raises(ValueError, match='must hold'):
    schedules.cubic_sparsity(final, start, stop, initial)


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
    schedules.cubic_sparsity(0.9, 3, 11, 0.2),
    schedules.drop_fraction(0.4, 9),
    schedules.drop_fraction(0.4, 9, 'constant'),
  ],
)
def test_traced_and_python_steps_agree(schedule):
  traced = jax.jit(jax.vmap(schedule))(jnp.arange(20))
  eager = [schedule(t) for t in range(20)]
  assert all(isinstance(x, jax.Array) and x.shape == () for x in eager)
  np.testing.assert_allclose(traced, eager, rtol=1e-6, atol=1e-7)


def test_cubic_by_hand():
  progress = schedules.cubic(2, 6)
  actual = [float(progress(t)) for t in (0, 2, 3, 4, 6, 9)]
  np.testing.assert_allclose(actual, [0, 0, 37 / 64, 7 / 8, 1, 1], rtol=1e-6)
  assert actual[-1] == 1.0
  with pytest.raises(ValueError, match='start < stop must hold'):
    schedules.cubic(3, 3)

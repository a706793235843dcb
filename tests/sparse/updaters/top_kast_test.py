"""Tests of Top-KAST, against tables worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import updaters

KEY = jax.random.key(0)
THETA = {
  'linear': {'w': jnp.array([0.5, -0.1, 0.3, 9.0, -8.0, 7.0]), 'b': jnp.ones(2)}
}


def _counts(n):
  return lambda theta: {'linear': {'w': n, 'b': theta['linear']['b'].size}}


def _bits(mask):
  return mask['linear']['w'].astype(int).tolist()


def test_top_kast_updates_more_than_it_uses():
  updater = updaters.top_kast(_counts(2), _counts(4))
  made = updater.init(KEY, THETA, THETA)
  assert _bits(made.forward) == [0, 0, 0, 1, 1, 0]
  assert _bits(made.backward) == [1, 0, 0, 1, 1, 1]
  tied = jax.tree.map(jnp.ones_like, THETA)
  _, made = updater.update(KEY, 0, tied, made, THETA)
  assert _bits(made.forward) == [1, 1, 0, 0, 0, 0]
  assert _bits(made.backward) == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
  ('before', 'forward', 'backward'),
  [
    # One weight is in use, and B is as given.
    ([1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [1, 0, 0, 1, 1, 1]),
    # Five are, which is more than there would be in B.
    ([1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]),
  ],
)
def test_top_kast_keeps_the_number_of_weights_in_use(before, forward, backward):
  mask = {'linear': {'w': jnp.array(before, bool), 'b': jnp.ones(2, bool)}}
  updater = updaters.top_kast(_counts(2), _counts(4))
  _, made = updater.update(KEY, 0, THETA, masks.Masks(mask, mask), THETA)
  assert _bits(made.forward) == forward
  assert _bits(made.backward) == backward
  assert made.forward['linear']['b'].all()


def test_top_kast_needs_a_larger_backward_set():
  updater = updaters.top_kast(_counts(3), _counts(2))
  with pytest.raises(ValueError, match="'linear/w' has 3 in the forward and 2"):
    updater.init(KEY, THETA, THETA)


def test_top_kast_penalty_by_hand():
  made = updaters.top_kast(_counts(3), _counts(4)).init(KEY, THETA, THETA)
  penalty = updaters.exploration_penalty(THETA, made, 0.1)
  # A: 9, -8, 7. B adds 0.5, which pays double at a density of 1/2.
  np.testing.assert_allclose(
    penalty['linear']['w'], [0.1, 0, 0, 0.9, -0.8, 0.7], rtol=1e-6
  )
  assert not penalty['linear']['b'].any()


@pytest.mark.parametrize(
  ('forward', 'backward'),
  [
    (distributions.n_of_m(2, 4, 0), distributions.n_of_m(1, 4, 0)),
    (distributions.n_of_m(1, 2, 0), distributions.n_of_m(3, 4, 0)),
    (distributions.n_of_m(1, 2, 0), distributions.uniform(0.5)),
    (distributions.uniform(0.5), distributions.n_of_m(1, 2, 0)),
  ],
)
def test_top_kast_needs_patterns_one_inside_the_other(forward, backward):
  theta = {'linear': {'w': jnp.arange(8.0)}}
  updater = updaters.top_kast(forward, backward)
  with pytest.raises(ValueError, match=r'Give both'):
    updater.init(KEY, theta, theta)


def test_top_kast_in_patterns():
  theta = {'linear': {'w': jnp.array([1.0, 4.0, 3.0, 2.0])}}
  for backward, expected in (
    (distributions.n_of_m(3, 4, 0), [0, 1, 1, 1]),
    (distributions.uniform(0.0), [1, 1, 1, 1]),
  ):
    updater = updaters.top_kast(distributions.n_of_m(1, 4, 0), backward)
    made = updater.init(KEY, theta, theta)
    for _ in range(2):
      assert _bits(made.forward) == [0, 1, 0, 0]
      assert _bits(made.backward) == expected
      _, made = updater.update(KEY, 0, theta, made, theta)

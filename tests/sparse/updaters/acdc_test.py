"""Tests of AC/DC, against tables worked by hand."""

import jax
import jax.numpy as jnp
import pytest

from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters

KEY = jax.random.key(0)
FIRST = {'linear': {'w': jnp.array([0.5, -0.1, 9.0, -8.0]), 'b': jnp.ones(2)}}
LATER = {'linear': {'w': jnp.array([0.5, -7.0, 9.0, -0.8]), 'b': jnp.ones(2)}}


def _bits(mask):
  return mask['linear']['w'].astype(int).tolist()


def _make(regrow=None, **options):
  compressed = schedules.alternating([10, 20, 30])
  counts = distributions.uniform(0.5)
  return updaters.acdc(counts, compressed, regrow, **options)


@pytest.mark.parametrize('scope', ['layer', 'global'])
def test_phases_alternate(scope):
  updater = _make(scope=scope)
  update = jax.jit(updater.update)
  made = updater.init(KEY, FIRST, FIRST)
  seen = []
  for step, theta in (
    (5, FIRST),
    (10, FIRST),  # The largest of this step ...
    (15, LATER),  # ... are kept for the phase, whatever happens.
    (20, LATER),
    (30, LATER),
    (99, FIRST),
  ):
    _, made = update(KEY, step, theta, made, FIRST)
    seen.append(_bits(made.forward))
    assert _bits(made.backward) == seen[-1]
    assert made.forward['linear']['b'].all()
  largest_first, largest_later = [0, 0, 1, 1], [0, 1, 1, 0]
  assert seen == [
    [1, 1, 1, 1],
    largest_first,
    largest_first,
    [1, 1, 1, 1],
    largest_later,
    largest_later,
  ]


def test_pruned_weights_enter_a_dense_phase_with_given_values():
  zeros = lambda key: jax.tree.map(jnp.zeros_like, FIRST)
  for regrow, expected in ((zeros, [0.0, 0.0, 9.0, -8.0]), (None, None)):
    updater = _make(regrow)
    made = updater.init(KEY, FIRST, FIRST)
    theta, made = updater.update(KEY, 10, FIRST, made, FIRST)
    assert theta['linear']['w'].tolist() == FIRST['linear']['w'].tolist()
    theta, made = updater.update(KEY, 20, theta, made, FIRST)
    expected = expected or FIRST['linear']['w'].tolist()
    assert theta['linear']['w'].tolist() == expected
    assert _bits(made.forward) == [1, 1, 1, 1]


def test_scopes_are_checked():
  with pytest.raises(ValueError, match="got 'row'"):
    _make(scope='row')

"""Tests of one-shot pruning and of what is measured around it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.sparse import masks
from powerprop_jax.sparse import pruning

F, T = False, True


def _theta():
  return {
    'linear': {'w': jnp.array([[3.0, -1.0], [1.0, -2.0]]), 'b': jnp.zeros(2)},
    'logits': {'w': jnp.array([[0.5], [-0.5]]), 'b': jnp.array([7.0])},
  }


def _random(seed, sizes):
  keys = jax.random.split(jax.random.key(seed), len(sizes))
  return {
    name: {'w': jax.random.normal(key, (n,))}
    for key, (name, n) in zip(keys, sizes.items())
  }


@pytest.mark.parametrize(
  ('density', 'options', 'linear', 'logits'),
  [
    (1.0, {}, [[T, T], [T, T]], [[T], [T]]),
    # 0.5 of 4 and of 2; the tie of 0.5 and -0.5 goes to the first.
    (0.5, {}, [[T, F], [F, T]], [[T], [F]]),
    # floor(3.0) of 4 with a tie of -1 and 1, and floor(1.5) of 2.
    (0.75, {}, [[T, T], [F, T]], [[T], [F]]),
    (0.49, {}, [[T, F], [F, F]], [[F], [F]]),
    # The output layer keeps twice the fraction, at most all.
    (0.5, {'density_scale': {'logits': 2.0}}, [[T, F], [F, T]], [[T], [T]]),
    (0.75, {'density_scale': {'logits': 2.0}}, [[T, T], [F, T]], [[T], [T]]),
    (0.5, {'density_scale': {'^linear/w$': 0.5}}, [[T, F], [F, F]], [[T], [F]]),
    # The first pattern that matches counts.
    (
      0.25,
      {'density_scale': {'log': 2.0, 'w': 3.0}},
      [[T, T], [F, T]],
      [[T], [F]],
    ),
    # 3 of all 6: 3, 2 and the first 1.
    (0.5, {'scope': 'global'}, [[T, T], [F, T]], [[F], [F]]),
    (0.9, {'scope': 'global'}, [[T, T], [T, T]], [[T], [F]]),
  ],
)
@pytest.mark.filterwarnings('ignore:Pruning cuts')
def test_prune_keeps_the_largest(density, options, linear, logits):
  expected = {
    'linear': {'w': np.array(linear), 'b': np.array([T, T])},
    'logits': {'w': np.array(logits), 'b': np.array([T])},
  }
  mask = pruning.prune(_theta(), density, **options)
  jax.tree.map(np.testing.assert_array_equal, mask, expected)


@pytest.mark.parametrize(
  'options', [{'density_scale': {'logits': 2.0}}, {'scope': 'global'}]
)
@pytest.mark.filterwarnings('ignore:Pruning cuts')
def test_prune_takes_a_traced_density(options):
  traces = []
  prune = functools.partial(pruning.prune, **options)

  @jax.jit
  def compiled(theta, density):
    traces.append(density)
    return prune(theta, density)

  for density in 1.0, 0.75, 0.5, 0.25, 0.1:
    jax.tree.map(
      np.testing.assert_array_equal,
      compiled(_theta(), density),
      prune(_theta(), density),
    )
  assert len(traces) == 1


def test_prune_takes_another_choice_of_weights():
  biases = functools.partial(
    pruning.prune, is_weight=lambda p, _: p.endswith('/b')
  )
  mask = biases(_theta(), 1 / 3, scope='global')
  assert mask['logits']['b'].tolist() == [T]
  assert mask['linear']['b'].tolist() == [F, F]
  assert bool(mask['linear']['w'].all())


@pytest.mark.parametrize(
  ('density', 'options', 'message'),
  [
    (0.0, {}, 'got 0.0'),
    (1.5, {}, 'got 1.5'),
    (1.5, {'density_scale': {'w': 0.1}}, 'got 1.5'),
    (math.nan, {}, 'got nan'),
    (0.5, {'scope': 'layerwise'}, "got 'layerwise'"),
    (0.5, {'scope': 'global', 'density_scale': {'w': 2.0}}, "scope='layer'"),
    (0.5, {'density_scale': {'w': 0.0}}, "'w': 0.0"),
    (0.5, {'density_scale': {'w': math.inf}}, "'w': inf"),
    (0.5, {'density_scale': {'output': 2.0}}, 'linear/w.*logits/w'),
    (0.5, {'is_weight': lambda p, x: False}, 'no weight among.*linear/b'),
  ],
)
def test_prune_refuses(density, options, message):
  with pytest.raises(ValueError, match=message):
    pruning.prune(_theta(), density, **options)


@pytest.mark.parametrize('options', [{}, {'scope': 'global'}])
def test_sweep_evaluates_what_prune_keeps_and_compiles_once(options):
  kept = [1.0, 0.7, 0.29, 0.1]
  traces = []

  def evaluate(theta, factor):
    traces.append(factor)
    return factor * sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(theta))

  sweep = pruning.make_prune_sweep(evaluate, kept, **options)
  for seed in range(3):
    # 0.7 of 10 weights is 7; it would be 6 of a float32 0.7.
    theta = _random(seed, {'a': 10, 'b': 30})
    result = sweep(theta, 2.0)
    assert all(type(x) is float for x in result)
    for p, x in zip(kept, result):
      mask = pruning.prune(theta, p, **options)
      pruned = masks.apply_mask(theta, mask)
      expected = 2.0 * sum(
        float(jnp.abs(w['w']).sum()) for w in pruned.values()
      )
      assert x == pytest.approx(expected, rel=1e-6)
  assert len(traces) == 1


def test_sweep_refuses_before_work_starts():
  def evaluate(theta):
    raise AssertionError

  with pytest.raises(ValueError, match=r'got 2\.0'):
    pruning.make_prune_sweep(evaluate, [0.5, 2.0])
  with pytest.raises(ValueError, match="got 'none'"):
    pruning.make_prune_sweep(evaluate, [0.5], scope='none')
  with pytest.raises(TypeError, match='sparsity'):
    pruning.make_prune_sweep(evaluate, [0.5], sparsity=0.1)
  theta = _theta()
  theta['logits']['w'] = theta['logits']['w'].at[0].set(jnp.nan)
  with pytest.raises(ValueError, match=r'1 entries.*logits/w'):
    pruning.make_prune_sweep(evaluate, [0.5])(theta)


@pytest.mark.parametrize('value', [jnp.nan, jnp.inf, -jnp.inf])
def test_check_finite_names_the_leaf(value):
  params = {'a/b': {'w': jnp.ones(3, jnp.bfloat16)}, 'count': jnp.int32(3)}
  pruning.check_finite(params)
  params['a/b']['w'] = params['a/b']['w'].at[1:].set(value)
  with pytest.raises(ValueError, match="2 entries of 'a/b/w'"):
    pruning.check_finite(params)

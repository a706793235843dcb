"""Tests of one-shot pruning, of its scores and of sweeps over densities."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax import leaves
from powerprop_jax.sparse import distributions
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


@pytest.mark.parametrize('dtype', [np.float16, np.float32, jnp.float32])
def test_densities_of_little_precision_count_exactly(dtype):
  theta = {'w': jnp.arange(1.0, 1001)}
  assert int(pruning.prune(theta, dtype(0.7))['w'].sum()) == 700
  count = lambda pruned: jnp.sum(pruned['w'] != 0)
  densities = [dtype(x) for x in (0.7, 0.9)]
  assert pruning.make_prune_sweep(count, densities)(theta) == [700, 900]


def test_a_global_density_that_keeps_nothing_is_told():
  with pytest.warns(UserWarning, match='keeps none of the 6 weights'):
    mask = pruning.prune(_theta(), 0.1, scope='global')
  assert not mask['linear']['w'].any()


def test_scores_have_the_shapes_of_the_weights():
  scores = jax.tree.map(lambda x: x[:1], _theta())
  with pytest.raises(ValueError, match=r'scores of .* have the shape'):
    pruning.prune(_theta(), 0.5, scores=scores)


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
@pytest.mark.filterwarnings('ignore:Pruning cuts', 'ignore:A density')
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
    # 0.7 of 10 weights is 7; it would be 6 with 0.7 in float32.
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


@pytest.mark.parametrize(
  ('density', 'size', 'kept'), [(1 - 0.9, 1000, 100), (0.29, 100, 29)]
)
def test_decimal_densities_count_exactly(density, size, kept):
  theta = {'linear': {'w': jnp.arange(1.0, size + 1)}}
  for scope in ('layer', 'global'):
    mask = pruning.prune(theta, density, scope=scope)
    assert mask['linear']['w'].sum() == kept
    traced = jax.jit(functools.partial(pruning.prune, scope=scope))
    assert traced(theta, density)['linear']['w'].sum() == kept


def test_a_layer_without_weights_is_said():
  theta = {'first': {'w': jnp.ones((8, 8))}, 'last': {'w': jnp.ones((80, 8))}}
  with pytest.warns(UserWarning, match="none of the 64 weights .*'first/w'"):
    mask = pruning.prune(theta, 0.01)
  assert int(mask['first']['w'].sum()) == 0
  assert int(mask['last']['w'].sum()) == 6
  # There is no warning if enough is kept, and an empty leaf is kept whole.
  pruning.prune(theta, 0.01, density_scale={'first': 2.0})
  pruning.prune({**theta, 'none': {'w': jnp.ones((0, 3))}}, 0.5)


@pytest.mark.parametrize('options', [{}, {'scope': 'global'}])
def test_leaves_without_entries_are_pruned_to_nothing(options):
  theta = {'none': {'w': jnp.ones((0, 3))}, 'linear': {'w': jnp.arange(4.0)}}
  mask = pruning.prune(theta, 0.5, **options)
  assert mask['none']['w'].shape == (0, 3)
  assert mask['linear']['w'].tolist() == [F, F, T, T]


def test_stacked_layers_are_ranked_by_themselves():
  w = jax.random.normal(jax.random.key(0), (4, 16, 16))
  kernel = w.at[3].multiply(0.01)
  theta = {'ScanBlock_0': {'Dense_0': {'kernel': kernel}}}
  mask = pruning.prune(theta, 0.5)['ScanBlock_0']['Dense_0']['kernel']
  assert mask.sum((1, 2)).tolist() == [128] * 4
  for layer, expected in zip(kernel, mask):
    single = pruning.prune({'linear': {'w': layer}}, 0.5)
    np.testing.assert_array_equal(single['linear']['w'], expected)
  axes = functools.partial(leaves.axes, stacked='.')
  mask = pruning.prune({'layers': {'w': kernel}}, 0.5, axes=axes)
  assert mask['layers']['w'].sum((1, 2)).tolist() == [128] * 4
  counts = jax.jit(functools.partial(pruning.prune, axes=axes))(
    {'layers': {'w': kernel}}, 0.5
  )
  np.testing.assert_array_equal(counts['layers']['w'], mask['layers']['w'])


def test_distributions_say_how_many():
  theta = _random(0, {'a': 10, 'b': 30})
  counts = distributions.custom({'a': 0.2, 'b': 0.9})
  mask = pruning.prune(theta, counts)
  assert [int(m['w'].sum()) for m in mask.values()] == [8, 3]
  mask = pruning.prune(theta, counts, scope='global')
  assert sum(int(m['w'].sum()) for m in mask.values()) == 11
  expected = pruning.prune(theta, 11 / 40, scope='global')
  jax.tree.map(np.testing.assert_array_equal, mask, expected)
  for options in {'scope': 'output'}, {'density_scale': {'a': 2.0}}:
    with pytest.raises(ValueError, match='says itself how many'):
      pruning.prune(theta, counts, **options)


def test_patterns_are_for_rankings_by_layer():
  theta = {'linear': {'w': jnp.array([[4.0, 1.0], [3.0, 2.0]])}}
  mask = pruning.prune(theta, distributions.n_of_m(1, 2))
  assert mask['linear']['w'].tolist() == [[T, F], [F, T]]
  mask = pruning.prune(theta, distributions.n_of_m(1, 2, axis=1))
  assert mask['linear']['w'].tolist() == [[T, F], [T, F]]
  with pytest.raises(ValueError, match="'linear/w' keeps 1 of every 2 weights"):
    pruning.prune(theta, distributions.n_of_m(1, 2), scope='global')


@pytest.mark.parametrize('shape', [(6, 4), (2, 3, 6, 4)])
def test_output_units_are_ranked_by_themselves(shape):
  w = jax.random.normal(jax.random.key(0), shape)
  mask = pruning.prune({'conv2_d': {'w': w}}, 0.5, scope='output')
  mask = np.asarray(mask['conv2_d']['w']).reshape(-1, 4)
  size = mask.shape[0]
  assert mask.sum(0).tolist() == [size // 2] * 4
  for column, kept in zip(np.abs(np.reshape(w, (-1, 4))).T, mask.T):
    assert column[kept].min() > column[~kept].max()


def test_wanda_by_hand():
  theta = {'linear': {'w': jnp.array([[1.0, -2.0], [3.0, 0.5]])}}
  # Two examples, of norms 5 and 1 in the two inputs.
  inputs = jnp.array([[3.0, 0.0], [4.0, 1.0]])
  scores = pruning.wanda_scores(theta, {'linear/w': inputs})
  assert scores['linear']['w'].tolist() == [[5.0, 10.0], [3.0, 0.5]]
  mask = pruning.prune(theta, 0.5, scores=scores, scope='output')
  assert mask['linear']['w'].tolist() == [[T, T], [F, F]]
  # By magnitude the first unit would keep its other weight.
  mask = pruning.prune(theta, 0.5, scope='output')
  assert mask['linear']['w'].tolist() == [[F, T], [T, F]]


@pytest.mark.parametrize(
  ('path', 'shape', 'inputs', 'einsum'),
  [
    ('conv2_d/w', (3, 3, 5, 2), (7, 4, 4, 5), 'nhwi->i,hwio->hwio'),
    ('conv2_d_transpose/w', (3, 3, 2, 5), (7, 4, 4, 5), 'nhwi->i,hwoi->hwoi'),
    ('attention/out/kernel', (4, 3, 6), (7, 9, 4, 3), 'nthd->hd,hdo->hdo'),
    ('Scan_0/Dense_0/kernel', (3, 5, 2), (7, 5), None),
    ('ScanB_0/Dense_0/kernel', (3, 5, 2), (3, 7, 5), 'sni->si,sio->sio'),
  ],
)
def test_wanda_finds_the_inputs_of_every_kind_of_layer(
  path, shape, inputs, einsum
):
  rng = np.random.default_rng(0)
  w, x = (rng.normal(size=s).astype(np.float32) for s in (shape, inputs))
  *modules, name = path.split('/')
  theta = {name: jnp.asarray(w)}
  for module in reversed(modules):
    theta = {module: theta}
  activations = {path: jnp.asarray(x)}
  if einsum is None:  # These are not the activations of three layers.
    with pytest.raises(ValueError, match=r'must begin with \(3,\)'):
      pruning.wanda_scores(theta, activations)
    return
  scores = pruning.wanda_scores(theta, activations)
  sums, product = einsum.split(',')
  norm = np.sqrt(np.einsum(sums, x**2))
  expected = np.einsum(f'{sums.split("->")[1]},{product}', norm, np.abs(w))
  np.testing.assert_allclose(jax.tree.leaves(scores)[0], expected, rtol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.uint8, jnp.float16])
def test_wanda_does_not_overflow(dtype):
  """Squares do not fit into bytes, nor sums of squares into float16."""
  theta = {'linear': {'w': jnp.ones((2, 1), jnp.float16)}}
  inputs = jnp.array([[16, 3], [250, 0], [250, 0]], dtype)
  scores = pruning.wanda_scores(theta, {'linear/w': inputs})
  expected = [[math.sqrt(16**2 + 2 * 250**2)], [3.0]]
  np.testing.assert_allclose(scores['linear']['w'], expected, rtol=1e-6)


def test_taylor_scores_do_not_underflow():
  theta, grads = (
    {'w': jnp.array(x, jnp.float16)} for x in ([1e-3, 2e-3], [1e-5, 1e-5])
  )
  first, second = pruning.taylor_scores(theta, grads)['w']
  assert 0 < first < second


def test_wanda_refuses():
  theta = {'linear': {'w': jnp.ones((3, 2)), 'b': jnp.ones(2)}}
  with pytest.raises(ValueError, match=r"no 'linear/w'; it has \['other'\]"):
    pruning.wanda_scores(theta, {'other': jnp.ones((4, 3))})
  with pytest.raises(ValueError, match=r'\(4, 2\), which must .* \(3,\)'):
    pruning.wanda_scores(theta, {'linear/w': jnp.ones((4, 2))})


def test_taylor_scores_rank_by_the_gradient_too():
  theta = {'linear': {'w': jnp.array([1.0, -2.0, 3.0]), 'b': jnp.ones(1)}}
  grads = {'linear': {'w': jnp.array([9.0, 3.0, -1.0]), 'b': jnp.ones(1)}}
  scores = pruning.taylor_scores(theta, grads)
  assert scores['linear']['w'].tolist() == [9.0, 6.0, 3.0]
  for scope in ('layer', 'global'):
    mask = pruning.prune(theta, 1 / 3, scores=scores, scope=scope)
    assert mask['linear']['w'].tolist() == [T, F, F]
  by_size = pruning.prune(theta, 1 / 3, scores=pruning.magnitude_scores(theta))
  expected = pruning.prune(theta, 1 / 3)
  jax.tree.map(np.testing.assert_array_equal, by_size, expected)


def test_scores_of_another_tree_are_refused():
  theta = _theta()
  with pytest.raises(ValueError, match='scores have the structure'):
    pruning.prune(theta, 0.5, scores=theta['linear'])

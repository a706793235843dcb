"""Tests of what is measured of networks, pruned or not."""

import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax import analysis
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import report as report_lib

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
  ('options', 'overlap', 'chance'),
  [
    # Layers keep 2 of 4 and 1 of 2: after training {0, 3} and {0}, before it
    # {0, 1} and {0}. By chance it is (2 * 2/4 + 1 * 1/2) / 3.
    ({}, 2 / 3, 1 / 2),
    # Layers keep 2 of 4 and both of 2: by chance it is (2 * 2/4 + 2 * 2/2) / 4.
    ({'density_scale': {'logits': 2.0}}, 3 / 4, 3 / 4),
    # 3 of 6 are kept, all in the first layer: {0, 1, 3} after training, and
    # {0, 1, 2} before it.
    ({'scope': 'global'}, 2 / 3, 1 / 2),
    # Every output unit keeps 1 of 2: {0}, {3} and {0} after training, and {0},
    # {1} and {0} before it.
    ({'scope': 'output'}, 2 / 3, 1 / 2),
  ],
)
def test_mask_overlap_by_hand(options, overlap, chance):
  before = _theta()
  before['linear']['w'] = jnp.array([[2.0, 0.9], [0.8, 0.1]])
  before['logits']['w'] = jnp.array([[0.2], [-0.1]])
  result = analysis.mask_overlap(before, _theta(), [1.0, 0.5], **options)
  assert result['kept'] == [1.0, 0.5]
  assert result['overlap'] == pytest.approx([1.0, overlap], rel=1e-6)
  assert result['chance'] == pytest.approx([1.0, chance], rel=1e-12)
  json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
  'options', [{'density_scale': {'b': 3.0}}, {'scope': 'global'}]
)
def test_chance_is_the_mean_overlap_of_independent_networks(options):
  sizes = {'a': 60, 'b': 20}
  results = [
    analysis.mask_overlap(
      _random(2 * i, sizes), _random(2 * i + 1, sizes), [0.2], **options
    )
    for i in range(200)
  ]
  overlaps = [r['overlap'][0] for r in results]
  assert np.mean(overlaps) == pytest.approx(results[0]['chance'][0], abs=0.025)


@pytest.mark.filterwarnings('ignore:Pruning cuts')
def test_mask_overlap_refuses():
  theta = _theta()
  with pytest.raises(ValueError, match='keeps none of 6'):
    analysis.mask_overlap(theta, theta, [0.5, 0.01])
  bad = {**theta, 'linear': {'w': jnp.full([2, 2], jnp.inf), 'b': jnp.ones(2)}}
  with pytest.raises(ValueError, match='0/linear/w'):
    analysis.mask_overlap(bad, theta, [0.5])
  with pytest.raises(ValueError, match='density must be .* got 1.5'):
    analysis.mask_overlap(theta, theta, [1.5])


def test_average_overlap():
  runs = [
    {'kept': [1.0, 0.1], 'overlap': [1.0, x], 'chance': [1.0, 0.1]}
    for x in (0.2, 0.4)
  ]
  result = analysis.average_overlap(runs)
  assert result['kept'] == [1.0, 0.1]
  assert result['chance'] == [1.0, 0.1]
  assert result['overlap'] == pytest.approx([1.0, 0.3])
  # The deviation of 0.2 and 0.4 is sqrt(2 * 0.1^2 / (2 - 1)).
  assert result['std'] == pytest.approx([0.0, 0.1 * math.sqrt(2)])
  assert analysis.average_overlap(runs[:1])['std'] == [0.0, 0.0]


def test_average_overlap_refuses_other_fractions():
  runs = [{'kept': [x], 'overlap': [x], 'chance': [x]} for x in (0.1, 0.5)]
  with pytest.raises(ValueError, match=r'fractions \[\(0.1,\), \(0.5,\)\]'):
    analysis.average_overlap(runs)
  with pytest.raises(ValueError, match='one or more'):
    analysis.average_overlap([])


def _silverman(values, points):
  """The density estimate, written as the sum that it is."""
  low, high = np.quantile(values, [0.25, 0.75])
  spread = min(np.std(values, ddof=1), (high - low) / 1.34)
  h = 0.9 * (spread or np.std(values, ddof=1)) * len(values) ** -0.2
  z = (np.asarray(points)[:, None] - values) / h
  kernels = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
  return kernels.sum(axis=1) / (len(values) * h)


def _trained_curve(values):
  theta = {'a': {'w': jnp.asarray(values)}}
  curve = analysis.weight_distribution(theta, theta, 1.0)['kde']['trained']
  return np.array(curve['x']), np.array(curve['density'])


def test_density_of_two_values_by_hand():
  x, density = _trained_curve([0.0, 1.0])
  # Quartiles are 0.25 and 0.75; the spread is 0.5 / 1.34, below sqrt(0.5).
  h = 0.9 * (0.5 / 1.34) / 2**0.2
  normal = [math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (0, 1 / h)]
  at_values = density[np.isin(x, [0.0, 1.0])]
  np.testing.assert_allclose(at_values, 2 * [sum(normal) / (2 * h)], rtol=1e-9)
  # If the quartiles coincide, the standard deviation is used: sqrt(0.8).
  x, density = _trained_curve([0.0, 0.0, 0.0, 0.0, 2.0])
  h = 0.9 * math.sqrt(0.8) / 5**0.2
  expected = (1 + 4 * math.exp(-((2 / h) ** 2) / 2)) / math.sqrt(2 * math.pi)
  np.testing.assert_allclose(density[x == 2.0], expected / (5 * h), rtol=1e-9)


def test_density_of_a_normal_sample():
  values = np.random.default_rng(0).normal(2.0, 3.0, 10_000)
  x, density = _trained_curve(values)
  expected = np.exp(-(((x - 2) / 3) ** 2) / 2) / (3 * math.sqrt(2 * math.pi))
  middle = np.abs(x - 2) < 3
  np.testing.assert_allclose(density[middle], expected[middle], rtol=0.09)


def test_weight_distribution_of_all_weights():
  before, after = _theta(), _theta()
  # The first of the two largest, and one of the others, change their sign.
  after['linear']['w'] = jnp.array([[-3.0, 1.0], [1.0, -2.0]])
  result = analysis.weight_distribution(before, after, 0.5)
  rows = sorted(zip(result['initial'], result['trained'], result['survives']))
  assert rows == [
    (-2.0, -2.0, T),
    (-1.0, 1.0, F),
    (-0.5, -0.5, F),
    (0.5, 0.5, T),
    (1.0, 1.0, F),
    (3.0, -3.0, T),
  ]
  assert result['sign_changes'] == {
    'all': 2 / 6,
    'survivors': 1 / 3,
    'pruned': 1 / 3,
  }
  assert result['density'] == 0.5
  assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_weight_distribution_chooses_the_same_weights_for_a_seed():
  sizes = {'a': 3000, 'b': 500}
  before, first, second = (_random(i, sizes) for i in range(3))
  options = {'density': 0.1, 'num_samples': 1000}
  results = [
    analysis.weight_distribution(before, after, seed=seed, **options)
    for after, seed in ((first, 0), (second, 0), (second, 1))
  ]
  assert len(set(results[0]['initial'])) == 1000
  assert results[0]['initial'] == results[1]['initial']
  assert results[1]['initial'] != results[2]['initial']
  survivors = np.array(results[0]['trained'])[results[0]['survives']]
  others = np.array(results[0]['trained'])[~np.array(results[0]['survives'])]
  assert np.abs(survivors).min() > 1.5 > 0.5 > np.abs(others).min()


def test_weight_distribution_smooths_the_initial_values():
  before, after = _random(0, {'a': 400}), _random(1, {'a': 400})
  result = analysis.weight_distribution(before, after, 0.25)
  initial, trained = np.array(result['initial']), np.array(result['trained'])
  survives = np.array(result['survives'])
  assert survives.sum() == 100
  for name, values in (
    ('survivors', initial[survives]),
    ('pruned', initial[~survives]),
    ('trained', trained),
  ):
    curve = result['kde'][name]
    expected = _silverman(values, curve['x'])
    np.testing.assert_allclose(curve['density'], expected, rtol=1e-9)


def test_zero_has_no_sign_to_change():
  before = {'a': {'w': jnp.array([1.0, 0.0, -2.0, 3.0])}}
  after = {'a': {'w': jnp.array([0.0, 1.0, 2.0, 4.0])}}
  result = analysis.weight_distribution(before, after, 0.5)
  assert result['sign_changes']['all'] == 0.25


def test_density_curves_have_area_one():
  before = _random(0, {'a': 20_000})
  # The tails are heavier than before, as after training with alpha > 1.
  after = jax.tree.map(lambda x: x * jnp.abs(x), _random(1, {'a': 20_000}))
  result = analysis.weight_distribution(before, after, 0.1)
  for curve in result['kde'].values():
    area = np.trapezoid(curve['density'], curve['x'])
    assert area == pytest.approx(1.0, abs=0.01)


@pytest.mark.filterwarnings('ignore:A density of')
def test_weight_distribution_without_survivors():
  theta = _theta()
  result = analysis.weight_distribution(theta, theta, 0.1, scope='global')
  assert result['sign_changes'] == {
    'all': 0.0,
    'survivors': None,
    'pruned': 0.0,
  }
  assert result['kde']['survivors'] == {'x': [], 'density': []}
  with pytest.raises(ValueError, match='got 0'):
    analysis.weight_distribution(theta, theta, 0.5, num_samples=0)


def test_sparsity_report_counts_weights_only():
  theta = _theta()
  mask = {
    # The second output of the first layer has no input left.
    'linear': {'w': jnp.array([[T, F], [T, F]]), 'b': jnp.array([F, F])},
    'logits': {'w': jnp.array([[T], [F]]), 'b': jnp.array([T])},
  }
  for like in theta, jax.eval_shape(lambda: theta):
    report = report_lib.sparsity_report(mask, like)
    assert report == {
      'layers': [
        {
          'path': 'linear/w',
          'shape': [2, 2],
          'size': 4,
          'kept': 2,
          'density': 0.5,
          'dead': 1,
        },
        {
          'path': 'logits/w',
          'shape': [2, 1],
          'size': 2,
          'kept': 1,
          'density': 0.5,
          'dead': 0,
        },
      ],
      'total': {'size': 6, 'kept': 3, 'density': 0.5, 'dead': 1},
    }
    json.dumps(report, allow_nan=False)


def test_dead_units_of_convolutions_and_of_equinox():
  mask = np.ones([3, 3, 2, 4], bool)
  mask[..., 1] = mask[:, 1, :, 2] = False
  conv = {'conv': {'w': jnp.zeros(mask.shape)}}
  report = report_lib.sparsity_report({'conv': {'w': mask}}, conv)
  assert report['total']['dead'] == 1
  linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))  # [out, in].
  dead = jnp.array([[F, F], [T, F], [F, F]])
  mask = eqx.tree_at(lambda m: m.weight, masks.dense(linear).forward, dead)
  assert report_lib.sparsity_report(mask, linear)['total']['dead'] == 2


def test_summarise_and_table():
  summary = analysis.summarise(
    [1.0, 0.0207],
    {
      '1.0': [[0.9, 0.8], [0.5, 0.5]],
      '2.0 chain_rule': np.array([[1], [0.75]]),
    },
    {'1.0': [[0.7, 0.6], [0.4, 0.3]], '2.0 chain_rule': [[0.9], [0.6]]},
  )
  first, second = summary['results'].values()
  assert first['mean'] == pytest.approx([0.85, 0.5])
  assert first['std'] == pytest.approx([0.1 / math.sqrt(2), 0.0])
  assert first['test_accuracy'] == [[0.9, 0.8], [0.5, 0.5]]
  assert first['valid_accuracy'] == [[0.7, 0.6], [0.4, 0.3]]
  assert second['std'] == [0.0, 0.0]
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  assert analysis.accuracy_table(summary).splitlines() == [
    '  kept (%)    alpha = 1.0    alpha = 2.0 chain_rule',
    '    100.00   85.00 ± 7.07                    100.00',
    '      2.07   50.00 ± 0.00                     75.00',
  ]


@pytest.mark.parametrize('values', [[[0.9, 0.8]], [0.9, 0.8], [[], []]])
def test_summarise_refuses_other_shapes(values):
  with pytest.raises(ValueError, match=r"'1.0' must be of shape \[2, seeds\]"):
    analysis.summarise([1.0, 0.5], {'1.0': values})


def test_sign_changes_of_what_survives():
  before = {'linear': {'w': np.array([[1.0, -1.0, 0.0, 2.0, -3.0]])}}
  after = {'linear': {'w': np.array([[-1.0, -2.0, 1.0, 0.0, 3.0]])}}
  bias = {'b': np.array([1.0])}
  before['linear'] |= bias
  after['linear'] |= {'b': -bias['b']}
  mask = {
    'linear': {'w': np.array([[1, 1, 1, 1, 0]], bool), 'b': bias['b'] > 0}
  }
  # The first of four survivors does; zeros have no sign, and biases do not
  # count.
  assert analysis.sign_changes(before, after, mask) == 0.25
  none = jax.tree.map(np.zeros_like, mask)
  assert analysis.sign_changes(before, after, none) == 0

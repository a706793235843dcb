"""Tests of how many weights each layer keeps."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax import leaves
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import masks


def _tree(**shapes):
  """A tree of layers with weights of the given shapes, and biases."""

  def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  return {k: {'w': struct(*s), 'b': struct(s[-1])} for k, s in shapes.items()}


def _weights(counts):
  return {k: v['w'] for k, v in counts.items()}


_PAIR = _tree(a=(2, 2), b=(10, 10))
_CONV = _tree(conv=(3, 3, 4, 8), linear=(16, 16))


@pytest.mark.parametrize(
  'distribution, params, expected',
  [
    (distributions.uniform(0.9), _tree(a=(10,), b=(20,), c=(70,)), (1, 2, 7)),
    (distributions.uniform(0.0), _tree(a=(3, 5), b=(2,)), (15, 2)),
    # 10 of 21, which are 3 1/3 per layer: the first one takes the remainder.
    (distributions.uniform(0.5), _tree(a=(7,), b=(7,), c=(7,)), (4, 3, 3)),
    # 10 of 100, 4 of them in the dense layer and 6 of 96 in the others.
    (
      distributions.uniform(0.9, dense='^b/'),
      _tree(a=(48,), b=(4,), c=(48,)),
      (3, 4, 3),
    ),
    # 13 of 112. The small layers' weights are taken from a, not from d.
    (
      distributions.uniform(0.884, dense=('d/',)),
      _tree(a=(100,), b=(1,), c=(1,), d=(10,)),
      (1, 1, 1, 10),
    ),
    # Ratios 4 / 4 and 20 / 100. 16 weights: 2.67 and 13.33.
    (distributions.erdos_renyi(0.85), _PAIR, (3, 13)),
    # 26 weights: a would have 4.33 of 4 and is capped, b has the other 22.
    (distributions.erdos_renyi(0.75), _PAIR, (4, 22)),
    (distributions.erdos_renyi(0.0), _PAIR, (4, 100)),
    # 136 weights. Ratios 18 / 288 and 32 / 256: 48.96 and 87.04.
    (distributions.erdos_renyi(0.75), _CONV, (49, 87)),
    # Ratios 12 / 32 and 32 / 256: 104.91 and 31.09.
    (distributions.erdos_renyi(0.75, kernel=False), _CONV, (105, 31)),
    (distributions.custom({'a': 0.5, '.': 0.9}), _PAIR, (2, 10)),
    (distributions.custom({'b/w': 0.9}, default=0.25), _PAIR, (3, 10)),
    (distributions.custom({'a': 0.99}), _PAIR, (1, 100)),
  ],
)
def test_hand_worked_counts(distribution, params, expected):
  counts = distribution(params)
  assert tuple(_weights(counts).values()) == expected
  assert all(counts[k]['b'] == params[k]['b'].shape[0] for k in params)
  assert all(isinstance(n, int) for n in jax.tree.leaves(counts))


def test_erdos_renyi_reads_the_layout_of_weights_with_outputs_first():
  shapes = {'conv': {'weight': jnp.zeros((8, 4, 3, 3))}}
  shapes['linear'] = {'weight': jnp.zeros((16, 16))}
  distribution = distributions.erdos_renyi(
    0.75, kernel=False, is_weight=lambda path, leaf: True
  )
  counts = distribution(shapes)
  assert counts == {'conv': {'weight': 105}, 'linear': {'weight': 31}}


def _random_tree(rng):
  shapes = {}
  for i in range(rng.integers(1, 9)):
    shapes[f'layer_{i}'] = tuple(rng.integers(1, 12, size=rng.integers(1, 5)))
  return _tree(**shapes)


@pytest.mark.parametrize('seed', range(40))
def test_total_is_exact_and_near_the_water_level(seed):
  rng = np.random.default_rng(seed)
  params = _random_tree(rng)
  size = np.array([np.prod(v['w'].shape) for v in params.values()])
  erk = [sum(v['w'].shape) / np.prod(v['w'].shape) for v in params.values()]
  for ratio, make in (
    (np.ones(len(size)), distributions.uniform),
    (np.array(erk), distributions.erdos_renyi),
  ):
    sparsity = rng.uniform(0, 1 - len(size) / size.sum())
    total = round((1 - sparsity) * size.sum())
    counts = np.array(list(_weights(make(sparsity)(params)).values()))
    assert counts.sum() == total
    assert (counts >= 1).all() and (counts <= size).all()
    # The scale of min(1, scale * ratio), by bisection.
    low, high = 0.0, 2 / ratio.min()
    for _ in range(100):
      middle = (low + high) / 2
      fits = (np.minimum(1, middle * ratio) * size).sum() <= total
      low, high = (middle, high) if fits else (low, middle)
    level = np.minimum(1, low * ratio) * size
    # Layers below one weight are lifted to one, at the cost of the others.
    lifted = np.maximum(1 - level, 0).sum()
    assert (np.abs(counts - level) <= 1 + lifted + 1e-6).all()


def test_every_layer_keeps_a_weight():
  params = _tree(a=(1000, 1000), b=(2, 2), c=(3, 3))
  counts = _weights(distributions.uniform(0.99999)(params))
  assert counts == {'a': 8, 'b': 1, 'c': 1}


def test_impossible_sparsity_states_the_largest_possible():
  params = _tree(a=(10, 10), b=(10, 90))
  with pytest.raises(ValueError, match=r'101 of 1000 .* is 0\.899'):
    distributions.uniform(0.9, dense='a/')(params)
  counts = distributions.uniform(0.899, dense='a/')(params)
  assert _weights(counts) == {'a': 100, 'b': 1}
  with pytest.raises(ValueError, match=r'largest possible sparsity is 0\.5'):
    distributions.erdos_renyi(0.9)(_tree(a=(2,), b=(2,)))


@pytest.mark.parametrize(
  'make', [distributions.uniform, distributions.erdos_renyi]
)
@pytest.mark.parametrize('sparsity', [-0.1, 1.0, float('nan')])
def test_sparsity_outside_the_unit_interval_is_rejected(make, sparsity):
  with pytest.raises(ValueError, match=r'\[0, 1\), got'):
    make(sparsity)
  with pytest.raises(ValueError, match=r'\[0, 1\), got'):
    distributions.custom({'a': sparsity})
  with pytest.raises(ValueError, match=r'\[0, 1\), got'):
    distributions.custom({'a': 0.5}, default=sparsity)


def test_patterns_are_checked():
  with pytest.raises(ValueError, match='not a regular expression'):
    distributions.uniform(0.5, dense=('(',))
  for distribution in (
    distributions.uniform(0.5, dense=('a', 'conv')),
    distributions.custom({'conv': 0.5}),
    # Biases do not count as weights.
    distributions.custom({'a/b': 0.5}),
  ):
    with pytest.raises(ValueError, match=r"matches no weight.*'a/w', 'b/w'"):
      distribution(_PAIR)


def test_trees_without_weights_are_rejected():
  with pytest.raises(ValueError, match='no weight among'):
    distributions.uniform(0.5)({'norm': {'scale': jnp.ones((1, 1, 1, 3))}})


def test_sparsities():
  counts = distributions.erdos_renyi(0.75)(_PAIR)
  assert distributions.sparsities(_PAIR, counts) == {
    'a': {'b': 0.0, 'w': 0.0},
    'b': {'b': 0.0, 'w': 0.78},
  }


def _kernels(prefix, *shapes):
  return {
    f'{prefix}_{i}': {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}
    for i, shape in enumerate(shapes)
  }


# Four layers of 16 inputs and 16 outputs and a last one, scanned or not. The
# order of the layers, by which fractions of weights are rounded, is the same.
_OUT = {'out': {'kernel': jax.ShapeDtypeStruct((16, 10), jnp.float32)}}
_STACKED = {'ScanBlock_0': _kernels('Dense', (4, 16, 16)), **_OUT}
_UNROLLED = {**_kernels('Block', *[(16, 16)] * 4), **_OUT}


@pytest.mark.parametrize(
  'make',
  [
    distributions.uniform(0.9),
    distributions.uniform(0.77),
    distributions.erdos_renyi(0.9),
    distributions.erdos_renyi(0.9, kernel=False),
    distributions.erdos_renyi(0.5),
    distributions.custom({'out': 0.3}, default=0.99),
  ],
)
def test_stacked_layers_have_the_counts_of_unrolled_ones(make):
  stacked, unrolled = make(_STACKED), make(_UNROLLED)
  counts = stacked['ScanBlock_0']['Dense_0']['kernel']
  assert counts.shape == (4, 1, 1)
  each = [unrolled[f'Block_{i}']['kernel'] for i in range(4)]
  assert counts.ravel().tolist() == each
  assert stacked['out'] == unrolled['out']


def test_erdos_renyi_of_stacked_layers_by_hand():
  # 118 of 1184 weights. Ratios 32 / 256 and 26 / 160, so 32 for each of the
  # stacked layers and 26 for the last one, scaled by 118 / 154.
  counts = distributions.erdos_renyi(0.9)(_STACKED)
  each = counts['ScanBlock_0']['Dense_0']['kernel'].ravel().tolist()
  assert (sorted(each), counts['out']['kernel']) == ([24, 24, 25, 25], 20)


def test_axes_can_be_said():
  params = {'layers': {'w': jnp.zeros((4, 16, 16))}, 'out': {'w': jnp.zeros(5)}}
  axes = functools.partial(leaves.axes, stacked='^layers/')
  counts = distributions.uniform(0.5, axes=axes)(params)
  assert counts['layers']['w'].ravel().tolist() == [128] * 4
  # Without axes, they look like the taps of a convolution.
  assert distributions.uniform(0.5)(params)['layers']['w'] == 512


@pytest.mark.parametrize('kernel', [True, False])
def test_attention_and_transposed_kernels_are_layers_of_two_dimensions(kernel):
  # In Flax the heads have an axis; all four are of 32 inputs and 32 outputs.
  attention = {
    'attention': {
      name: {'kernel': jnp.zeros(shape)}
      for name, shape in {
        'query': (32, 4, 8),
        'key': (32, 4, 8),
        'out': (4, 8, 32),
      }.items()
    },
    'dense': {'kernel': jnp.zeros((32, 32))},
  }
  counts = distributions.erdos_renyi(0.9, kernel)(attention)
  found = jax.tree.leaves(counts)
  assert sum(found) == round(0.1 * 4 * 1024)
  assert max(found) - min(found) <= 1
  # Taps, outputs and inputs in Haiku's transposed convolution: 3, 3, 5 and 7.
  shapes = {'conv2_d': (3, 3, 7, 5), 'conv2_d_transpose': (3, 3, 5, 7)}
  tree = {k: {'w': jnp.zeros(shape)} for k, shape in shapes.items()}
  counts = distributions.erdos_renyi(0.8, kernel)(tree)
  assert counts['conv2_d'] == counts['conv2_d_transpose']


def test_n_of_m_finds_the_inputs():
  params = {
    'linear': {'w': jnp.zeros((8, 3)), 'b': jnp.zeros(3)},
    'conv2_d': {'w': jnp.zeros((3, 3, 4, 5))},
    'conv2_d_transpose': {'w': jnp.zeros((3, 3, 5, 4))},
  }
  counts = distributions.n_of_m(2, 4)(params)
  assert counts['linear'] == {'w': masks.NOfM(2, 4, 0), 'b': 3}
  assert counts['conv2_d']['w'] == masks.NOfM(2, 4, 2)
  assert counts['conv2_d_transpose']['w'] == masks.NOfM(2, 4, 3)
  equinox = eqx.nn.Linear(4, 3, key=jax.random.key(0))
  assert distributions.n_of_m(1, 2)(equinox).weight == masks.NOfM(1, 2, 1)
  given = distributions.n_of_m(1, 3, axis=-1)({'w': jnp.zeros((2, 6))})
  assert given == {'w': masks.NOfM(1, 3, 1)}
  assert distributions.sparsities(params, counts)['linear']['w'] == 0.5


@pytest.mark.parametrize('n, m', [(0, 4), (5, 4), (-1, 2)])
def test_impossible_patterns_are_rejected(n, m):
  with pytest.raises(ValueError, match='1 <= n <= m must hold'):
    distributions.n_of_m(n, m)


def test_patterns_that_do_not_fit_are_rejected():
  with pytest.raises(ValueError, match="'a/w': 4 does not divide the axis 0"):
    distributions.n_of_m(2, 4)({'a': {'w': jnp.zeros((6, 8))}})
  with pytest.raises(ValueError, match="'a/w': 4 does not divide the axis 2"):
    distributions.n_of_m(2, 4, axis=2)({'a': {'w': jnp.zeros((8, 8))}})
  with pytest.raises(ValueError, match="'a/w'.* has no axis of inputs"):
    distributions.n_of_m(2, 4)({'a': {'w': jnp.zeros(8)}})
  with pytest.raises(ValueError, match='no weight among'):
    distributions.n_of_m(2, 4)({'a': {'b': jnp.zeros(8)}})


def test_two_leaves_of_one_path_are_rejected():
  params = {'a/w': jnp.zeros((2, 2)), 'a': {'w': jnp.zeros((8, 8))}}
  with pytest.raises(ValueError, match='the same path'):
    distributions.uniform(0.5)(params)

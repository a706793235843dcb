"""Tests of the networks: their sizes, names, initial values and arithmetic."""

import functools

import haiku as hk
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.models import networks

# Threefry, the default, is slow to compile.
_KEY = jax.random.key(0, impl='unsafe_rbg')


def _shapes(name, num_classes, shape, **kwargs):
  net = networks.build(name, num_classes, **kwargs)
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  params, state = jax.eval_shape(lambda x: net.init(_KEY, x, True), images)
  return net, params, state, images


def _random_images(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def _filled(shapes):
  """Parameters or state with values from numpy, which compiles nothing."""
  rng = np.random.default_rng(0)

  def fill(path, x):
    if path[-1].key != 'w':
      return jnp.ones(x.shape, x.dtype)
    w = rng.normal(size=x.shape) / np.sqrt(np.prod(x.shape[:-1]))
    return jnp.asarray(w, x.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def _equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in core.jaxprs_in_params(eqn.params):
      yield from _equations(inner)


def _traced(net, params, state, images, is_training=True):
  def apply(p, s, x):
    return net.apply(p, s, None, x, is_training)

  jaxpr = jax.make_jaxpr(apply)(params, state, images)
  return list(_equations(jaxpr.jaxpr))


# The numbers of parameters and of weights. Those of the ResNets are published
# for ImageNet, and the others are sums of the products of the layers'
# dimensions.
@pytest.mark.parametrize(
  'name, num_classes, shape, num_params, num_weights',
  [
    ('lenet_300_100', 10, (2, 28, 28, 1), 266_610, 266_200),
    ('lenet_5', 10, (2, 28, 28, 1), 431_080, 430_500),
    ('alexnet_s', 10, (2, 32, 32, 3), 5_073_642, 5_066_784),
    ('wrn_10_1', 10, (2, 28, 28, 1), 77_562, 77_072),
    ('wrn_22_2', 10, (2, 32, 32, 3), 1_079_642, 1_076_912),
    ('resnet18', 1000, (2, 224, 224, 3), 11_689_512, 11_678_912),
    ('resnet50', 1000, (2, 224, 224, 3), 25_557_032, 25_502_912),
  ],
)
def test_sizes_and_names(name, num_classes, shape, num_params, num_weights):
  net, params, state, images = _shapes(name, num_classes, shape)
  assert hk.data_structures.tree_size(params) == num_params
  weights = [k for k, v in params.items() if 'w' in v]
  assert sum(params[k]['w'].size for k in weights) == num_weights
  for part, dim, size in (
    ('initial', -2, shape[-1]),
    ('logits', -1, num_classes),
  ):
    (layer,) = [k for k in weights if part in k]
    expected = 784 if name == 'lenet_300_100' and part == 'initial' else size
    assert params[layer]['w'].shape[dim] == expected
  logits, _ = jax.eval_shape(
    lambda p, s, x: net.apply(p, s, None, x, False), params, state, images
  )
  assert logits.shape == (2, num_classes)


def test_every_network_is_in_the_table_above():
  mark = next(m for m in test_sizes_and_names.pytestmark)
  assert [row[0] for row in mark.args[1]] == list(networks.NETWORKS)


def test_lenet_300_100_is_initialised_as_in_the_paper():
  net = networks.build('lenet_300_100', 10)
  init = jax.jit(net.init, static_argnums=2)
  params, _ = init(_KEY, jnp.zeros((1, 28, 28, 1)), True)
  for layer, fan_in in ('initial_linear', 784), ('linear_1', 300):
    w = params[layer]['w'] * np.sqrt(fan_in)
    np.testing.assert_allclose(jnp.std(w), 1.0, rtol=0.02)
    # Values are truncated at twice the deviation before truncation.
    assert 2.0 < jnp.abs(w).max() <= 2.0 / 0.8796
    assert not params[layer]['b'].any()


def test_lenet_300_100_computes_a_multilayer_perceptron():
  x = _random_images(5, 6, 4, 2)
  net, *shapes, _ = _shapes('lenet_300_100', 7, x.shape)
  params, state = _filled(shapes)
  logits, _ = net.apply(params, state, None, x, False)
  h = np.asarray(x).reshape(5, -1)
  for layer in 'initial_linear', 'linear_1', 'logits':
    h = h @ np.asarray(params[layer]['w']) + np.asarray(params[layer]['b'])
    h = h if layer == 'logits' else np.maximum(h, 0)
  np.testing.assert_allclose(logits, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'name, side', [('lenet_5', 16), ('alexnet_s', 17), ('wrn_22_2', 3)]
)
def test_forward_pass_of_the_smallest_images(name, side):
  x = _random_images(2, side, side, 3)
  net, *shapes, _ = _shapes(name, 10, x.shape)
  apply = jax.jit(net.apply, static_argnums=4)
  logits, _ = apply(*_filled(shapes), None, x, False)
  assert logits.shape == (2, 10)
  assert np.isfinite(logits).all() and np.std(logits) > 0


@pytest.fixture
def small_wrn(monkeypatch):
  """A name for a network of few layers, with BatchNorm."""
  network = functools.partial(networks.wide_resnet, depth=10, width=1)
  monkeypatch.setitem(networks.NETWORKS, 'wrn_10_1', network)
  return 'wrn_10_1'


def test_bfloat16_is_near_float32(small_wrn):
  x = _random_images(4, 4, 4, 3)
  results = []
  for dtype in 'float32', 'bfloat16':
    net, *shapes, _ = _shapes(small_wrn, 10, x.shape, dtype=dtype)
    apply = jax.jit(net.apply, static_argnums=4)
    results.append(apply(*_filled(shapes), None, x, True))
  for leaf in jax.tree.leaves(results):
    assert leaf.dtype in (jnp.float32, jnp.int32)
    assert np.isfinite(leaf).all()
  (full, _), (half, _) = results
  assert 0 < jnp.abs(full - half).max() < 0.1 * jnp.abs(full).max()


@pytest.mark.parametrize('name', ['lenet_5', 'wrn_22_2', 'resnet50'])
def test_bfloat16_products_and_float32_statistics(name):
  args = _shapes(name, 10, (2, 32, 32, 3), dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(args[1])} == {jnp.dtype('float32')}
  products = {'dot_general', 'conv_general_dilated'}
  eqns = _traced(*args)
  assert {
    str(v.aval.dtype)
    for e in eqns
    for v in e.invars
    if e.primitive.name in products
  } == {'bfloat16'}
  squares = [e for e in eqns if e.primitive.name in ('square', 'rsqrt')]
  assert {str(e.outvars[0].aval.dtype) for e in squares} <= {'float32'}
  assert bool(squares) == (name != 'lenet_5')


def test_policies_of_bfloat16_do_not_leak():
  _shapes('wrn_22_2', 10, (2, 8, 8, 3), dtype=jnp.bfloat16)
  for module in hk.Linear, hk.Conv2D, hk.BatchNorm:
    assert hk.mixed_precision.get_policy(module) is None


def test_resnet50_strides_in_the_3x3_convolutions():
  eqns = _traced(*_shapes('resnet50', 1000, (1, 224, 224, 3)))
  convs = [e for e in eqns if e.primitive.name == 'conv_general_dilated']
  assert len(convs) == 53
  strided = [e for e in convs if e.params['window_strides'] == (2, 2)]
  kernels = sorted(e.invars[1].aval.shape[:2] for e in strided)
  # Those of 1 x 1 are in the shortcuts.
  assert kernels == [(1, 1)] * 3 + [(3, 3)] * 3 + [(7, 7)]


@pytest.mark.parametrize(
  'name, last, zero_init',
  [('resnet18', 1, True), ('resnet18', 1, False), ('resnet50', 2, True)],
)
def test_zero_init_is_of_the_last_scale_in_each_block(name, last, zero_init):
  net = networks.build(name, 10, zero_init=zero_init)

  # Leaves that are not returned are not computed either.
  @jax.jit
  def init(key):
    params, _ = net.init(key, jnp.zeros((1, 32, 32, 3)), True)
    return {k: v['scale'] for k, v in params.items() if 'scale' in v}

  scales = init(_KEY)
  lasts = [k for k in scales if k.endswith(f'/batchnorm_{last}')]
  assert len(lasts) == {'resnet18': 8, 'resnet50': 16}[name]
  for path, scale in scales.items():
    assert (scale == float(path not in lasts or not zero_init)).all(), path


def test_outputs_of_a_resnet_do_not_start_at_zero():
  net = networks.build('resnet18', 1000)

  @jax.jit
  def init(key):
    params, _ = net.init(key, jnp.zeros((1, 32, 32, 3)), True)
    return params['resnet18/~/logits']

  logits = init(_KEY)
  np.testing.assert_allclose(jnp.std(logits['w']), 0.01, rtol=0.02)
  assert not logits['b'].any()


def test_statistics_change_in_training_only(small_wrn):
  x = _random_images(4, 4, 4, 3)
  net, *shapes, _ = _shapes(small_wrn, 10, x.shape)
  params, state = _filled(shapes)

  def changed(is_training):
    apply = jax.jit(net.apply, static_argnums=4)
    _, new_state = apply(params, state, None, x, is_training)
    old, new = jax.tree.leaves(state), jax.tree.leaves(new_state)
    return [bool((a != b).any()) for a, b in zip(old, new)]

  assert not any(changed(False)) and all(changed(True))


def test_cross_replica_axis_gives_the_statistics_of_the_whole_batch(small_wrn):
  x = _random_images(8, 4, 4, 3)
  halves = x.reshape(2, 4, 4, 4, 3)
  whole, *shapes, _ = _shapes(small_wrn, 10, x.shape)
  params, state = _filled(shapes)
  apply = jax.jit(whole.apply, static_argnums=4)
  logits, new_state = apply(params, state, None, x, True)

  # `init` is called outside of the map, where the axis has no name.
  net, *_ = _shapes(small_wrn, 10, x.shape, cross_replica_axis='i')
  mapped = jax.vmap(
    lambda x: net.apply(params, state, None, x, True), axis_name='i'
  )
  parts, states = jax.jit(mapped)(halves)
  np.testing.assert_allclose(parts.reshape(8, 10), logits, rtol=1e-4, atol=1e-4)
  for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(new_state)):
    np.testing.assert_allclose(a, np.stack([b, b]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'name, side',
  [
    ('lenet_5', 15),
    ('alexnet_s', 16),
    ('wrn_22_2', 2),
    ('resnet18', 16),
    ('resnet50', 16),
  ],
)
def test_small_images_are_rejected(name, side):
  with pytest.raises(
    ValueError, match=rf'{name} takes .* \(1, 64, {side}, 3\)'
  ):
    _shapes(name, 10, (1, 64, side, 3))


def test_images_of_other_ranks_and_integers_are_rejected():
  with pytest.raises(ValueError, match=r'got shape \(2, 784\)'):
    _shapes('lenet_300_100', 10, (2, 784))
  net = networks.build('lenet_5', 10, dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match='got uint8'):
    net.init(_KEY, jnp.zeros((1, 28, 28, 1), jnp.uint8), True)


@pytest.mark.parametrize(
  'name, num_classes, options, message',
  [
    ('lenet', 10, {}, "No network 'lenet'; there are .*'wrn_22_2'"),
    ('lenet_5', 0, {}, 'got 0'),
    ('lenet_5', 10, {'dtype': jnp.int32}, 'got int32'),
    ('lenet_5', 10, {'zero_init': True}, r'options of lenet_5 are \[\]'),
    ('resnet50', 10, {'depth': 18}, r"\['zero_init'\], got \['depth'\]"),
  ],
)
def test_impossible_networks_are_rejected(name, num_classes, options, message):
  with pytest.raises(ValueError, match=message):
    networks.build(name, num_classes, **options)


def test_impossible_depths_are_rejected():
  x = jnp.zeros((1, 32, 32, 3))
  with pytest.raises(ValueError, match='got 21'):
    networks.wide_resnet(x, True, 10, depth=21, width=2)
  with pytest.raises(ValueError, match='got 34'):
    networks.resnet(x, True, 10, depth=34)

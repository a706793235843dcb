"""Tests of counts of operations, by hand and against published counts."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.models import networks
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import flops


def _struct(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _network(name, num_classes, shape):
  net = networks.build(name, num_classes)
  key, images = jax.random.key(0), _struct(*shape)
  params, state = jax.eval_shape(lambda x: net.init(key, x, True), images)

  def apply(params, state, images):
    return net.apply(params, state, None, images, False)[0]

  return apply, params, state, images


@pytest.fixture(scope='module')
def resnet50():
  apply, params, *args = _network('resnet50', 1000, (1, 224, 224, 3))
  return params, flops.layer_flops(apply, params, *args)


def test_lenets_by_hand():
  layers = flops.layer_flops(*_network('lenet_300_100', 10, (1, 28, 28, 1)))
  assert layers == {
    'initial_linear/w': 2.0 * 784 * 300,
    'linear_1/w': 2.0 * 300 * 100,
    'logits/w': 2.0 * 100 * 10,
  }
  layers = flops.layer_flops(*_network('lenet_5', 10, (3, 28, 28, 1)))
  assert layers == {
    'initial_conv/w': 3 * 2.0 * 24 * 24 * 20 * 25,
    'conv_1/w': 3 * 2.0 * 8 * 8 * 50 * 20 * 25,
    'linear_2/w': 3 * 2.0 * 800 * 500,
    'logits/w': 3 * 2.0 * 500 * 10,
  }


@pytest.mark.parametrize('name', ['lenet_300_100', 'lenet_5'])
def test_agrees_with_the_cost_analysis_of_xla(name):
  apply, *args = _network(name, 10, (1, 28, 28, 1))
  compiled = jax.jit(apply).lower(*args).compile()
  analysed = (compiled.cost_analysis() or {})['flops']
  counted = sum(flops.layer_flops(apply, *args).values())
  # XLA also counts biases, activations and pooling.
  assert counted <= analysed <= 1.02 * counted


@pytest.mark.parametrize(
  'name', [n for n in networks.NETWORKS if n != 'lenet_300_100']
)
def test_every_weight_is_counted_in_order_of_use(name):
  apply, params, *args = _network(name, 10, (1, 32, 32, 3))
  layers = flops.layer_flops(apply, params, *args)
  assert set(layers) == {f'{k}/w' for k, v in params.items() if 'w' in v}
  first, *_, last = layers
  assert 'initial' in first and 'logits' in last


def test_resnet50_has_the_published_operations(resnet50):
  np.testing.assert_allclose(sum(resnet50[1].values()), 8.2e9, rtol=0.005)


# Ratios to dense in the README of the RigL repository. Its columns for training
# with an update every 100 steps and for inference hold the same numbers, which
# are those of training. (0.10, which is quoted too for uniform 90 %, is the
# ratio where the first layer is as sparse as the others.)
@pytest.mark.parametrize(
  'make, sparsity, dense, published',
  [
    (distributions.erdos_renyi, 0.8, (), 0.42),
    (distributions.erdos_renyi, 0.9, (), 0.24),
    (distributions.erdos_renyi, 0.95, (), 0.12),
    (distributions.erdos_renyi, 0.965, (), 0.09),
    (distributions.erdos_renyi, 0.99, 'initial', 0.05),
    (distributions.uniform, 0.8, 'initial', 0.23),
    (distributions.uniform, 0.9, 'initial', 0.13),
    (distributions.uniform, 0.95, 'initial', 0.08),
    (distributions.uniform, 0.965, 'initial', 0.07),
  ],
)
def test_published_ratios_of_rigl(resnet50, make, sparsity, dense, published):
  params, layers = resnet50
  counts = make(sparsity, dense=dense)(params)
  removed = distributions.sparsities(params, counts)
  kept = jax.tree.map(lambda s: 1.0 - s, removed)
  total = sum(layers.values())
  sparse = sum(flops.inference_flops(layers, kept).values())
  step = flops.rigl_training_flops(total, sparse, 100)
  assert round(step / flops.training_flops(total), 2) == published
  np.testing.assert_allclose(sparse / total, published, atol=0.01)


def _conv(dims=('NHWC', 'HWIO', 'NHWC'), **kwargs):
  def apply(params, x):
    return jax.lax.conv_general_dilated(
      x, params['w'], padding='SAME', dimension_numbers=dims, **kwargs
    )

  return apply


@pytest.mark.parametrize(
  'apply, kernel, image, expected',
  [
    (_conv(window_strides=(1, 1)), (3, 3, 4, 8), (1, 6, 6, 4), 36 * 8 * 36),
    (_conv(window_strides=(2, 2)), (3, 3, 4, 8), (1, 6, 6, 4), 9 * 8 * 36),
    # Two groups of two inputs, and depthwise with a multiplier of three.
    (
      _conv(window_strides=(1, 1), feature_group_count=2),
      (3, 3, 2, 8),
      (1, 6, 6, 4),
      36 * 8 * 18,
    ),
    (
      _conv(window_strides=(1, 1), feature_group_count=4),
      (3, 3, 1, 12),
      (1, 6, 6, 4),
      36 * 12 * 9,
    ),
    (
      _conv(('NCHW', 'OIHW', 'NCHW'), window_strides=(1, 1)),
      (8, 4, 3, 3),
      (1, 4, 6, 6),
      36 * 8 * 36,
    ),
  ],
)
def test_convolutions_by_hand(apply, kernel, image, expected):
  params = {'w': _struct(*kernel)}
  layers = flops.layer_flops(apply, params, _struct(*image))
  assert layers == {'w': 2.0 * expected}


def test_transposed_convolution_multiplies_no_inserted_zeros():
  def apply(params, x):
    return jax.lax.conv_transpose(x, params['w'], (2, 2), 'SAME')

  params = {'w': _struct(4, 4, 3, 5)}
  layers = flops.layer_flops(apply, params, _struct(1, 6, 6, 3))
  # Each of 36 x 3 inputs meets 4 x 4 x 5 weights.
  assert layers == {'w': 2.0 * 36 * 3 * 16 * 5}


def _masked(params, x):
  w = jnp.where(jnp.eye(4) > 0, params['w'].astype(jnp.bfloat16), 0) * 2.0
  return x.astype(jnp.bfloat16) @ w.T.reshape(4, 4) + params['b']


def _called(params, x):
  @jax.custom_jvp
  def custom(w, x):
    return x @ w

  custom.defjvp(lambda p, t: (custom(*p), custom(*t)))
  product = jax.checkpoint(jax.jit(custom))
  return product(params['w'], jax.nn.relu(x + params['b']))


def _vjp(params, x):
  @jax.custom_vjp
  def custom(w, x):
    return x @ w

  custom.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: r)
  return custom(params['w'], x)


def _batched(params, x):
  return jax.vmap(lambda v: params['w'] @ v + params['b'])(x)


@pytest.mark.parametrize('apply', [_masked, _called, _vjp, _batched])
def test_weights_are_followed_through_the_program(apply):
  params = {'w': _struct(4, 4), 'b': _struct(4)}
  assert flops.layer_flops(apply, params, _struct(5, 4)) == {'w': 160.0}


def test_loops_and_branches():
  params = {'cell': _struct(4, 4), 'stack': _struct(7, 4, 4)}
  # This is larger than the cell, and at first the carry depends on it alone.
  params['start'] = _struct(5, 4)

  def loop(params, x):
    def step(h, x):
      return jnp.tanh(h @ params['cell'] + x), None

    h, _ = jax.lax.scan(step, params['start'], x)
    h, _ = jax.lax.scan(lambda h, w: (h @ w, None), h, params['stack'])
    branch = jax.lax.cond(
      h.sum() > 0, lambda h: h @ params['cell'] @ params['cell'], lambda h: h, h
    )
    return jax.lax.fori_loop(0, 3, lambda _, h: h @ params['cell'], branch)

  layers = flops.layer_flops(loop, params, _struct(10, 4))
  assert layers == {'cell': (10 + 2 + 3) * 160.0, 'stack': 7 * 160.0}

  def unknown(params, x):
    return jax.lax.while_loop(
      lambda h: h.sum() < 1, lambda h: h @ params['cell'], x
    )

  with pytest.raises(ValueError, match="products in a 'while'"):
    flops.layer_flops(unknown, params, _struct(4))


def test_products_of_activations_have_a_key_of_their_own():
  def attention(params, x):
    q, k = x @ params['q'], x @ params['k']
    return jax.nn.softmax(q @ k.T) @ x

  params = {'k': _struct(8, 4), 'q': _struct(8, 4)}
  layers = flops.layer_flops(attention, params, _struct(5, 8))
  assert layers == {
    'q': 2.0 * 5 * 8 * 4,
    'k': 2.0 * 5 * 8 * 4,
    flops.ACTIVATIONS: 2.0 * 5 * 5 * (4 + 8),
  }
  sparse = flops.inference_flops(layers, {'k': 0.5, 'q': 0.25})
  assert sparse == {'q': 80.0, 'k': 160.0, flops.ACTIVATIONS: 600.0}


def test_networks_of_other_libraries():
  image = jnp.zeros((1, 6, 6, 3))
  expected = [2.0 * 36 * 5 * 27, 2.0 * 180 * 2]

  class Flax(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.Conv(5, (3, 3))(x))
      return nn.Dense(2)(x.reshape(len(x), -1))

  variables = jax.eval_shape(Flax().init, jax.random.key(0), image)
  layers = flops.layer_flops(
    lambda p, x: Flax().apply({'params': p}, x), variables['params'], image
  )
  assert layers == dict(zip(['Conv_0/kernel', 'Dense_0/kernel'], expected))

  def equinox(key):
    layers = [
      eqx.nn.Conv2d(3, 5, 3, padding='SAME', key=key),
      eqx.nn.Lambda(lambda x: jax.nn.relu(x).ravel()),
      eqx.nn.Linear(180, 2, key=key),
    ]
    return eqx.nn.Sequential(layers)

  net = eqx.filter_eval_shape(equinox, jax.random.key(0))
  params, static = eqx.partition(
    net, lambda x: isinstance(x, jax.ShapeDtypeStruct)
  )
  layers = flops.layer_flops(
    lambda p, x: jax.vmap(eqx.combine(p, static))(x),
    params,
    jnp.moveaxis(image, 3, 1),
  )
  assert list(layers.values()) == expected
  assert all(path.endswith('/weight') for path in layers)


def test_recurrent_haiku_network():
  def forward(x):
    core = hk.LSTM(4)
    return hk.dynamic_unroll(core, x, core.initial_state(2))[0]

  net = hk.without_apply_rng(hk.transform(forward))
  x = jnp.zeros((6, 2, 3))
  params = jax.eval_shape(net.init, jax.random.key(0), x)
  layers = flops.layer_flops(net.apply, params, x)
  assert layers == {'lstm/linear/w': 6 * 2.0 * 2 * (3 + 4) * 16}


def test_inputs_by_closure_are_rejected():
  x = jnp.ones((1, 4))
  with pytest.raises(ValueError, match='no inputs'):
    flops.layer_flops(lambda p: x @ p['w'], {'w': _struct(4, 4)})


def test_inference_flops_rejects_wrong_densities():
  layers = {'a/w': 10.0, 'b/w': 20.0}
  with pytest.raises(ValueError, match=r"no \['b/w'\]"):
    flops.inference_flops(layers, {'a': {'w': 0.5}})
  with pytest.raises(ValueError, match=r"'b/w' is 1\.5"):
    flops.inference_flops(layers, {'a': {'w': 0.5}, 'b': {'w': 1.5}})


def test_training_flops_by_hand():
  assert flops.training_flops(10.0) == 30.0
  # Three steps of 3, and an update of 2 and 10.
  assert flops.rigl_training_flops(10.0, 1.0, 3) == (3 * 3.0 + 12.0) / 4
  assert flops.top_kast_training_flops(1.0, 2.0) == 4.0
  # All agree where nothing is sparse.
  assert flops.rigl_training_flops(10.0, 10.0, 100) == 30.0
  assert flops.top_kast_training_flops(10.0, 10.0) == 30.0


def test_training_flops_reject():
  with pytest.raises(ValueError, match='got 0'):
    flops.rigl_training_flops(10.0, 1.0, 0)

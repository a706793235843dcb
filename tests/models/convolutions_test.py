"""Tests of the convolutions and maxima, against those of XLA and Haiku."""

import contextlib
import functools
import re

import haiku as hk
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.models import convolutions
from powerprop_jax.models import networks
from powerprop_jax.sparse import flops

# Threefry, the default, is slow to compile.
_KEY = jax.random.key(0, impl='unsafe_rbg')


def _random(*shape, dtype='float32', seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, dtype)


def _reference(images, kernel, stride, padding):
  """XLA's convolution, with the gradients that JAX derives."""
  return jax.lax.conv_general_dilated(
    images,
    kernel,
    np.broadcast_to(stride, 2).tolist(),
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def _haiku_max(images, side):
  return hk.max_pool(images, (side, side, 1), (side, side, 1), 'VALID')


def _output_and_gradients(function, *args):
  """The output, and the gradients for a cotangent that is not constant."""
  out, vjp = jax.vjp(function, *args)
  cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
  return out, vjp(cotangent.astype(out.dtype))


def _assert_close(a, b, tolerance=1e-5):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.shape == y.shape
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * abs(y).max())
    assert y.any()


# The shape of the images, height and width of the kernel, stride, padding.
_CASES = [
  ((3, 8, 7, 2), (3, 3), 1, 'SAME'),
  ((3, 8, 7, 2), (3, 3), 1, 'VALID'),
  ((2, 9, 8, 1), (5, 5), 1, 'VALID'),
  ((2, 9, 8, 2), (5, 5), 1, 'SAME'),
  ((2, 9, 8, 2), (7, 5), 1, 'VALID'),
  ((2, 7, 8, 3), (3, 3), 2, 'SAME'),
  ((2, 8, 8, 3), (3, 3), 2, 'VALID'),
  ((2, 8, 9, 2), (5, 5), 2, 'SAME'),
  ((2, 9, 9, 1), (7, 7), 2, 'SAME'),
  ((2, 8, 7, 3), (1, 1), 1, 'SAME'),
  ((2, 8, 7, 3), (1, 1), 2, 'SAME'),
  ((2, 9, 8, 2), (2, 3), (3, 2), 'SAME'),
  ((2, 7, 6, 2), (3, 2), 2, ((2, 1), (0, 3))),
]


@pytest.mark.parametrize('shape, taps, stride, padding', _CASES)
def test_a_convolution_is_that_of_xla(shape, taps, stride, padding):
  images, kernel = _random(*shape), _random(*taps, shape[-1], 4, seed=1)

  def results(function, *args):
    return _output_and_gradients(
      lambda x, w: function(x, w, stride, padding), *args
    )

  functions = convolutions.conv2d, _reference
  both = jax.jit(lambda *args: [results(f, *args) for f in functions])
  (out, gradients), (expected, others) = both(images, kernel)
  np.testing.assert_array_equal(out, expected)
  _assert_close(gradients, others)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('taps, stride', [(3, 2), (5, 1)])
def test_half_precision_is_as_exact_as_that_of_xla(dtype, taps, stride):
  images, kernel = _random(2, 8, 8, 4), _random(taps, taps, 4, 4, seed=1)
  half = jax.tree.map(lambda x: x.astype(dtype), (images, kernel))

  def gradients(function, args):
    return _output_and_gradients(
      lambda x, w: function(x, w, stride, 'VALID'), *args
    )[1]

  found, exact = jax.jit(
    lambda *half: (
      gradients(convolutions.conv2d, half),
      gradients(_reference, jax.tree.map(jnp.float32, half)),
    )
  )(*half)
  assert {x.dtype for x in found} == {jnp.dtype(dtype)}
  eps = float(jnp.finfo(dtype).eps)
  _assert_close(jax.tree.map(jnp.float32, found), exact, 2 * eps)


@pytest.mark.parametrize('taps, stride', [(3, 1), (3, 2), (5, 1)])
def test_scans_and_vmaps_of_convolutions(taps, stride):
  images = _random(2, 3, 8, 8, 2)
  kernels = _random(2, taps, taps, 2, 4, seed=1)

  def gradients(function):
    one = functools.partial(
      _output_and_gradients, lambda x, w: function(x, w, stride, 'VALID')
    )
    _, scanned = jax.lax.scan(
      lambda carry, args: (carry, one(*args)), None, (images, kernels)
    )
    remembered = jax.checkpoint(one)(images[0], kernels[0])
    return scanned, jax.vmap(one)(images, kernels), remembered

  found, expected = jax.jit(
    lambda: [gradients(f) for f in (convolutions.conv2d, _reference)]
  )()
  _assert_close(found, expected)


@pytest.mark.parametrize('taps, stride', [(3, 1), (3, 2), (5, 1)])
def test_forward_mode_and_second_derivatives(taps, stride):
  images, kernel = _random(2, 8, 8, 2), _random(taps, taps, 2, 3, seed=1)
  tangents = (0.5 * images + 1.0, jnp.flip(kernel, 0))

  def derivatives(function):
    def loss(*args):
      return jnp.sum(jnp.tanh(function(*args, stride, 'SAME')) ** 2)

    gradient = jax.grad(loss, (0, 1))
    directional = lambda *args: jnp.vdot(gradient(*args)[1], tangents[1])
    return (
      jax.jvp(loss, (images, kernel), tangents),
      jax.jvp(gradient, (images, kernel), tangents)[1],
      jax.grad(directional, (0, 1))(images, kernel),
    )

  found, expected = jax.jit(
    lambda: [derivatives(f) for f in (convolutions.conv2d, _reference)]
  )()
  _assert_close(found, expected)


def _equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in core.jaxprs_in_params(eqn.params):
      yield from _equations(inner)


@pytest.mark.parametrize('shape, taps, stride, padding', _CASES)
def test_gradients_have_the_layout_that_is_fast(shape, taps, stride, padding):
  images, kernel = _random(*shape), _random(*taps, shape[-1], 4, seed=1)

  def layouts(function):
    gradient = functools.partial(
      _output_and_gradients, lambda x, w: function(x, w, stride, padding)
    )
    equations = _equations(jax.make_jaxpr(gradient)(images, kernel).jaxpr)
    return {
      tuple(e.params['dimension_numbers'])
      for e in equations
      if e.primitive.name == 'conv_general_dilated'
    }

  assert layouts(convolutions.conv2d) == {
    ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
  }
  assert len(layouts(_reference)) == 3


@pytest.mark.parametrize(
  'shape, side',
  [((2, 8, 6, 3), 2), ((2, 7, 9, 3), 2), ((1, 7, 8, 2), 3), ((2, 3, 3, 2), 1)],
)
def test_maxima_are_those_of_haiku_also_among_equals(shape, side):
  # There are few values, so that most squares have equal ones.
  images = jnp.round(_random(*shape))

  @jax.jit
  def both(images):
    def results(function, images):
      return _output_and_gradients(lambda x: function(x, side), images)

    halves = [
      results(convolutions.max_pool, images.astype(dtype))
      for dtype in ('bfloat16', 'float16')
    ]
    functions = convolutions.max_pool, _haiku_max
    return *(results(f, images) for f in functions), halves

  found, expected, halves = both(images)
  _assert_close(found, expected, 0.0)
  for out, (gradient,) in halves:
    assert out.dtype == gradient.dtype != images.dtype
    np.testing.assert_array_equal(out.astype('float32'), expected[0])
    np.testing.assert_array_equal(gradient != 0, expected[1][0] != 0)


def test_maxima_in_scans_vmaps_and_forward_mode():
  images = jnp.round(_random(2, 3, 4, 4, 2))
  tangent = _random(2, 3, 4, 4, 2, seed=1)

  def derivatives(function):
    one = functools.partial(_output_and_gradients, lambda x: function(x, 2))
    _, scanned = jax.lax.scan(lambda carry, x: (carry, one(x)), None, images)
    return scanned, jax.vmap(one)(images)

  @jax.jit
  def forward_and_backward(x, t, cotangent):
    _, forward = jax.jvp(lambda x: convolutions.max_pool(x, 2), (x,), (t,))
    _, vjp = jax.vjp(lambda x: _haiku_max(x, 2), x)
    return jnp.vdot(forward, cotangent), jnp.vdot(t, vjp(cotangent)[0])

  functions = convolutions.max_pool, _haiku_max
  found, expected = jax.jit(lambda: [derivatives(f) for f in functions])()
  _assert_close(found, expected, 0.0)
  cotangent = _random(3, 2, 2, 2, seed=2)
  a, b = forward_and_backward(images[0], tangent[0], cotangent)
  np.testing.assert_allclose(a, b, rtol=1e-5)


def test_maxima_pass_on_what_is_not_a_number():
  images = jnp.zeros([1, 2, 2, 1]).at[0, 1, 0, 0].set(jnp.nan)
  assert jnp.isnan(convolutions.max_pool(images, 2)).all()


def test_other_backends_get_what_haiku_computes(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  images, kernel = _random(2, 8, 8, 2), _random(3, 3, 2, 4)

  def gradients(conv, pool):
    def function(x, w):
      return pool(conv(x, w, 2, 'SAME'), 2)

    gradient = jax.grad(lambda *args: function(*args).sum(), (0, 1))
    return str(jax.make_jaxpr(gradient)(images, kernel))

  found = gradients(convolutions.conv2d, convolutions.max_pool)
  assert found == gradients(_reference, _haiku_max)


def _plain(network):
  """The network with the operations of Haiku alone."""
  return hk.transform_with_state(
    functools.partial(network, num_classes=10, cross_replica_axis=None)
  )


@pytest.mark.parametrize('name', ['lenet_5', 'alexnet_s', 'resnet18'])
def test_parameters_are_made_as_by_haiku(monkeypatch, name):
  """The traced programs are the same, and so are all bits of the values."""
  monkeypatch.setattr(convolutions, 'max_pool', _haiku_max)
  images = _random(2, 17, 17, 3)

  def traced(net):
    program = jax.make_jaxpr(lambda x: net.init(_KEY, x, True))(images)
    return re.sub('0x[0-9a-f]+', '', str(program))

  plain = _plain(networks.NETWORKS[name])
  assert traced(networks.build(name, 10)) == traced(plain)


def test_lenet_5_computes_what_it_did_by_haiku(monkeypatch):
  images = _random(2, 16, 16, 2)
  net, plain = networks.build('lenet_5', 10), _plain(networks.lenet_5)
  shapes, _ = jax.eval_shape(lambda x: net.init(_KEY, x, True), images)
  params = jax.tree.map(lambda x: 0.1 * _random(*x.shape), shapes)

  def gradients(apply):
    def loss(params):
      return jnp.sum(jnp.sin(apply(params, {}, None, images, True)[0]))

    return jax.jit(jax.value_and_grad(loss))(params)

  found = gradients(net.apply)
  monkeypatch.setattr(convolutions, 'max_pool', _haiku_max)
  _assert_close(found, gradients(plain.apply))


@pytest.mark.parametrize('name', ['lenet_5', 'wrn_22_2', 'resnet18'])
def test_operations_are_counted_as_before(name):
  images = jax.ShapeDtypeStruct([1, 32, 32, 3], 'float32')
  nets = networks.build(name, 10), _plain(networks.NETWORKS[name])
  params, state = jax.eval_shape(lambda x: nets[0].init(_KEY, x, True), images)
  found, expected = (
    flops.layer_flops(
      lambda p, s, x, net=net: net.apply(p, s, None, x, False)[0],
      params,
      state,
      images,
    )
    for net in nets
  )
  assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize(
  'options',
  [
    {'rate': 2},
    {'feature_group_count': 2},
    {'data_format': 'NCHW'},
    {'mask': np.ones([3, 3, 2, 4])},
    {'padding': hk.pad.causal},
    {'stride': (2, 1), 'with_bias': False},
  ],
)
def test_every_module_of_haiku_computes_what_it_did(options):
  images = _random(2, 8, 8, 2)
  if 'data_format' in options:
    images = images.transpose(0, 3, 1, 2)

  def network(x, context):
    with context():
      conv = hk.Conv2D(4, 3, b_init=hk.initializers.Constant(0.5), **options)
      return conv(x), conv(x[0])  # A batch, and one image.

  init, apply = hk.transform(
    functools.partial(network, context=convolutions.in_haiku)
  )
  _, expected = hk.transform(
    functools.partial(network, context=contextlib.nullcontext)
  )
  params = jax.jit(init)(_KEY, images)
  both = jax.jit(lambda *args: [f(*args) for f in (apply, expected)])
  for a, b in zip(*both(params, None, images)):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_impossible_arguments_are_rejected():
  images, kernel = jnp.ones([1, 4, 4, 2]), jnp.ones([3, 3, 2, 1])
  with pytest.raises(ValueError, match=r'got shapes \(4, 4, 2\)'):
    convolutions.conv2d(images[0], kernel)
  with pytest.raises(ValueError, match='have 2 channels, and .* takes 3'):
    convolutions.conv2d(images, jnp.ones([3, 3, 3, 1]))
  for side in 0, 5:
    with pytest.raises(ValueError, match=f'a side of {side}'):
      convolutions.max_pool(images, side)

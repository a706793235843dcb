"""Tests of reparameterised Haiku functions."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import reparam

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((4, 6, 6, 2)).astype(np.float32)


def _net(x, is_training=None):
  init = hk.initializers.RandomUniform(-0.5, 0.5)  # Fast to compile.
  x = jax.nn.relu(hk.Conv2D(3, 3, stride=2, w_init=init)(x))
  if is_training is not None:
    x = hk.BatchNorm(True, True, 0.9)(x, is_training)
  x = hk.dropout(hk.next_rng_key(), 0.5, hk.Flatten()(x))
  return hk.Linear(3, w_init=init)(jnp.tanh(hk.Linear(8, w_init=init)(x)))


def _alpha_by_path(path, leaf):
  del leaf
  return 1.5 if path.startswith('conv') else 4.0


@pytest.fixture(scope='module')
def plain():
  f = hk.transform(_net)
  return f, f.init(KEY, X)


@pytest.fixture(scope='module')
def with_state():
  f = hk.transform_with_state(_net)
  return f, *f.init(KEY, X, True)


ALPHAS = pytest.mark.parametrize('alpha', [1.0, 3.0, _alpha_by_path])


@ALPHAS
def test_transformed_is_the_same_function_at_initialisation(plain, alpha):
  f, theta = plain
  transform = power.power_transform(alpha)
  g = reparam.reparameterise(f, transform)
  assert type(g) is hk.Transformed
  phi = g.init(KEY, X)
  assert jax.tree.structure(phi) == jax.tree.structure(theta)
  expected = f.apply(theta, KEY, X)
  assert jnp.std(expected) > 0.1
  np.testing.assert_allclose(g.apply(phi, KEY, X), expected, atol=1e-6)
  for module, leaf in theta.items():
    np.testing.assert_array_equal(phi[module]['b'], leaf['b'])
    changed = not np.allclose(phi[module]['w'], leaf['w'], atol=1e-3)
    assert changed == (alpha != 1.0)


@ALPHAS
def test_with_state_is_the_same_function_at_initialisation(with_state, alpha):
  f, theta, state = with_state
  g = reparam.reparameterise(f, power.power_transform(alpha))
  assert type(g) is hk.TransformedWithState
  phi, phi_state = g.init(KEY, X, True)
  jax.tree.map(np.testing.assert_array_equal, phi_state, state)
  for name in ('scale', 'offset'):
    np.testing.assert_array_equal(
      phi['batch_norm'][name], theta['batch_norm'][name]
    )
  expected, expected_state = f.apply(theta, state, KEY, X, is_training=True)
  y, new_state = g.apply(phi, phi_state, KEY, X, is_training=True)
  np.testing.assert_allclose(y, expected, atol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    new_state,
    expected_state,
  )
  # The statistics did change, so that the comparison above means something.
  average = new_state['batch_norm/~/mean_ema']['average']
  assert jnp.max(jnp.abs(average)) > 1e-3


def _gradient(f):
  def loss(params, state):
    return jnp.sum(f.apply(params, state, KEY, X, True)[0] ** 2)

  return jax.jit(jax.grad(loss))


def test_gradient_at_phi_follows_by_the_chain_rule(with_state):
  f, _, state = with_state
  transform = power.power_transform(_alpha_by_path)
  g = reparam.reparameterise(f, transform)
  phi, _ = g.init(KEY, X, True)
  # A pruned weight, where the chain rule gives 0 and its inverse 0 / 0.
  phi['linear']['w'] = phi['linear']['w'].at[0, 0].set(0.0)

  at_phi = _gradient(g)(phi, state)
  at_theta = _gradient(f)(transform.to_theta(phi), state)
  powers = power.exponents(phi, _alpha_by_path)

  def check(weight, a, x, at_x, grad):
    slope = a * np.abs(x) ** (a - 1) if weight else 1.0
    np.testing.assert_allclose(at_x, slope * grad, rtol=1e-4, atol=1e-5)

  jax.tree.map(check, leaves.weight_mask(phi), powers, phi, at_phi, at_theta)
  assert at_phi['linear']['w'][0, 0] == 0.0
  assert at_theta['linear']['w'][0, 0] != 0.0


@pytest.mark.parametrize(
  'f', [_net, (_net, _net), hk.transform(_net).apply, None]
)
def test_anything_else_is_an_error(f):
  transform = power.power_transform(2.0)
  message = f'hk.transform or hk.transform_with_state, got {type(f).__name__}'
  with pytest.raises(ValueError, match=message):
    reparam.reparameterise(f, transform)  # pyright: ignore[reportArgumentType]


def _zero_logits(x, is_training=None):
  x = hk.Linear(8, name='hidden')(x)
  return hk.Linear(3, w_init=jnp.zeros, name='logits')(x)


def test_weights_of_zeros_are_refused():
  x = X[:, 0, 0]
  plain, with_state = (
    hk.transform(_zero_logits),
    hk.transform_with_state(_zero_logits),
  )
  transform = power.power_transform(2.0)
  for f in (plain, with_state):
    with pytest.raises(ValueError, match=r"\['logits/w'\] are zero"):
      reparam.reparameterise(f, transform).init(KEY, x)
    # When compiled, their values are not known.
    jax.jit(reparam.reparameterise(f, transform).init)(KEY, x)
  for alpha in (1.0, lambda path, _: 1.0 if path == 'logits/w' else 2.0):
    baseline = power.power_transform(alpha)
    phi = reparam.reparameterise(plain, baseline).init(KEY, x)
    assert not np.any(phi['logits']['w'])


def test_networks_without_a_weight_are_refused():
  @hk.transform
  def f(x):
    return x @ hk.get_parameter('matrix', (2, 2), init=jnp.ones)

  g = reparam.reparameterise(f, power.power_transform(2.0))
  with pytest.raises(ValueError, match='There is no weight(.|\n)*matrix'):
    g.init(KEY, X)

"""Tests of the updates, by equalities on a small network for iris flowers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from mlxtend import data
import numpy as np
import optax
from optax import contrib
import pytest

from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import transforms

ALPHAS = (1.5, 2.0, 3.25)
ULP = float(jnp.finfo(jnp.float32).eps)
OPTIMISERS = {
  'sgd': lambda: optax.sgd(0.1),
  'adam': lambda: optax.adam(0.01),
  'adamw': lambda: optax.adamw(0.01, weight_decay=0.1),
}


@functools.cache
def _flowers():
  features, labels = data.iris_data()
  features = (features - features.mean(0)) / features.std(0)
  return features.astype(np.float32), labels


def _init():
  rng = np.random.default_rng(0)

  def normal(scale, *shape):
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

  return {
    'hidden': {'w': normal(0.5, 4, 8), 'b': normal(0.5, 8)},
    'output': {'w': normal(0.35, 8, 3), 'b': normal(0.35, 3)},
  }


def _loss(theta):
  x, labels = _flowers()
  x = jnp.tanh(x @ theta['hidden']['w'] + theta['hidden']['b'])
  logits = x @ theta['output']['w'] + theta['output']['b']
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


_gradient = jax.jit(jax.grad(_loss))


def _train(tx, params, grad, steps=50):
  """The parameters after steps of tx, in one compiled loop."""

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(grad(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def run(params):
    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

  return run(params)


def _first_updates(tx, grads, params) -> Any:
  return tx.update(grads, tx.init(params), params)[0]


def _max_difference(tree, other):
  differences = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), tree, other)
  return max(jax.tree.leaves(differences))


def _assert_close(actual, desired, rtol=1e-6, atol=1e-7):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    actual,
    desired,
  )


def _assert_identical(actual, desired):
  jax.tree.map(np.testing.assert_array_equal, actual, desired)


def _weights(params):
  return {layer: leaf['w'] for layer, leaf in params.items()}


# The three forms are compared with plain optax.


@pytest.mark.parametrize('alphas', [(1.25, 3.5), (3.0, 2.0)])
def test_sgd_is_gradient_descent_through_psi(alphas):
  """Equation (1) is the chain rule, which autodiff applies here."""
  powers: dict[str, float] = dict(zip(('hidden/w', 'output/w'), alphas))

  def loss_of_phi(phi):
    theta = {layer: dict(leaf) for layer, leaf in phi.items()}
    for path, alpha in powers.items():
      x = phi[path[:-2]]['w']
      theta[path[:-2]]['w'] = jnp.sign(x) * jnp.abs(x) ** alpha
    return _loss(theta)

  transform = power.power_transform(lambda path, _: powers[path])
  phi = transform.to_phi(_init())
  tx = transforms.target_propagation(optax.sgd(0.1), transform)
  _assert_close(
    _train(tx, phi, lambda x: _gradient(transform.to_theta(x)), 20),
    _train(optax.sgd(0.1), phi, jax.grad(loss_of_phi), 20),
    rtol=0,
    atol=1e-6,
  )


@pytest.mark.parametrize('alpha', ALPHAS)
def test_last_link_is_the_wrapper_for_adam(alpha):
  transform = power.power_transform(alpha)
  wrapper = transforms.target_propagation(optax.adam(0.1), transform)
  link = transforms.scale_by_power_jacobian(transform)
  chain = optax.chain(optax.adam(0.1), link)
  phi = transform.to_phi(_init())
  grads = _gradient(transform.to_theta(phi))
  _assert_identical(
    _first_updates(chain, grads, phi),
    _first_updates(wrapper, grads, phi),
  )


@pytest.mark.parametrize('alpha', ALPHAS)
def test_last_link_differs_for_adamw_by_what_it_decays(alpha):
  """The decay of the chain reads phi, that of the wrapper theta."""
  inner = optax.adamw(0.1, weight_decay=0.5)
  transform = power.power_transform(alpha)
  wrapper = transforms.target_propagation(inner, transform)
  link = transforms.scale_by_power_jacobian(transform)
  chain = optax.chain(inner, link)
  phi = transform.to_phi(_init())
  theta = transform.to_theta(phi)
  grads = _gradient(theta)
  difference = jax.tree.map(
    jnp.subtract,
    _first_updates(chain, grads, phi),
    _first_updates(wrapper, grads, phi),
  )
  for layer in phi:
    x, y = phi[layer]['w'], theta[layer]['w']
    expected = -0.1 * 0.5 * (x - y) * alpha * np.abs(x) ** (alpha - 1)
    np.testing.assert_allclose(difference[layer]['w'], expected, atol=1e-7)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_array_equal(difference[layer]['b'], 0)


@pytest.mark.parametrize(
  ('name', 'alphas'),
  [('sgd', (1.5, 3.25)), ('adam', (3.25, 1.5)), ('adamw', (2.0, 3.0))],
)
def test_drop_in_follows_the_trajectory_of_phi(name, alphas):
  theta, inner = _init(), OPTIMISERS[name]()
  powers: dict[str, float] = dict(zip(('hidden/w', 'output/w'), alphas))

  def alpha(path, leaf):
    del leaf
    return powers[path]

  transform = power.power_transform(alpha)
  phi = _train(
    transforms.target_propagation(inner, transform),
    transform.to_phi(theta),
    lambda phi: _gradient(transform.to_theta(phi)),
  )
  drop_in = _train(transforms.powerprop(inner, alpha), theta, _gradient)
  assert _max_difference(drop_in, transform.to_theta(phi)) < 1e-5
  assert _max_difference(drop_in, theta) > 0.1  # The weights did move.
  assert _loss(drop_in) < 0.75 * _loss(theta)


def test_alpha_one_is_plain_training_to_the_last_bit():
  inner, theta = optax.adamw(0.01, weight_decay=0.1), _init()
  expected = _train(inner, theta, _gradient)
  transform = power.power_transform(1.0)
  for tx in (
    transforms.powerprop(inner, 1.0),
    transforms.target_propagation(inner, transform),
    optax.chain(inner, transforms.scale_by_power_jacobian(transform)),
  ):
    _assert_identical(_train(tx, theta, _gradient), expected)


# Fixed points and descent (section 2 of the paper).


@pytest.mark.parametrize('alpha', [1.0, 1.25, 2.0, 3.0])
@pytest.mark.parametrize('name', OPTIMISERS)
def test_zero_is_a_fixed_point_unless_alpha_is_one(name, alpha):
  theta = _init()
  dead = theta['hidden']['w'] < 0
  theta['hidden']['w'] = jnp.where(dead, 0.0, theta['hidden']['w'])
  transform = power.power_transform(alpha)
  inner = OPTIMISERS[name]()
  forms = {
    'drop-in': transforms.powerprop(inner, alpha),
    'phi': transforms.target_propagation(inner, transform),
  }
  grads = _gradient(theta)
  assert np.all(grads['hidden']['w'])
  for form, tx in forms.items():
    params = theta if form == 'drop-in' else transform.to_phi(theta)
    updates = _first_updates(tx, grads, params)
    moved = np.asarray(updates['hidden']['w'] != 0)
    np.testing.assert_array_equal(moved, ~dead if alpha > 1 else True)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('alpha', ALPHAS)
def test_drop_in_without_gradient_does_not_move(alpha, dtype):
  """Mapping to phi and back rounds; none of that may reach the weights."""
  theta = jax.tree.map(lambda x: x.astype(dtype), _init())
  tx = transforms.powerprop(optax.sgd(0.1), alpha)
  zeros = jax.tree.map(jnp.zeros_like, theta)
  updates, _ = jax.jit(tx.update)(zeros, tx.init(theta), theta)
  _assert_identical(updates, zeros)


@pytest.mark.parametrize('alpha', ALPHAS)
@pytest.mark.parametrize(
  'inner',
  [optax.sgd(0.1), optax.adam(0.01), optax.sign_sgd(0.01)],
  ids=['sgd', 'adam', 'sign_sgd'],
)
def test_first_step_descends(inner, alpha):
  """<delta phi, dL / d phi> < 0, and every coordinate adds to it."""
  transform = power.power_transform(alpha)
  tx = transforms.target_propagation(inner, transform)
  phi = transform.to_phi(_init())
  grads = _gradient(transform.to_theta(phi))
  updates = _first_updates(tx, grads, phi)
  for layer, leaf in phi.items():
    slope = alpha * np.abs(leaf['w']) ** (alpha - 1) * grads[layer]['w']
    assert np.all(updates[layer]['w'] * slope < 0)
    assert np.all(updates[layer]['b'] * grads[layer]['b'] < 0)


def test_descent_on_theta_is_not_enough():
  """A step that trades one weight against another can ascend on phi."""
  step, grads = jnp.array([-1.0, 0.5]), jnp.array([1.0, 1.0])
  assert jnp.vdot(step, grads) < 0
  tx = transforms.target_propagation(
    optax.stateless(lambda updates, params: {'w': step}),
    power.power_transform(2.0),
  )
  updates = _first_updates(tx, {'w': grads}, {'w': jnp.array([0.125, 1.0])})
  np.testing.assert_array_equal(updates['w'], [-0.25, 1.0])
  slope = 2 * jnp.array([0.125, 1.0]) * grads
  assert jnp.vdot(updates['w'], slope) > 0


@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('alpha', [1.5, 2.0, 3.0, 3.25, 4.0, 5.0])
def test_drop_in_adds_up_no_rounding(alpha, traced):
  """It is as exact after 1,000 noisy steps as phi, against float64 by hand.

  A step rounds theta by some units in the last place, at random: in 1,000 steps
  they add up as the square root of 1,000, and a bias would add up as 1,000.
  """
  rng = np.random.default_rng(0)
  theta = rng.standard_normal(200).astype(np.float32) / 16
  noise = rng.standard_normal((1000, 200)).astype(np.float32)
  schedule = lambda count: alpha + 0.0 * count
  tx = transforms.powerprop(optax.sgd(0.004), schedule if traced else alpha)

  @jax.jit
  def run(params):
    def step(carry, grads):
      params, state = carry
      updates, state = tx.update({'w': grads}, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), noise)[0][0]

  phi = np.sign(theta) * np.abs(theta.astype(np.float64)) ** (1 / alpha)
  largest = np.abs(theta)
  for grads in noise:
    phi -= 0.004 * grads * alpha * np.abs(phi) ** (alpha - 1)
    largest = np.maximum(largest, np.abs(phi) ** alpha)
  expected = np.sign(phi) * np.abs(phi) ** alpha
  actual = run({'w': theta})['w']
  assert np.abs(expected - theta).max() > 0.1
  # A unit of phi is alpha units of theta, and phi is rounded there and back;
  # the other form rounds the step and the sum alone.
  units = 2.0 if traced else 2 * alpha
  limit = units * ULP * np.sqrt(len(noise)) * largest
  assert np.all(np.abs(actual - expected) < limit)


# Weight decay, inside and outside.


@pytest.mark.parametrize('alpha', [1.0, 2.0, 3.25])
def test_decay_outside_multiplies_phi(alpha):
  """phi shrinks by 1 - d per step, and theta by (1 - d)^alpha."""
  transform = power.power_transform(alpha)
  tx = optax.chain(
    transforms.target_propagation(optax.adam(0.1), transform),
    transforms.decay_phi(0.125),
  )
  phi = transform.to_phi(_init())
  no_grads = jax.tree.map(jnp.zeros_like, phi)
  decayed = _train(tx, phi, lambda _: no_grads, steps=3)
  before, after = transform.to_theta(phi), transform.to_theta(decayed)
  for layer in phi:
    np.testing.assert_allclose(
      decayed[layer]['w'], 0.875**3 * phi[layer]['w'], rtol=1e-6
    )
    np.testing.assert_allclose(
      after[layer]['w'], 0.875 ** (3 * alpha) * before[layer]['w'], rtol=1e-5
    )
    np.testing.assert_array_equal(decayed[layer]['b'], phi[layer]['b'])


def _decay(tx, phi):
  """The update of phi in the first step."""
  return _first_updates(tx, jax.tree.map(jnp.zeros_like, phi), phi)


def _decayed(tx, phi):
  """phi after the first step, without another update."""
  return optax.apply_updates(phi, _decay(tx, phi))


X = jnp.array([0.5, -0.25, 0.125, -0.0625, 0.0])


@pytest.mark.parametrize(
  ('norm', 'expected'),
  [
    ('l2', [0.4375, -0.21875, 0.109375, -0.0546875, 0.0]),
    ('l1', [0.375, -0.125, 0.0, 0.0, 0.0]),
    # X / (X + p r) with X = |phi|: 4/5, 2/3, 1/2, 1/3.
    (1.0, [0.4, -0.25 * 2 / 3, 0.0625, -0.0625 / 3, 0.0]),
    # X = |phi|^1.5 and p r = 1/16: the fourth is 1/16 times 1/5.
    (0.5, [0.42488907, -0.16666667, 0.05177671, -0.0125, 0.0]),
  ],
)
def test_decay_phi_by_hand(norm, expected):
  phi = {'linear': {'w': X, 'b': X}, 'norm': {'scale': X}}
  decayed = _decayed(transforms.decay_phi(0.125, norm), phi)
  np.testing.assert_allclose(decayed['linear']['w'], expected, rtol=1e-6)
  np.testing.assert_array_equal(decayed['linear']['b'], X)
  np.testing.assert_array_equal(decayed['norm']['scale'], X)


def test_p_norm_is_the_known_decay_to_first_order():
  """Up to rate^2, p = 1 is the soft threshold, and p = 2 is twice 'l2'."""
  phi = {'w': jnp.linspace(0.1, 2.0, 50)}
  for rate in (1e-2, 1e-3):
    soft = _decayed(transforms.decay_phi(rate, 'l1'), phi)['w']
    one = _decayed(transforms.decay_phi(rate, 1), phi)['w']
    # phi^2 / (phi + r) - (phi - r) = r^2 / (phi + r).
    np.testing.assert_allclose(
      one - soft, rate**2 / (phi['w'] + rate), atol=2e-7
    )
    l2 = _decayed(transforms.decay_phi(2 * rate), phi)['w']
    two = _decayed(transforms.decay_phi(rate, 2 - 1e-6), phi)['w']
    # phi / (1 + 2 r) - phi (1 - 2 r) = phi (2 r)^2 / (1 + 2 r).
    np.testing.assert_allclose(
      two - l2, phi['w'] * (2 * rate) ** 2 / (1 + 2 * rate), atol=4e-7
    )


@pytest.mark.parametrize('norm', [0.5, 1.0, 1.5])
def test_p_norm_descends_its_penalty(norm):
  """It does not overshoot: the step is the implicit one of rate |phi|^p."""
  phi = {'w': jnp.array([0.7, -0.02, 3.0])}
  rate = 1e-3
  step = -_decay(transforms.decay_phi(rate, norm), phi)['w']
  decayed = phi['w'] - step
  gradient = norm * decayed * jnp.abs(phi['w']) ** (norm - 2)
  np.testing.assert_allclose(step, rate * gradient, rtol=1e-5)
  large = _decayed(transforms.decay_phi(100.0, norm), phi)['w']
  assert np.all(large * phi['w'] >= 0)  # Zero only by rounding.


@pytest.mark.parametrize('alpha', [1.5, 2.0, 4.0])
def test_p_norm_on_theta_is_the_penalty_of_l2_on_phi(alpha):
  """rate / 2 |phi|^2 = rate / 2 |theta|^(2 / alpha), by its gradient."""
  rate = 1e-4
  theta = {'w': jnp.array([0.7, -0.1, 1.3])}
  step = -_decay(transforms.decay_phi(rate / 2, 2 / alpha), theta)['w']
  with jax.enable_x64(True):
    penalty = jax.vmap(
      jax.grad(lambda x: rate / 2 * jnp.abs(power.psi_inverse(x, alpha)) ** 2)
    )(jnp.asarray(theta['w'], jnp.float64))
  np.testing.assert_allclose(step, penalty, rtol=5e-3)


@pytest.mark.parametrize('norm', ['l2', 'l1', 0.5])
def test_decay_phi_follows_a_schedule(norm):
  schedule = optax.piecewise_constant_schedule(0.25, {2: 0.0})
  tx = transforms.decay_phi(schedule, norm)
  phi = {'w': X}
  state, update = tx.init(phi), jax.jit(tx.update)
  for step in range(4):
    before = phi
    updates, state = update({'w': jnp.zeros_like(X)}, state, phi)
    phi = optax.apply_updates(phi, updates)
    rate = 0.25 if step < 2 else 0.0
    expected = _decayed(transforms.decay_phi(rate, norm), before)
    np.testing.assert_allclose(phi['w'], expected['w'], rtol=1e-6)
    assert np.array_equal(phi['w'], before['w']) == (step >= 2)
  assert state.count == 4


def test_decay_phi_scales_the_first_layer_that_matches():
  phi = {name: {'w': X, 'b': X} for name in ('conv_1', 'conv_2', 'logits')}
  scale = {'conv_1/': 0.5, '^conv': 2.0}
  decayed = _decayed(transforms.decay_phi(0.125, scale=scale), phi)
  for name, factor in (('conv_1', 0.5), ('conv_2', 2.0), ('logits', 1.0)):
    np.testing.assert_array_equal(decayed[name]['w'], X * (1 - 0.125 * factor))
    np.testing.assert_array_equal(decayed[name]['b'], X)


def test_decay_phi_takes_another_choice_of_weights():
  phi = {'linear': {'w': X, 'b': X}}
  decayed = _decayed(
    transforms.decay_phi(0.5, is_weight=lambda path, _: path == 'linear/b'), phi
  )
  np.testing.assert_array_equal(decayed['linear']['b'], 0.5 * X)
  np.testing.assert_array_equal(decayed['linear']['w'], X)


def test_decay_phi_keeps_dtypes_and_passes_none():
  phi = {'a': {'w': X.astype(jnp.bfloat16)}, 'b': {'w': X}}
  updates = {'a': {'w': X.astype(jnp.bfloat16)}, 'b': {'w': None}}
  for rate in (0.25, optax.linear_schedule(0.25, 0.0, 9)):
    tx = transforms.decay_phi(rate)
    out, _ = jax.jit(tx.update)(updates, tx.init(phi), phi)
    assert out['b']['w'] is None
    assert out['a']['w'].dtype == jnp.bfloat16


def test_decay_phi_takes_numbers_of_numpy_for_norms():
  phi = {'linear': {'w': jnp.array([[4.0, 1.0]])}}
  zeros = jax.tree.map(jnp.zeros_like, phi)
  found, expected = (
    tx.update(zeros, tx.init(phi), phi)[0]['linear']['w']
    for tx in (transforms.decay_phi(0.1, x) for x in (np.float32(0.5), 0.5))
  )
  np.testing.assert_array_equal(found, expected)


def test_decay_phi_refuses_what_it_cannot_do():
  for arguments, message in (
    ({'rate': -1e-4}, 'rate must be a finite number >= 0, got -0.0001'),
    ({'rate': float('nan')}, 'rate must be .* got nan'),
    ({'rate': 1.5}, 'rate must be at most 1'),
    ({'rate': 0.5, 'scale': {'w': 3.0}}, 'at most 1 .* factor 3.0, got 0.5'),
    ({'rate': 0.1, 'scale': {'w': -3.0}}, "'w' in scale must be .* got -3.0"),
    ({'rate': 0.1, 'scale': {'(': 1.0}}, r"regular expressions, got '\('"),
    ({'rate': 0.1, 'norm': 'l0'}, "'l1', 'l2' or in .* got 'l0'"),
    ({'rate': 0.1, 'norm': 2.0}, 'got 2.0'),
    ({'rate': 0.1, 'norm': jnp.ones([])}, 'one of static_args'),
    ({'rate': 0.1, 'norm': 0}, 'got 0'),
  ):
    with pytest.raises(ValueError, match=message):
      transforms.decay_phi(**arguments)
  tx = transforms.decay_phi(0.1, scale={'conv': 2.0, 'hidden': 1.0, 'b$': 1.0})
  with pytest.raises(ValueError, match=r"\['conv', 'b\$'\] .* no weight"):
    tx.init(_init())
  with pytest.raises(ValueError, match='There is no weight'):
    transforms.decay_phi(0.1).init({'layer': {'W': jnp.ones((2, 2))}})


def test_decay_phi_under_inject_hyperparams():
  tx = optax.inject_hyperparams(
    transforms.decay_phi, static_args=('norm', 'is_weight')
  )(rate=0.25, norm=1.0)
  phi = {'w': X}
  state = tx.init(phi)
  state.hyperparams['rate'] = jnp.asarray(0.125)
  zeros = {'w': jnp.zeros_like(X)}
  updates, _ = jax.jit(tx.update)(zeros, state, phi)
  expected = _decayed(transforms.decay_phi(0.125, 1.0), phi)
  _assert_close(optax.apply_updates(phi, updates), expected)


@pytest.mark.parametrize('alpha', [1.0, *ALPHAS])
def test_decay_inside_pulls_theta_and_goes_through_the_jacobian(alpha):
  transform = power.power_transform(alpha)
  tx = transforms.target_propagation(
    optax.adamw(0.5, weight_decay=0.25, mask=leaves.weight_mask), transform
  )
  phi = transform.to_phi(_init())
  no_grads = jax.tree.map(jnp.zeros_like, phi)
  updates = _first_updates(tx, no_grads, phi)
  for layer in phi:
    x = np.asarray(phi[layer]['w'])
    theta = x * np.abs(x) ** (alpha - 1)
    np.testing.assert_allclose(
      updates[layer]['w'],
      -0.5 * 0.25 * theta * alpha * np.abs(x) ** (alpha - 1),
      rtol=1e-5,
    )
    np.testing.assert_array_equal(updates[layer]['b'], 0)


# The transforms are used with the rest of optax and JAX.


def test_drop_in_among_the_links_of_a_chain():
  clip, adam = optax.clip_by_global_norm(0.1), optax.adam(0.01)
  whole = transforms.powerprop(optax.chain(clip, adam), 2.0)
  link = transforms.powerprop(adam, 2.0)
  chain = optax.chain(clip, link, optax.scale(0.5))
  theta = _init()
  grads = _gradient(theta)
  updates = _first_updates(chain, grads, theta)
  expected = _first_updates(whole, grads, theta)
  _assert_identical(updates, jax.tree.map(lambda u: 0.5 * u, expected))


def test_drop_in_takes_powers_by_path_and_a_choice_of_weights():
  theta = _init()
  tx = transforms.powerprop(
    optax.sgd(0.1),
    lambda path, _: {'hidden/w': 2.0, 'output/b': 3.0}[path],
    is_weight=lambda path, _: path in ('hidden/w', 'output/b'),
  )
  grads = _gradient(theta)
  updates = _first_updates(tx, grads, theta)
  for path, alpha in (('hidden/w', 2.0), ('output/b', 3.0)):
    layer, name = path.split('/')
    x = np.asarray(theta[layer][name], np.float64)
    phi = np.sign(x) * np.abs(x) ** (1 / alpha)
    phi -= 0.1 * grads[layer][name] * alpha * np.abs(phi) ** (alpha - 1)
    np.testing.assert_allclose(
      x + updates[layer][name],
      np.sign(phi) * np.abs(phi) ** alpha,
      rtol=1e-5,
      atol=1e-7,
    )
  for layer, name in (('hidden', 'b'), ('output', 'w')):
    np.testing.assert_array_equal(
      updates[layer][name], -0.1 * grads[layer][name]
    )


@pytest.mark.parametrize('alpha', [0.5, -1.0, 0.0, float('nan'), float('inf')])
def test_impossible_powers_are_refused_at_construction(alpha):
  with pytest.raises(ValueError, match=f'>= 1, got {alpha}'):
    transforms.powerprop(optax.sgd(0.1), alpha)
  # A function cannot be checked before its first use.
  tx = transforms.powerprop(optax.sgd(0.1), lambda *_: alpha)
  with pytest.raises(ValueError, match=f'>= 1, got {alpha}'):
    tx.update(_init(), tx.init(_init()), _init())


@pytest.mark.parametrize('form', ['drop-in', 'phi'])
def test_arguments_can_be_donated(form):
  inner = optax.adamw(0.01)
  tx = {
    'drop-in': transforms.powerprop(inner, 2.0),
    'phi': transforms.target_propagation(inner, power.power_transform(2.0)),
  }[form]
  grads = _gradient(_init())

  def step(state, params):
    updates, state = tx.update(grads, state, params)
    return state, optax.apply_updates(params, updates)

  results = []
  for donated in ((), (0, 1)):
    new = tx.init(_init()), _init()
    compiled = jax.jit(step, donate_argnums=donated)
    for _ in range(2):
      old, new = new, compiled(*new)
      for x in jax.tree.leaves(old):
        assert x.is_deleted() == bool(donated)
    results.append(new)
  _assert_identical(results[1], results[0])


def test_sharded_parameters_stay_sharded():
  """They do so under jit on all devices; with one the code is the same."""
  mesh = jax.make_mesh((jax.device_count(),), ('model',))
  spec = jax.sharding.PartitionSpec
  tx = transforms.powerprop(optax.adam(0.01), 2.0)
  theta = {'linear': {'w': jax.random.normal(jax.random.key(0), (840, 2))}}
  grads = {'linear': {'w': jax.random.normal(jax.random.key(1), (840, 2))}}
  expected, _ = jax.jit(tx.update)(grads, tx.init(theta), theta)

  sharding = jax.sharding.NamedSharding(mesh, spec('model'))
  theta, grads = jax.device_put((theta, grads), sharding)
  updates, state = jax.jit(tx.update)(grads, tx.init(theta), theta)
  for x in (updates, optax.tree_utils.tree_get(state, 'mu')):
    assert x['linear']['w'].sharding.is_equivalent_to(sharding, 2)
  _assert_close(updates, expected, rtol=1e-5)


def test_drop_in_refuses_parameters_without_names():
  params = [(jnp.ones((2, 2)), jnp.zeros(2))]
  with pytest.raises(ValueError, match='There is no weight'):
    transforms.powerprop(optax.sgd(0.1), 2.0).init(params)


def test_drop_in_checks_alpha_at_init():
  tx = transforms.powerprop(optax.sgd(0.1), lambda path, leaf: 0.5)
  with pytest.raises(ValueError, match='got 0.5'):
    tx.init({'w': jnp.ones(2)})
  with pytest.raises(ValueError, match='static_args'):
    jax.jit(lambda a: power.check_alpha(a))(2.0)


# These would not train, or not as intended.


def _forms(inner, alpha, **options):
  """The two wrappers, and the map from theta to the parameters of each."""
  transform = power.power_transform(alpha)
  return (
    (transforms.powerprop(inner, alpha, **options), lambda theta: theta),
    (
      transforms.target_propagation(inner, transform, **options),
      transform.to_phi,
    ),
  )


def test_weights_of_zeros_are_refused_at_init():
  theta = _init()
  theta['output']['w'] = jnp.zeros((8, 3))
  inner = optax.sgd(0.1)
  for tx, parameters in _forms(inner, 2.0):
    with pytest.raises(ValueError, match=r"\['output/w'\] are zero.*floor"):
      tx.init(parameters(theta))
    jax.jit(tx.init)(parameters(theta))
    jax.eval_shape(tx.init, parameters(theta))
    # A network that is pruned to nothing later on trains as it can.
    tx.update(_init(), tx.init(parameters(_init())), parameters(theta))
  for alpha, options in (
    (1.0, {}),
    (lambda path, leaf: 1.0 if path == 'output/w' else 2.0, {}),
    (2.0, {'floor': 0.1}),
  ):
    for tx, parameters in _forms(inner, alpha, **options):
      tx.init(parameters(theta))


@pytest.mark.parametrize('form', [0, 1], ids=['drop-in', 'phi'])
def test_nothing_to_reparameterise_is_refused(form):
  params = {'layer': {'W': jnp.ones((2, 2)), 'b': jnp.ones(2)}}
  tx, _ = _forms(optax.sgd(1.0), 2.0)[form]
  for f in (
    lambda: tx.init(params),
    lambda: tx.update(params, optax.sgd(1.0).init(params), params),
    lambda: jax.jit(tx.init)(params),
  ):
    with pytest.raises(ValueError, match='There is no weight(.|\n)*layer/W'):
      f()
  baseline, _ = _forms(optax.sgd(1.0), 1.0)[form]
  baseline.update(params, baseline.init(params), params)


@pytest.mark.parametrize('form', [0, 1], ids=['drop-in', 'phi'])
def test_biases_by_themselves_pass(form):
  """A group of `optax.partition` may have only biases, or placeholders."""
  tx, _ = _forms(optax.adam(0.1), 2.0)[form]
  partition = optax.partition(
    {True: optax.sgd(0.1), False: tx}, leaves.weight_mask
  )
  theta = _init()
  partition.update(theta, partition.init(theta), theta)
  state = tx.init(theta)
  mapped = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
  assert optax.tree_utils.tree_get(mapped, 'mu')['hidden']['b'][0] == 1.0


@pytest.mark.parametrize('alpha', [1.0, 2.0])
@pytest.mark.parametrize('floor', [0.0, 0.5])
@pytest.mark.parametrize('form', [0, 1], ids=['drop-in', 'phi'])
def test_none_passes_as_in_optax(form, floor, alpha):
  """None for the gradient of a frozen leaf, with or without its value."""
  tx, _ = _forms(optax.adamw(0.1), alpha, floor=floor)[form]
  head = {'kernel': jnp.full((2, 2), 0.25)}
  grads = {'frozen': {'kernel': None}, 'head': head}
  expected, _ = tx.update(
    {'head': head}, tx.init({'head': head}), {'head': head}
  )
  for frozen in (None, jnp.ones((2, 2))):
    params = {'frozen': {'kernel': frozen}, 'head': head}
    state = tx.init({'frozen': {'kernel': None}, 'head': head})
    updates, _ = jax.jit(tx.update)(grads, state, params)
    assert updates['frozen']['kernel'] is None
    _assert_close(updates['head'], expected['head'])
  link = transforms.scale_by_power_jacobian(power.power_transform(alpha))
  updates, _ = link.update(grads, link.init(params), params)
  assert updates['frozen']['kernel'] is None


def _sam(inner, opaque=False):
  adversary = optax.chain(contrib.normalize(), optax.sgd(0.05))
  return contrib.sam(inner, adversary, opaque_mode=opaque)


OUTSIDE = {
  'lookahead': lambda inner: optax.lookahead(inner, 2, 0.5),
  'schedule_free': lambda inner: contrib.schedule_free(inner, 0.1),
  'mechanize': contrib.mechanize,
  'sam': _sam,
  'zoom line search': lambda inner: optax.chain(
    inner, optax.scale_by_zoom_linesearch(5)
  ),
  'backtracking line search': lambda inner: optax.chain(
    inner, optax.scale_by_backtracking_linesearch(5, store_grad=True)
  ),
  'in a chain': lambda inner: optax.chain(
    optax.clip(1.0), contrib.schedule_free(inner, 0.1)
  ),
  'in a partition': lambda inner: optax.partition(
    {True: _sam(inner), False: inner}, leaves.weight_mask
  ),
}


@pytest.mark.parametrize('name', OUTSIDE)
def test_wrappers_that_go_outside_are_refused_inside(name):
  wrap, theta = OUTSIDE[name], _init()
  for tx, parameters in _forms(wrap(optax.sgd(0.1)), 2.0):
    with pytest.raises(ValueError, match='State counts on .* Put it outside'):
      tx.init(parameters(theta))
  # They are accepted outside, and inside of a power that changes nothing.
  for tx, parameters in _forms(optax.sgd(0.1), 2.0):
    wrap(tx).init(parameters(theta))
  for tx, parameters in _forms(wrap(optax.sgd(0.1)), 1.0):
    tx.init(parameters(theta))


def test_wrappers_that_may_be_inside_are_not_refused():
  line_search = optax.scale_by_backtracking_linesearch(5)
  for inner in (
    _sam(optax.sgd(0.1), opaque=True),
    optax.chain(optax.sgd(0.1), line_search),
    optax.lbfgs(0.1, linesearch=None),
  ):
    for tx, parameters in _forms(inner, 2.0):
      tx.init(parameters(_init()))


def _steps(tx, params, loss, steps):
  state = tx.init(params)
  for _ in range(steps):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(
      grads, state, params, value=value, grad=grads, value_fn=loss
    )
    params = optax.apply_updates(params, updates)
  return params, state


def test_line_search_outside_hands_on_the_value_at_the_next_point():
  """`value_and_grad_from_state` reads it, so that L-BFGS goes on correctly."""
  tx = optax.chain(
    transforms.powerprop(optax.lbfgs(linesearch=None), 2.0),
    optax.scale_by_zoom_linesearch(20),
  )
  update = jax.jit(tx.update, static_argnames='value_fn')
  theta, state = _steps(tx._replace(update=update), _init(), _loss, 5)
  assert _loss(theta) < 0.7 * _loss(_init())
  stored, grads = optax.value_and_grad_from_state(_loss)(theta, state=state)
  np.testing.assert_allclose(stored, _loss(theta), rtol=1e-5)
  _assert_close(grads, _gradient(theta), rtol=1e-4, atol=1e-5)


def test_sam_outside_comes_back_from_its_ascent():
  """At a rate of 0 it ascends and comes back to where it was."""
  tx = optax.with_extra_args_support(
    _sam(transforms.powerprop(optax.sgd(0.0), 2.0))
  )
  theta, state = _init(), tx.init(_init())
  for step in range(4):
    updates, state = tx.update(_gradient(theta), state, theta)
    theta = optax.apply_updates(theta, updates)
    if step % 2:
      _assert_close(theta, _init(), atol=1e-6)
    else:
      assert _max_difference(theta, _init()) > 1e-3


def test_lookahead_outside_synchronises():
  tx = optax.lookahead(transforms.powerprop(optax.sgd(0.1), 2.0), 1, 0.5)
  params = optax.LookaheadParams.init_synced(_init())
  updates, _ = tx.update(_gradient(params.fast), tx.init(params), params)
  fast, slow = optax.apply_updates(params, updates)
  _assert_close(fast, slow)
  step = _first_updates(
    transforms.powerprop(optax.sgd(0.1), 2.0), _gradient(_init()), _init()
  )
  middle = jax.tree.map(lambda x, u: x + 0.5 * u, _init(), step)
  _assert_close(slow, middle)


def test_nonnegative_parameters_outside():
  tx = optax.chain(
    transforms.powerprop(optax.sgd(0.5), 2.0), optax.keep_params_nonnegative()
  )
  theta = jax.tree.map(jnp.abs, _init())
  theta = _train(tx, theta, _gradient, steps=10)
  assert min(float(jnp.min(x)) for x in jax.tree.leaves(theta)) == 0.0


# Schedules of alpha.


def _moved(theta, update, alpha, floor=0.0):
  """psi(psi^-1(theta) + psi' u) - theta + floor u, in double precision."""
  theta, update = np.asarray(theta, float), np.asarray(update, float)
  phi = np.sign(theta) * np.abs(theta) ** (1 / alpha)
  phi = phi + alpha * np.abs(phi) ** (alpha - 1) * update
  return np.sign(phi) * np.abs(phi) ** alpha - theta + floor * update


@pytest.mark.parametrize('alpha', [1.0009765625, 1.25, 2.0, 2.7, 3.25, 5.0])
def test_traced_power_loses_no_digits_of_the_update(alpha):
  """Small steps of theta would be lost in the rounding of a power of it."""
  size = np.geomspace(1e-6, 4.0, 60, dtype=np.float32)
  theta = np.concatenate([size, -size])[:, None]
  update = np.float32([1e-7, -1e-7, 1e-4, -1e-4, 0.01, -0.01, 0.5, -0.5])
  theta, update = map(np.array, np.broadcast_arrays(theta, update))
  tx = transforms.powerprop(optax.identity(), lambda count: count * 0.0 + alpha)

  @jax.jit
  def step(theta, update):
    return tx.update({'w': update}, tx.init({'w': theta}), {'w': theta})[0]['w']

  expected = _moved(theta, update, alpha)
  # The last term is where the step nearly cancels theta: phi is on its way
  # through zero and keeps the digits of phi.
  limit = 128 * ULP * np.abs(expected) + 32 * ULP * np.abs(theta) * (
    np.abs(expected) > 0.1 * np.abs(theta)
  )
  assert np.all(np.abs(step(theta, update) - expected) <= limit)


def test_schedule_of_alpha_is_function_preserving():
  """The weights stay where they are, and the moments are kept."""
  theta = _init()
  schedule = optax.piecewise_constant_schedule(1.0, {3: 2.0, 6: 1.5})
  tx = transforms.powerprop(optax.adam(0.01), schedule)
  none = jax.tree.map(jnp.zeros_like, theta)
  still = _train(tx, theta, lambda _: none, steps=9)
  _assert_identical(still, theta)

  # The same with parameters phi, changed at the boundaries.
  transform = power.power_transform(1.0)
  phi, state = theta, optax.adam(0.01).init(theta)
  for step in range(9):
    if step in (3, 6):
      new = power.power_transform({3: 2.0, 6: 3.0}[step])
      phi, transform = power.change_alpha(phi, transform, new), new
    wrapper = transforms.target_propagation(optax.adam(0.01), transform)
    grads = _gradient(transform.to_theta(phi))
    updates, state = wrapper.update(grads, state, phi)
    phi = optax.apply_updates(phi, updates)
  expected = transform.to_theta(phi)
  actual = _train(tx, theta, _gradient, steps=9)
  assert _max_difference(expected, theta) > 0.02
  assert _max_difference(actual, expected) < 32 * ULP


def test_schedule_at_one_is_the_inner_optimiser_to_the_last_bit():
  tx = transforms.powerprop(
    optax.adamw(0.01), optax.piecewise_constant_schedule(1.0, {2: 2.0})
  )
  update, inner = jax.jit(tx.update), optax.adamw(0.01)
  theta = _init()
  # A weight at zero moves as long as alpha is 1.
  theta['hidden']['w'] = theta['hidden']['w'].at[0, 0].set(0.0)
  state, inner_state = tx.init(theta), inner.init(theta)
  for step in range(4):
    grads = _gradient(theta)
    updates, state = update(grads, state, theta)
    expected, inner_state = jax.jit(inner.update)(grads, inner_state, theta)
    same = step < 2
    assert (
      np.array_equal(updates['hidden']['w'], expected['hidden']['w']) == same
    )
    np.testing.assert_array_equal(
      updates['hidden']['b'], expected['hidden']['b']
    )
    theta = optax.apply_updates(theta, updates)
  assert state.count == 4
  assert update._cache_size() == 1


@pytest.mark.parametrize('form', ['schedule', 'hyperparameter'])
def test_constant_schedule_is_the_fixed_power(form):
  alpha = 2.5
  if form == 'schedule':
    tx = transforms.powerprop(optax.adam(0.01), lambda count: count * 0 + alpha)
  else:
    tx = optax.inject_hyperparams(
      transforms.powerprop, static_args=('inner', 'is_weight')
    )(inner=optax.adam(0.01), alpha=alpha)
  fixed = transforms.powerprop(optax.adam(0.01), alpha)
  expected = _train(fixed, _init(), _gradient, steps=5)
  actual = _train(tx, _init(), _gradient, steps=5)
  # The tolerance is some units in the last place per step, of the largest
  # weight.
  size = _max_difference(expected, jax.tree.map(jnp.zeros_like, expected))
  assert _max_difference(actual, expected) < 5 * 4 * ULP * size


def test_schedule_of_alpha_below_one_is_loud():
  tx = transforms.powerprop(optax.sgd(0.1), optax.linear_schedule(2.0, 0.0, 4))
  theta = _train(tx, _init(), _gradient, steps=4)
  assert np.all(np.isnan(theta['hidden']['w']))
  with pytest.raises(ValueError, match='got 0.5'):
    transforms.powerprop(optax.sgd(0.1), lambda count: 0.5).init(_init())


def test_state_of_a_schedule_goes_through_tree_map_params():
  tx = transforms.powerprop(optax.adam(0.1), optax.linear_schedule(1.0, 2.0, 4))
  state = tx.init(_init())
  assert isinstance(state, transforms.PowerpropState)
  mapped = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
  assert mapped.count == 0
  assert optax.tree_utils.tree_get(mapped, 'nu')['output']['w'][0, 0] == 1.0


# inject_hyperparams


def test_advice_about_inject_hyperparams_works():
  """The error says that alpha is static, and so are functions."""

  def make(learning_rate, alpha, is_weight=leaves.is_weight):
    transform = power.power_transform(alpha, is_weight)
    return transforms.target_propagation(optax.sgd(learning_rate), transform)

  theta = _init()
  bad = optax.inject_hyperparams(make, static_args='is_weight')(0.1, alpha=2.0)
  with pytest.raises(ValueError, match=r"static_args=\('alpha', 'is_weight'\)"):
    jax.jit(bad.update)(theta, bad.init(theta), theta)
  static = ('alpha', 'is_weight')
  for tx in (
    optax.inject_hyperparams(make, static_args=static)(0.1, alpha=2.0),
    optax.inject_hyperparams(transforms.powerprop, static_args=static)(
      inner=optax.sgd(0.1), alpha=2.0
    ),
  ):
    jax.jit(tx.update)(theta, tx.init(theta), theta)


def test_alpha_is_a_hyperparameter_that_can_be_set():
  tx = optax.inject_hyperparams(transforms.powerprop, static_args='is_weight')(
    inner=optax.sgd(0.1), alpha=2.0, floor=0.0
  )
  theta, grads = _init(), _gradient(_init())
  state = tx.init(theta)
  assert sorted(state.hyperparams) == ['alpha', 'floor']
  state.hyperparams['alpha'] = jnp.asarray(3.0)
  updates, _ = jax.jit(tx.update)(grads, state, theta)
  fixed = transforms.powerprop(optax.sgd(0.1), 3.0)
  _assert_close(updates, _first_updates(fixed, grads, theta), rtol=1e-5)


# With a floor, weights can cross zero.


@pytest.mark.parametrize('alpha', [1.5, 2.0, 3.0])
def test_floor_adds_a_share_of_the_inner_update(alpha):
  theta = {'w': jnp.array([0.7, -0.3, 0.0, 1e-3]), 'b': jnp.ones(4)}
  grads = {'w': jnp.array([1.0, -2.0, 0.5, 3.0]), 'b': jnp.ones(4)}
  step = -0.01 * np.asarray(grads['w'])
  expected = _moved(theta['w'], step, alpha, floor=0.25)
  for (tx, to_params), back in zip(
    _forms(optax.sgd(0.01), alpha, floor=0.25),
    (lambda x: x, power.power_transform(alpha).to_theta),
  ):
    params = to_params(theta)
    updates = _first_updates(tx, grads, params)
    moved = back(optax.apply_updates(params, updates))['w'] - theta['w']
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(updates['b'], -jnp.full(4, 0.01))
    assert moved[2] != 0


def test_floor_is_the_flow_of_hyperbolic_aware_minimisation():
  """For alpha = 2, theta moves by (4 |theta| + floor) u in a small step."""
  theta = {'w': jnp.linspace(-1.0, 1.0, 21)}
  grads = {'w': jnp.full(21, 1.0)}
  tx = transforms.powerprop(optax.sgd(1e-5), 2.0, floor=0.5)
  updates = _first_updates(tx, grads, theta)['w']
  flow = -(4 * jnp.abs(theta['w']) + 0.5)
  np.testing.assert_allclose(updates / 1e-5, flow, rtol=2e-2)


@pytest.mark.parametrize('form', [0, 1, 2], ids=['drop-in', 'phi', 'schedule'])
@pytest.mark.parametrize('floor', [0.0, 0.1])
def test_weights_cross_zero_only_with_a_floor(form, floor):
  """A flow from 1/2 towards -1/2, in small steps."""
  tx = [
    *(tx for tx, _ in _forms(optax.sgd(0.02), 2.0, floor=floor)),
    transforms.powerprop(
      optax.sgd(0.02), lambda count: count * 0 + 2.0, floor=floor
    ),
  ][form]
  transform = power.power_transform(2.0 if form == 1 else 1.0)
  params = transform.to_phi({'w': jnp.array([0.5])})
  params = _train(
    tx,
    params,
    lambda x: {'w': transform.to_theta(x)['w'] + 0.5},
    steps=2_000,
  )
  end = float(transform.to_theta(params)['w'][0])
  if floor:
    assert end == pytest.approx(-0.5, abs=1e-3)
  else:
    assert 0 < end < 1e-3


def test_floor_leaves_the_baseline_alone():
  theta, grads = _init(), _gradient(_init())
  expected = _first_updates(optax.adam(0.01), grads, theta)
  for tx, _ in _forms(optax.adam(0.01), 1.0, floor=0.5):
    _assert_identical(_first_updates(tx, grads, theta), expected)
  for floor in (-0.1, float('nan'), float('inf')):
    with pytest.raises(ValueError, match=f'floor must be .* got {floor}'):
      transforms.powerprop(optax.sgd(0.1), 2.0, floor=floor)
    with pytest.raises(ValueError, match=f'floor must be .* got {floor}'):
      transforms.target_propagation(
        optax.sgd(0.1), power.power_transform(2.0), floor
      )


def test_what_is_no_optimiser_or_transform_is_refused():
  transform = power.power_transform(2.0)
  for make in (
    lambda: transforms.powerprop(1e-3, 2.0),
    lambda: transforms.target_propagation(1e-3, transform),
  ):
    with pytest.raises(ValueError, match='inner must be an optimiser.*0.001'):
      make()
  with pytest.raises(ValueError, match='transform must be .* got 2.0'):
    transforms.target_propagation(optax.sgd(0.1), 2.0)

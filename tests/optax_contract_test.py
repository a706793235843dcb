"""Tests that the transforms keep the contract of optax, with its optimisers.

Every optimiser takes four steps inside `target_propagation`, compiled, with a
power of its own for each weight. Each of the steps is then compared with the
formula of the paper worked out with `jnp.power` around a plain call of the
optimiser, from the same parameters and state.
"""

import functools
from typing import Any, NamedTuple

from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimisers
import pytest

from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import transforms

POWERS = {'kernel': 3.0, 'w': 1.5}  # By weight; there is a bias too.
STEPS = 4
each_optimiser = pytest.mark.parametrize('name', optimisers.OPTIMISERS)


def _random(seed):
  rng = np.random.default_rng(seed)
  shapes = {'b': (3,), 'kernel': (3, 2), 'w': (4, 3)}
  return {
    name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for name, shape in shapes.items()
  }


def _parameters():
  # A weight at zero, where the power and its derivative are most fragile.
  phi = _random(0)
  phi['w'] = phi['w'].at[1, 2].set(0.0)
  return phi


def _gradients(name, step):
  grads = _random(1 + step)
  if name == 'apply_if_finite' and step == 1:
    grads['kernel'] = grads['kernel'].at[0, 0].set(jnp.nan)
  return grads


def _alpha(path, leaf):
  del leaf
  return POWERS[path]  # The bias has no power, and no entry.


def _theta(phi):
  """phi |phi|^(alpha - 1), as in the paper."""
  theta = dict(phi)
  for name, alpha in POWERS.items():
    theta[name] = phi[name] * jnp.power(jnp.abs(phi[name]), alpha - 1)
  return theta


def _times_jacobian(updates, phi):
  """alpha |phi|^(alpha - 1) u, as in the paper."""
  updates = dict(updates)
  for name, alpha in POWERS.items():
    updates[name] *= alpha * jnp.power(jnp.abs(phi[name]), alpha - 1)
  return updates


def _transform():
  return power.power_transform(_alpha)


def _wrapped(name):
  return transforms.target_propagation(
    optimisers.OPTIMISERS[name](), _transform()
  )


@functools.cache
def _inner(name):
  """The optimiser, with a compiled update, as several tests call it."""
  inner = optax.with_extra_args_support(optimisers.OPTIMISERS[name]())
  return optax.GradientTransformationExtraArgs(
    inner.init, jax.jit(inner.update)
  )


def _update(tx, grads, state, params, **extra_args) -> tuple[Any, Any]:
  """The updates and the new state."""
  tx = optax.with_extra_args_support(tx)
  return tx.update(grads, state, params, **extra_args)


def _assert_close(actual, desired, rtol=1e-5, atol=1e-6):
  def check(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  jax.tree.map(check, actual, desired)


def _assert_identical(actual, desired):
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  jax.tree.map(np.testing.assert_array_equal, actual, desired)


def _is_masked_node(x):
  return isinstance(x, optax.MaskedNode)


class Step(NamedTuple):
  grads: Any
  phi: Any
  state: Any
  updates: Any
  new_state: Any


@functools.cache
def _trajectory(name):
  """Four compiled steps, the step function, and how often it was traced."""
  tx, extra_args = _wrapped(name), optimisers.EXTRA_ARGS.get(name, {})
  traces = []

  @jax.jit
  def update(grads, state, phi):
    traces.append(None)
    updates, state = tx.update(grads, state, phi, **extra_args)
    return updates, state, optax.apply_updates(phi, updates)

  phi = _parameters()
  state = tx.init(phi)
  steps = []
  for i in range(STEPS):
    grads = _gradients(name, i)
    updates, new_state, new_phi = update(grads, state, phi)
    steps.append(Step(grads, phi, state, updates, new_state))
    phi, state = new_phi, new_state
  return steps, update, len(traces)


# Two compilations of one update differ by rounding. Muon magnifies the
# difference: each of its five Newton-Schulz steps multiplies small singular
# values, and the errors in them, by 3.4445.
_MAGNIFIES = {'muon': 3.4445**5}


def _atol(name, updates, atol):
  """The tolerance for updates of this size, which allows for rounding."""
  size = max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(updates))
  units = 8 * float(jnp.finfo(jnp.float32).eps) * size
  return max(atol, units * _MAGNIFIES.get(name, 1.0))


@each_optimiser
def test_step_is_the_inner_step_at_theta_times_the_jacobian(name):
  inner = _inner(name)
  steps, _, _ = _trajectory(name)
  _assert_close(steps[0].state, inner.init(_theta(steps[0].phi)))
  for step in steps:
    updates, new_state = inner.update(
      step.grads,
      step.state,
      _theta(step.phi),
      **optimisers.EXTRA_ARGS.get(name, {}),
    )
    expected = _times_jacobian(updates, step.phi)
    _assert_close(step.updates, expected, atol=_atol(name, expected, 1e-6))
    _assert_close(step.new_state, new_state, rtol=1e-4, atol=1e-5)
  assert any(np.any(u) for u in jax.tree.leaves(steps[-1].updates))


@each_optimiser
def test_drop_in_step_is_the_difference_of_thetas(name):
  inner, extra_args = _inner(name), optimisers.EXTRA_ARGS.get(name, {})
  tx = transforms.powerprop(inner, _alpha)
  for step in _trajectory(name)[0][:2]:
    theta = _theta(step.phi)
    updates, state = _update(tx, step.grads, step.state, theta, **extra_args)
    inner_updates, inner_state = _update(
      inner, step.grads, step.state, theta, **extra_args
    )
    _assert_identical(state, inner_state)
    phi = optax.apply_updates(
      step.phi, _times_jacobian(inner_updates, step.phi)
    )
    _assert_close(
      optax.apply_updates(theta, updates),
      _theta(phi),
      atol=_atol(name, inner_updates, 1e-5),
    )
    np.testing.assert_array_equal(updates['b'], inner_updates['b'])
    assert updates['w'][1, 2] == 0.0


@each_optimiser
def test_zero_is_a_fixed_point(name):
  for step in _trajectory(name)[0]:
    np.testing.assert_array_equal(np.argwhere(step.phi['w'] == 0.0), [[1, 2]])
    assert np.all(step.phi['kernel'])


@each_optimiser
def test_compiles_once(name):
  assert _trajectory(name)[2] == 1


@each_optimiser
def test_alpha_one_is_the_inner_optimiser_to_the_last_bit(name):
  inner, extra_args = _inner(name), optimisers.EXTRA_ARGS.get(name, {})
  step = _trajectory(name)[0][1]
  expected = inner.update(step.grads, step.state, step.phi, **extra_args)
  for tx in (
    transforms.target_propagation(inner, power.power_transform(1.0)),
    transforms.powerprop(inner, 1.0),
  ):
    _assert_identical(
      tx.update(step.grads, step.state, step.phi, **extra_args), expected
    )


def _types(tx, params, grads, **extra_args):
  """The types of the first state, of the updates and of the new state."""
  tx = optax.with_extra_args_support(tx)

  def init_and_update(params, grads):
    state = tx.init(params)
    return state, *tx.update(grads, state, params, **extra_args)

  return jax.eval_shape(init_and_update, params, grads)


def _cast(tree, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), tree)


@each_optimiser
def test_bfloat16_is_kept_where_the_inner_optimiser_keeps_it(name):
  types = functools.partial(
    _types,
    params=_cast(_random(0), jnp.bfloat16),
    grads=_cast(_random(1), jnp.bfloat16),
    **optimisers.EXTRA_ARGS.get(name, {}),
  )
  inner = optimisers.OPTIMISERS[name]()
  expected = types(inner)
  assert types(_wrapped(name)) == expected
  assert types(transforms.powerprop(inner, _alpha)) == expected
  # The rates that inject_hyperparams keeps are float32 and promote the updates.
  if name != 'inject_hyperparams':
    assert {str(x.dtype) for x in jax.tree.leaves(expected[1])} == {'bfloat16'}


def test_dtypes_of_half_precision_gradients_for_float32_parameters():
  types = functools.partial(
    _types, params=_random(0), grads=_cast(_random(1), jnp.bfloat16)
  )
  inner = optax.sgd(0.1)
  expected = types(inner)
  assert types(_wrapped('sgd')) == expected
  assert types(transforms.powerprop(inner, _alpha)) == expected
  assert {str(x.dtype) for x in jax.tree.leaves(expected[1])} == {'bfloat16'}


def test_missing_parameters_are_an_error():
  inner = optax.sgd(0.1)
  for tx in (
    transforms.target_propagation(inner, _transform()),
    transforms.powerprop(inner, _alpha),
    transforms.powerprop(inner, optax.linear_schedule(1.0, 2.0, 4)),
    transforms.scale_by_power_jacobian(_transform()),
    transforms.decay_phi(1e-3),
  ):
    state = tx.init(_random(0))
    with pytest.raises(ValueError, match='current values of the parameters'):
      tx.update(_random(1), state)


@each_optimiser
def test_tree_map_params_maps_what_it_maps_in_the_inner_state(name):
  state = _trajectory(name)[0][-1].new_state

  def times_zero(x):
    return x if _is_masked_node(x) else 0 * x

  def mapped(tx):
    return optax.tree_utils.tree_map_params(
      tx, times_zero, state, is_leaf=_is_masked_node
    )

  inner = optimisers.OPTIMISERS[name]()
  expected = mapped(inner)
  _assert_identical(mapped(_wrapped(name)), expected)
  _assert_identical(mapped(transforms.powerprop(inner, _alpha)), expected)


@each_optimiser
def test_state_saves_and_restores(name):
  steps, update, _ = _trajectory(name)
  arrays, structure = jax.tree.flatten((steps[2].state, steps[2].phi))
  saved = [np.array(x) for x in arrays]  # As in a checkpoint.
  state, phi = jax.tree.unflatten(structure, saved)
  for step in steps[2:]:
    _assert_identical((state, phi), (step.state, step.phi))
    updates, state, phi = update(step.grads, state, phi)
    _assert_identical((updates, state), (step.updates, step.new_state))


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'multi_steps'])
def test_state_goes_through_flax_serialization(name):
  step = _trajectory(name)[0][-1]
  data = serialization.to_bytes(step.state)
  fresh = _wrapped(name).init(step.phi)
  _assert_identical(serialization.from_bytes(fresh, data), step.state)


def _adam_state():
  tx = _wrapped('adam')
  steps, _, _ = _trajectory('adam')
  return tx, steps[-1].new_state


def _keep():
  """False at the weights whose moments are to be forgotten."""
  return jax.tree.map(lambda x: x > 0, _random(9))


def _forget(moment, keep):
  if _is_masked_node(moment):
    return moment
  return jnp.where(keep, moment, 0)


def test_moments_of_chosen_weights_can_be_reset():
  tx, state = _adam_state()
  keep = _keep()
  reset = optax.tree_utils.tree_map_params(tx, _forget, state, keep)
  for name in ('mu', 'nu'):
    before = optax.tree_utils.tree_get(state, name)
    after = optax.tree_utils.tree_get(reset, name)
    _assert_identical(
      after, jax.tree.map(lambda k, m: np.where(k, m, 0), keep, before)
    )
  assert optax.tree_utils.tree_get(reset, 'count') == STEPS


def _weights_only(inner):
  return optax.masked(inner, leaves.weight_mask)


@pytest.mark.parametrize('outside', [True, False])
def test_masked_inside_and_outside(outside):
  """Weights are trained by the formula, and biases are passed through."""
  inner = optax.adam(0.1)
  if outside:
    tx = _weights_only(transforms.target_propagation(inner, _transform()))
  else:
    tx = transforms.target_propagation(_weights_only(inner), _transform())
  phi, grads, keep = _parameters(), _gradients('adam', 0), _keep()
  updates, state = _update(tx, grads, tx.init(phi), phi)
  expected, _ = _update(inner, grads, inner.init(phi), phi)
  expected = _times_jacobian(expected, phi)
  for name in POWERS:
    np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)
  np.testing.assert_array_equal(updates['b'], grads['b'])

  reset = optax.tree_utils.tree_map_params(
    tx, _forget, state, keep, is_leaf=_is_masked_node
  )
  before = optax.tree_utils.tree_get(state, 'mu')
  after = optax.tree_utils.tree_get(reset, 'mu')
  for name in POWERS:
    np.testing.assert_array_equal(
      after[name], np.where(keep[name], before[name], 0)
    )
  assert _is_masked_node(after['b'])


def test_each_part_of_a_partition_has_its_own_transform():
  tx = optax.partition(
    {
      name: transforms.target_propagation(
        optax.adam(0.1), power.power_transform(a)
      )
      for name, a in POWERS.items()
    },
    {'b': 'w', 'kernel': 'kernel', 'w': 'w'},
  )
  whole = _wrapped('adam')
  phi, grads = _parameters(), _gradients('adam', 0)
  _assert_close(
    tx.update(grads, tx.init(phi), phi)[0],
    whole.update(grads, whole.init(phi), phi)[0],
    rtol=1e-6,
  )


@pytest.mark.parametrize(
  ('name', 'wrap'),
  [
    ('multi_steps', lambda tx: optax.MultiSteps(tx, 2)),
    ('apply_if_finite', lambda tx: optax.apply_if_finite(tx, 3)),
  ],
  ids=['multi_steps', 'apply_if_finite'],
)
def test_wrappers_that_do_not_read_parameters_commute(name, wrap):
  """They do the same around `target_propagation` as inside it."""
  inner = optax.adamw(0.1)
  tx = wrap(transforms.target_propagation(inner, _transform()))
  steps, _, _ = _trajectory(name)
  state, update = tx.init(steps[0].phi), jax.jit(tx.update)
  for step in steps:
    updates, state = update(step.grads, state, step.phi)
    _assert_close(updates, step.updates)


def test_powers_by_path():
  """Worked by hand: 0.5 alpha |phi|^(alpha - 1), and 0.5 for the bias."""
  phi = {
    'a': {'w': jnp.array([4.0, -0.25]), 'b': jnp.array([4.0])},
    'c': {'w': jnp.array([2.0, 0.0])},
    'd': {'w': jnp.array([-3.0])},
  }
  alphas = {'a/w': 1.5, 'c/w': 3.0, 'd/w': 1.0}
  tx = transforms.target_propagation(
    optax.sgd(0.5), power.power_transform(lambda path, _: alphas[path])
  )
  grads = jax.tree.map(lambda x: -jnp.ones_like(x), phi)
  updates, _ = tx.update(grads, tx.init(phi), phi)
  _assert_identical(
    updates,
    {
      'a': {'w': jnp.array([1.5, 0.375]), 'b': jnp.array([0.5])},
      'c': {'w': jnp.array([6.0, 0.0])},
      'd': {'w': jnp.array([0.5])},
    },
  )


def test_extra_arguments_reach_the_inner_optimiser():
  """The Polyak step is value / |g|^2 g, and value is an extra argument."""
  tx = _wrapped('polyak_sgd')
  phi, grads = _parameters(), _gradients('polyak_sgd', 0)
  sq_norm = sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))
  for value in (0.5, 2.0):
    updates, _ = tx.update(
      grads, tx.init(phi), phi, value=value, batch='is not read by anyone'
    )
    step = jax.tree.map(lambda g, v=value: -v / sq_norm * g, grads)
    _assert_close(updates, _times_jacobian(step, phi))


def test_line_search_evaluates_the_loss_at_theta():
  inner = optax.chain(optax.sgd(4.0), optax.scale_by_backtracking_linesearch(8))
  tx = transforms.target_propagation(inner, _transform())
  target = _random(5)

  def loss(theta):
    return sum(
      jnp.sum((x - y) ** 2)
      for x, y in zip(*map(jax.tree.leaves, (theta, target)))
    )

  phi = _parameters()
  value, grads = jax.value_and_grad(loss)(_theta(phi))
  extra_args = {'value': value, 'grad': grads, 'value_fn': loss}
  updates, _ = tx.update(grads, tx.init(phi), phi, **extra_args)
  expected, state = inner.update(
    grads, inner.init(_theta(phi)), _theta(phi), **extra_args
  )
  _assert_close(updates, _times_jacobian(expected, phi))
  # A step of 4 is too long for this loss, so the search did shorten it.
  assert 0 < optax.tree_utils.tree_get(state, 'learning_rate') < 1


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_bfloat16_step_is_the_formula_in_float32_rounded(name):
  half = functools.partial(_cast, dtype=jnp.bfloat16)
  single = functools.partial(_cast, dtype=jnp.float32)
  inner, tx = optimisers.OPTIMISERS[name](), _wrapped(name)
  phi, grads = half(_parameters()), half(_gradients(name, 0))
  theta = half(_theta(single(phi)))
  updates, _ = tx.update(grads, tx.init(phi), phi)
  expected, _ = inner.update(grads, inner.init(theta), theta)
  # The Jacobian and the product are rounded, each by half of 2^-8.
  _assert_close(
    single(updates),
    _times_jacobian(single(expected), single(phi)),
    rtol=2**-7,
  )


def test_bfloat16_drop_in_step_is_that_of_float32_rounded():
  """bfloat16 has too few digits for the difference of two powers."""
  tx = transforms.powerprop(optax.sgd(0.1), _alpha)
  theta, grads = _cast((_random(0), _random(1)), jnp.bfloat16)
  updates, _ = _update(tx, grads, tx.init(theta), theta)
  theta, grads = _cast((theta, grads), jnp.float32)
  expected, _ = _update(tx, grads, tx.init(theta), theta)
  # The inner update and the result are rounded, each by half of 2^-8.
  _assert_close(_cast(updates, jnp.float32), expected, rtol=2**-7)

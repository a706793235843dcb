"""Tests of the train step, and of what runs it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimisers
import pytest

from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax import transforms
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import updaters


def _squared_error(theta, model_state, key, batch):
  del key
  x, y = batch
  error = x @ theta['linear']['w'] + theta['linear']['b'] - y
  return jnp.mean(error**2), (model_state, {'error': jnp.mean(error)})


def _linear_problem(alpha, optimiser):
  """A linear regression of two weights and a bias, solvable by hand."""
  transform = power.power_transform(alpha)
  tx = transforms.target_propagation(optimiser, transform)
  theta = {'linear': {'w': jnp.array([4.0, -1.0]), 'b': jnp.array(0.5)}}
  state = training.init_state(jax.random.key(0), theta, {}, tx, transform)
  return state, training.make_train_step(_squared_error, tx, transform)


def test_one_step_by_hand():
  state, step = _linear_problem(2.0, optax.sgd(0.1))
  # phi = (2, -1), theta = (4, -1), error = 1*4 + 2*(-1) + 0.5 - 0 = 2.5.
  batch = (jnp.array([[1.0, 2.0]]), jnp.array([0.0]))
  state, metrics = step(state, batch)
  # dL/dtheta = 2 * 2.5 * x = (5, 10), times 2 |phi| = (4, 2).
  np.testing.assert_allclose(
    state.phi['linear']['w'], [2 - 0.1 * 20, -1 - 0.1 * 20], rtol=1e-6
  )
  np.testing.assert_allclose(state.phi['linear']['b'], 0.5 - 0.1 * 5)
  np.testing.assert_allclose(metrics['loss'], 6.25)
  np.testing.assert_allclose(metrics['error'], 2.5)
  assert state.step == 1


@pytest.mark.parametrize(
  'optimiser',
  [optax.sgd(0.1, momentum=0.9), optax.adamw(0.1, weight_decay=0.1)],
  ids=['momentum', 'adamw'],
)
def test_masks_cut_the_forward_pass_and_freeze_the_update(optimiser):
  state, step = _linear_problem(2.0, optimiser)
  cut = {'linear': {'w': jnp.array([True, False]), 'b': jnp.array(True)}}
  batch = (jnp.array([[1.0, 2.0]]), jnp.array([0.0]))
  state, _ = step(state, batch)  # Momentum of both weights builds up.
  before = state.phi['linear']['w'][1]
  state = state._replace(masks=masks.Masks(forward=cut, backward=cut))
  theta = power.power_transform(2.0).to_theta(state.phi)
  _, metrics = step(state, batch)
  expected = theta['linear']['w'][0] + theta['linear']['b']
  np.testing.assert_allclose(metrics['error'], expected, rtol=1e-6)
  for _ in range(3):
    state, _ = step(state, batch)
  assert state.phi['linear']['w'][1] == before
  assert state.phi['linear']['w'][0] != before


def _two_layers(theta, model_state, key, batch):
  del key
  x, y = batch
  hidden = jnp.tanh(x @ theta['w'] + theta['b'])
  return jnp.mean((hidden @ theta['kernel'] - y) ** 2), (model_state, {})


def _draw(seed):
  rng = np.random.default_rng(seed)
  shapes = {'b': (3,), 'kernel': (3, 2), 'w': (4, 3)}
  return {
    name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for name, shape in shapes.items()
  }


# Their states have no entry for an entry of a weight.
_WITHOUT_MOMENTS = ('sgd', 'adafactor', 'polyak_sgd')


# One optimiser of each kind of state. The parts of the step that depend on the
# optimiser are those of `sparsify`, whose tests go through all of them.
_OF_EACH_KIND = ('sgd', 'adam', 'adafactor', 'muon', 'polyak_sgd')


@pytest.mark.parametrize('name', _OF_EACH_KIND)
def test_masks_hold_for_every_kind_of_optimiser(name):
  """Masked weights stay to the last bit; moments of grown ones start afresh."""
  transform = power.power_transform(2.0)
  tx = transforms.target_propagation(optimisers.OPTIMISERS[name](), transform)
  extra_args = optimisers.EXTRA_ARGS.get(name, {})
  tx = optax.GradientTransformation(
    tx.init, functools.partial(tx.update, **extra_args)
  )
  counts = lambda theta: {'b': 3, 'kernel': 3, 'w': 6}
  half, fresh = lambda step: jnp.asarray(0.5), lambda key: _draw(1)
  init_masks, update_masks = training.make_mask_updates(
    _two_layers, tx, updaters.rigl(counts, half, fresh, False), transform
  )
  step = training.make_train_step(_two_layers, tx, transform)
  rng = np.random.default_rng(2)
  batch = tuple(
    jnp.asarray(rng.standard_normal((1, 5, n)), jnp.float32) for n in (4, 2)
  )
  one = jax.tree.map(lambda x: x[0], batch)

  state = training.init_state(jax.random.key(0), _draw(0), {}, tx, transform)
  for _ in range(2):  # Moments of all weights build up.
    state, _ = step(state, one)
  before = init_masks(state, batch)
  state = before
  for _ in range(3):
    state, _ = step(state, one)
  active = before.masks.backward
  for old, new, mask in zip(
    *map(jax.tree.leaves, (before.phi, state.phi, active))
  ):
    np.testing.assert_array_equal(old[~mask], new[~mask])
    assert (old != new)[mask].any()

  after = update_masks(state, batch)
  changed = jax.tree.map(lambda a, b: a ^ b, after.masks.backward, active)
  # As many are cut as are grown.
  assert [int(c.sum()) for c in jax.tree.leaves(changed)] == [0, 2, 6]
  by_shape = {c.shape: c for c in jax.tree.leaves(changed)}
  fresh = tx.init(masks.apply_mask(after.phi, after.masks.backward))
  reset = False
  for initial, old, new in zip(
    *map(jax.tree.leaves, (fresh, state.opt_state, after.opt_state))
  ):
    where = by_shape.get(old.shape, False)
    np.testing.assert_array_equal(new, jnp.where(where, initial, old))
    reset |= bool((new != old).any())
  assert reset == (name not in _WITHOUT_MOMENTS)


def test_optimisers_are_given_the_loss_and_its_gradient():
  """The step of Polyak by hand: value / |g|^2 g, which the power scales."""
  state, step = _linear_problem(2.0, optax.polyak_sgd(max_learning_rate=10.0))
  batch = (jnp.array([[1.0, 2.0]]), jnp.array([0.0]))
  state, _ = step(state, batch)
  # The loss is 6.25 and its gradient (5, 10) and 5 for the bias.
  rate = 6.25 / (5**2 + 10**2 + 5**2)
  np.testing.assert_allclose(
    state.phi['linear']['w'],
    [2 - rate * 5 * 4, -1 - rate * 10 * 2],
    rtol=1e-6,
  )
  np.testing.assert_allclose(state.phi['linear']['b'], 0.5 - rate * 5)


def test_a_plateau_lowers_the_rate():
  plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
  state, step = _linear_problem(1.0, optax.chain(optax.sgd(0.0), plateau))
  batch = (jnp.array([[1.0, 2.0]]), jnp.array([0.0]))
  for _ in range(2):  # The loss stays what it is at a rate of 0.
    state, _ = step(state, batch)
  assert optax.tree_utils.tree_get(state.opt_state, 'scale') == 0.5


@pytest.mark.parametrize('chained', [False, True])
def test_init_state_refuses_weights_that_start_at_zero(chained):
  transform = power.power_transform(2.0)
  tx = transforms.target_propagation(optax.sgd(0.1), transform)
  if chained:
    tx = optax.chain(
      optax.sgd(0.1), transforms.scale_by_power_jacobian(transform)
    )
  theta = {'linear': {'w': jnp.zeros([3, 2]), 'b': jnp.zeros(2)}}
  with pytest.raises(ValueError, match=r"'linear/w'.*zero"):
    training.init_state(jax.random.key(0), theta, {}, tx, transform)


@pytest.mark.parametrize('which', [0, 1], ids=['init', 'update'])
def test_state_that_cannot_follow_masks_is_refused_before_training(which):
  transform = power.power_transform(2.0)
  tx = transforms.target_propagation(optax.flatten(optax.adam(0.1)), transform)
  state, _ = _linear_problem(2.0, tx)
  change = training.make_mask_updates(
    _squared_error, tx, updaters.dense(), transform
  )[which]
  with pytest.raises(ValueError, match=r'optax\.flatten'):
    jax.eval_shape(change, state, (jnp.ones([1, 1, 2]), jnp.zeros([1, 1])))


def test_an_infinite_gradient_of_a_cut_weight_harms_no_other():
  clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
  state, step = _linear_problem(2.0, clipped)
  cut = {'linear': {'w': jnp.array([True, False]), 'b': jnp.array(True)}}
  state = state._replace(masks=masks.Masks(cut, cut))
  # The derivative by the second weight, 2 * 4.5 * 1e38, is infinite.
  batch = (jnp.array([[1.0, 1e38]]), jnp.array([0.0]))
  new, _ = step(state, batch)
  # The gradient of the others is (9, 9), clipped to norm 1.
  np.testing.assert_allclose(
    new.phi['linear']['w'], [2 - 0.1 / np.sqrt(2) * 4, -1], rtol=1e-6
  )


def test_masks_are_scored_by_the_mean_gradient():
  transform = power.power_transform(2.0)
  tx = transforms.target_propagation(optax.sgd(0.1), transform)
  state, _ = _linear_problem(2.0, optax.sgd(0.1))
  # A method that shows the gradient that it is given.
  updater = updaters.MaskUpdater(
    init=lambda key, theta, grads: masks.Masks(grads, grads),
    update=lambda key, step, theta, found, grads: (
      theta,
      found._replace(forward=grads),
    ),
  )
  init_masks, _ = training.make_mask_updates(
    _squared_error, tx, updater, transform
  )
  batches = (jnp.array([[[1.0, 2.0]], [[0.0, 1.0]]]), jnp.zeros([2, 1]))
  # w = (4, -1), b = 0.5. The errors are 2.5 and -0.5, and dL/dw = 2 error x is
  # (5, 10) for the one batch and (0, -1) for the other.
  found = init_masks(state, batches).masks.forward['linear']
  np.testing.assert_allclose(found['w'], [2.5, 4.5], rtol=1e-6)
  np.testing.assert_allclose(found['b'], 2.0, rtol=1e-6)
  # Where w is masked to (4, 0), the errors are 4.5 and 0.5. The gradient is
  # that of all weights.
  cut = {'linear': {'w': jnp.array([True, False]), 'b': jnp.array(True)}}
  state = state._replace(masks=masks.Masks(cut, cut))
  found = init_masks(state, batches).masks.forward['linear']
  np.testing.assert_allclose(found['w'], [4.5, 9.5], rtol=1e-6)
  np.testing.assert_allclose(found['b'], 5.0, rtol=1e-6)


def test_a_mean_gradient_of_half_precision_adds_up():
  def loss(theta, model_state, key, batch):
    return jnp.sum(theta['w'] * batch), (model_state, {})

  updater = updaters.MaskUpdater(
    init=lambda key, theta, grads: masks.Masks(grads, grads), update=None
  )
  transform = power.power_transform(1.0)
  tx = optax.sgd(0.1)
  theta = {'w': jnp.ones((1, 2), jnp.bfloat16)}
  state = training.init_state(jax.random.key(0), theta, {}, tx, transform)
  init_masks, _ = training.make_mask_updates(loss, tx, updater, transform)
  batches = jnp.tile(jnp.array([[1.0, 1.5]], jnp.bfloat16), (1000, 1, 1))
  found = init_masks(state, batches).masks.forward['w']
  assert found.astype(float).tolist() == [[1.0, 1.5]]


def test_run_steps_equals_a_python_loop():
  state, step = _linear_problem(3.0, optax.adam(1e-2))
  rng = np.random.default_rng(0)
  data = (
    jnp.asarray(rng.normal(size=(20, 2)), jnp.float32),
    jnp.asarray(rng.normal(size=20), jnp.float32),
  )
  indices = training.batch_indices(jax.random.key(1), 0, 7, 4, 20)
  loop, losses = state, []
  for index in indices:
    loop, metrics = step(loop, jax.tree.map(lambda x, i=index: x[i], data))
    losses.append(metrics['loss'])
  scanned, metrics = training.make_run_steps(step)(state, data, indices)
  chex.assert_trees_all_close(scanned.phi, loop.phi, rtol=1e-6)
  chex.assert_trees_all_close(scanned.opt_state, loop.opt_state, rtol=1e-5)
  np.testing.assert_allclose(metrics['loss'], jnp.stack(losses), rtol=1e-5)
  assert scanned.step == 7


def test_init_state_leaves_the_callers_arrays_alone():
  transform = power.power_transform(1.0)  # psi returns its argument.
  theta, key = {'linear': {'w': jnp.ones(3)}}, jax.random.key(0)
  state = training.init_state(key, theta, {}, optax.sgd(0.1), transform)
  jax.jit(lambda s: s, donate_argnums=0)(state)
  assert not theta['linear']['w'].is_deleted()
  assert not key.is_deleted()


def test_batch_indices_are_epochs():
  key = jax.random.key(3)
  indices = training.batch_indices(key, 0, 10, 3, 10)
  chex.assert_shape(indices, (10, 3))
  for epoch in indices.reshape(3, 10):
    assert sorted(epoch.tolist()) == list(range(10))
  assert indices.ravel()[:10].tolist() != indices.ravel()[10:20].tolist()


@pytest.mark.parametrize(
  ('start', 'batch_size'), [(0, 3), (1, 10), (4, 25), (33, 3)]
)
def test_batch_indices_go_on_from_any_step(start, batch_size):
  key = jax.random.key(3)
  whole = training.batch_indices(key, 0, start + 5, batch_size, 10)
  part = training.batch_indices(key, start, 5, batch_size, 10)
  np.testing.assert_array_equal(part, whole[start:])


@pytest.mark.parametrize('kind', [np.int32, np.int64, jnp.int32])
def test_batch_indices_of_array_integers_do_not_wrap(kind):
  # Step 600,000 of batches of 4,096 is example 2,457,600,000, beyond 2^31.
  key = jax.random.key(0)
  expected = training.batch_indices(key, 600_000, 1, 4096, 1_281)
  found = training.batch_indices(
    key, kind(600_000), kind(1), kind(4096), kind(1_281)
  )
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('sizes', [(0, 4, 10), (2, 0, 10), (2, 4, 0)])
def test_batch_indices_of_nothing_are_refused(sizes):
  with pytest.raises(ValueError, match='at least 1|no examples'):
    training.batch_indices(jax.random.key(0), 0, *sizes)


def test_batch_indices_beyond_int32():
  # Step 2^31 of batches of 8 is example 2^34 of the stream.
  indices = training.batch_indices(jax.random.key(0), 2**31, 2, 8, 16)
  assert sorted(indices.ravel().tolist()) == list(range(16))


def test_batch_indices_of_no_examples():
  with pytest.raises(ValueError, match='no examples'):
    training.batch_indices(jax.random.key(0), 0, 2, 4, 0)


def test_each_step_has_a_key_of_its_own():
  transform = power.power_transform(1.0)

  def loss_fn(theta, model_state, key, batch):
    noise = jax.random.uniform(key)
    return jnp.sum(theta['w']) * 0.0, (model_state, {'noise': noise})

  tx = optax.sgd(0.1)
  state = training.init_state(
    jax.random.key(0), {'w': jnp.ones(1)}, {}, tx, transform
  )
  step = training.make_train_step(loss_fn, tx, transform)
  state, first = step(state, None)
  _, second = step(state, None)
  assert first['noise'] != second['noise']


def test_norms_are_of_what_may_move():
  def loss_fn(theta, model_state, key, batch):
    return jnp.sum(theta['w'] * batch), (model_state, {})

  transform = power.power_transform(2.0)
  tx = transforms.target_propagation(optax.sgd(0.1), transform)
  theta, key = {'w': jnp.array([4.0, 9.0])}, jax.random.key(0)
  state = training.init_state(key, theta, {}, tx, transform)
  mask = {'w': jnp.array([True, False])}
  state = state._replace(masks=masks.Masks(mask, mask))
  step = training.make_train_step(loss_fn, tx, transform, norms=True)
  _, metrics = jax.jit(step)(state, jnp.array([-3.0, 5.0]))
  # phi is 2, and moves by 0.1 * 3 * 2 * 2.
  np.testing.assert_allclose(metrics['gradient_norm'], 3.0, rtol=1e-6)
  np.testing.assert_allclose(metrics['update_norm'], 1.2, rtol=1e-6)

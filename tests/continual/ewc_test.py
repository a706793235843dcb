"""Tests of elastic weight consolidation, against sums worked by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax import transforms
from powerprop_jax.continual import ewc
from powerprop_jax.sparse import masks

_X = np.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
_Y = np.array([0, 2, 1, 1, 0])
_W = np.array([[0.5, -0.5, 0.0], [1.0, 0.0, -1.0]])
_THETA = {'linear': {'w': jnp.array(_W, jnp.float32), 'b': jnp.zeros(3)}}


def _logits(theta, x):
  return x @ theta['linear']['w'] + theta['linear']['b']


def _scores(labels):
  """Gradients of the log-likelihood: x (e_y - p), and e_y - p of the bias."""
  p = np.exp(_X @ _W)
  p /= p.sum(axis=1, keepdims=True)
  residual = np.eye(3)[labels] - p
  return _X[:, :, None] * residual[:, None], residual


def _random(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  return {
    'linear': {
      'w': jax.random.normal(keys[0], (2, 3)),
      'b': jax.random.normal(keys[1], (3,)),
    }
  }


def test_fisher_of_given_labels_by_hand():
  found = ewc.fisher(_logits, _THETA, jnp.array(_X), labels=jnp.array(_Y))
  w, b = _scores(_Y)
  np.testing.assert_allclose(found['linear']['w'], (w**2).mean(0), rtol=1e-5)
  np.testing.assert_allclose(found['linear']['b'], (b**2).mean(0), rtol=1e-5)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_fisher_of_half_precision_is_that_of_single(dtype):
  theta = jax.tree.map(lambda x: x.astype(dtype), _THETA)
  images = jnp.tile(jnp.array(_X), (400, 1))
  labels = jnp.tile(jnp.array(_Y), 400)
  found = ewc.fisher(_logits, theta, images.astype(dtype), labels=labels)
  wanted = ewc.fisher(_logits, _THETA, images, labels=labels)
  assert found['linear']['w'].dtype == dtype
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x.astype(jnp.float32), found), wanted, rtol=0.05
  )


def test_fisher_does_not_count_negative_labels():
  labels = jnp.array([0, -1, 1, -1, 0])
  found = ewc.fisher(_logits, _THETA, jnp.array(_X), labels=labels)
  w, _ = _scores(_Y)
  np.testing.assert_allclose(
    found['linear']['w'], (w[[0, 2, 4]] ** 2).mean(0), rtol=1e-5
  )


def test_fisher_of_drawn_labels_is_the_expectation():
  n = 20_000
  x = jnp.broadcast_to(jnp.array(_X[0]), (n, 2))
  fisher = jax.jit(lambda key: ewc.fisher(_logits, _THETA, x, key=key))
  p = np.exp(_X[0] @ _W)
  p /= p.sum()
  expected = _X[0][:, None] ** 2 * (p * (1 - p))
  found = fisher(jax.random.key(0))['linear']['w']
  # The standard error of a mean of n is below 0.5 / sqrt(n) of x^2.
  np.testing.assert_allclose(found, expected, atol=4 * 3 * 0.5 / np.sqrt(n))
  # Labels are drawn: the likeliest would give (1 - p)^2 and p^2.
  wrong = _X[0][:, None] ** 2 * (np.eye(3)[np.argmax(p)] - p) ** 2
  assert np.abs(wrong - expected).max() > 0.1
  assert (found != fisher(jax.random.key(1))['linear']['w']).any()


def test_fisher_wants_a_key_or_labels_and_examples():
  x, y = jnp.array(_X), jnp.array(_Y)
  with pytest.raises(ValueError, match='either a key'):
    ewc.fisher(_logits, _THETA, x)
  with pytest.raises(ValueError, match='either a key'):
    ewc.fisher(_logits, _THETA, x, key=jax.random.key(0), labels=y)
  with pytest.raises(ValueError, match='must be examples'):
    ewc.fisher(_logits, _THETA, x[:0], labels=y[:0])


def _quadratic(theta, fishers, thetas, strength):
  """The penalty as the paper writes it, with a term for each task."""
  return sum(
    strength / 2 * jnp.sum(f * (x - t) ** 2)
    for fisher, task in zip(fishers, thetas)
    for f, x, t in zip(*map(jax.tree.leaves, (fisher, theta, task)))
  )


def test_one_anchor_is_the_sum_of_a_penalty_for_each_task():
  fishers = [jax.tree.map(jnp.square, _random(s)) for s in range(4)]
  thetas = [_random(10 + s) for s in range(4)]
  anchor = ewc.no_anchor(_THETA)
  for fisher, theta in zip(fishers, thetas):
    anchor = ewc.add_task(anchor, fisher, theta, 0.3)
  gradient = ewc.penalty(*anchor)(_THETA, masks.dense(_THETA))
  expected = jax.grad(_quadratic)(_THETA, fishers, thetas, 0.3)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    gradient,
    expected,
  )


def test_no_anchor_pulls_nowhere_and_a_task_not_at_its_own_weights():
  anchor = ewc.no_anchor(_THETA)
  gradient = ewc.penalty(*anchor)(_THETA, masks.dense(_THETA))
  assert not any(x.any() for x in jax.tree.leaves(gradient))
  anchor = ewc.add_task(anchor, _random(0), _random(1))
  gradient = ewc.penalty(*anchor)(_random(1), masks.dense(_THETA))
  for x in jax.tree.leaves(gradient):
    np.testing.assert_allclose(x, 0, atol=1e-6)


def test_what_is_not_held_is_free():
  held = {'linear': {'w': True, 'b': False}}
  anchor = ewc.add_task(
    ewc.no_anchor(_THETA), _random(0), _random(1), 2.0, held
  )
  assert not anchor.fisher['linear']['b'].any()
  assert not anchor.pull['linear']['b'].any()
  np.testing.assert_allclose(
    anchor.fisher['linear']['w'], 2 * _random(0)['linear']['w'], rtol=1e-6
  )


@pytest.mark.parametrize('strength', [-1.0, float('nan')])
def test_strength_is_not_negative(strength):
  with pytest.raises(ValueError, match=f'negative, got {strength}'):
    ewc.add_task(ewc.no_anchor(_THETA), _THETA, _THETA, strength)


def test_a_train_step_compiles_once_for_all_tasks():
  transform = power.power_transform(2.0)
  tx = transforms.target_propagation(optax.sgd(0.1), transform)
  traces = []

  def loss_fn(theta, model_state, key, batch):
    return jnp.zeros([]) + 0 * jnp.sum(theta['linear']['w']), (model_state, {})

  @jax.jit
  def run(state, anchor):
    traces.append(None)
    step = training.make_train_step(
      loss_fn, tx, transform, penalty=ewc.penalty(*anchor)
    )
    return step(state, None)[0]

  state = training.init_state(jax.random.key(0), _THETA, {}, tx, transform)
  before = np.asarray(state.phi['linear']['b'])
  anchor = ewc.no_anchor(_THETA)
  for task in range(3):
    after = run(state, anchor)
    # The expected value for a bias is x - 0.1 sum_t F_t (x - theta_t).
    pull = sum(
      np.asarray(_random(t)['linear']['b']) ** 2
      * (before - np.asarray(_random(9 + t)['linear']['b']))
      for t in range(task)
    )
    np.testing.assert_allclose(
      after.phi['linear']['b'], before - 0.1 * pull, rtol=1e-5, atol=1e-6
    )
    fisher = jax.tree.map(jnp.square, _random(task))
    anchor = ewc.add_task(anchor, fisher, _random(9 + task))
  assert len(traces) == 1

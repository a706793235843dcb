"""Tests of the loss and the accuracy of classifiers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.models import networks
from powerprop_jax.training import classification


def _network():
  network = networks.build('lenet_300_100', 3)
  params, state = network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), True)
  return network, params, state


def test_loss_by_hand():
  def apply(theta, model_state, key, images, is_training):
    assert is_training
    return images.reshape(2, 2) @ theta, model_state

  loss_fn = classification.make_loss(apply, label_smoothing=0.1)
  images = jnp.array([[255, 0], [0, 51]], jnp.uint8).reshape(2, 1, 2, 1)
  labels = jnp.array([0, 0])
  loss, (_, metrics) = loss_fn(
    jnp.eye(2), {}, jax.random.key(0), (images, labels)
  )
  # Logits are (1, 0) and (0, 0.2); the targets are (0.95, 0.05).
  a = np.log(1 + np.e) - 0.95
  b = np.log(1 + np.exp(0.2)) - 0.05 * 0.2
  np.testing.assert_allclose(loss, (a + b) / 2, rtol=1e-6)
  np.testing.assert_allclose(metrics['accuracy'], 0.5)


@pytest.mark.parametrize('batch_size', [1, 4, 7, 10, 64])
def test_accuracy_counts_every_example_once(batch_size):
  network, params, state = _network()
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.integers(0, 256, (10, 4, 4, 1)), jnp.uint8)
  logits, _ = network.apply(params, state, None, images / 255, False)
  labels = jnp.argmax(logits, axis=-1)
  labels = labels.at[jnp.array([2, 9])].set((labels[jnp.array([2, 9])] + 1) % 3)
  accuracy = classification.make_accuracy(network.apply, batch_size=batch_size)
  np.testing.assert_allclose(
    jax.jit(accuracy)(params, state, images, labels), 0.8, rtol=1e-6
  )


def test_an_evaluation_by_hand():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=[8, 101]).astype(np.float32)
  labels = rng.integers(101, size=8)
  labels[:5] = np.argsort(-logits)[:5, :5].diagonal()  # First to fifth best.
  labels[7] = classification.PADDING
  evaluate = classification.make_evaluation(_apply, _unchanged, batch_size=3)
  found = jax.jit(evaluate)(logits, {}, np.eye(8, dtype=np.float32), labels)
  places = [(x > x[y]).sum() for x, y in zip(logits[:7], labels[:7])]
  assert places[:5] == [0, 1, 2, 3, 4]
  assert max(places) > 4
  losses = np.log(np.exp(logits).sum(1))[:7] - logits[range(7), labels[:7]]
  wanted = {
    'accuracy': np.mean([p == 0 for p in places]),
    'loss': losses.mean(),
    'top5': np.mean([p < 5 for p in places]),
  }
  assert found.keys() == wanted.keys()
  for name, x in wanted.items():
    np.testing.assert_allclose(found[name], x, rtol=1e-5)


def _apply(theta, model_state, key, images, is_training):
  del key, is_training
  return images @ theta, model_state


def _unchanged(key, images, is_training):
  del key, is_training
  return images


_BAD_LABELS = {
  'a trailing axis': np.zeros([4, 1], np.int32),
  'a leading axis': np.zeros([1, 4], np.int32),
  'one-hot': np.eye(4, 3, dtype=np.int32),
  'too few': np.zeros(3, np.int32),
  'too many': np.zeros(5, np.int32),
  'a scalar': np.int32(0),
  'floats': np.zeros(4, np.float32),
  'bools': np.zeros(4, bool),
}


@pytest.mark.parametrize('kind', _BAD_LABELS)
def test_labels_that_do_not_fit_are_an_error_when_traced(kind):
  theta, images = jnp.eye(4, 3), jnp.eye(4)
  loss_fn = classification.make_loss(_apply, _unchanged)
  batch = images, _BAD_LABELS[kind]
  with pytest.raises(ValueError, match='[Ll]abels'):
    jax.eval_shape(loss_fn, theta, {}, jax.random.key(0), batch)
  accuracy = classification.make_accuracy(_apply, _unchanged)
  with pytest.raises(ValueError, match='labels|Labels'):
    jax.eval_shape(accuracy, theta, {}, *batch)


@pytest.mark.parametrize('label', [-2, -1, 3, 7])
@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
def test_labels_out_of_range_give_a_loss_of_nan(label, label_smoothing):
  loss_fn = classification.make_loss(_apply, _unchanged, label_smoothing)
  labels = jnp.array([0, 1, 2, label])
  loss, _ = loss_fn(jnp.eye(4, 3), {}, jax.random.key(0), (jnp.eye(4), labels))
  assert np.isnan(loss)


@pytest.mark.parametrize('batch_size', [1, 3, 4, 100])
def test_accuracy_leaves_padding_out_and_gives_nan_for_unknown_labels(
  batch_size,
):
  accuracy = classification.make_accuracy(_apply, _unchanged, batch_size)
  accuracy = jax.jit(accuracy)
  theta, images = jnp.eye(4, 3), jnp.eye(4)  # It predicts 0, 1, 2, 0.
  pad = classification.PADDING
  assert accuracy(theta, {}, images, jnp.array([0, 1, 2, pad])) == 1.0
  assert accuracy(theta, {}, images, jnp.array([0, pad, 1, pad])) == 0.5
  for label in (-2, 3, 255):
    labels = jnp.array([0, 1, label, 0])
    assert np.isnan(accuracy(theta, {}, images, labels))
  assert np.isnan(accuracy(theta, {}, images, jnp.full(4, pad)))


def test_accuracy_takes_unsigned_labels():
  accuracy = classification.make_accuracy(_apply, _unchanged, 3)
  labels = np.array([0, 1, 0, 0], np.uint8)
  assert accuracy(jnp.eye(4, 3), {}, jnp.eye(4), labels) == 0.75


def test_accuracy_of_no_examples_is_an_error():
  accuracy = classification.make_accuracy(_apply, _unchanged)
  with pytest.raises(ValueError, match='no examples'):
    accuracy(jnp.eye(4, 3), {}, jnp.zeros([0, 4]), jnp.zeros([0], jnp.int32))

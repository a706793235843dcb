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

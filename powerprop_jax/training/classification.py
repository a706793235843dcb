"""What a network that classifies images minimises, and how it is judged."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from powerprop_jax.data import augment
from powerprop_jax.training import step as step_lib

Params = Any
ModelState = Any


def make_loss(
  apply: Callable[..., Any],
  prepare: augment.Prepare = augment.scale,
  label_smoothing: float = 0.0,
) -> step_lib.LossFn:
  """Mean softmax cross-entropy of a network over (images, labels).

  Args:
    apply: maps (theta, model_state, key, images, is_training) to (logits,
      model_state), as `networks.build` makes it.
    prepare: maps (key, images, is_training) to what the network sees; images
      are uint8.
    label_smoothing: the weight of the uniform distribution in the targets.

  Returns:
    A loss function for `training.make_train_step`, over batches (images,
    labels), whose metrics hold the accuracy.
  """

  def loss_fn(theta, model_state, key, batch):
    images, labels = batch
    data_key, network_key = jax.random.split(key)
    logits, model_state = apply(
      theta, model_state, network_key, prepare(data_key, images, True), True
    )
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(targets, label_smoothing)
    loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
    correct = jnp.argmax(logits, axis=-1) == labels
    return loss, (model_state, {'accuracy': jnp.mean(correct)})

  return loss_fn


def make_accuracy(
  apply: Callable[..., Any],
  prepare: augment.Prepare = augment.scale,
  batch_size: int = 1000,
) -> Callable[[Params, ModelState, jax.Array, jax.Array], jax.Array]:
  """The accuracy of a network over a data set on the device.

  Every example counts exactly once, also when the last batch is short.

  Args:
    apply: as in `make_loss`.
    prepare: as in `make_loss`.
    batch_size: how many examples go through the network at once.

  Returns:
    A pure function of (theta, model_state, images, labels), with uint8 images,
    that returns the fraction of correct predictions as a float32 scalar.
  """

  def accuracy(theta, model_state, images, labels):
    rows = min(batch_size, len(labels))
    padding = -len(labels) % rows
    images = jnp.pad(images, [(0, padding)] + [(0, 0)] * (images.ndim - 1))
    # Padded labels are -1, which no prediction equals.
    labels_ = jnp.pad(labels, (0, padding), constant_values=-1)

    def count(batch):
      images, labels = batch
      logits, _ = apply(
        theta, model_state, None, prepare(None, images, False), False
      )
      return jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32)

    batches = (
      images.reshape(-1, rows, *images.shape[1:]),
      labels_.reshape(-1, rows),
    )
    return jnp.sum(jax.lax.map(count, batches)) / len(labels)

  return accuracy

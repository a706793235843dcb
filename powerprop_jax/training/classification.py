"""The loss and the accuracy of networks that classify images.

The experiments of section 4 of the paper minimise the softmax cross-entropy of
a classifier and report its accuracy. The functions here check their arguments
as far as they can: labels whose shape does not fit the logits would broadcast
into a loss that trains a wrong network without a word, so they are an error
when the function is traced; labels that name no class are only known when the
program runs, and give NaN, as they do in optax.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from powerprop_jax import types
from powerprop_jax.data import augment
from powerprop_jax.training import step as step_lib

#: The label of examples that only fill up a batch. `make_accuracy` and
#: `make_evaluation` leave them out; for a loss it is a label out of range.
PADDING = -1
_TOP_5_ABOVE = 100  # With fewer classes, five guesses tell little.


def _check_labels(logits: jax.Array, labels: jax.Array) -> None:
  """Raises ValueError if labels do not fit the logits."""
  shape = jnp.shape(labels)
  if shape != logits.shape[:-1]:
    raise ValueError(
      f'Logits of shape {list(logits.shape)} need labels of shape'
      f' {list(logits.shape[:-1])}, got {list(shape)}. Labels are class'
      ' indices, one integer per example: squeeze a trailing axis of size 1,'
      ' and take the argmax of one-hot labels.'
    )
  _check_integers(labels)


def _check_integers(labels: jax.Array) -> None:
  dtype = jnp.result_type(labels)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(f'Labels must be integers (class indices), got {dtype}.')


def make_loss(
  apply: Callable[..., Any],
  prepare: augment.Prepare = augment.scale,
  label_smoothing: float = 0.0,
) -> step_lib.LossFn:
  """The mean softmax cross-entropy of a network over (images, labels).

  >>> import jax, jax.numpy as jnp
  >>> apply = lambda theta, state, key, x, training: (x @ theta, state)
  >>> loss_fn = make_loss(apply, prepare=lambda key, x, training: x)
  >>> batch = jnp.eye(2), jnp.array([0, 1])
  >>> loss, (_, metrics) = loss_fn(jnp.eye(2), {}, jax.random.key(0), batch)
  >>> print(f'{loss:.3f} {metrics["accuracy"]:.1f}')
  0.313 1.0

  Args:
    apply: maps (theta, model_state, key, images, is_training) to (logits,
      model_state), as `networks.build` makes it. Logits have the shape
      [batch, classes].
    prepare: maps (key, images, is_training) to what the network sees. Images
      are uint8 arrays [batch, height, width, channels].
    label_smoothing: the weight of the uniform distribution in the targets.

  Returns:
    A loss function for `training.make_train_step`, over batches (images,
    labels) with integer labels [batch], whose metrics hold the accuracy. The
    loss is NaN if a label is not in [0, classes). The function raises
    ValueError if the labels have another shape or are not integers.
  """

  def loss_fn(theta, model_state, key, batch):
    images, labels = batch
    data_key, network_key = jax.random.split(key)
    logits, model_state = apply(
      theta, model_state, network_key, prepare(data_key, images, True), True
    )
    _check_labels(logits, labels)
    classes = logits.shape[-1]
    targets = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
    targets = optax.smooth_labels(targets, label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets)
    # The targets of a label out of range are all zero, and so would be its
    # loss.
    known = (labels >= 0) & (labels < classes)
    loss = jnp.mean(jnp.where(known, losses, jnp.nan))
    correct = jnp.argmax(logits, axis=-1) == labels
    return loss, (model_state, {'accuracy': jnp.mean(correct)})

  return loss_fn


def counted(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
  """Counts of a batch that are added up to evaluate many batches.

  Args:
    logits: floats [batch, classes].
    labels: integers [batch]; examples with the label `PADDING` do not count.

  Returns:
    A dict of scalars: how many predictions are correct as `accuracy`; the sum
    of the cross-entropies as `loss`; and, if there are more than 100 classes,
    how many labels are among the five largest logits as `top5`.

  Raises:
    ValueError: if the labels have another shape or are not integers.

  >>> import jax.numpy as jnp
  >>> found = counted(jnp.zeros([3, 2]), jnp.array([0, 1, PADDING]))
  >>> {name: round(float(x), 3) for name, x in found.items()}
  {'accuracy': 1.0, 'loss': 1.386}
  """
  _check_labels(logits, labels)
  # No prediction equals a label of padding.
  correct = jnp.argmax(logits, axis=-1) == labels
  known = labels != PADDING
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), jnp.where(known, labels, 0)
  )
  found = {
    'accuracy': jnp.sum(correct, dtype=jnp.int32),
    'loss': jnp.sum(jnp.where(known, losses, 0.0)),
  }
  if logits.shape[-1] > _TOP_5_ABOVE:
    _, five = jax.lax.top_k(logits, 5)
    among = jnp.any(five == labels[..., None], axis=-1)
    found['top5'] = jnp.sum(among, dtype=jnp.int32)
  return found


def _make_evaluate(apply, prepare, batch_size, count):
  """Makes an evaluation from what `count(logits, labels)` gives per batch."""

  def evaluate(theta, model_state, images, labels):
    if jnp.shape(labels) != jnp.shape(images)[:1]:
      raise ValueError(
        f'{len(images)} images need labels of shape [{len(images)}], got'
        f' {list(jnp.shape(labels))}. Labels are class indices, one integer per'
        ' example.'
      )
    _check_integers(labels)
    if not len(labels):
      raise ValueError('The accuracy over no examples is not defined.')
    size = len(labels)
    rows = min(batch_size, size)
    padding = -size % rows
    images = jnp.pad(images, [(0, padding)] + [(0, 0)] * (images.ndim - 1))
    # Signed, so that they can hold the label of padding.
    labels = jnp.asarray(labels).astype(jnp.int32)
    labels = jnp.pad(labels, (0, padding), constant_values=PADDING)

    def measure(batch):
      images, labels = batch
      logits, _ = apply(
        theta, model_state, None, prepare(None, images, False), False
      )
      _check_labels(logits, labels)
      known = (labels >= 0) & (labels < logits.shape[-1])
      outside = ~known & (labels != PADDING)
      totals = [jnp.sum(x, dtype=jnp.int32) for x in (known, outside)]
      return totals, count(logits, labels)

    batches = (
      images.reshape(-1, rows, *images.shape[1:]),
      labels.reshape(-1, rows),
    )
    found = jax.tree.map(jnp.sum, jax.lax.map(measure, batches))
    (known, outside), counts = found

    # There are two quotients, the second of which is exactly 1 without padding:
    # XLA rounds a quotient by a constant another way than one by a variable,
    # and recorded accuracies would differ in their last bit.
    def mean(total):
      fraction = total / size * (size / known)
      return jnp.where(outside > 0, jnp.nan, fraction)

    return jax.tree.map(mean, counts)

  return evaluate


def make_evaluation(
  apply: Callable[..., Any],
  prepare: augment.Prepare = augment.scale,
  batch_size: int = 1000,
) -> Callable[[types.Params, types.ModelState, Any, Any], dict[str, jax.Array]]:
  """The accuracy and the loss of a network over a data set on the device.

  >>> import jax.numpy as jnp
  >>> apply = lambda theta, state, key, x, training: (x @ theta, state)
  >>> evaluate = make_evaluation(apply, lambda key, x, training: x)
  >>> found = evaluate(jnp.eye(2), {}, jnp.eye(2), jnp.array([0, 0]))
  >>> {name: round(float(x), 3) for name, x in found.items()}
  {'accuracy': 0.5, 'loss': 0.813}

  Args:
    apply: as in `make_loss`.
    prepare: as in `make_loss`.
    batch_size: how many examples go through the network at once.

  Returns:
    A function as `make_accuracy` returns it, but of a dict of float32 scalars:
    `accuracy`, `loss`, which is the mean cross-entropy without smoothing, and,
    if there are more than 100 classes, `top5`.
  """
  return _make_evaluate(apply, prepare, batch_size, counted)


def make_accuracy(
  apply: Callable[..., Any],
  prepare: augment.Prepare = augment.scale,
  batch_size: int = 1000,
) -> Callable[[types.Params, types.ModelState, Any, Any], jax.Array]:
  """The accuracy of a network over a data set on the device.

  Every example counts exactly once, also when the last batch is short. Examples
  with the label `PADDING` do not count at all, so that data sets of different
  sizes can be filled up to one shape and share a compiled function.

  >>> import jax.numpy as jnp
  >>> apply = lambda theta, state, key, x, training: (x @ theta, state)
  >>> accuracy = make_accuracy(apply, prepare=lambda key, x, training: x)
  >>> labels = jnp.array([0, 0, PADDING])
  >>> print(accuracy(jnp.eye(3), {}, jnp.eye(3), labels))
  0.5

  Args:
    apply: as in `make_loss`.
    prepare: as in `make_loss`.
    batch_size: how many examples go through the network at once.

  Returns:
    A pure function of (theta, model_state, images, labels), with uint8 images
    [n, height, width, channels] and integer labels [n], that returns the
    fraction of correct predictions as a float32 scalar. It is NaN if a label is
    neither `PADDING` nor in [0, classes), or if no example counts. The function
    raises ValueError if the labels have another shape or are not integers, or
    if there are no examples.
  """

  def count(logits, labels):
    return counted(logits, labels)['accuracy']

  return _make_evaluate(apply, prepare, batch_size, count)

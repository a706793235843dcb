"""Where the batches of sparse training come from: memory, or a stream.

What a step sees depends on the seed and the number of the step alone, so a feed
goes on from any step; and on several devices or hosts every step sees the same
examples as on one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import augment
from powerprop_jax import classification
from powerprop_jax import datasets
from powerprop_jax import devices
from powerprop_jax import streams
from powerprop_jax import training

State = training.TrainState
Metrics = dict[str, np.ndarray]


class Feed(NamedTuple):
  """A data set on the devices.

  Attributes:
    advance: (state, start, stop) -> (state, metrics): takes the steps [start,
      stop) with a state on the devices. Metrics are those of every step.
    batches: (step, n) -> n batches on the devices, for scoring masks.
    accuracy: (theta, model_state), as one device holds them -> accuracies by
      name, of each split but the training set.
    close: ends what runs in the background.
  """

  advance: Callable[[State, int, int], tuple[State, Metrics]]
  batches: Callable[[int, int], Any]
  accuracy: Callable[[Any, Any], dict[str, float]]
  close: Callable[[], None]


def _host_columns(batch_size: int) -> slice:
  """The part of a global batch that is this host's."""
  part = batch_size // jax.process_count()
  return slice(jax.process_index() * part, (jax.process_index() + 1) * part)


def in_memory(
  data: datasets.Dataset,
  step: training.TrainStep,
  apply: Callable[..., Any],
  prepare: augment.Prepare,
  *,
  batch_size: int,
  seed: int,
  axis: str | None,
) -> Feed:
  """A feed of a data set that every device holds as a whole.

  Args:
    data: the data set.
    step: the train step, made for the same axis.
    apply: the network, as of `networks.build`.
    prepare: from bytes to what the network sees.
    batch_size: global; a multiple of the number of devices.
    seed: decides the order.
    axis: as of `devices.axis_name`.

  Returns:
    A `Feed`.
  """
  key = jax.random.key(seed)
  size, columns = len(data.train.labels), _host_columns(batch_size)
  split = devices.replicate((data.train.images, data.train.labels), axis)
  run_steps = devices.on_devices(training.make_run_steps(step), axis)
  accuracy = jax.jit(classification.make_accuracy(apply, prepare=prepare))

  def indices(start, n, salt=0):
    order = training.batch_indices(
      jax.random.fold_in(key, salt), start, n, batch_size, size
    )
    return np.asarray(order)[:, columns]

  def advance(state, start, stop):
    chosen = devices.shard(indices(start, stop - start), axis, dim=1)
    state, metrics = run_steps(state, split, chosen)
    return state, jax.device_get(devices.first(metrics, axis))

  def batches(step, n):
    # An order of its own: masks are not scored by the batch that follows.
    chosen = indices(step * n, n, salt=1)
    images, labels = data.train.images[chosen], data.train.labels[chosen]
    return devices.shard((images, labels), axis, dim=1)

  def evaluate(theta, model_state):
    splits = {'valid_accuracy': data.valid, 'test_accuracy': data.test}
    return {
      name: float(accuracy(theta, model_state, *split))
      for name, split in splits.items()
    }

  return Feed(advance, batches, evaluate, lambda: None)


def streamed(
  train: streams.Source,
  test: streams.Source,
  step: training.TrainStep,
  apply: Callable[..., Any],
  prepare: augment.Prepare,
  *,
  batch_size: int,
  image_size: int,
  seed: int,
  num_workers: int,
  axis: str | None,
) -> Feed:
  """A feed of a set too large for memory. Arguments as of `in_memory`.

  Args:
    train: encoded training images.
    test: encoded test images.
    image_size: height and width after cropping.
    num_workers: how many processes of this host decode.
    **others: as of `in_memory`.

  Returns:
    A `Feed`.
  """
  hosts = {
    'batch_size': batch_size // jax.process_count(),
    'image_size': image_size,
    'num_workers': num_workers,
    'shard_index': jax.process_index(),
    'shard_count': jax.process_count(),
  }
  step = devices.on_devices(step, axis)
  stream, at = None, -1

  def advance(state, start, stop):
    nonlocal stream, at
    if stream is None or at != start:
      if stream is not None:
        stream.close()
      stream = streams.train_stream(train, seed=seed, start=start, **hosts)
    metrics = []
    for _ in range(start, stop):
      state, result = step(state, devices.shard(next(stream), axis))
      metrics.append(result)  # On the device: the host does not wait for it.
    at = stop
    metrics = jax.device_get([devices.first(m, axis) for m in metrics])
    return state, jax.tree.map(lambda *x: np.stack(x), *metrics)

  def batches(step, n):
    own = streams.train_stream(
      train, seed=seed + 1, start=step * n, **(hosts | {'num_workers': 0})
    )
    found = [next(own) for _ in range(n)]
    own.close()
    stacked = jax.tree.map(lambda *x: np.stack(x), *found)
    return devices.shard(stacked, axis, dim=1)

  def correct(theta, model_state, batch):
    images, labels = batch
    logits, _ = apply(
      theta, model_state, None, prepare(None, images, False), False
    )
    count = jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32)
    return count if axis is None else jax.lax.psum(count, axis)

  count_correct = devices.on_devices(correct, axis, donate=())

  def evaluate(theta, model_state):
    theta, model_state = devices.replicate((theta, model_state), axis)
    counts = [
      count_correct(theta, model_state, devices.shard(batch, axis))
      for batch in streams.eval_batches(test, **hosts)
    ]
    total = sum(int(devices.first(c, axis)) for c in counts)
    return {'test_accuracy': total / test.size}

  def close():
    if stream is not None:
      stream.close()

  return Feed(advance, batches, evaluate, close)

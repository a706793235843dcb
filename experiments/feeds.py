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

from powerprop_jax import training
from powerprop_jax.data import augment
from powerprop_jax.data import in_memory as datasets
from powerprop_jax.data import streams
from powerprop_jax.training import classification
from powerprop_jax.training import devices

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


def _on_host(metrics: list[Any], axis: str | None) -> Metrics:
  """The metrics of steps that were taken one by one, stacked."""
  found = jax.device_get([devices.unreplicate(m, axis) for m in metrics])
  return jax.tree.map(lambda *x: np.stack(x), *found)


def compile_steps(
  step: training.TrainStep, axis: str | None, params: Any
) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
  """Compiles a chunk of steps over data on the devices.

  Inside a loop, XLA for CPUs takes the gradient of a convolution several times
  more slowly than outside of one (jax issue 12868; LOG.md has numbers). There
  Python loops over steps that are compiled one by one; everything else is one
  compiled loop.

  Args:
    step: the train step, made for the same axis.
    axis: as of `devices.axis_name`.
    params: the parameters of the network, or their shapes.

  Returns:
    A function of (state, data, indices) as of `training.make_run_steps`. The
    state is donated, and the metrics come back to the host.
  """
  convolves = any(len(x.shape) > 2 for x in jax.tree.leaves(params))
  if jax.default_backend() != 'cpu' or not convolves:
    run = devices.on_devices(training.make_run_steps(step), axis)

    def run_steps(state, data, indices):
      state, metrics = run(state, data, indices)
      return state, jax.device_get(devices.unreplicate(metrics, axis))

    return run_steps

  def take(state, data, index):
    return step(state, jax.tree.map(lambda x: x[index], data))

  take = devices.on_devices(take, axis)

  def loop(state, data, indices):
    metrics = []
    for index in np.moveaxis(indices, 0 if axis is None else 1, 0):
      state, result = take(state, data, index)
      metrics.append(result)
    return state, _on_host(metrics, axis)

  return loop


def in_memory(
  data: datasets.Dataset,
  step: training.TrainStep,
  apply: Callable[..., Any],
  prepare: augment.Prepare,
  *,
  params: Any,
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
    params: as of `compile_steps`.
    batch_size: global; a multiple of the number of devices.
    seed: decides the order.
    axis: as of `devices.axis_name`.

  Returns:
    A `Feed`.
  """
  key = jax.random.key(seed)
  size, columns = len(data.train.labels), _host_columns(batch_size)
  split = devices.replicate((data.train.images, data.train.labels), axis)
  run_steps = compile_steps(step, axis, params)
  accuracy = jax.jit(classification.make_accuracy(apply, prepare=prepare))

  def indices(start, n, salt=0):
    order = training.batch_indices(
      jax.random.fold_in(key, salt), start, n, batch_size, size
    )
    return np.asarray(order)[:, columns]

  def advance(state, start, stop):
    chosen = devices.shard(indices(start, stop - start), axis, dim=1)
    return run_steps(state, split, chosen)

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


def _batches_of(
  source: streams.Source, axis: str | None, seed: int, hosts: dict[str, Any]
) -> Callable[[int, int], Any]:
  """`Feed.batches` of a stream of its own."""

  def batches(step, n):
    # Few batches are worth no worker processes.
    stream = streams.train_stream(
      source, seed=seed, start=step * n, **(hosts | {'num_workers': 0})
    )
    found = [next(stream) for _ in range(n)]
    stream.close()
    stacked = jax.tree.map(lambda *x: np.stack(x), *found)
    return devices.shard(stacked, axis, dim=1)

  return batches


def _accuracy_on(
  source: streams.Source,
  apply: Callable[..., Any],
  prepare: augment.Prepare,
  axis: str | None,
  hosts: dict[str, Any],
) -> Callable[[Any, Any], float]:
  """The accuracy of (theta, model_state) over a stream, on all devices."""

  def correct(theta, model_state, batch):
    images, labels = batch
    logits, _ = apply(
      theta, model_state, None, prepare(None, images, False), False
    )
    # What fills the last batch has the label -1, which no prediction equals.
    count = jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32)
    return count if axis is None else jax.lax.psum(count, axis)

  count_correct = devices.on_devices(correct, axis, donate=())

  def accuracy(theta, model_state):
    theta, model_state = devices.replicate((theta, model_state), axis)
    counts = [
      count_correct(theta, model_state, devices.shard(batch, axis))
      for batch in streams.eval_batches(source, **hosts)
    ]
    return sum(int(devices.unreplicate(c, axis)) for c in counts) / source.size

  return accuracy


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
  """A feed of a set too large for memory.

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
  accuracy = _accuracy_on(test, apply, prepare, axis, hosts)
  stream, at = None, -1

  def close():
    if stream is not None:
      stream.close()

  def advance(state, start, stop):
    nonlocal stream, at
    if stream is None or at != start:
      close()
      stream = streams.train_stream(train, seed=seed, start=start, **hosts)
    metrics = []
    for _ in range(start, stop):
      state, result = step(state, devices.shard(next(stream), axis))
      metrics.append(result)  # On the device: the host does not wait for it.
    at = stop
    return state, _on_host(metrics, axis)

  return Feed(
    advance=advance,
    # Masks are not scored by the batch that follows.
    batches=_batches_of(train, axis, seed + 1, hosts),
    accuracy=lambda *network: {'test_accuracy': accuracy(*network)},
    close=close,
  )

"""Where the batches of the loop come from: memory, or a stream.

What a step sees depends on the seed and on the number of the step alone, so a
feed goes on from any step; and on several devices or hosts every step sees the
same examples as on one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.data import augment
from powerprop_jax.data import in_memory as in_memory_lib
from powerprop_jax.data import streams
from powerprop_jax.training import classification
from powerprop_jax.training import devices
from powerprop_jax.training import loop
from powerprop_jax.training import step as step_lib

State = step_lib.TrainState
# (state, data, indices [steps, batch]) -> (state, metrics [steps] on the host).
RunSteps = Callable[[State, Any, Any], tuple[State, loop.Metrics]]

# To put an epoch in order takes as long as some thirty steps of LeNet-300-100,
# so that the order is not drawn anew for every chunk.
_ORDERED = 1000


class Feed(NamedTuple):
  """A data set on the devices.

  Attributes:
    advance: (state, start, stop) -> (state, metrics): takes the steps [start,
      stop) with a state on the devices. Metrics are those of every step.
    batches: (step, n) -> n batches on the devices, for scoring masks.
    accuracy: (theta, model_state), as one device holds them -> the accuracies
      of the validation and the test split, by name.
    close: ends what runs in the background.
  """

  advance: loop.Advance[State]
  batches: Callable[[int, int], Any]
  accuracy: Callable[[Any, Any], dict[str, float]]
  close: Callable[[], None]


def _host_columns(batch_size: int) -> slice:
  """The part of a global batch that is this host's."""
  part = batch_size // jax.process_count()
  return slice(jax.process_index() * part, (jax.process_index() + 1) * part)


def _stacked_on_host(metrics: list[Any], axis: str | None) -> loop.Metrics:
  """The metrics of steps that were taken one by one, stacked."""
  found = jax.device_get([devices.unreplicate(m, axis) for m in metrics])
  return jax.tree.map(lambda *x: np.stack(x), *found)


def metrics_on_host(
  run_steps: Callable[..., tuple[State, Any]], axis: str | None = None
) -> RunSteps:
  """Brings the metrics of a compiled chunk of steps to the host.

  Args:
    run_steps: a function of (state, data, indices), compiled for the axis.
    axis: the name of the axis returned by `devices.axis_name`.

  Returns:
    The same function with numpy arrays as metrics.

  >>> import jax
  >>> from powerprop_jax.training import feeds
  >>> steps = jax.jit(lambda state, data, indices: (state, {'loss': indices}))
  >>> run_steps = feeds.metrics_on_host(steps)
  >>> run_steps(None, None, jax.numpy.arange(2))[1]['loss']
  array([0, 1], dtype=int32)
  """

  def run(state, data, indices):
    state, metrics = run_steps(state, data, indices)
    return state, jax.device_get(devices.unreplicate(metrics, axis))

  return run


def compile_steps(
  step: step_lib.TrainStep, axis: str | None, params: Any
) -> RunSteps:
  """Compiles a chunk of steps over data on the devices.

  Inside a loop, XLA for CPUs takes the gradient of a convolution several times
  more slowly than outside of one (jax issue 12868; LOG.md has numbers). There
  Python loops over steps that are compiled one by one; everything else is one
  compiled loop.

  Args:
    step: the train step, made for the same axis.
    axis: the name of the axis returned by `devices.axis_name`.
    params: the parameters of the network, or their shapes.

  Returns:
    A function of (state, data, indices), where data is a pytree of arrays with
    one row per example and indices is an int array [steps, batch]; on several
    devices both, and the state, have a leading axis of devices. It donates the
    state, and returns the state and the metrics of every step as numpy arrays.

  >>> import jax
  >>> from powerprop_jax.training import feeds
  >>> def step(state, batch):
  ...   return state + batch.sum(), {'loss': batch.mean()}
  >>> run_steps = feeds.compile_steps(step, None, params={})
  >>> data, indices = jax.numpy.arange(4.0), jax.numpy.array([[0, 1], [2, 3]])
  >>> state, metrics = run_steps(jax.numpy.zeros([]), data, indices)
  >>> float(state), metrics['loss'].tolist()
  (6.0, [0.5, 2.5])
  """
  convolves = any(len(x.shape) > 2 for x in jax.tree.leaves(params))
  if jax.default_backend() != 'cpu' or not convolves:
    run_steps = step_lib.make_run_steps(step)
    return metrics_on_host(devices.on_devices(run_steps, axis), axis)

  def take(state, data, index):
    return step(state, jax.tree.map(lambda x: x[index], data))

  take = devices.on_devices(take, axis)

  def loop_over_steps(state, data, indices):
    metrics = []
    for index in np.moveaxis(indices, 0 if axis is None else 1, 0):
      state, result = take(state, data, index)
      metrics.append(result)
    return state, _stacked_on_host(metrics, axis)

  return loop_over_steps


def _ordered(
  key: jax.Array, batch_size: int, size: int
) -> Callable[[int, int], np.ndarray]:
  """The examples of the steps [start, stop), drawn for many steps at once."""
  first, rows = 0, np.zeros([0, batch_size], np.int32)

  def indices(start, stop):
    nonlocal first, rows
    if not first <= start <= stop <= first + len(rows):
      count = max(stop - start, _ORDERED)
      drawn = step_lib.batch_indices(key, start, count, batch_size, size)
      first, rows = start, np.asarray(drawn)
    return rows[start - first : stop - first]

  return indices


def make_advance(
  run_steps: RunSteps,
  data: Any,
  key: jax.Array,
  *,
  batch_size: int,
  size: int,
  axis: str | None = None,
) -> loop.Advance[State]:
  """Takes steps over data that every device holds as a whole.

  Args:
    run_steps: made by `compile_steps` or `metrics_on_host`.
    data: what `run_steps` takes, on the devices.
    key: decides the order of the examples.
    batch_size: examples per step, over all devices and hosts.
    size: how many examples there are; rows of the data after them are unused.
    axis: the name of the axis returned by `devices.axis_name`.

  Returns:
    A function of (state, start, stop), for `loop.run`.

  >>> import jax
  >>> from powerprop_jax.training import feeds
  >>> def step(seen, batch):
  ...   return seen.at[batch].add(1), {'loss': batch.mean()}
  >>> run_steps = feeds.compile_steps(step, None, params={})
  >>> data, key = jax.numpy.arange(6), jax.random.key(0)
  >>> advance = feeds.make_advance(run_steps, data, key, batch_size=2, size=6)
  >>> seen, _ = advance(jax.numpy.zeros(6, int), 0, 3)  # An epoch.
  >>> seen.tolist()
  [1, 1, 1, 1, 1, 1]
  """
  columns = _host_columns(batch_size)
  indices = _ordered(key, batch_size, size)

  def advance(state, start, stop):
    chosen = indices(start, stop)[:, columns]
    return run_steps(state, data, devices.shard(chosen, axis, dim=1))

  return advance


def in_memory(
  data: in_memory_lib.Dataset,
  step: step_lib.TrainStep,
  apply: Callable[..., Any],
  prepare: augment.Prepare,
  *,
  params: Any,
  batch_size: int,
  key: jax.Array,
  axis: str | None,
) -> Feed:
  """A feed of a data set that every device holds as a whole.

  Args:
    data: the data set.
    step: the train step, made for the same axis.
    apply: the network, made by `networks.build`.
    prepare: from bytes to what the network sees.
    params: the parameters of the network, or their shapes.
    batch_size: examples per step, over all devices and hosts; a multiple of the
      number of devices.
    key: decides the order of the examples.
    axis: the name of the axis returned by `devices.axis_name`.

  Returns:
    A `Feed`.
  """
  size, columns = len(data.train.labels), _host_columns(batch_size)
  split = devices.replicate((data.train.images, data.train.labels), axis)
  accuracy = jax.jit(classification.make_accuracy(apply, prepare=prepare))
  advance = make_advance(
    compile_steps(step, axis, params),
    split,
    jax.random.fold_in(key, 0),
    batch_size=batch_size,
    size=size,
    axis=axis,
  )

  def batches(step, n):
    # An order of its own: masks are not scored by the batch that follows.
    order = step_lib.batch_indices(
      jax.random.fold_in(key, 1), step * n, n, batch_size, size
    )
    chosen = np.asarray(order)[:, columns]
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
  step: step_lib.TrainStep,
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
    step: the train step, made for the same axis.
    apply: the network, made by `networks.build`.
    prepare: from bytes to what the network sees.
    batch_size: examples per step, over all devices and hosts; a multiple of the
      number of devices.
    image_size: height and width after cropping.
    seed: decides the order of the examples and their crops.
    num_workers: how many processes of this host decode images.
    axis: the name of the axis returned by `devices.axis_name`.

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
    return state, _stacked_on_host(metrics, axis)

  return Feed(
    advance=advance,
    # Masks are not scored by the batch that follows.
    batches=_batches_of(train, axis, seed + 1, hosts),
    accuracy=lambda *network: {'test_accuracy': accuracy(*network)},
    close=close,
  )

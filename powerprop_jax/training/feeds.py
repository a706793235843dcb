"""Feeds of batches for the training loop, from memory or from a stream.

What a step sees depends on the seed and on the number of the step alone, so a
feed can go on from any step; and on several devices or hosts every step sees
the same examples as on one.
"""

import collections
from collections.abc import Callable, Mapping
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from powerprop_jax.data import augment
from powerprop_jax.data import in_memory as in_memory_lib
from powerprop_jax.data import streams
from powerprop_jax.training import classification
from powerprop_jax.training import devices
from powerprop_jax.training import loop
from powerprop_jax.training import step as step_lib

State = step_lib.TrainState
#: (state, data, indices [steps, batch]) -> (state, metrics [steps] on the
#: host).
RunSteps = Callable[[State, Any, Any], tuple[State, loop.Metrics]]
#: Called with the number of examples that have been evaluated so far.
Seen = Callable[[int], object]

# For how many steps the order is drawn at once: to put an epoch in order takes
# as long as some thirty steps of LeNet-300-100, too long for every chunk.
_ORDERED = 1000


def _unseen(count: int) -> None:
  """Ignores how many examples have been evaluated."""


class Feed(NamedTuple):
  """A data set, by the functions that train and evaluate networks on it.

  Attributes:
    advance: (state, start, stop) -> (state, metrics): takes the steps [start,
      stop) with a state on the devices. Metrics are those of every step.
    batches: (step, n) -> n batches for scoring masks at a step, along an axis
      of their own, with a part for each device.
    sizes: the numbers of examples of the splits to evaluate on: `test` and, if
      there is one, `valid`.
    evaluate: (theta, model_state, split, seen) -> a dict of `accuracy`, `loss`
      and, with more than 100 classes, `top5`. The network is given as one
      device holds it. `seen` is called with the number of examples that have
      been evaluated so far.
    close: ends what runs in the background.

  >>> feed = Feed(
  ...   advance=lambda state, start, stop: (state + stop - start, {}),
  ...   batches=lambda step, n: [step] * n,
  ...   sizes={'test': 4},
  ...   evaluate=lambda theta, model_state, split, seen: {'accuracy': theta},
  ...   close=lambda: None,
  ... )
  >>> feed.accuracy(theta=0.5, model_state={})
  {'test_accuracy': 0.5}
  """

  advance: loop.Advance[State]
  batches: Callable[[int, int], Any]
  sizes: Mapping[str, int]
  evaluate: Callable[[Any, Any, str, Seen], dict[str, float]]
  close: Callable[[], None]

  def accuracy(self, theta: Any, model_state: Any) -> dict[str, float]:
    """The accuracies of a network on all splits.

    Args:
      theta: the weights, as one device holds them.
      model_state: the statistics of the network, likewise.

    Returns:
      The accuracies in [0, 1] by names such as 'test_accuracy'.
    """
    return {
      f'{split}_accuracy': self.evaluate(theta, model_state, split, _unseen)[
        'accuracy'
      ]
      for split in self.sizes
    }


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


def compile_steps(step: step_lib.TrainStep, axis: str | None) -> RunSteps:
  """Compiles a chunk of steps over data on the devices, into one loop.

  On CPUs, inside of loops, XLA computes the gradient of a convolution several
  times more slowly than outside. The networks of `models` have gradients that
  avoid it; for other networks see `models.convolutions`.

  Args:
    step: the train step, made for the same axis.
    axis: the name of the axis returned by `devices.axis_name`.

  Returns:
    A function of (state, data, indices), where data is a pytree of arrays with
    one row per example and indices is an int array [steps, batch]; on several
    devices both, and the state, have a leading axis of devices. It donates the
    state, and returns the state and the metrics of every step as numpy arrays.

  >>> import jax
  >>> from powerprop_jax.training import feeds
  >>> def step(state, batch):
  ...   return state + batch.sum(), {'loss': batch.mean()}
  >>> run_steps = feeds.compile_steps(step, None)
  >>> data, indices = jax.numpy.arange(4.0), jax.numpy.array([[0, 1], [2, 3]])
  >>> state, metrics = run_steps(jax.numpy.zeros([]), data, indices)
  >>> float(state), metrics['loss'].tolist()
  (6.0, [0.5, 2.5])
  """
  run_steps = step_lib.make_run_steps(step)
  return metrics_on_host(devices.on_devices(run_steps, axis), axis)


def _ordered(
  key: jax.Array, batch_size: int, size: int
) -> Callable[[int, int], np.ndarray]:
  """Makes a function that gives the examples of the steps [start, stop)."""
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
  """Makes a function that takes steps over data that each device holds whole.

  Args:
    run_steps: made by `compile_steps` or `metrics_on_host`.
    data: what `run_steps` takes, on the devices.
    key: the PRNG key that decides the order of the examples.
    batch_size: examples per step, over all devices and hosts.
    size: how many examples there are; rows of the data after them are unused.
    axis: the name of the axis returned by `devices.axis_name`.

  Returns:
    A function of (state, start, stop), for `loop.run`.

  >>> import jax
  >>> from powerprop_jax.training import feeds
  >>> def step(seen, batch):
  ...   return seen.at[batch].add(1), {'loss': batch.mean()}
  >>> run_steps = feeds.compile_steps(step, None)
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
  batch_size: int,
  key: jax.Array,
  axis: str | None,
) -> Feed:
  """A feed of a data set that every device holds as a whole.

  Args:
    data: the data set.
    step: the train step, made for the same axis.
    apply: the network, made by `networks.build`.
    prepare: maps bytes to what the network sees, as `augment.scale` does.
    batch_size: examples per step, over all devices and hosts; a multiple of the
      number of devices.
    key: the PRNG key that decides the order of the examples.
    axis: the name of the axis returned by `devices.axis_name`.

  Returns:
    A `Feed`.

  >>> import jax
  >>> from powerprop_jax.data import in_memory
  >>> from powerprop_jax.training import feeds
  >>> images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
  >>> part = in_memory.Split(images, np.arange(4))
  >>> data = in_memory.Dataset('tiny', part, part, part, num_classes=4)
  >>> def step(seen, batch):
  ...   return seen.at[batch[1]].add(1), {'loss': batch[1].mean()}
  >>> def apply(theta, model_state, key, images, is_training):
  ...   return theta * jax.nn.one_hot(images.ravel(), 4), model_state
  >>> feed = feeds.in_memory(
  ...   data, step, apply, prepare=lambda key, images, is_training: images,
  ...   batch_size=2, key=jax.random.key(0), axis=None,
  ... )
  >>> seen, _ = feed.advance(jax.numpy.zeros(4, int), 0, 2)  # An epoch.
  >>> seen.tolist(), feed.accuracy(theta=1.0, model_state={})
  ([1, 1, 1, 1], {'valid_accuracy': 1.0, 'test_accuracy': 1.0})
  """
  size, columns = len(data.train.labels), _host_columns(batch_size)
  split = devices.replicate((data.train.images, data.train.labels), axis)
  evaluation = jax.jit(classification.make_evaluation(apply, prepare=prepare))
  advance = make_advance(
    compile_steps(step, axis),
    split,
    jax.random.fold_in(key, 0),
    batch_size=batch_size,
    size=size,
    axis=axis,
  )

  def batches(step, n):
    # The order is another one, so that masks are not scored by the batch on
    # which the next step trains.
    order = step_lib.batch_indices(
      jax.random.fold_in(key, 1), step * n, n, batch_size, size
    )
    chosen = np.asarray(order)[:, columns]
    images, labels = data.train.images[chosen], data.train.labels[chosen]
    return devices.shard((images, labels), axis, dim=1)

  splits = {'valid': data.valid, 'test': data.test}

  def evaluate(theta, model_state, split, seen):
    found = evaluation(theta, model_state, *splits[split])
    seen(len(splits[split].labels))
    return {name: float(x) for name, x in found.items()}

  sizes = {name: len(split.labels) for name, split in splits.items()}
  return Feed(advance, batches, sizes, evaluate, lambda: None)


def _batches_of(
  source: streams.Source, axis: str | None, seed: int, hosts: dict[str, Any]
) -> Callable[[int, int], Any]:
  """Makes `Feed.batches`, which reads a stream of its own."""

  def batches(step, n):
    # For a few batches it is not worth starting worker processes.
    stream = streams.train_stream(
      source, seed=seed, start=step * n, **(hosts | {'num_workers': 0})
    )
    found = [next(stream) for _ in range(n)]
    stream.close()
    stacked = jax.tree.map(lambda *x: np.stack(x), *found)
    return devices.shard(stacked, axis, dim=1)

  return batches


def _evaluation_on(
  source: streams.Source,
  apply: Callable[..., Any],
  prepare: augment.Prepare,
  axis: str | None,
  hosts: dict[str, Any],
) -> Callable[[Any, Any, Seen], dict[str, float]]:
  """Evaluates (theta, model_state) over a stream, on all devices."""

  def count(theta, model_state, batch):
    images, labels = batch
    logits, _ = apply(
      theta, model_state, None, prepare(None, images, False), False
    )
    # What fills the last batch has the label of padding.
    counts = classification.counted(logits, labels)
    return counts if axis is None else jax.lax.psum(counts, axis)

  count = devices.on_devices(count, axis, donate=())

  def evaluate(theta, model_state, seen):
    theta, model_state = devices.replicate((theta, model_state), axis)
    totals, done = collections.Counter(), 0
    counts = (
      count(theta, model_state, devices.put(batch, axis))
      for batch in streams.eval_batches(source, **hosts)
    )
    # Each result is waited for when the next one is under way.
    for found, _ in itertools.pairwise(itertools.chain(counts, [None])):
      found = jax.device_get(devices.unreplicate(found, axis))
      totals.update({name: x.item() for name, x in found.items()})
      done += hosts['batch_size'] * hosts['shard_count']
      seen(min(done, source.size))
    return {name: x / source.size for name, x in totals.items()}

  return evaluate


def streamed(
  train: streams.Source,
  valid: streams.Source | None,
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
  """A feed of a data set that is too large for memory.

  While a step runs, the next batch is decoded and moved to the devices.

  Args:
    train: encoded training images.
    valid: encoded validation images, or None; `streams.hold_out` can take them
      from the training images.
    test: encoded test images.
    step: the train step, made for the same axis.
    apply: the network, made by `networks.build`.
    prepare: maps bytes to what the network sees, as `augment.scale` does.
    batch_size: examples per step, over all devices and hosts; a multiple of the
      number of devices.
    image_size: height and width after cropping, in pixels.
    seed: decides the order of the examples and their crops.
    num_workers: how many processes of this host decode images.
    axis: the name of the axis returned by `devices.axis_name`.

  Returns:
    A `Feed`.

  >>> import io
  >>> import jax
  >>> from PIL import Image
  >>> from powerprop_jax.data import streams
  >>> from powerprop_jax.training import feeds
  >>> Image.new('RGB', (9, 9)).save(file := io.BytesIO(), 'png')
  >>> def read(i):
  ...   return streams.Example(file.getvalue(), label=i, name=f'{i}.png')
  >>> source = streams.Source(read, size=4, num_classes=4)
  >>> def step(seen, batch):
  ...   return seen.at[batch[1]].add(1), {'loss': batch[1].mean()}
  >>> feed = feeds.streamed(
  ...   source, None, source, step, apply=None, prepare=None, batch_size=2,
  ...   image_size=8, seed=0, num_workers=0, axis=None,
  ... )
  >>> seen, _ = feed.advance(jax.numpy.zeros(4, int), 0, 2)  # An epoch.
  >>> seen.tolist(), feed.sizes
  ([1, 1, 1, 1], {'test': 4})
  >>> feed.close()
  """
  hosts = {
    'batch_size': batch_size // jax.process_count(),
    'image_size': image_size,
    'num_workers': num_workers,
    'shard_index': jax.process_index(),
    'shard_count': jax.process_count(),
  }
  step = devices.on_devices(step, axis)
  evaluations = {
    name: _evaluation_on(source, apply, prepare, axis, hosts)
    for name, source in (('valid', valid), ('test', test))
    if source is not None
  }
  sizes = {'test': test.size}
  if valid is not None:
    sizes = {'valid': valid.size, **sizes}
  stream, ahead, at = None, None, -1

  def close():
    nonlocal ahead
    ahead = None  # On a CPU it may be memory that is shared with a worker.
    if stream is not None:
      stream.close()

  def advance(state, start, stop):
    nonlocal stream, ahead, at
    if stream is None or at != start:
      close()
      stream = streams.train_stream(train, seed=seed, start=start, **hosts)
      ahead = devices.put(next(stream), axis)
    metrics = []
    for _ in range(start, stop):
      # Both return before the devices are done.
      state, result = step(state, ahead)
      ahead = devices.put(next(stream), axis)
      metrics.append(result)
      # The host is one step ahead: each further step keeps a batch in memory.
      jax.block_until_ready(metrics[-2:-1])
    at = stop
    return state, _stacked_on_host(metrics, axis)

  return Feed(
    advance=advance,
    # The seed is another one, so that masks are not scored by the batch on
    # which the next step trains.
    batches=_batches_of(train, axis, seed + 1, hosts),
    sizes=sizes,
    evaluate=lambda theta, model_state, split, seen: evaluations[split](
      theta, model_state, seen
    ),
    close=close,
  )

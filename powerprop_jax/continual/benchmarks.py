"""Sequences of tasks made from one image classification data set.

Continual learning (section 4 of the paper) trains one network on a sequence of
tasks. The usual benchmarks make the sequence from a single data set: every task
permutes the pixels in an order of its own (Goodfellow et al. 2013), turns the
images by an angle of its own (Lopez-Paz and Ranzato 2017), or takes some of the
classes (Zenke et al. 2017). A task is made on the device when it is asked for,
and not stored: a hundred permuted copies of MNIST would take 5 GB.

References:
  Goodfellow et al, `An empirical investigation of catastrophic forgetting in
  gradient-based neural networks <https://arxiv.org/abs/1312.6211>`_, 2013.
  Lopez-Paz and Ranzato, `Gradient episodic memory for continual learning
  <https://arxiv.org/abs/1706.08840>`_, 2017.
  Zenke et al, `Continual learning through synaptic intelligence
  <https://arxiv.org/abs/1703.04200>`_, 2017.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import ndimage
import numpy as np

from powerprop_jax.data import in_memory
from powerprop_jax.training import classification

_PARTS = ('train', 'valid', 'test')


class Benchmark(NamedTuple):
  """A sequence of tasks.

  Attributes:
    name: the name of the benchmark, such as `permuted_mnist`.
    num_tasks: how many tasks there are.
    num_classes: the number of classes of one task, and so of the outputs that
      its head needs.
    input_shape: (height, width, channels), the same for all tasks.
    task: maps t, from 0 to num_tasks - 1, to the data set of task t: uint8
      images [n, height, width, channels] and int32 labels [n] from 0 to
      num_classes - 1, on the device. Every call makes it anew, with the same
      contents.
    part: maps t and 'train', 'valid' or 'test' to that part of task t alone.
      Evaluating earlier tasks takes their test parts only.
    size: maps the same arguments to the number of examples in that part,
      without making it.

  >>> import numpy as np
  >>> from powerprop_jax.continual import benchmarks
  >>> from powerprop_jax.data import in_memory
  >>> part = in_memory.Split(np.zeros((5, 2, 2, 1), np.uint8), np.arange(5) % 2)
  >>> task = in_memory.Dataset('tiny', part, part, part, num_classes=2)
  >>> benchmark = benchmarks.Benchmark(
  ...   name='twice',
  ...   num_tasks=2,
  ...   num_classes=2,
  ...   input_shape=(2, 2, 1),
  ...   task=lambda t: task,
  ...   part=lambda t, name: getattr(task, name),
  ...   size=lambda t, name: 5,
  ... )
  >>> len(benchmark.part(1, 'test').labels) == benchmark.size(1, 'test')
  True
  """

  name: str
  num_tasks: int
  num_classes: int
  input_shape: tuple[int, ...]
  task: Callable[[int], in_memory.Dataset]
  part: Callable[[int, str], in_memory.Split]
  size: Callable[[int, str], int]


def _benchmark(
  name: str,
  data: in_memory.Dataset,
  num_tasks: int,
  num_classes: int,
  convert: Callable[[int, in_memory.Split], in_memory.Split],
  count: Callable[[int, in_memory.Split], int] = lambda t, part: len(
    part.labels
  ),
) -> Benchmark:
  """Makes the benchmark whose task t has the parts `convert(t, part)`.

  Each of them has `count(t, part)` examples.
  """

  def found(t, which):
    if not 0 <= t < num_tasks:
      raise ValueError(
        f'{name} has the tasks 0 to {num_tasks - 1}; there is no task {t}.'
      )
    if which not in _PARTS:
      raise ValueError(f'A part is one of {_PARTS}, got {which!r}.')
    return getattr(data, which)

  def part(t, which):
    return convert(t, found(t, which))

  def size(t, which):
    return count(t, found(t, which))

  def task(t):
    parts = {which: part(t, which) for which in _PARTS}
    return in_memory.Dataset(f'{name}/{t}', **parts, num_classes=num_classes)

  shape = tuple(data.train.images.shape[1:])
  return Benchmark(name, num_tasks, num_classes, shape, task, part, size)


def _check_num_tasks(num_tasks: int) -> None:
  if num_tasks < 1:
    raise ValueError(f'num_tasks must be at least 1, got {num_tasks}.')


def _put(images: Any, labels: Any) -> in_memory.Split:
  """A part on the device, of uint8 images and int32 labels."""
  images = jnp.asarray(images, jnp.uint8)
  labels = jnp.asarray(labels, jnp.int32)
  return in_memory.Split(images, labels)  # pyright: ignore[reportArgumentType]


def _on_device(data: in_memory.Dataset) -> in_memory.Dataset:
  for which in _PARTS:
    if not len(getattr(data, which).labels):
      raise ValueError(
        f'{data.name} has no {which} examples from which to make tasks.'
      )
  parts = {which: _put(*getattr(data, which)) for which in _PARTS}
  return data._replace(**parts)


@jax.jit
def _permute(images, order):
  n, height, width, channels = images.shape
  pixels = images.reshape(n, height * width, channels)
  # The order is a permutation: not checking its indices saves a fifth of the
  # time.
  return jnp.take(pixels, order, axis=1, mode='clip').reshape(images.shape)


def permuted(data: in_memory.Dataset, num_tasks: int, seed: int) -> Benchmark:
  """A benchmark whose tasks each see the pixels in an order of their own.

  Task 0 is the data set as it is, as in Goodfellow et al. (2013) and many
  since; others permute the first task too, which makes no difference to a fully
  connected network. Channels move with their pixel. The order of task t depends
  on the seed and t alone, so that a longer sequence begins as a shorter one
  does.

  Args:
    data: any data set in memory.
    num_tasks: how many tasks to make, at least 1.
    seed: the seed of the permutations.

  Returns:
    A `Benchmark`.

  Raises:
    ValueError: if num_tasks is below 1, or if a part has no examples.

  >>> import numpy as np
  >>> from powerprop_jax.continual import benchmarks
  >>> from powerprop_jax.data import in_memory
  >>> images = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
  >>> part = in_memory.Split(images, np.array([0, 1]))
  >>> data = in_memory.Dataset('tiny', part, part, part, num_classes=2)
  >>> task = benchmarks.permuted(data, num_tasks=3, seed=0).task(2)
  >>> sorted(task.train.images[1].ravel().tolist())
  [4, 5, 6, 7]
  """
  _check_num_tasks(num_tasks)
  height, width, _ = data.train.images.shape[1:]
  key, data = jax.random.key(seed), _on_device(data)

  def convert(t, part):
    if t == 0:
      return part
    size = height * width
    order = jax.random.permutation(jax.random.fold_in(key, t), size)
    return part._replace(images=_permute(part.images, order))

  return _benchmark(
    f'permuted_{data.name}', data, num_tasks, data.num_classes, convert
  )


def _sources(height: int, width: int, degrees: float) -> np.ndarray:
  """Where each pixel of a turned image comes from: [2, height, width]."""
  angle = math.radians(degrees)
  centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
  y, x = np.mgrid[:height, :width]
  y, x = y - centre_y, x - centre_x
  # Rows are counted downwards, so these are the signs of a turn to the left.
  return np.stack(
    [
      centre_y + math.cos(angle) * y + math.sin(angle) * x,
      centre_x - math.sin(angle) * y + math.cos(angle) * x,
    ]
  ).astype(np.float32)


@jax.jit
def _resample(images, sources):
  def channel(plane):
    return ndimage.map_coordinates(plane, list(sources), order=1)

  def resample(image):
    image = jax.vmap(channel, -1, -1)(image.astype(jnp.float32))
    return jnp.round(image).astype(jnp.uint8)

  # In portions: all images at once, as floats, would take 16 times the memory.
  return jax.lax.map(resample, images, batch_size=500)


def rotated(
  data: in_memory.Dataset, num_tasks: int, max_angle: float = 180.0
) -> Benchmark:
  """A benchmark whose tasks each turn the images by an angle of their own.

  The angles are evenly spaced from 0 to `max_angle`, both included: task t
  turns by t / (num_tasks - 1) of it, to the left, about the centre. Each pixel
  is interpolated linearly between four pixels of the image, and what comes from
  outside of the image is black.

  Args:
    data: any data set in memory.
    num_tasks: how many tasks to make, at least 1.
    max_angle: the angle of the last task in degrees, in (0, 360).

  Returns:
    A `Benchmark`.

  Raises:
    ValueError: if num_tasks is below 1, if max_angle is not between 0 and 360
      degrees, or if a part has no examples.

  >>> import numpy as np
  >>> from powerprop_jax.continual import benchmarks
  >>> from powerprop_jax.data import in_memory
  >>> images = np.array([[[[1], [2]], [[3], [4]]]], np.uint8)
  >>> part = in_memory.Split(images, np.array([0]))
  >>> data = in_memory.Dataset('tiny', part, part, part, num_classes=1)
  >>> last = benchmarks.rotated(data, num_tasks=2).part(1, 'test')
  >>> last.images[0, ..., 0].tolist()
  [[4, 3], [2, 1]]
  """
  _check_num_tasks(num_tasks)
  if not 0 < max_angle < 360:
    raise ValueError(
      f'max_angle must be between 0 and 360 degrees, got {max_angle}. At either'
      ' of these the last task would be the same as the first.'
    )
  height, width, _ = data.train.images.shape[1:]
  data = _on_device(data)

  def convert(t, part):
    if t == 0:
      return part
    degrees = max_angle * t / (num_tasks - 1)
    sources = _sources(height, width, degrees)
    return part._replace(images=_resample(part.images, sources))

  return _benchmark(
    f'rotated_{data.name}', data, num_tasks, data.num_classes, convert
  )


def split(data: in_memory.Dataset, classes_per_task: int = 2) -> Benchmark:
  """A benchmark whose tasks each have some of the classes.

  Task 0 has the first `classes_per_task` classes, task 1 the next ones, and so
  on.

  Args:
    data: any data set in memory.
    classes_per_task: how many classes a task has, at least 2. It must divide
      the number of classes. In every task the labels start at 0.

  Returns:
    A `Benchmark` of num_classes / classes_per_task tasks.

  Raises:
    ValueError: if classes_per_task is below 2 or does not divide the number of
      classes, or if a part of a task would have no examples.

  >>> import numpy as np
  >>> from powerprop_jax.continual import benchmarks
  >>> from powerprop_jax.data import in_memory
  >>> part = in_memory.Split(np.zeros((4, 2, 2, 1)), np.array([0, 3, 2, 1]))
  >>> data = in_memory.Dataset('tiny', part, part, part, num_classes=4)
  >>> benchmark = benchmarks.split(data, classes_per_task=2)
  >>> benchmark.num_tasks, benchmark.part(1, 'test').labels.tolist()
  (2, [1, 0])
  """
  if classes_per_task < 2 or data.num_classes % classes_per_task:
    divisors = range(2, data.num_classes + 1)
    divisors = [n for n in divisors if data.num_classes % n == 0]
    raise ValueError(
      f'classes_per_task must be at least 2 and divide the {data.num_classes}'
      f' classes of {data.name}, got {classes_per_task}. Choose among'
      f' {divisors}.'
    )
  num_tasks = data.num_classes // classes_per_task
  for which in _PARTS:
    present = np.unique(getattr(data, which).labels // classes_per_task)
    missing = sorted(set(range(num_tasks)) - set(present.tolist()))
    if missing:
      raise ValueError(
        f'{data.name} has no {which} examples of task {missing[0]}, classes'
        f' {missing[0] * classes_per_task} and up. The examples must not be'
        ' sorted by class, and every class should occur.'
      )

  def rows(t, part):
    return np.flatnonzero(np.asarray(part.labels) // classes_per_task == t)

  def convert(t, part):
    chosen = rows(t, part)
    labels = np.asarray(part.labels)[chosen] - t * classes_per_task
    return _put(part.images[chosen], labels)

  return _benchmark(
    f'split_{data.name}',
    data,
    num_tasks,
    classes_per_task,
    convert,
    lambda t, part: len(rows(t, part)),
  )


def _check_part(benchmark: Benchmark, t: int, part: in_memory.Split) -> None:
  """Raises ValueError if a network of the benchmark cannot learn a part."""
  shape = tuple(part.images.shape[1:])
  if shape != benchmark.input_shape:
    raise ValueError(
      f'Task {t} of {benchmark.name} has images of the shape {shape}, and the'
      f' others have {benchmark.input_shape}. Resize them.'
    )
  if not len(part.labels):
    raise ValueError(
      f'Task {t} of {benchmark.name} has a part without examples.'
    )
  labels = jnp.asarray(part.labels)
  least, most = int(jnp.min(labels)), int(jnp.max(labels))
  if least < 0 or most >= benchmark.num_classes:
    raise ValueError(
      f'Task {t} of {benchmark.name} has labels from {least} to {most}, and'
      f' {benchmark.num_classes} classes. Labels of a task start at 0.'
    )


def padded(benchmark: Benchmark) -> Benchmark:
  """The same tasks with parts of one shape, for functions that compile once.

  The tasks of `split` differ in size. Here every part is filled up at the end
  to the size of the largest of its kind, with black images that have the label
  `classification.PADDING`, -1: accuracies do not count them, and training
  should draw from the examples before them.

  Args:
    benchmark: any `Benchmark`.

  Returns:
    A `Benchmark` whose 'train' parts are all of one shape, as are the 'valid'
    and the 'test' parts. Its `size` does not count what was added.

  Raises:
    ValueError: when a part is asked for, if a network could not learn it: its
      images have another shape than `input_shape`, a label is not in [0,
      num_classes), or it is empty.

  >>> import numpy as np
  >>> from powerprop_jax.continual import benchmarks
  >>> from powerprop_jax.data import in_memory
  >>> images, labels = np.zeros((5, 2, 2, 1)), np.array([0, 1, 1, 2, 3])
  >>> part = in_memory.Split(images, labels)
  >>> data = in_memory.Dataset('tiny', part, part, part, num_classes=4)
  >>> benchmark = benchmarks.padded(benchmarks.split(data))
  >>> [benchmark.part(t, 'train').labels.tolist() for t in range(2)]
  [[0, 1, 1], [0, 1, -1]]
  """

  @functools.cache
  def rows(which):
    return max(benchmark.size(t, which) for t in range(benchmark.num_tasks))

  def part(t, which):
    found = benchmark.part(t, which)
    _check_part(benchmark, t, found)
    images, labels = found
    padding = rows(which) - len(labels)
    if not padding:
      return found
    images = jnp.pad(images, [(0, padding)] + [(0, 0)] * (images.ndim - 1))
    labels = jnp.pad(
      labels, (0, padding), constant_values=classification.PADDING
    )
    return _put(images, labels)

  def task(t):
    parts = {which: part(t, which) for which in _PARTS}
    return benchmark.task(t)._replace(**parts)

  return benchmark._replace(part=part, task=task)

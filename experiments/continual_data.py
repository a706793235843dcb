"""The data of continual learning, from flags: parts of tasks on the device."""

from collections.abc import Callable
import functools
from typing import Any

import jax.numpy as jnp

from powerprop_jax import datasets
from powerprop_jax import tasks

BENCHMARKS = ('permuted', 'rotated', 'split')


def make_benchmark(
  settings: dict[str, Any], data: datasets.Dataset, seed: int
) -> tasks.Benchmark:
  """The sequence of tasks, on the device that holds the data."""
  name, num_tasks = settings['benchmark'], settings['tasks']
  if name == 'permuted':
    return tasks.permuted(data, num_tasks, seed)
  if name == 'rotated':
    return tasks.rotated(data, num_tasks)
  benchmark = tasks.split(data, settings['classes_per_task'])
  if num_tasks > benchmark.num_tasks:
    raise ValueError(
      f'--tasks={num_tasks}: {data.name} has {benchmark.num_tasks} tasks of'
      f' {benchmark.num_classes} classes. Ask for fewer, or lower'
      ' --classes_per_task.'
    )
  return benchmark


def _pad(split: datasets.Split, rows: int) -> datasets.Split:
  """Adds examples of label -1, by which parts of all tasks have one shape."""
  images, labels = split
  padding = rows - len(labels)
  if not padding:
    return split
  images = jnp.pad(images, [(0, padding)] + [(0, 0)] * (images.ndim - 1))
  labels = jnp.pad(labels, (0, padding), constant_values=-1)
  return datasets.Split(images, labels)  # pyright: ignore[reportArgumentType]


def make_part(
  benchmark: tasks.Benchmark, num_tasks: int
) -> Callable[[int, str], datasets.Split]:
  """Parts of tasks by (task, name), of one shape for all tasks."""

  @functools.cache
  def rows(which):
    # Only tasks of different classes differ in size.
    count = num_tasks if benchmark.name.startswith('split') else 1
    return max(len(benchmark.part(t, which).labels) for t in range(count))

  # The parts of a task are asked for again until the next one begins.
  @functools.lru_cache(maxsize=3)
  def part(t, which):
    found = benchmark.part(t, which)
    check_part(found, benchmark.num_classes, benchmark.input_shape)
    return _pad(found, rows(which))

  return part


def check_part(
  split: datasets.Split, num_classes: int, input_shape: tuple[int, ...]
) -> None:
  """Raises ValueError if a network cannot learn a task."""
  if tuple(split.images.shape[1:]) != input_shape:
    raise ValueError(
      f'A task has images of shape {tuple(split.images.shape[1:])}, and the'
      f' network takes {input_shape}. Resize them.'
    )
  most = int(jnp.max(jnp.asarray(split.labels)))
  if most >= num_classes:
    raise ValueError(
      f'A task has the label {most}, and the network {num_classes} outputs.'
      ' Labels of a task start at 0; give the network more outputs.'
    )

"""The data of continual learning, from flags: parts of tasks on the device."""

from collections.abc import Callable
import functools
from typing import Any

import jax.numpy as jnp

from powerprop_jax.continual import benchmarks
from powerprop_jax.data import in_memory

BENCHMARKS = ('permuted', 'rotated', 'split')


def make_benchmark(
  settings: dict[str, Any], data: in_memory.Dataset, seed: int
) -> benchmarks.Benchmark:
  """The sequence of tasks, on the device that holds the data."""
  name, num_tasks = settings['benchmark'], settings['tasks']
  if name == 'permuted':
    return benchmarks.permuted(data, num_tasks, seed)
  if name == 'rotated':
    return benchmarks.rotated(data, num_tasks)
  benchmark = benchmarks.split(data, settings['classes_per_task'])
  if num_tasks > benchmark.num_tasks:
    raise ValueError(
      f'--tasks={num_tasks}: {data.name} has {benchmark.num_tasks} tasks of'
      f' {benchmark.num_classes} classes. Ask for fewer, or lower'
      ' --classes_per_task.'
    )
  return benchmark


def _pad(split: in_memory.Split, rows: int) -> in_memory.Split:
  """Adds examples of label -1, by which parts of all tasks have one shape."""
  images, labels = split
  padding = rows - len(labels)
  if not padding:
    return split
  images = jnp.pad(images, [(0, padding)] + [(0, 0)] * (images.ndim - 1))
  labels = jnp.pad(labels, (0, padding), constant_values=-1)
  return in_memory.Split(images, labels)  # pyright: ignore[reportArgumentType]


def make_part(
  benchmark: benchmarks.Benchmark, num_tasks: int
) -> Callable[[int, str], in_memory.Split]:
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
  split: in_memory.Split, num_classes: int, input_shape: tuple[int, ...]
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

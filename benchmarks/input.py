"""Measures whether the decoding of images keeps up with the training step.

  python -m benchmarks.input

Prints the images per second of decoding alone, of the step alone, and of both
together. Training decodes the next batches in processes of their own, and moves
one batch to the device while a step runs, so that both together should be as
fast as the slower of the two. On a CPU they share the cores, and are slower
than either. --apart gives one core to the step and the others to the processes
that decode, as if the first were an accelerator; a small network
(--network=lenet_5 --batch=64 --image_size=64) then shows what the loop itself
costs. The images are JPEGs of noise under large shapes, which this script
makes; photographs of the same size take about as long to decode.
"""

import argparse
from collections.abc import Callable
import os
import pathlib
import tempfile
import time

import jax
import numpy as np
from PIL import Image

from experiments import sparse_training
from experiments.presets import sparse_training as presets
from experiments.support import config
from experiments.support import problem as problem_lib
from experiments.support import settings as settings_lib
from powerprop_jax.data import streams
from powerprop_jax.training import devices


def make_folder(root: pathlib.Path, count: int, height: int, width: int):
  """Writes JPEGs of two classes: `count` in `train`, and two in `val`."""
  rng = np.random.default_rng(0)
  for split, images in (('train', count), ('val', 2)):
    for i in range(images):
      place = root / split / f'class_{i % 2}'
      place.mkdir(parents=True, exist_ok=True)
      shapes = rng.integers(256, size=[6, 8, 3], dtype=np.uint8)
      image = Image.fromarray(shapes).resize((width, height))
      noise = rng.normal(0, 8, [height, width, 3])
      pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
      Image.fromarray(pixels).save(place / f'{i}.jpeg', quality=90)


def speed(take: Callable[[], object], images: int, seconds: float) -> float:
  """Images per second of a function that takes some, after a first call.

  Args:
    take: takes a batch, or several.
    images: how many images a call takes.
    seconds: how long to measure.
  """
  take()
  done, begun = 0, time.perf_counter()
  while (passed := time.perf_counter() - begun) < seconds:
    take()
    done += images
  return done / passed


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--network', default='resnet50', help='The network to train.'
  )
  parser.add_argument(
    '--batch', type=int, default=256, help='The number of images per step.'
  )
  parser.add_argument(
    '--image_size', type=int, default=224, help='Their height and width.'
  )
  parser.add_argument(
    '--images', type=int, default=2_000, help='How many JPEGs are made.'
  )
  parser.add_argument(
    '--seconds',
    type=float,
    default=30,
    help='How long each of the three is measured.',
  )
  parser.add_argument(
    '--workers',
    type=int,
    help='How many processes decode; the number of cores if not given.',
  )
  parser.add_argument(
    '--apart',
    action='store_true',
    help='Whether the step has a core of its own.',
  )
  args = parser.parse_args()
  if args.apart:
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
      parser.error('--apart needs two cores.')
    # Threads and processes stay on the cores on which they were started.
    os.sched_setaffinity(0, [first])
    jax.devices()  # Starts the threads that compute.
    os.sched_setaffinity(0, others)
  cores = settings_lib.num_cores()
  workers = cores if args.workers is None else args.workers
  with tempfile.TemporaryDirectory() as place:
    make_folder(pathlib.Path(place), args.images, 375, 500)
    flags = [
      '--preset=imagenet',
      '--dataset=folder',
      f'--data_dir={place}',
      '--method=static',
      '--learning_rate=0',  # Noise has nothing to be learnt.
      # CPUs emulate bfloat16, slowly.
      f'--bfloat16={jax.default_backend() != "cpu"}',
      f'--network={args.network}',
      f'--batch_size={args.batch}',
      f'--image_size={args.image_size}',
      f'--num_workers={workers}',
    ]
    settings = config.parse(sparse_training.Settings, flags, presets.PRESETS)
    data = problem_lib.load(settings)
    assert isinstance(data, problem_lib.Sources)
    problem = problem_lib.make(settings, data)
    axis = problem.axis

    stream = streams.train_stream(
      data.train,
      batch_size=args.batch,
      image_size=args.image_size,
      seed=0,
      num_workers=workers,
    )
    decoding = speed(lambda: next(stream), args.batch, args.seconds)
    # The memory of a batch is shared with workers, and ends with them.
    batch = devices.put(jax.tree.map(np.copy, next(stream)), axis)
    stream.close()

    step = devices.on_devices(problem.step, axis)
    state = devices.replicate(problem.init(), axis)

    def take_step():
      nonlocal state
      state, metrics = step(state, batch)
      jax.block_until_ready(metrics)

    computing = speed(take_step, args.batch, args.seconds)

    feed, start, chunk = problem.make_feed(), 0, 4

    def take_both():
      nonlocal state, start
      state, _ = feed.advance(state, start, start + chunk)
      start += chunk

    both = speed(take_both, args.batch * chunk, args.seconds)
    feed.close()
  print(
    f'{jax.device_count()} x {jax.devices()[0].device_kind}, {workers}'
    f' processes on {cores} cores, jax {jax.__version__},'
    f' {args.network}, batches of {args.batch} images of {args.image_size} x'
    f' {args.image_size}'
  )
  slower = min(decoding, computing)
  print(f'decoding alone  {decoding:9.1f} images/s')
  print(f'the step alone  {computing:9.1f} images/s')
  print(
    f'both together   {both:9.1f} images/s, {both / slower:.3f} x the slower'
  )


if __name__ == '__main__':
  main()

"""Measures images per second of ResNet-50, dense and under sparse training.

  python -m benchmarks.resnet50

Dense training, Powerpropagation, RigL and Top-KAST take turns in one run, and
the fastest turn of each counts. The images are synthetic and lie on the device.
Activations are bfloat16, the optimiser is SGD with Nesterov momentum, and masks
have a sparsity of 0.9 by ERK and change every 100 steps. The script is for one
GPU.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import methods
from powerprop_jax.data import in_memory

_RUNS = {
  'dense, alpha = 1': ('--method=dense', '--alpha=1'),
  'dense, alpha = 2': ('--method=dense', '--alpha=2'),
  'RigL, alpha = 1': ('--method=rigl', '--alpha=1'),
  'Top-KAST, alpha = 1': ('--method=top_kast', '--alpha=1'),
}


def synthetic(batch: int, side: int) -> in_memory.Dataset:
  """One batch of random images [batch, side, side, 3] and labels [batch]."""
  rng = np.random.default_rng(0)
  images = rng.integers(256, size=[batch, side, side, 3], dtype=np.uint8)
  labels = rng.integers(1000, size=batch, dtype=np.int32)
  split = in_memory.Split(images, labels)
  return in_memory.Dataset('synthetic', split, split, split, 1000)


def make_chunk(
  data: in_memory.Dataset, steps: int, update_every: int, args: tuple[str, ...]
) -> Callable[[], Any]:
  """A function that takes some steps, with the mask updates among them."""
  problem = methods.make_problem(
    data,
    '--network=resnet50',
    '--bfloat16',
    '--momentum=0.9',
    '--nesterov',
    '--weight_decay=1e-4',
    '--label_smoothing=0.1',
    '--steps=1000000000',
    f'--update_every={update_every}',
    f'--batch_size={len(data.train.labels)}',
    *args,
  )
  batch = jax.device_put((data.train.images, data.train.labels))
  batches = jax.tree.map(lambda x: x[None], batch)
  step = jax.jit(problem.step, donate_argnums=0)
  state = problem.init_masks(problem.init(), batches)
  taken = 0

  def chunk():
    nonlocal state, taken
    for _ in range(steps):
      if problem.method.due(taken):
        state = problem.update_masks(state, batches)
      state, _ = step(state, batch)
      taken += 1
    return state

  return chunk


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--batch', type=int, default=256, help='The number of images per step.'
  )
  parser.add_argument(
    '--image_size', type=int, default=224, help='Their height and width.'
  )
  parser.add_argument(
    '--steps', type=int, default=100, help='The number of steps in a turn.'
  )
  parser.add_argument(
    '--turns', type=int, default=3, help='How many turns each method takes.'
  )
  parser.add_argument(
    '--update_every',
    type=int,
    default=100,
    help='The number of steps from one update of the masks to the next.',
  )
  args = parser.parse_args()
  data = synthetic(args.batch, args.image_size)
  chunks = {
    name: make_chunk(data, args.steps, args.update_every, run)
    for name, run in _RUNS.items()
  }
  seconds = methods.take_turns(chunks, args.turns)
  print(
    f'{jax.devices()[0].device_kind}, jax {jax.__version__}, batches of'
    f' {args.batch} images of {args.image_size} x {args.image_size}'
  )
  base = seconds['dense, alpha = 1']
  for name, best in seconds.items():
    speed = args.steps * args.batch / best
    print(f'{name:<20} {speed:8.1f} images/s, {base / best:.3f} x the first')


if __name__ == '__main__':
  main()

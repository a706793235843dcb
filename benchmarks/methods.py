"""Steps per second of each sparse training method, against dense training.

  python -m benchmarks.methods

LeNet-5 on mnist_5k, batches of 128, SGD with momentum, alpha = 2: the steps
between two mask updates. Top-KAST is given once more with new masks in every
step. The methods take turns, and the fastest of their turns count.
"""

import argparse
from collections.abc import Callable, Mapping
import time
from typing import Any

from absl import flags
import jax

from experiments import methods
from experiments import sparse_problem
from experiments import sparse_training
from powerprop_jax import datasets


def make_problem(data: datasets.Dataset, *args: str) -> sparse_problem.Problem:
  """The problem of `experiments.sparse_training` with these flags."""
  values = flags.FlagValues()
  sparse_training.define_flags(values)
  values(['benchmark', *args])
  return sparse_problem.make_problem(values.flag_values_dict(), data, 0)


def take_turns(
  chunks: Mapping[str, Callable[[], Any]], turns: int
) -> dict[str, float]:
  """The least seconds that each chunk took in its turns, after a first."""
  seconds = {name: [] for name in chunks}
  for turn in range(turns + 1):
    for name, chunk in chunks.items():
      start = time.perf_counter()
      jax.block_until_ready(chunk())
      if turn:  # The first one compiles.
        seconds[name].append(time.perf_counter() - start)
  return {name: min(times) for name, times in seconds.items()}


def make_chunk(
  data: datasets.Dataset, method: str, steps: int, every_step: bool = False
) -> Callable[[], Any]:
  """A function that takes some steps, with mask updates before all or none."""
  problem = make_problem(
    data,
    '--network=lenet_5',
    '--momentum=0.9',
    f'--method={method}',
    '--batch_size=128',
  )
  feed = problem.make_feed()
  state = problem.init_masks(problem.init(), feed.batches(0, 1))
  batches = [feed.batches(t, 1) for t in range(steps if every_step else 0)]

  def update_and_step(state, batches):
    batch = jax.tree.map(lambda x: x[0], batches)
    return problem.step(problem.update_masks(state, batches), batch)

  update_and_step = jax.jit(update_and_step, donate_argnums=0)

  def chunk():
    nonlocal state
    if not every_step:
      state, _ = feed.advance(state, 0, steps)
    for batch in batches:
      state, _ = update_and_step(state, batch)
    return state

  return chunk


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=25)
  parser.add_argument('--turns', type=int, default=6)
  args = parser.parse_args()
  data = datasets.load('mnist_5k')
  chunks = {m: make_chunk(data, m, args.steps) for m in methods.METHODS}
  name = 'top_kast, masks every step'
  chunks[name] = make_chunk(data, 'top_kast', args.steps, every_step=True)
  seconds = take_turns(chunks, args.turns)
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}')
  for name, best in seconds.items():
    print(
      f'{name:<28} {args.steps / best:7.1f} steps/s,'
      f' {best / seconds["dense"]:.3f} x the time of dense'
    )


if __name__ == '__main__':
  main()

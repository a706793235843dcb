"""Times a step of each sparse training method, against dense training.

  python -m benchmarks.methods

The steps between two mask updates are timed, of LeNet-5 on mnist_5k with
batches of 128, SGD with momentum and alpha = 2. Masks are part of the state, so
methods whose steps lower to the same program are timed as one, against a step
without any masks. Top-KAST is timed once more with new masks in every step. The
programs take turns, and the ratios are those within a turn, as other work on
the machine comes and goes.
"""

import argparse
from collections.abc import Callable, Mapping
import time
from typing import Any

import jax
import numpy as np

from experiments.support import config
from experiments.support import methods
from experiments.support import problem as problem_lib
from powerprop_jax import training
from powerprop_jax.data import in_memory
from powerprop_jax.sparse import masks

Step = Callable[[Any, Any], Any]
UNMASKED = 'no masks'


def make_problem(data: in_memory.Dataset, *args: str) -> problem_lib.Problem:
  """The problem of `experiments.sparse_training` with these flags."""
  return problem_lib.make(config.parse(problem_lib.Settings, args), data)


def unmasked(step: training.TrainStep) -> training.TrainStep:
  """A step whose masks are all ones, which the compiler knows and removes."""

  def step_without(state, batch):
    constant = masks.dense(state.phi)
    new, metrics = step(state._replace(masks=constant), batch)
    return new._replace(masks=state.masks), metrics

  return step_without


def make_steps(
  problems: Mapping[str, problem_lib.Problem], state: Any, batch: Any
) -> dict[str, tuple[str, Step]]:
  """The different programs: the methods that run each, and its compiled step.

  Args:
    problems: the problem of each method.
    state: a state of training, for its shapes.
    batch: images and labels of a step, for their shapes.

  Returns:
    By the first method that runs a program: the names of all of them, and the
    step.
  """
  dense = problems['dense'].step
  steps = {UNMASKED: unmasked(dense)} | {m: p.step for m, p in problems.items()}
  programs: dict[str, tuple[list[str], Any]] = {}
  for name, step in steps.items():
    # All get one name, as the name is part of the program's text.
    step = jax.jit(lambda s, b, step=step: step(s, b), donate_argnums=0)
    lowered = step.lower(state, batch)
    programs.setdefault(lowered.as_text(), ([], lowered))[0].append(name)
  return {
    names[0]: (', '.join(names), lowered.compile())
    for names, lowered in programs.values()
  }


def take_turns(
  chunks: Mapping[str, Callable[[], Any]], turns: int
) -> dict[str, np.ndarray]:
  """The seconds of each chunk in each turn, [turns], after a first turn."""
  seconds = {name: [] for name in chunks}
  for _ in range(turns + 1):
    for name, chunk in chunks.items():
      start = time.perf_counter()
      jax.block_until_ready(chunk())
      seconds[name].append(time.perf_counter() - start)
  return {name: np.array(times[1:]) for name, times in seconds.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--steps', type=int, default=10, help='The number of steps in a turn.'
  )
  parser.add_argument(
    '--turns', type=int, default=30, help='How many turns each program takes.'
  )
  args = parser.parse_args()
  data = in_memory.load('mnist_5k')
  common = ('--network=lenet_5', '--momentum=0.9', '--batch_size=128')
  problems = {
    m: make_problem(data, f'--method={m}', *common) for m in methods.METHODS
  }
  feed = problems['dense'].make_feed()
  batches = [feed.batches(t, 1) for t in range(args.steps)]
  firsts = [jax.tree.map(lambda x: x[0], batch) for batch in batches]

  def make_chunk(method, step, inputs):
    problem = problems.get(method, problems['dense'])
    state = problem.init_masks(problem.init(), batches[0])

    def chunk():
      nonlocal state
      for batch in inputs:
        state, _ = step(state, batch)
      return state

    return chunk

  steps = make_steps(problems, problems['dense'].init(), firsts[0])
  chunks = {
    label: make_chunk(first, step, firsts)
    for first, (label, step) in steps.items()
  }
  top_kast = problems['top_kast']

  def update_and_step(state, batches):
    batch = jax.tree.map(lambda x: x[0], batches)
    return top_kast.step(top_kast.update_masks(state, batches), batch)

  chunks['top_kast, masks every step'] = make_chunk(
    'top_kast', jax.jit(update_and_step, donate_argnums=0), batches
  )
  seconds = take_turns(chunks, args.turns)
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}\n')
  print('time of a step over that of one without masks: median (quartiles)')
  for label, times in seconds.items():
    ratios = times / seconds[UNMASKED]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    each = np.median(times) / args.steps
    print(f'{middle:.3f} ({low:.3f} to {high:.3f}), {each:.4f} s: {label}')


if __name__ == '__main__':
  main()

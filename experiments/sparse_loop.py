"""The loop of a sparse training run: steps, mask updates and checkpoints.

A run is cut into segments, which end where masks are due, a checkpoint is, or
the loss has to be looked at. They end at the same steps whether or not the run
was stopped in between, and all that a segment depends on is in the checkpoint,
so that a run which was killed ends with the same bits as one which was not.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import pathlib
import signal
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments import feeds
from experiments import sparse_problem
from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax.training import checkpoint
from powerprop_jax.training import devices

_SEGMENT = 100  # Steps between two looks at the loss, at most.


class Failed(Exception):
  """The run can not go on: its loss is not finite, or a layer has collapsed."""


class Progress(NamedTuple):
  """What a checkpoint holds: the state, and which weights were ever in use."""

  state: training.TrainState
  ever: Any


def begin(
  problem: sparse_problem.Problem,
  manager: checkpoint.Manager,
  init_from: str | None,
) -> tuple[int, Progress, bool]:
  """Where to go on: a checkpoint of this run or of another, or a fresh state.

  Returns:
    The step, the progress, and whether masks are still to be chosen.
  """
  state = problem.init()
  like = Progress(state, jax.tree.map(jnp.copy, state.masks.forward))
  found = checkpoint.restore_latest(manager, like)
  if found is not None:
    return found[0], found[1], False
  if init_from is None:
    return 0, like, True
  source = checkpoint.load(init_from)
  names = ('phi', 'model_state', 'masks')
  wanted = {'state': {name: getattr(state, name) for name in names}}
  there = checkpoint.fill(wanted, source, partial=True)['state']
  old = power.power_transform(source.config['alpha'])
  phi = power.change_alpha(there['phi'], old, problem.transform)
  state = state._replace(**(there | {'phi': phi}))
  forward = state.masks.forward
  # A network that is sparse already keeps its mask.
  is_dense = all(bool(m.all()) for m in jax.tree.leaves(forward))
  return 0, Progress(state, jax.tree.map(jnp.copy, forward)), is_dense


def check_collapse(kept: Mapping[str, int], on_collapse: str) -> None:
  """Raises Failed, or warns, if a layer has no weight left.

  Args:
    kept: the number of weights in use, by path.
    on_collapse: 'error' or 'warn'.
  """
  empty = ', '.join(path for path, count in kept.items() if not count)
  if empty and on_collapse == 'error':
    raise Failed(
      f'no weight is left in {empty}: nothing can be learnt. Lower --sparsity,'
      ' choose another --distribution or --scope, or go on with'
      ' --on_collapse=warn.'
    )
  if empty:
    logging.warning('No weight is left in %s.', empty)


def check_loss(loss: np.ndarray, step: int, settings: dict[str, Any]) -> None:
  """Raises Failed if the loss of a segment from `step` on is not finite."""
  finite = np.isfinite(loss)
  if not finite.all():
    first = int(np.argmin(finite))
    raise Failed(
      f'the loss became {loss[first]} at step {step + first}, with alpha ='
      f' {settings["alpha"]:g} and learning_rate ='
      f' {settings["learning_rate"]:g}. Lower the learning rate.'
    )


def next_stop(
  step: int, steps: int, due: Callable[[int], bool], checkpoint_every: int
) -> int:
  """The end of the segment that starts at a step."""
  for end in range(step + 1, min(step + _SEGMENT, steps)):
    if due(end) or end % checkpoint_every == 0 or end % _SEGMENT == 0:
      return end
  return min(step + _SEGMENT, steps)


class Log(NamedTuple):
  """Where the first host reports to; other hosts have none."""

  bar: Any
  path: pathlib.Path


def open_log(out_dir: pathlib.Path, step: int, steps: int) -> Log | None:
  """Opens the bar and metrics.jsonl, of which only the past is kept."""
  if jax.process_index():
    return None
  path = out_dir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  past = []
  for line in lines:
    try:
      if json.loads(line)['step'] <= step:
        past.append(line + '\n')
    except json.JSONDecodeError:
      continue  # The end of a file that was cut off.
  path.write_text(''.join(past))
  return Log(tqdm.tqdm(total=steps, initial=step, unit='step'), path)


def write_log(log: Log | None, step: int, metrics: feeds.Metrics) -> None:
  """Reports a segment that ended before a step."""
  if log is None:
    return
  means = {name: float(np.mean(x)) for name, x in metrics.items()}
  with log.path.open('a') as f:
    f.write(json.dumps({'step': step, **means}) + '\n')
  log.bar.update(step - log.bar.n)
  log.bar.set_postfix({name: f'{x:.4f}' for name, x in means.items()})


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
  """A list of the signals that came, which no longer end the process.

  Python sees a signal between two of its own steps: while XLA compiles, it is
  kept for later.
  """
  asked = []
  before = {
    number: signal.signal(number, lambda number, _: asked.append(number))
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    yield asked
  finally:
    for number, handler in before.items():
      # None is a handler that Python has not set and can not set again.
      signal.signal(number, handler or signal.SIG_DFL)


# (mask step, step, state, ever) -> (state, ever).
_UpdateMasks = Callable[
  [training.MaskStep, int, training.TrainState, Any],
  tuple[training.TrainState, Any],
]


def _make_update_masks(
  problem: sparse_problem.Problem,
  feed: feeds.Feed,
  gradient_batches: int,
  on_collapse: str,
) -> _UpdateMasks:
  """A mask step, with an account of the weights in use."""

  def observe(ever, phi, forward):
    ever = jax.tree.map(jnp.logical_or, ever, forward)
    rows = leaves.weight_rows(phi, leaves.is_weight, forward)
    return ever, {str(p): jnp.sum(m, dtype=jnp.int32) for p, _, m in rows}

  observe = devices.on_devices(observe, problem.axis)

  def update(mask_step, step, state, ever):
    state = mask_step(state, feed.batches(step, gradient_batches))
    ever, kept = observe(ever, state.phi, state.masks.forward)
    # The masks stay where they are: these are a few numbers.
    kept = jax.device_get(devices.unreplicate(kept, problem.axis))
    check_collapse(kept, on_collapse)
    return state, ever

  return update


def _speed(times: list[tuple[int, float]]) -> float:
  """Steps a second, but for the first segment, which compiles; NaN of none."""
  count, seconds = np.sum(times[1:] or [(np.nan, 1)], axis=0)
  return float(count / seconds)


def train(
  problem: sparse_problem.Problem,
  feed: feeds.Feed,
  manager: checkpoint.Manager,
  out_dir: pathlib.Path,
  settings: dict[str, Any],
  *,
  checkpoint_every: int,
  on_collapse: str,
) -> tuple[Progress, float] | None:
  """Trains to the end, or until the process is asked to stop.

  Args:
    problem: what to train.
    feed: of `problem.make_feed`; it is closed in the end.
    manager: the checkpoints, to go on from and to write; closed in the end.
    out_dir: the folder of metrics.jsonl.
    settings: the flags.
    checkpoint_every: steps between checkpoints.
    on_collapse: 'error' or 'warn'.

  Returns:
    The progress and the steps a second, or None if it was stopped.

  Raises:
    Failed: if a layer collapses or the loss is not finite.
    ValueError: if there are checkpoints of another run.
  """
  axis, steps, times = problem.axis, settings['steps'], []
  due = problem.method.due
  update = _make_update_masks(
    problem, feed, settings['gradient_batches'], on_collapse
  )
  with asked_to_stop() as asked:
    step, progress, choose = begin(problem, manager, settings['init_from'])
    state, ever = devices.replicate(progress, axis)
    if choose:
      none = jax.tree.map(jnp.zeros_like, ever)
      state, ever = update(problem.init_masks, step, state, none)
    log = open_log(out_dir, step, steps)
    while step < steps and not devices.any_host(bool(asked)):
      if due(step):
        state, ever = update(problem.update_masks, step, state, ever)
      begun, end = time.time(), next_stop(step, steps, due, checkpoint_every)
      state, metrics = feed.advance(state, step, end)
      times.append((end - step, time.time() - begun))
      check_loss(metrics['loss'], step, settings)
      step = end
      write_log(log, step, metrics)
      if step % checkpoint_every == 0:
        saved = Progress(*devices.unreplicate((state, ever), axis))
        checkpoint.save(manager, step, saved)
    progress = Progress(*devices.unreplicate((state, ever), axis))
    checkpoint.save(manager, step, progress)  # Unless it is the newest.
    checkpoint.close(manager)
    feed.close()
  if log is not None:
    log.bar.close()
  return (progress, _speed(times)) if step == steps else None

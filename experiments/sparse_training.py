"""Trains one network by a sparse training method, with any alpha.

  python -m experiments.sparse_training --method=rigl --alpha=2 --sparsity=0.9

The program runs on CPU, GPU or TPU, on all local devices and on several hosts.
It may be killed at any moment: the same command goes on from the last
checkpoint and ends with the same parameters, bit for bit. --out_dir gets
config.json, metrics.jsonl, summary.json, the checkpoints, and in events/ the
files that TensorBoard shows. With --evaluate_every the checkpoint with the best
validation accuracy is kept beside the newest.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import hashlib
import math
import sys
import time
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from experiments.presets import sparse_training as presets
from experiments.support import config
from experiments.support import evaluation
from experiments.support import events
from experiments.support import methods
from experiments.support import optimisers
from experiments.support import output
from experiments.support import problem as problem_lib
from experiments.support import settings as settings_lib
from powerprop_jax import extras
from powerprop_jax import leaves
from powerprop_jax import paths
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax.sparse import flops
from powerprop_jax.sparse import report as report_lib
from powerprop_jax.training import checkpoint
from powerprop_jax.training import devices
from powerprop_jax.training import feeds
from powerprop_jax.training import loop


@dataclasses.dataclass(frozen=True)
class Settings(problem_lib.Settings, settings_lib.Output, settings_lib.Hosts):
  """Where the run begins, and what is kept of it."""

  init_from: str | None = config.flag(
    None,
    'The folder of another run, or of its checkpoints. This run begins with the'
    ' network of that one, and with its masks if it is sparse.',
  )
  on_collapse: str = config.flag(
    'error',
    'What to do if an update of the masks leaves a layer without weights: error'
    ' stops the run, and warn lets it go on.',
    choices=('error', 'warn'),
    decides=False,
  )
  checkpoint_every: int = config.flag(
    1_000,
    'The number of steps from one checkpoint to the next.',
    low=1,
    high=settings_lib.MAX_STEPS,
    decides=False,
  )
  evaluate_every: int | None = config.flag(
    None,
    'The number of steps from one evaluation on validation data to the next.'
    ' Each evaluation writes a checkpoint. By default there is only one'
    ' evaluation, at the end.',
    low=1,
    high=settings_lib.MAX_STEPS,
    decides=False,
  )
  histograms: bool = config.flag(
    False,
    'Whether evaluations write histograms of the masks into the event files:'
    ' one for each layer, of the share of its inputs that each unit uses.',
    decides=False,
  )
  out_dir: str = config.like(
    settings_lib.Output, 'out_dir', 'results/sparse_training', own=True
  )

  def __post_init__(self):
    super().__post_init__()
    if self.evaluate_every and self.validation_images == 0:
      raise ValueError(
        f'--evaluate_every={self.evaluate_every} needs validation images. Leave'
        ' --validation_images=0 out.'
      )
    if self.histograms and not self.evaluate_every:
      raise ValueError(
        '--histograms=True: histograms are written by evaluations. Give'
        ' --evaluate_every.'
      )
    if self.histograms and not events.installed():
      raise ValueError(
        '--histograms=True needs tensorboardX. Run:'
        f' {extras.command("tensorboard")}'
      )


class Progress(NamedTuple):
  """What a checkpoint holds.

  Attributes:
    state: the training state.
    ever: boolean arrays like the masks, true for the weights that were ever in
      use.
  """

  state: training.TrainState
  ever: Any


class Timing(NamedTuple):
  """How many steps were timed, and how many seconds they took.

  It is kept with a checkpoint.
  """

  steps: int = 0
  seconds: float = 0.0


class Start(NamedTuple):
  """Where a run starts or goes on.

  Attributes:
    step: the next step.
    progress: what a checkpoint holds, as it is on one device.
    choose: whether the masks must still be chosen.
    timing: that of the steps before.
  """

  step: int
  progress: Progress
  choose: bool
  timing: Timing = Timing()


def start_or_resume(
  problem: problem_lib.Problem,
  manager: checkpoint.Manager,
  init_from: str | None,
) -> Start:
  """Finds the start: a checkpoint of this run or of another, or a fresh state.

  Args:
    problem: what is trained.
    manager: that of the checkpoints of this run.
    init_from: the folder of another run, or of its checkpoints, or None.

  Returns:
    A `Start`.

  Raises:
    ValueError: if a checkpoint is of another network or of other settings.
    FileNotFoundError: if all checkpoints of this run are damaged, or if
      init_from holds no checkpoint.
  """
  state = problem.init()
  like = Progress(state, jax.tree.map(jnp.copy, state.masks.forward))
  found = checkpoint.restore_latest(manager, like)
  if found is not None:
    step, progress, extra = found
    return Start(step, progress, False, Timing(**(extra or {})))
  if init_from is None:
    return Start(0, like, True)
  place = paths.resolve(init_from)
  inside = place / 'checkpoints'
  source = checkpoint.load(inside if inside.is_dir() else place)
  names = ('phi', 'model_state', 'masks')
  wanted = {'state': {name: getattr(state, name) for name in names}}
  there = checkpoint.fill(wanted, source, partial=True)['state']
  powers = config.restored(optimisers.Settings, source.config)
  old = optimisers.make_transform(powers, source.config['alpha'])
  phi = power.change_alpha(there['phi'], old, problem.transform)
  state = state._replace(**(there | {'phi': phi}))
  forward = state.masks.forward
  # A network that is sparse already keeps its masks.
  is_dense = all(bool(m.all()) for m in jax.tree.leaves(forward))
  return Start(0, Progress(state, jax.tree.map(jnp.copy, forward)), is_dense)


def check_collapse(kept: Mapping[str, int], on_collapse: str) -> None:
  """Stops, or warns, if a layer has no weight left.

  Args:
    kept: the number of weights in use, by path.
    on_collapse: 'error' or 'warn'.

  Raises:
    loop.Diverged: if a layer has no weight left and on_collapse is 'error'.
  """
  empty = ', '.join(path for path, count in kept.items() if not count)
  if empty and on_collapse == 'error':
    raise loop.Diverged(
      f'no weight is left in {empty}: nothing can be learnt. Lower --sparsity,'
      ' choose another --distribution or --scope, or go on with'
      ' --on_collapse=warn.'
    )
  if empty:
    logging.warning('No weight is left in %s.', empty)


# (mask step, step, progress) -> progress; both are on the devices.
_UpdateMasks = Callable[[training.MaskStep, int, Progress], Progress]


def _make_update_masks(
  problem: problem_lib.Problem, feed: feeds.Feed, settings: Settings
) -> _UpdateMasks:
  """The function that updates the masks and the record of weights in use."""

  def observe(ever, phi, forward):
    ever = jax.tree.map(jnp.logical_or, ever, forward)
    rows = leaves.weight_rows(phi, leaves.is_weight, forward)
    return ever, {str(p): jnp.sum(m, dtype=jnp.int32) for p, _, m in rows}

  observe = devices.on_devices(observe, problem.axis)

  def update(mask_step, step, progress):
    batches = feed.batches(step, settings.gradient_batches)
    state = mask_step(progress.state, batches)
    ever, kept = observe(progress.ever, state.phi, state.masks.forward)
    # Only a few numbers are copied to the host; the masks stay on the devices.
    kept = jax.device_get(devices.unreplicate(kept, problem.axis))
    check_collapse(kept, settings.on_collapse)
    return Progress(state, ever)

  return update


def train(
  problem: problem_lib.Problem,
  feed: feeds.Feed,
  manager: checkpoint.Manager,
  settings: Settings,
  out_dir: epath.Path,
) -> tuple[Progress, Timing] | None:
  """Trains to the end, or until the process is asked to stop.

  Args:
    problem: what to train.
    feed: made by `problem.make_feed`; it is closed at the end.
    manager: that of the checkpoints, to go on from and to write.
    settings: those of the run, returned by `stretched`.
    out_dir: the folder of metrics.jsonl.

  Returns:
    The progress as it is on one device, and the timing of the steps; None if
    the process was asked to stop before the end.

  Raises:
    loop.Diverged: if a layer collapses or the loss is not finite.
    config.Refused: if the checkpoints to start from are impossible.
  """
  axis, first = problem.axis, jax.process_index() == 0
  update = _make_update_masks(problem, feed, settings)
  with contextlib.ExitStack() as ending, loop.stop_on_signals() as asked:
    with config.refusing():
      start = start_or_resume(problem, manager, settings.init_from)
    if first and start.step:
      message = f'Going on from step {start.step}.'
      if start.step >= settings.steps:
        message = f'All {start.step} steps are done already.'
      print(message, file=sys.stderr)
    timing, compiled = start.timing, False
    progress = devices.replicate(start.progress, axis)
    if start.choose:
      none = progress._replace(ever=jax.tree.map(jnp.zeros_like, progress.ever))
      progress = update(problem.init_masks, start.step, none)

    def advance(progress, begin, end):
      nonlocal timing, compiled
      begun = time.monotonic()
      state, metrics = feed.advance(progress.state, begin, end)
      if compiled:  # The first chunk of a process compiles.
        seconds = timing.seconds + time.monotonic() - begun
        timing = Timing(timing.steps + end - begin, seconds)
      compiled = True
      return progress._replace(state=state), metrics

    def kept(line):
      step = line.get('step')
      return isinstance(step, int) and step <= start.step

    write, bar = None, None
    if first:
      write = output.Metrics(out_dir / 'metrics.jsonl', kept)
      ending.callback(write.close)
      bar = output.Progress(settings.steps, start.step)

    def report(step, metrics):
      if write is not None:
        write({'step': step, **metrics})
      if bar is not None:
        bar.at(step, metrics)

    every, evaluate = settings.evaluate_every, None
    if every:
      evaluate = evaluation.make_evaluate(
        problem,
        feed,
        settings,
        histograms=settings.histograms,
        compare_signs=settings.init_from is None,
        timing=timing,
      )

    def evaluates(step):
      return every and (step % every == 0 or step == settings.steps)

    def save(step, progress, best=None):
      saved = devices.unreplicate(progress, axis)
      checkpoint.save(manager, step, saved, timing._asdict(), best)

    def measure_and_save(step, progress):
      best = None
      if evaluate is not None and evaluates(step):
        state, ever = devices.unreplicate(progress, axis)
        found = evaluate(step, state, ever, timing)
        best = {evaluation.BEST: found.metrics[evaluation.BEST]}
        if write is not None:
          write({'step': step, **found.metrics}, found.histograms)
      save(step, progress, best)

    def is_due(step):
      return evaluates(step) or step % settings.checkpoint_every == 0

    step, progress = loop.run(
      advance,
      progress,
      start=start.step,
      stop=settings.steps,
      before=[
        loop.Hook(
          problem.method.due,
          lambda step, state: update(problem.update_masks, step, state),
        )
      ],
      after=[loop.Hook(is_due, measure_and_save)],
      report=report,
      recipe=optimisers.recipe(settings, settings.alpha),
      stopped=lambda: devices.any_host(asked.is_set()),
    )
    save(step, progress)  # Does nothing if it is the newest.
    feed.close()
    if bar is not None:
      bar.close()
  progress = devices.unreplicate(progress, axis)
  return (progress, timing) if step == settings.steps else None


def fingerprint(state: training.TrainState) -> str:
  """The SHA-256 of phi and the masks, by which equal runs are recognised.

  Args:
    state: the training state, as one device holds it.

  Returns:
    The digits, in hexadecimal.
  """
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get((state.phi, state.masks))):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def summarise(
  problem: problem_lib.Problem,
  progress: Progress,
  accuracy: Mapping[str, float],
  timing: Timing,
  steps: int,
) -> dict[str, Any]:
  """Makes the content of summary.json.

  Args:
    problem: what was trained.
    progress: that at the end of the run, as it is on one device.
    accuracy: returned by `evaluation.last`.
    timing: that of the steps.
    steps: the number of steps of the run.

  Returns:
    A dict that JSON can hold.
  """
  state, layers = progress.state, problem.layer_flops
  masks, ever = jax.device_get((state.masks, progress.ever))
  reports = [report_lib.sparsity_report(m, state.phi) for m in (*masks, ever)]
  found = [{r['path']: r['density'] for r in x['layers']} for x in reports]
  densities = methods.Densities(
    *({path: x.get(path, 1.0) for path in layers} for x in found)
  )
  dense = math.fsum(layers.values())
  kept = flops.inference_flops(layers, densities.forward)
  inference = math.fsum(kept.values())
  step = problem.method.training_flops(layers, densities)
  return {
    **accuracy,
    **evaluation.sparsities(reports[0]),
    'explored': reports[-1]['total']['density'],
    'inference_flops': {'absolute': inference, 'relative': inference / dense},
    # These are for one example per step, over the whole run.
    'training_flops': {
      'absolute': step * steps,
      'relative': step / flops.training_flops(dense),
    },
    'steps_per_second': (
      timing.steps / timing.seconds if timing.seconds else None
    ),
    'fingerprint': fingerprint(state),
  }


def table(summary: dict[str, Any]) -> str:
  """The summary as text for a person to read.

  Args:
    summary: returned by `summarise`.

  Returns:
    Text of several lines.
  """
  rows = [(k, f'{v:.4f}') for k, v in summary['sparsity'].items()]
  lines = [output.table(rows, ('layer', 'sparsity')), '']
  rows = []
  for name in ('valid_accuracy', 'valid_top5', 'test_accuracy', 'test_top5'):
    if name in summary:
      rows.append((name, f'{100 * summary[name]:.2f} %'))
  for name, unit in (
    ('inference_flops', 'per image'),
    ('training_flops', 'per image of a batch'),
  ):
    value = summary[name]
    shown = f'{value["absolute"]:.4g} {unit} ({value["relative"]:.3f} x dense)'
    rows.append((name, shown))
  rows.append(('weights ever in use', f'{summary["explored"]:.4f}'))
  rows.append(('dead units', str(summary['dead_units'])))
  if summary['steps_per_second'] is not None:
    rows.append(('steps per second', f'{summary["steps_per_second"]:.1f}'))
  lines += [output.table(rows), f'fingerprint {summary["fingerprint"]}']
  return '\n'.join(lines)


def main(settings: Settings) -> None:
  """Trains and evaluates the network, and writes and prints the summary."""
  with config.refusing():
    settings_lib.connect(settings)
    settings = problem_lib.stretched(settings)
  output.announce('sparse_training')
  with config.refusing():
    data = problem_lib.load(settings)
    problem = problem_lib.make(settings, data)
  deciding = config.deciding(settings) | {'data': problem_lib.fingerprint(data)}
  with output.opened(settings.out_dir, 'sparse_training', deciding) as out_dir:
    with config.refusing():
      feed = problem.make_feed()
      manager = checkpoint.open_manager(
        out_dir / 'checkpoints',
        {'binary': 'sparse_training', **deciding},
        best=evaluation.BEST,
      )
    try:
      ended = train(problem, feed, manager, settings, out_dir)
    finally:
      checkpoint.close(manager)
    if ended is None:
      print('\nInterrupted. The same command goes on.', file=sys.stderr)
      sys.exit(130)
    progress, timing = ended
    theta = training.masked_theta(progress.state, problem.transform)
    accuracy = evaluation.last(feed, theta, progress.state.model_state)
    summary = summarise(problem, progress, accuracy, timing, settings.steps)
    if jax.process_index() == 0:
      output.write_json(out_dir / 'summary.json', summary)
      print(table(summary))
      print(f'\nIn {out_dir}: summary.json, checkpoints')


if __name__ == '__main__':
  config.run(main, Settings, presets.PRESETS)

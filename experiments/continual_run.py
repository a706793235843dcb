"""A run of continual learning: one network taken through all tasks.

At the boundary of two tasks everything is in a `Progress`, which is written to
a checkpoint: a run that was killed goes on at the task where it was, and ends
with the same numbers. Each task draws from keys of its own.
"""

from collections.abc import Callable
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments import continual_data
from experiments import continual_inference
from experiments import continual_problem
from experiments import continual_progress
from experiments import continual_pruning
from experiments import runner
from powerprop_jax import continual
from powerprop_jax.continual import report as continual_report
from powerprop_jax.data import in_memory
from powerprop_jax.sparse import masks
from powerprop_jax.training import checkpoint

PHASES: tuple[str, ...] = ('data', 'train', 'search', 'retrain', 'evaluate')


def _timed(
  seconds: dict[str, float], phase: str, f: Callable[..., Any]
) -> Callable[..., Any]:
  """A function that adds to the seconds of a phase how long it took."""

  def timed(*args):
    begin = time.time()
    result = jax.block_until_ready(f(*args))
    seconds[phase] = seconds.get(phase, 0.0) + time.time() - begin
    return result

  return timed


def _accuracy(
  problem: continual_problem.Problem,
  memory: continual.Memory,
  task: continual.Task,
  split: in_memory.Split,
) -> float:
  """The accuracy of a task, from its stored mask."""
  return problem.accuracy(*problem.recall(memory, task), split)


def _learn(
  problem: continual_problem.Problem,
  progress: continual_progress.Progress,
  settings: dict[str, Any],
  init_key: jax.Array,
  train_key: jax.Array,
  part: Callable[[int, str], in_memory.Split],
  seconds: dict[str, float],
  log: Callable[[int, dict[str, Any]], None],
) -> tuple[continual.Memory, continual.Task, dict[str, Any]]:
  """Learns the next task: the memory, the task, and what there is to say."""
  index, record = len(progress.tasks), {}
  train_part = part(index, 'train')

  def train(memory, chosen, retraining):
    data = (train_part.images, train_part.labels)
    key = jax.random.fold_in(train_key, retraining)
    return problem.train(
      memory,
      chosen,
      progress.anchors,
      data,
      key,
      index,
      retraining,
      lambda count, metrics: log(count, {'task': index, **metrics}),
    )

  def choose(memory, index, *valid):
    assert problem.choose is not None
    find = _timed(seconds, 'search', problem.choose)
    mask, choice = find(memory, index, *valid)
    record.update(continual_pruning.describe(choice))
    if choice is not None:
      record['search_seconds'] = seconds['search']
    if settings['retrain_steps']:
      # Reported, and never decided by: what pruning leaves by itself.
      pruned = continual.store(memory, mask, problem.layout)
      test = part(index, 'test')
      record['pruned_test_accuracy'] = _accuracy(problem, memory, pruned, test)
    return mask, choice

  masked = bool(progress.memory.owners)
  memory, task, _ = continual.learn_task(
    progress.memory,
    index,
    problem.fresh(init_key),
    problem.layout,
    train=_timed(seconds, 'train', functools.partial(train, retraining=False)),
    choose=choose if problem.choose else None,
    retrain=_timed(
      seconds, 'retrain', functools.partial(train, retraining=True)
    )
    if settings['retrain_steps'] and masked
    else None,
    valid=part(index, 'valid'),
    omit=problem.omit,
  )
  owners = memory.owners
  kept = jax.tree.map(jnp.sum, masks.unpack(task.packed, owners))
  size = sum(owner.size for owner in owners.values())
  record['density'] = int(sum(kept.values())) / size if size else 1.0
  record['bytes'] = continual.num_bytes(task)
  return memory, task, record


def _evaluate(
  problem: continual_problem.Problem,
  progress: continual_progress.Progress,
  part: Callable[[int, str], in_memory.Split],
  which: str,
  every: bool,
) -> list[float | None]:
  """Accuracies of all tasks that were learnt, or of the last alone."""
  last = len(progress.tasks) - 1
  return [
    _accuracy(problem, progress.memory, task, part(t, which))
    if every or t == last
    else None
    for t, task in enumerate(progress.tasks)
  ]


def _advance(
  problem: continual_problem.Problem,
  progress: continual_progress.Progress,
  settings: dict[str, Any],
  keys: jax.Array,
  part: Callable[[int, str], in_memory.Split],
  log: Callable[[int, dict[str, Any]], None],
) -> continual_progress.Progress:
  """Learns the next task, and evaluates it and those before it."""
  t, seconds = len(progress.tasks), dict.fromkeys(PHASES, 0.0)
  _timed(seconds, 'data', part)(t, 'train')
  init_key, train_key, anchor_key = (jax.random.fold_in(k, t) for k in keys)
  memory, task, record = _learn(
    problem, progress, settings, init_key, train_key, part, seconds, log
  )
  anchors = problem.anchor(
    memory, progress.anchors, part(t, 'train'), anchor_key
  )
  progress = progress._replace(
    memory=memory, anchors=anchors, tasks=[*progress.tasks, task]
  )
  every = (t + 1) % settings['evaluate_every'] == 0
  every |= t + 1 == settings['tasks']
  row = _timed(seconds, 'evaluate', _evaluate)(
    problem, progress, part, 'test', every
  )
  accuracies = {
    'test_accuracy': row[-1],
    'valid_accuracy': _accuracy(problem, memory, task, part(t, 'valid')),
  }
  log(0, {'task': t, **accuracies, 'density': record['density']})
  record = {'task': t, **accuracies, **record, 'seconds': seconds}
  return progress._replace(
    records=[*progress.records, record], matrix=[*progress.matrix, row]
  )


def _reports(progress: continual_progress.Progress) -> dict[str, Any]:
  """What there is to say of all tasks together."""
  records, owners = progress.records, progress.memory.owners
  report = continual_report.accuracy_report(progress.matrix) | {
    'num_tasks': len(records),
    'density': [record['density'] for record in records],
    'bytes_per_task': records[-1]['bytes'],
    'seconds': {
      phase: sum(record['seconds'][phase] for record in records)
      for phase in PHASES
    },
  }
  if owners:
    owners = jax.device_get(owners)
    packed = [jax.device_get(task.packed) for task in progress.tasks]
    report |= continual_report.capacity_report(owners, len(records))
    report |= continual_report.mask_report(packed, owners)
  return report


def _infer(
  problem: continual_problem.Problem,
  progress: continual_progress.Progress,
  part: Callable[[int, str], in_memory.Split],
  count: int,
) -> dict[str, dict[str, float]]:
  """How often the first tasks are told from their test images."""

  def images_of(t):
    images, labels = map(jnp.asarray, part(t, 'test'))
    return images[: int(jnp.sum(labels >= 0))]

  learnt = progress.tasks[:count]
  found = [problem.recall(progress.memory, task) for task in learnt]
  networks = jax.tree.map(lambda *x: jnp.stack(x), *found)
  return continual_inference.evaluate(
    problem.logits, networks, images_of, count
  )


def _all_tasks(
  problem: continual_problem.Problem,
  settings: dict[str, Any],
  keys: jax.Array,
  part: Callable[[int, str], in_memory.Split],
  manager: checkpoint.Manager,
  report: runner.Report,
) -> tuple[continual_progress.Progress, str | None]:
  """Learns what is not learnt yet: the progress, and why it stopped early."""
  # On the device of the data from the start: compiled functions tell arrays
  # that are bound to a device from others, and would be compiled for both.
  place = functools.partial(jax.device_put, device=keys.device)
  # The network before the first task is that with which the task begins.
  fresh = problem.fresh(jax.random.fold_in(keys[0], 0))
  memory = place(continual.init_memory(*fresh, problem.layout))
  start = continual_progress.start(memory, place(problem.anchor(memory)))
  progress = continual_progress.restore(manager, start, problem.layout)
  memory, anchors, learnt = place(progress[:3])
  progress = progress._replace(memory=memory, anchors=anchors, tasks=learnt)
  for step, metrics in progress.history:
    report(step, metrics)
  done = progress.history[-1][0] if progress.history else 0

  def log(count, metrics):
    nonlocal done
    done += count
    progress.history.append((done, metrics))
    report(done, metrics)

  while len(progress.tasks) < settings['tasks']:
    t, owners = len(progress.tasks), progress.memory.owners
    if owners and not continual.free_count(owners):
      return progress, (
        f'no weight is free for task {t}; the {t} tasks before it are learnt'
        ' and stay. Lower --gamma or --cap, add lower --densities, decay phi'
        ' (--phi_decay), or take a larger --network.'
      )
    progress = _advance(problem, progress, settings, keys, part, log)
    continual_progress.save(manager, progress)
  return progress, None


def run(
  job: continual_problem.Job,
  problem: continual_problem.Problem,
  settings: dict[str, Any],
  name: str,
  num_classes: int,
  out_dir: pathlib.Path,
  data: tuple[in_memory.Split, ...],
  report: runner.Report,
) -> dict[str, Any]:
  """Takes one network through all tasks.

  Args:
    job: which one.
    problem: as of `continual_problem.make_problem`.
    settings: the flags.
    name: of the data set.
    num_classes: of the data set.
    out_dir: the folder of results.
    data: train, valid and test split, on the device.
    report: called with the step, over all tasks, and metrics.

  Returns:
    What the summary needs of it.

  Raises:
    runner.Diverged: if the loss becomes NaN or infinite.
    ValueError: if the network cannot learn a task.
  """
  dataset = in_memory.Dataset(name, *data, num_classes=num_classes)
  benchmark = continual_data.make_benchmark(settings, dataset, job.seed)
  part = continual_data.make_part(benchmark, settings['tasks'])
  device = jnp.asarray(part(0, 'train').images).device
  keys = jax.random.split(jax.device_put(jax.random.key(job.seed), device), 3)
  manager = checkpoint.open_manager(
    out_dir / 'checkpoints' / job.name, settings | job._asdict(), keep=2
  )
  try:
    progress, stopped = _all_tasks(
      problem, settings, keys, part, manager, report
    )
  finally:
    checkpoint.close(manager)
  if any(x is None for x in progress.matrix[-1]):
    progress.matrix[-1] = _evaluate(problem, progress, part, 'test', True)
  return {
    **job._asdict(),
    'stopped': stopped,
    **_reports(progress),
    'valid_accuracy': _evaluate(problem, progress, part, 'valid', True),
    'tasks': progress.records,
    'task_inference': {
      str(count): _infer(problem, progress, part, count)
      for count in settings['infer_tasks']
      if count <= len(progress.tasks)
    },
  }

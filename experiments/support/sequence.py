"""Takes one network through a sequence of tasks.

Each task draws its random numbers from keys of its own, and after each task
everything is in a checkpoint (see `progress`).
"""

from collections.abc import Callable
import functools
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp

from experiments.support import config
from experiments.support import progress as progress_lib
from experiments.support import runs
from experiments.support import tasks as tasks_lib
from powerprop_jax import continual
from powerprop_jax.continual import benchmarks
from powerprop_jax.continual import report as continual_report
from powerprop_jax.continual import task_inference
from powerprop_jax.data import in_memory
from powerprop_jax.sparse import masks
from powerprop_jax.training import checkpoint

BINARY = 'continual_learning'
PHASES: tuple[str, ...] = ('data', 'train', 'search', 'retrain', 'evaluate')


class _Run(NamedTuple):
  """What learning a task needs besides the progress of earlier tasks.

  Attributes:
    job: which run it is.
    problem: the functions of its method and power.
    settings: those of the run.
    benchmark: its tasks.
    keys: random keys [3], of the initialisation, of training, and of the
      anchors of EWC.
    watch: follows the run and stops it.
  """

  job: tasks_lib.Job
  problem: tasks_lib.Problem
  settings: tasks_lib.Settings
  benchmark: benchmarks.Benchmark
  keys: jax.Array
  watch: runs.Watch

  def accuracy(
    self, memory: continual.Memory, task: continual.Task, t: int, which: str
  ) -> float:
    """The accuracy of task t, from its stored mask."""
    network = self.problem.recall(memory, task)
    return self.problem.accuracy(*network, self.benchmark.part(t, which))

  def accuracies(
    self, progress: progress_lib.Progress, which: str, every: bool = True
  ) -> list[float | None]:
    """The accuracies of learnt tasks; if not `every`, None but for the last."""
    last = len(progress.tasks) - 1
    return [
      self.accuracy(progress.memory, task, t, which)
      if every or t == last
      else None
      for t, task in enumerate(progress.tasks)
    ]


def _timed(
  seconds: dict[str, float], phase: str, f: Callable[..., Any]
) -> Callable[..., Any]:
  """Wraps a function so that its duration is added to those of a phase."""

  def timed(*args):
    begin = time.time()
    result = jax.block_until_ready(f(*args))
    seconds[phase] += time.time() - begin
    return result

  return timed


def _describe(choice: continual.Choice | None) -> dict[str, Any]:
  """The record of how a mask was chosen."""
  if choice is None:
    return {}
  return {
    'dense_valid_accuracy': choice.dense,
    'pruned_valid_accuracy': choice.performance,
    'target_met': choice.met,
    'searched_density': choice.density,
    'evaluated': [list(pair) for pair in choice.evaluated],
    'evaluations': len(choice.evaluated),
  }


def _before(
  run: _Run, memory: continual.Memory, fresh: tuple[Any, Any], t: int
) -> float:
  """The test accuracy on a task before it is learnt, of the dense network."""
  problem = run.problem
  memory = continual.begin_task(memory, fresh, problem.layout)
  used = continual.training_masks(memory, problem.layout, t, problem.omit)
  theta = problem.transform.to_theta(memory.phi)
  theta = masks.apply_mask(theta, used.forward)
  part = run.benchmark.part(t, 'test')
  return problem.accuracy(theta, memory.model_state, part)


def _learn(
  run: _Run,
  progress: progress_lib.Progress,
  seconds: dict[str, float],
  log: Callable[[int, dict[str, Any]], None],
) -> tuple[continual.Memory, continual.Task, dict[str, Any]]:
  """Learns the next task; returns the memory, the task, and a record of it."""
  t, problem, settings = len(progress.tasks), run.problem, run.settings
  part, record = functools.partial(run.benchmark.part, t), {}
  init_key, train_key = (jax.random.fold_in(key, t) for key in run.keys[:2])

  def train(memory, chosen, retraining):
    reported = 0

    def report(step, metrics):
      nonlocal reported
      log(step - reported, {'task': t + 1, **metrics})
      reported = step

    return problem.train(
      memory,
      chosen,
      progress.anchors,
      part('train'),
      run.benchmark.size(t, 'train'),
      jax.random.fold_in(train_key, retraining),
      t,
      retraining,
      run.watch._replace(report=report),
    )

  def choose(memory, index, *valid):
    assert problem.choose is not None
    mask, choice = _timed(seconds, 'search', problem.choose)(
      memory, index, *valid
    )
    record.update(_describe(choice))
    if choice is not None:
      record['search_seconds'] = seconds['search']
    if settings.retrain_steps:
      # The accuracy that pruning leaves by itself is reported; it decides
      # nothing.
      pruned = continual.store(memory, mask, problem.layout)
      record['pruned_test_accuracy'] = run.accuracy(memory, pruned, t, 'test')
    return mask, choice

  masked = problem.choose is not None
  fresh = problem.fresh(init_key)
  before = _timed(seconds, 'evaluate', _before)
  record['test_accuracy_before'] = before(run, progress.memory, fresh, t)
  memory, task, _ = continual.learn_task(
    progress.memory,
    t,
    fresh,
    problem.layout,
    train=_timed(seconds, 'train', functools.partial(train, retraining=False)),
    choose=choose if masked else None,
    retrain=_timed(
      seconds, 'retrain', functools.partial(train, retraining=True)
    )
    if settings.retrain_steps and masked
    else None,
    valid=part('valid'),
    omit=problem.omit,
  )
  kept = jax.tree.map(jnp.sum, masks.unpack(task.packed, memory.owners))
  size = sum(owner.size for owner in memory.owners.values())
  record['density'] = int(sum(kept.values())) / size if size else 1.0
  record['bytes'] = continual.num_bytes(task)
  return memory, task, record


def _advance(
  run: _Run,
  progress: progress_lib.Progress,
  log: Callable[[int, dict[str, Any]], None],
) -> progress_lib.Progress:
  """Learns the next task, and evaluates it and those before it."""
  t, seconds = len(progress.tasks), dict.fromkeys(PHASES, 0.0)
  train_part = _timed(seconds, 'data', run.benchmark.part)(t, 'train')
  memory, task, record = _learn(run, progress, seconds, log)
  anchor_key = jax.random.fold_in(run.keys[2], t)
  progress = progress._replace(
    memory=memory,
    anchors=run.problem.anchor(
      memory, progress.anchors, train_part, anchor_key
    ),
    tasks=[*progress.tasks, task],
  )
  every = (t + 1) % run.settings.evaluate_every == 0
  every |= t + 1 == run.settings.tasks
  row = _timed(seconds, 'evaluate', run.accuracies)(progress, 'test', every)
  accuracies = {
    'test_accuracy': row[-1],
    'valid_accuracy': run.accuracy(memory, task, t, 'valid'),
  }
  log(0, {'task': t + 1, **accuracies, 'density': record['density']})
  record = {'task': t + 1, **accuracies, **record, 'seconds': seconds}
  return progress._replace(
    records=[*progress.records, record], matrix=[*progress.matrix, row]
  )


def _all_tasks(
  run: _Run, manager: checkpoint.Manager
) -> tuple[progress_lib.Progress, str | None]:
  """Learns the remaining tasks; returns the progress, and why it stopped early.

  The reason is None if all tasks were learnt.
  """
  problem = run.problem
  # All arrays are on the device of the data from the start: compiled functions
  # tell arrays that are bound to a device from others, and would be compiled
  # for both.
  place = functools.partial(jax.device_put, device=run.keys.device)
  # The network before the first task is the one with which that task begins.
  fresh = problem.fresh(jax.random.fold_in(run.keys[0], 0))
  memory = place(continual.init_memory(*fresh, problem.layout))
  first = progress_lib.start(memory, place(problem.anchor(memory)))
  with config.refusing():
    progress = progress_lib.restore(manager, first, problem.layout)
  memory, anchors, learnt = place(progress[:3])
  progress = progress._replace(memory=memory, anchors=anchors, tasks=learnt)
  for step, metrics in progress.history:
    run.watch.report(step, metrics)
  done = progress.history[-1][0] if progress.history else 0

  def log(count, metrics):
    nonlocal done
    done += count
    progress.history.append((done, metrics))
    run.watch.report(done, metrics)

  while len(progress.tasks) < run.settings.tasks:
    t, owners = len(progress.tasks), progress.memory.owners
    if owners and not continual.free_count(owners):
      return progress, (
        f'no weight is free for task {t + 1}; the {t} tasks before it are'
        ' learnt and stay. Lower --gamma or --cap, add lower --densities, decay'
        ' phi (--phi_decay), or take a larger --network.'
      )
    progress = _advance(run, progress, log)
    progress_lib.save(manager, progress)
  return progress, None


def _initial(run: _Run, count: int) -> list[float]:
  """The test accuracies of the network at its initialisation."""
  phi, state = run.problem.fresh(jax.random.fold_in(run.keys[0], 0))
  theta = run.problem.transform.to_theta(phi)
  parts = (run.benchmark.part(t, 'test') for t in range(count))
  return [run.problem.accuracy(theta, state, part) for part in parts]


def _reports(run: _Run, progress: progress_lib.Progress) -> dict[str, Any]:
  """The report on all tasks together."""
  records, owners = progress.records, progress.memory.owners
  rows = progress.matrix
  report = continual_report.accuracy_report(rows)
  # Each row goes on with the accuracy on the task that comes next.
  following = [[r['test_accuracy_before']] for r in records[1:]]
  before = [a + b for a, b in zip(rows, [*following, []])]
  initial = _initial(run, len(records))
  transfer = continual_report.accuracy_report(before, initial=initial)
  names = ('zero_shot_transfer', 'mean_zero_shot_transfer')
  report |= {name: transfer[name] for name in names} | {
    'initial_test_accuracy': initial,
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
  run: _Run, progress: progress_lib.Progress, count: int
) -> dict[str, dict[str, float]]:
  """How often each rule finds the task of test images among the first ones."""

  def images_of(t):
    images = run.benchmark.part(t, 'test').images
    return jnp.asarray(images)[: run.benchmark.size(t, 'test')]

  learnt = progress.tasks[:count]
  found = [run.problem.recall(progress.memory, task) for task in learnt]
  networks = jax.tree.map(lambda *x: jnp.stack(x), *found)
  return task_inference.compare_rules(
    run.problem.logits, networks, images_of, count
  )


def learn_all(
  job: tasks_lib.Job,
  problem: tasks_lib.Problem,
  settings: tasks_lib.Settings,
  deciding: dict[str, Any],
  dataset: in_memory.Dataset,
  out_dir: epath.Path,
  data: tuple[in_memory.Split, ...],
  watch: runs.Watch,
) -> dict[str, Any]:
  """Takes one network through all tasks.

  Args:
    job: which run it is.
    problem: made by `tasks.make_problem` for its method and power.
    settings: those of the run.
    deciding: the settings that decide the result, and the fingerprint of the
      data, which must be equal for a run to go on.
    dataset: the data set, of which only the name and the number of classes are
      used.
    out_dir: the folder of results.
    data: the train, valid and test splits, on the device.
    watch: follows the run and stops it.

  Returns:
    The result of the run, a dict that JSON can hold.

  Raises:
    loop.Diverged: if the loss becomes NaN or infinite.
    loop.Interrupted: if the run is stopped.
    config.Refused: if its checkpoints are those of another run, or damaged.
  """
  train, valid, test = data
  local = dataset._replace(train=train, valid=valid, test=test)
  benchmark = tasks_lib.make_benchmark(settings, local, job.seed)
  # The parts of a task are asked for again until the next one begins.
  part = functools.lru_cache(maxsize=3)(benchmark.part)
  device = jnp.asarray(part(0, 'train').images).device
  keys = jax.random.split(jax.device_put(jax.random.key(job.seed), device), 3)
  run = _Run(job, problem, settings, benchmark._replace(part=part), keys, watch)
  manager = checkpoint.open_manager(
    out_dir / 'checkpoints' / job.name,
    {'binary': BINARY, **deciding, **job._asdict()},
    keep=2,
  )
  try:
    progress, stopped = _all_tasks(run, manager)
  finally:
    checkpoint.close(manager)
  if any(x is None for x in progress.matrix[-1]):
    progress.matrix[-1] = run.accuracies(progress, 'test')
  return {
    **job._asdict(),
    'stopped': stopped,
    **_reports(run, progress),
    'valid_accuracy': run.accuracies(progress, 'valid'),
    'tasks': progress.records,
    'task_inference': {
      str(count): _infer(run, progress, count)
      for count in settings.infer_tasks
      if count <= len(progress.tasks)
    },
  }

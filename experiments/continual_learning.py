"""Continual learning: many tasks in one network, none forgotten.

  python -m experiments.continual_learning --method=epn --alpha=2

learns five tasks of permuted digits with EfficientPackNet (section 4 of the
paper). Lists of methods and powers, and several seeds, make a table:

  python -m experiments.continual_learning --method=epn,packnet --alpha=1,2 \
    --seeds=3

The default data set, mnist_5k, comes with an installed package. --out_dir gets
config.json, metrics.jsonl, one file a run in runs/, summary.json, figures, and
the network with the masks of its tasks in checkpoints/. It may be killed at any
moment: the same command goes on at the task where it was, and ends with the
same result. Every choice is made on validation data; test data are only
reported.
"""

from collections.abc import Sequence
import functools
from typing import Any

from absl import app
from absl import flags
import numpy as np

from experiments import common
from experiments import continual_data
from experiments import continual_problem
from experiments import continual_pruning
from experiments import continual_run
from experiments import continual_summary
from experiments import optimiser_flags
from experiments import runner
from experiments.presets import continual as presets
from powerprop_jax import power
from powerprop_jax.continual import benchmarks
from powerprop_jax.continual import search
from powerprop_jax.data import in_memory
from powerprop_jax.models import networks

_DENSITIES = [f'{p:.4g}' for p in np.geomspace(0.01, 1.0, 24)]


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this binary."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  real = functools.partial(flags.DEFINE_float, flag_values=values)
  enum = functools.partial(flags.DEFINE_enum, flag_values=values)
  boolean = functools.partial(flags.DEFINE_bool, flag_values=values)
  several = functools.partial(flags.DEFINE_list, flag_values=values)
  several('method', ['epn'], f'Among {", ".join(continual_problem.METHODS)}.')
  several('alpha', ['2'], 'Powers; 1 is the baseline.')
  integer('seeds', 1, 'Runs of each method and power.', 1)
  enum('benchmark', 'permuted', continual_data.BENCHMARKS, 'What tasks are.')
  string('dataset', 'mnist_5k', 'mnist_5k, idx, or the name of a TFDS set.')
  string('data_dir', None, 'Where TFDS or idx files lie.')
  integer('tasks', 5, 'How many tasks to learn; only PackNet uses it.', 1)
  integer('classes_per_task', 2, 'Of the benchmark split.', 2)
  enum('network', 'lenet_300_100', sorted(networks.NETWORKS), 'The network.')
  integer('steps_per_task', 2_000, 'Training steps of a task.', 1)
  integer('retrain_steps', 500, 'Steps under the mask; 0 leaves them out.', 0)
  real('retrain_learning_rate', None, 'Its peak; --learning_rate if not given.')
  integer('batch_size', 100, 'Examples a step, over all devices.', 1)
  real(
    'gamma',
    0.99,
    'EPN: share of the dense validation accuracy that pruning has to leave.',
  )
  enum('search', 'binary', continual_pruning.SEARCHES, 'EPN: for the density.')
  integer('search_steps', 5, 'Of the binary search.', 0)
  several('densities', _DENSITIES, 'EPN: candidates, rising, in (0, 1].')
  real('min_density', 0.0, 'EPN: the least that a task may have.', 0.0, 1.0)
  real('max_density', 1.0, 'EPN: the largest.', 0.0, 1.0)
  real(
    'cap',
    None,
    'EPN, not in the paper: how much of all weights a task may take anew.',
    0.0,
    1.0,
  )
  boolean(
    'omit_first_layer',
    False,
    "EPN, not in the paper: leaves earlier tasks' weights of the first layer"
    ' out of the training and the mask of a new task.',
  )
  enum('heads', 'task', ['task', 'shared'], 'A last layer a task, or one.')
  enum('biases', 'task', ['task', 'frozen'], 'A copy a task, or of the first.')
  enum('norm', 'task', ['task', 'frozen'], 'Likewise, for normalisation.')
  real('ewc_strength', 10.0, "EWC: of the pull to earlier tasks' weights.", 0)
  several(
    'infer_tasks',
    [],
    'Among how many of the first tasks to tell the task of images at the end.',
  )
  integer('evaluate_every', 1, 'Tasks between evaluations of all earlier.', 1)
  boolean('data_parallel', False, 'Share every batch out among all devices.')
  string('out_dir', 'results/continual_learning', 'Folder of results.')
  names = sorted(presets.PRESETS)
  flags.DEFINE_enum('preset', None, names, 'Settings.', flag_values=values)
  optimiser_flags.define_flags(values)
  values.set_default('momentum', 0.9)
  values.set_default('learning_rate', 0.1)
  values.set_default('schedule', 'cosine')
  values.set_default('phi_decay', 7e-4)
  values.set_default('clip_norm', 1.0)
  values.set_default('phi_decay_schedule', 'cosine')


# The flags that decide the result of a run; the others say which runs.
_RUN_FLAGS = (
  'benchmark',
  'dataset',
  'tasks',
  'classes_per_task',
  'network',
  'steps_per_task',
  'retrain_steps',
  'retrain_learning_rate',
  'batch_size',
  'gamma',
  'search',
  'search_steps',
  'densities',
  'min_density',
  'max_density',
  'cap',
  'omit_first_layer',
  'heads',
  'biases',
  'norm',
  'ewc_strength',
  'infer_tasks',
  'evaluate_every',
  'data_parallel',
  *optimiser_flags.NAMES,
)


def parse_jobs(
  methods: Sequence[str], alphas: Sequence[str], seeds: int
) -> list[continual_problem.Job]:
  """The runs that the flags ask for.

  Raises:
    ValueError: if there is no such method, or an alpha is impossible.
  """
  for method in methods:
    if method not in continual_problem.METHODS:
      raise ValueError(
        f'--method must be among {", ".join(continual_problem.METHODS)}, got'
        f' {method!r}.'
      )
  powers = common.parse_numbers(alphas, 'alpha', power.check_alpha)
  return [
    continual_problem.Job(method, alpha, seed)
    for seed in range(seeds)
    for method in dict.fromkeys(methods)
    for alpha in dict.fromkeys(powers)
  ]


def read_flags(
  values: flags.FlagValues,
) -> tuple[list[continual_problem.Job], dict[str, Any]]:
  """The runs, and the settings that they share, checked."""
  if values.preset:
    common.apply_preset(values, presets.PRESETS[values.preset])
  jobs = parse_jobs(values.method, values.alpha, values.seeds)
  settings: dict[str, Any] = {n: values[n].value for n in _RUN_FLAGS}
  counts = common.parse_numbers(settings['infer_tasks'], 'infer_tasks')
  for count in counts:
    if count not in range(1, settings['tasks'] + 1):
      raise ValueError(
        f'--infer_tasks={count:g} must be a whole number from 1 to --tasks='
        f'{settings["tasks"]}.'
      )
  settings['infer_tasks'] = [int(count) for count in counts]
  if settings['retrain_learning_rate'] is None:
    settings['retrain_learning_rate'] = settings['learning_rate']
  if not 0.0 <= settings['gamma'] <= 1.0:
    raise ValueError(
      f'--gamma={settings["gamma"]:g} must be in [0, 1]: it is the share of the'
      ' dense accuracy that pruning has to leave.'
    )
  try:
    settings['densities'] = [float(p) for p in settings['densities']]
    search.check_densities(
      settings['densities'], settings['min_density'], settings['max_density']
    )
  except ValueError as e:
    raise ValueError(f'--densities: {e}') from e
  return jobs, settings


def check_batch_size(
  settings: dict[str, Any], benchmark: benchmarks.Benchmark
) -> None:
  """Raises ValueError if a task has fewer examples than a batch."""
  size = len(benchmark.part(0, 'train').labels)
  if settings['batch_size'] > size:
    raise ValueError(
      f'--batch_size={settings["batch_size"]} is more than the {size} training'
      f' examples of a task of {benchmark.name}.'
    )


def main(argv: Sequence[str]) -> None:
  common.check_no_arguments(argv)
  values = flags.FLAGS
  try:
    jobs, settings = read_flags(values)
    data = in_memory.load(values.dataset, values.data_dir)
    if not settings['data_parallel']:
      runner.use_cores(len(jobs))
    benchmark = continual_data.make_benchmark(settings, data, 0)
    problems = {
      kind: continual_problem.make_problem(
        settings, *kind, benchmark.input_shape, benchmark.num_classes
      )
      for kind in dict.fromkeys((job.method, job.alpha) for job in jobs)
    }
    check_batch_size(settings, benchmark)
    out_dir = common.prepare_out_dir(values.out_dir, settings)
  except ValueError as e:
    common.fail(e)
  runs = {
    job.name: functools.partial(
      continual_run.run,
      job,
      problems[job.method, job.alpha],
      settings,
      data.name,
      data.num_classes,
      out_dir,
    )
    for job in jobs
  }
  steps = settings['steps_per_task'] + settings['retrain_steps']
  splits, steps = (data.train, data.valid, data.test), steps * values.tasks
  # On all devices, runs go one after another.
  groups = [{n: f} for n, f in runs.items()] if values.data_parallel else [runs]
  messages, interrupted = [], False
  for group in groups:
    if not interrupted:
      try:
        more, interrupted = runner.run_all(group, splits, steps, out_dir)
      except (ValueError, FileNotFoundError) as e:
        common.fail(e)
      messages += more
  found = runner.finished(out_dir)
  results = {name: found[name] for name in runs if name in found}
  if results:
    continual_summary.write(results, out_dir)
  messages += [
    f'{name}: {result["stopped"]}'
    for name, result in results.items()
    if result['stopped']
  ]
  runner.exit_with(messages, interrupted, len(results), len(runs))


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  app.run(main)

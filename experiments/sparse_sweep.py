"""Accuracy against sparsity of every sparse training method, in one table.

Trains small networks by each method, at each sparsity, with and without
Powerpropagation, on a data set that fits in memory:

  python -m experiments.sparse_sweep --alphas=1,2 --sparsities=0.9,0.98

One network trains on each device, so that on a CPU every core has one. The
results are written to --out_dir: config.json, metrics.jsonl, one file a run in
runs/, summary.json and a figure for each distribution. A command that was
interrupted continues when it is given again. `sparse_training` trains a single
network, of any size, with every flag there is.
"""

from collections.abc import Sequence
import functools
import math

from absl import app
from absl import flags

from experiments import common
from experiments import methods
from experiments import optimiser_flags
from experiments import runner
from experiments import sparse_report
from experiments import sparse_runs
from experiments.presets import sparse_sweep as presets
from powerprop_jax import power
from powerprop_jax.data import in_memory
from powerprop_jax.models import networks


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this binary."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  real = functools.partial(flags.DEFINE_float, flag_values=values)
  several = functools.partial(flags.DEFINE_list, flag_values=values)
  several('methods', list(methods.METHODS), 'Sparse training methods.')
  several('alphas', ['1', '2'], 'Powers, each at least 1.')
  several(
    'learning_rates', [], 'One for each of --alphas; --learning_rate if empty.'
  )
  several('phi_decays', [], 'One for each of --alphas; --phi_decay if empty.')
  several('clip_norms', [], 'One for each of --alphas; --clip_norm if empty.')
  several(
    'sparsities', ['0.8', '0.9', '0.95', '0.98', '0.99'], 'Weights removed.'
  )
  several('distributions', ['erk'], 'uniform, erk and er.')
  integer('seeds', 1, 'Networks of each setting.', 1)
  names = sorted(networks.NETWORKS)
  flags.DEFINE_enum('network', 'lenet_300_100', names, '', flag_values=values)
  string('dataset', 'mnist_5k', 'mnist_5k, idx, or the name of a TFDS set.')
  string('data_dir', None, 'Where TFDS or idx files lie.')
  integer('steps', 1_000, 'Training steps.', 1)
  integer('batch_size', 100, 'Examples a step.', 1)
  integer('update_every', 100, 'Steps between mask updates.', 1)
  real('drop_fraction', 0.3, 'Weights that RigL and SET trade.', 0.0, 1.0)
  real('exploration_penalty', 1e-4, 'Of Top-KAST, in its backward set.', 0.0)
  string('out_dir', 'results/sparse_sweep', 'Folder of results.')
  presets_ = sorted(presets.PRESETS)
  flags.DEFINE_enum('preset', None, presets_, 'Settings.', flag_values=values)
  optimiser_flags.define_flags(values)
  values.set_default('learning_rate', 0.05)
  values.set_default('momentum', 0.9)
  values.set_default('schedule', 'cosine')


# The flags that decide the result of a run; the others say which runs.
RUN_FLAGS = (
  'network',
  'dataset',
  'steps',
  'batch_size',
  'update_every',
  'drop_fraction',
  'exploration_penalty',
  *(n for n in optimiser_flags.NAMES if n not in sparse_runs.Recipe._fields),
)


def _check_amount(value: float) -> float:
  if not 0 <= value < math.inf:
    raise ValueError(f'must be finite and not negative, got {value:g}')
  return value


def parse_recipes(values: flags.FlagValues) -> list[sparse_runs.Recipe]:
  """The recipes of the flags.

  Raises:
    ValueError: if a value is impossible or lists differ in length.
  """
  columns = {'alphas': values.alphas}
  for name in ('learning_rate', 'phi_decay', 'clip_norm'):
    columns[f'{name}s'] = values[f'{name}s'].value or (
      [values[name].value] * len(values.alphas)
    )
  parsed = []
  for name, column in columns.items():
    if len(column) != len(values.alphas):
      raise ValueError(
        f'--{name} has {len(column)} values for {len(values.alphas)} alphas.'
      )
    check = power.check_alpha if name == 'alphas' else _check_amount
    parsed.append(common.parse_numbers(column, name, check))
  return [sparse_runs.Recipe(*values) for values in zip(*parsed)]


def parse_jobs(values: flags.FlagValues) -> list[sparse_runs.Job]:
  """The jobs that the flags ask for.

  Raises:
    ValueError: if a value is impossible.
  """
  for method in values.methods:
    if method not in methods.METHODS:
      raise ValueError(
        f'--methods must be among {", ".join(methods.METHODS)}, got {method!r}.'
      )
  sparsities = common.parse_numbers(values.sparsities, 'sparsities')
  jobs = []
  for method in values.methods:
    # Dense networks have no sparsity, and SNIP ranks all weights together.
    for distribution in values.distributions:
      for sparsity in sparsities if method != 'dense' else [0.0]:
        for recipe in parse_recipes(values):
          d = 'uniform' if method in ('dense', 'snip') else distribution
          seeds = values.seeds
          jobs.append(sparse_runs.Job(method, d, sparsity, recipe, seeds))
  return list(dict.fromkeys(jobs))


def name(job: sparse_runs.Job) -> str:
  """The name of a job and of its file."""
  alpha, rate, decay, clip = job.recipe
  return (
    f'{job.method}-{job.distribution}-{job.sparsity:g}-alpha={alpha:g}'
    f'-lr={rate:g}-decay={decay:g}-clip={clip:g}-seeds={job.seeds}'
  )


def main(argv: Sequence[str]) -> None:
  common.check_no_arguments(argv)
  values = flags.FLAGS
  try:
    if values.preset:
      common.apply_preset(values, presets.PRESETS[values.preset])
    jobs = parse_jobs(values)
    settings = {name: values[name].value for name in RUN_FLAGS}
    data = in_memory.load(values.dataset, values.data_dir)
    # Before JAX makes its devices, which any computation does.
    runner.use_cores(len(jobs))
    make = sparse_runs.make_functions(
      settings, data.train.images.shape[1:], data.num_classes
    )
    runs = {
      name(job): functools.partial(sparse_runs.run, job, make, settings)
      for job in jobs
    }
    for job in jobs:
      make(job)  # What is impossible fails here.
    out_dir = common.prepare_out_dir(values.out_dir, settings)
  except ValueError as e:
    common.fail(e)
  messages, interrupted = runner.run_all(
    runs,
    (data.train, data.valid, data.test),
    values.steps * values.seeds,
    out_dir,
  )
  results = runner.finished(out_dir)
  results = [results[name] for name in runs if name in results]
  if results:
    sparse_report.write(results, values.distributions, out_dir)
  runner.exit_with(messages, interrupted, len(results), len(runs))


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  app.run(main)

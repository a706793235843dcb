"""Accuracy against sparsity of LeNet-300-100: Figure 1 of the paper.

Trains a network for every alpha and seed, prunes it once by magnitude to a
range of densities, without retraining, and evaluates each of them:

  python -m experiments.mnist_pruning --alphas=1,2,3 --seeds=5

The default data set, mnist_5k, comes with an installed package. The results are
written to --out_dir: config.json, metrics.jsonl, one file a run in runs/,
summary.json and three figures. A command that was interrupted continues when it
is given again; what is finished is not computed a second time.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
import time
from typing import Any, NamedTuple

from absl import app
from absl import flags
import jax
import numpy as np

from experiments import common
from experiments import optimiser_flags
from experiments import runner
from experiments.presets import mnist_pruning as presets
from powerprop_jax import analysis
from powerprop_jax import export
from powerprop_jax import plots
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax import types
from powerprop_jax.data import augment
from powerprop_jax.data import in_memory
from powerprop_jax.models import networks
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import pruning
from powerprop_jax.training import classification


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this binary."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  several = functools.partial(flags.DEFINE_list, flag_values=values)
  string('dataset', 'mnist_5k', 'mnist_5k, idx, or the name of a TFDS set.')
  string('data_dir', None, 'Where TFDS or idx files lie.')
  several('alphas', ['1', '2', '3', '4'], 'Powers, each at least 1.')
  integer('seeds', 3, 'Runs of each alpha.', 1)
  integer('steps', 5_000, 'Training steps.', 1)
  integer('batch_size', 60, 'Examples a step.', 1)
  integer('max_shift', 0, 'Pixels to move training images by, at most.', 0)
  several(
    'update_rule',
    ['target_propagation'],
    'target_propagation, chain_rule, or both: whether the optimiser sees the'
    ' gradient at theta or the one at phi.',
  )
  several(
    'scope',
    ['layer'],
    'layer, global, or both: whether each layer is pruned to a density, or all'
    ' weights together.',
  )
  several('kept', presets.KEPT, 'Fractions of the weights to keep.')
  string('out_dir', 'results/mnist_pruning', 'Folder of results.')
  names = sorted(presets.PRESETS)
  flags.DEFINE_enum('preset', None, names, 'Settings.', flag_values=values)
  optimiser_flags.define_flags(values)


# The flags that decide the result of a run; the others say which runs.
_RUN_FLAGS = (
  'dataset',
  'steps',
  'batch_size',
  'max_shift',
  'scope',
  'kept',
  *optimiser_flags.NAMES,
)


class Job(NamedTuple):
  """One run: a network to train and to prune."""

  alpha: float
  update_rule: str
  seed: int


class Functions(NamedTuple):
  """What the runs of one alpha and update rule share, compiled."""

  init: Callable[..., training.TrainState]
  run_steps: Callable[..., tuple[training.TrainState, training.Metrics]]
  to_theta: Callable[[types.Params], types.Params]
  sweeps: dict[str, Callable[..., list[float]]]  # By scope.


def make_functions(
  alpha: float, update_rule: str, settings: dict[str, Any], num_classes: int
) -> Functions:
  """Builds the functions of a run; nothing is compiled yet."""
  network = networks.build('lenet_300_100', num_classes)
  transform = power.power_transform(alpha)
  tx = optimiser_flags.make_tx(
    transform,
    steps=settings['steps'],
    update_rule=update_rule,
    **{name: settings[name] for name in optimiser_flags.NAMES},
  )

  def init(init_key, run_key, images):
    theta, model_state = network.init(init_key, images / 255.0, True)
    return training.init_state(run_key, theta, model_state, tx, transform)

  shift = settings['max_shift']
  prepare = augment.crop_and_flip(shift, False) if shift else augment.scale
  accuracy = classification.make_accuracy(network.apply)
  loss_fn = classification.make_loss(network.apply, prepare=prepare)
  step = training.make_train_step(loss_fn, tx, transform)
  return Functions(
    init=jax.jit(init),
    run_steps=jax.jit(training.make_run_steps(step), donate_argnums=0),
    to_theta=jax.jit(transform.to_theta),
    sweeps={
      scope: pruning.make_prune_sweep(
        accuracy, settings['kept'], **prune_options(scope)
      )
      for scope in settings['scope']
    },
  )


def prune_options(scope: str) -> dict[str, Any]:
  """How networks are pruned, for `pruning.prune`."""
  # The paper's MNIST experiment halves the sparsity of the output layer.
  scale = {'logits': 2.0} if scope == 'layer' else None
  return {'scope': scope, 'density_scale': scale}


def run(
  job: Job,
  functions: Functions,
  settings: dict[str, Any],
  weights_path: pathlib.Path,
  data: tuple[in_memory.Split, ...],
  report: runner.Report,
) -> dict[str, Any]:
  """Trains and prunes one network.

  Args:
    job: which one.
    functions: as of `make_functions`.
    settings: the flags of `_RUN_FLAGS`.
    weights_path: the file to write the trained weights to, for `export_model`.
    data: train, valid and test split, on the device.
    report: called with the step and the metrics as training goes on.

  Returns:
    What the summary needs of it.

  Raises:
    runner.Diverged: if the loss becomes NaN.
  """
  begin = time.time()
  train_split, valid_split, test_split = data
  init_key, run_key, data_key = jax.random.split(jax.random.key(job.seed), 3)
  state = functions.init(init_key, run_key, train_split.images[:1])
  initial = functions.to_theta(state.phi)
  try:
    state = runner.train(
      state,
      functions.run_steps,
      (train_split.images, train_split.labels),
      data_key,
      steps=settings['steps'],
      batch_size=settings['batch_size'],
      report=report,
    )
  except runner.Diverged as e:
    raise runner.Diverged(
      f'{e}, with alpha = {job.alpha:g} and learning_rate ='
      f' {settings["learning_rate"]:g}. Lower the learning rate.'
    ) from e
  theta, seconds = functions.to_theta(state.phi), time.time() - begin
  export.save_compressed(weights_path, theta, masks={}, alpha=job.alpha)

  def sweep(split):
    return {
      scope: f(theta, state.model_state, *split)
      for scope, f in functions.sweeps.items()
    }

  kept, options = settings['kept'], prune_options(settings['scope'][0])
  return {
    **job._asdict(),
    'valid_accuracy': sweep(valid_split),
    'test_accuracy': sweep(test_split),
    'overlap': analysis.mask_overlap(initial, theta, kept, **options),
    # Figures 1c and 1d prune to 90 %.
    'weights': analysis.weight_distribution(initial, theta, 0.1, **options),
    'seconds': seconds,
  }


def summarise(
  results: Sequence[dict[str, Any]],
  settings: dict[str, Any],
  out_dir: pathlib.Path,
) -> None:
  """Writes summary.json and the figures, and prints the table."""
  rules = {r['update_rule'] for r in results}
  groups: dict[str, list[Any]] = {}
  for result in results:
    label = str(result['alpha'])
    if len(rules) > 1 and result['alpha'] > 1:
      label += f' {result["update_rule"]}'
    groups.setdefault(label, []).append(result)

  def columns(name):
    return {
      label if scope == settings['scope'][0] else f'{label} {scope}': (
        np.transpose([r[name][scope] for r in rows])
      )
      for scope in settings['scope']
      for label, rows in groups.items()
    }

  summary = analysis.summarise(
    settings['kept'], columns('test_accuracy'), columns('valid_accuracy')
  )
  common.write_json(out_dir / 'summary.json', summary)
  overlaps = {
    label: analysis.average_overlap([r['overlap'] for r in rows])
    for label, rows in groups.items()
  }
  weights = {label: rows[0]['weights'] for label, rows in groups.items()}
  figures = {
    'accuracy.png': plots.accuracy_against_kept(summary),
    'overlap.png': plots.mask_overlap(overlaps),
    'weights.png': plots.weight_scatter(weights),
  }
  for name, figure in figures.items():
    plots.save(figure, out_dir / name)
  print(
    '\nTest accuracy (%) at each percentage of weights kept, mean ± standard'
    f' deviation of {max(map(len, groups.values()))} seeds:\n'
  )
  print(analysis.accuracy_table(summary))
  print(f'\nIn {out_dir}: summary.json, {", ".join(figures)}')


def parse_jobs(
  alphas: Sequence[str], update_rules: Sequence[str], seeds: int
) -> list[Job]:
  """The runs that the flags ask for, the seeds of an alpha one after another.

  Raises:
    ValueError: if an alpha or an update rule is impossible.
  """
  for rule in update_rules:
    if rule not in optimiser_flags.UPDATE_RULES:
      raise ValueError(
        '--update_rule must be among'
        f' {", ".join(optimiser_flags.UPDATE_RULES)}, got {rule!r}.'
      )
  powers = common.parse_numbers(alphas, 'alphas', power.check_alpha)
  return [
    Job(alpha, rule, seed)
    for alpha in dict.fromkeys(powers)
    # At alpha = 1 the rules are one.
    for rule in (update_rules if alpha > 1 else update_rules[:1])
    for seed in range(seeds)
  ]


def read_flags(
  values: flags.FlagValues,
) -> tuple[list[Job], dict[str, Any]]:
  """The runs, and the settings that they share, checked."""
  if values.preset:
    common.apply_preset(values, presets.PRESETS[values.preset])
  jobs = parse_jobs(values.alphas, values.update_rule, values.seeds)
  settings = {name: values[name].value for name in _RUN_FLAGS}
  settings['kept'] = common.parse_numbers(
    values.kept, 'kept', masks.check_density
  )
  if min(settings['kept']) < 1e-5:
    raise ValueError(
      f'--kept={min(settings["kept"]):g} keeps no weight at all.'
    )
  for scope in values.scope:
    if scope not in ('layer', 'global'):
      raise ValueError(f'--scope must be layer, global or both, got {scope!r}.')
  for rule in values.update_rule:
    make_functions(jobs[-1].alpha, rule, settings, num_classes=10)
  return jobs, settings


def load_data(values: flags.FlagValues) -> in_memory.Dataset:
  """The data set of the flags, large enough for a batch."""
  data = in_memory.load(values.dataset, values.data_dir)
  size = len(data.train.labels)
  if values.batch_size > size:
    raise ValueError(
      f'--batch_size={values.batch_size} is more than the {size} training'
      f' examples of {data.name}.'
    )
  return data


def main(argv: Sequence[str]) -> None:
  common.check_no_arguments(argv)
  try:
    jobs, settings = read_flags(flags.FLAGS)
    data = load_data(flags.FLAGS)
    runner.use_cores(len(jobs))
    out_dir = common.prepare_out_dir(flags.FLAGS.out_dir, settings)
  except ValueError as e:
    common.fail(e)
  kinds = {(job.alpha, job.update_rule) for job in jobs}
  functions = {
    kind: make_functions(*kind, settings, data.num_classes) for kind in kinds
  }
  runs = {}
  for job in jobs:
    name = f'alpha={job.alpha}-{job.update_rule}-seed={job.seed}'
    runs[name] = functools.partial(
      run,
      job,
      functions[job.alpha, job.update_rule],
      settings,
      out_dir / 'runs' / f'{name}.safetensors',
    )
  messages, interrupted = runner.run_all(
    runs, (data.train, data.valid, data.test), settings['steps'], out_dir
  )
  results = runner.finished(out_dir)
  results = [results[name] for name in runs if name in results]
  if results:
    summarise(results, settings, out_dir)
  runner.exit_with(messages, interrupted, len(results), len(runs))


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  app.run(main)

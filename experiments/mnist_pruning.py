"""Accuracy against sparsity of small networks: Figure 1 of the paper.

The program trains a network for every alpha and seed, prunes it once by
magnitude to each of several densities, without retraining, and evaluates what
is left:

  python -m experiments.mnist_pruning --alphas=1,2,3 --seeds=5

The default network is that of the paper, LeNet-300-100, and the default data
set, mnist_5k, comes with an installed package. The results are written to
--out_dir: config.json, metrics.jsonl, the results and the weights of every run
in runs/, summary.json and three figures. A command that was interrupted
continues when it is given again; finished runs are not made a second time.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from experiments.presets import mnist_pruning as presets
from experiments.support import config
from experiments.support import optimisers
from experiments.support import output
from experiments.support import runs
from experiments.support import settings as settings_lib
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
from powerprop_jax.training import feeds
from powerprop_jax.training import loop

_CHUNK = 500  # The number of steps between two checks of the loss.
# Less than this keeps next to none of the 266,200 weights of LeNet-300-100.
_LEAST_KEPT = 1e-5
# Shorter runs than some 20,000 steps cannot stand as many (`power.nats`).
_ENOUGH_NATS = 10


@dataclasses.dataclass(frozen=True)
class Settings(
  optimisers.Settings,
  settings_lib.Network,
  settings_lib.Data,
  settings_lib.Output,
):
  """What is trained and how it is pruned."""

  alphas: tuple[float, ...] = config.flag(
    (1.0, 2.0, 3.0, 4.0),
    'The powers alpha, each at least 1; 1 is the baseline without'
    ' Powerpropagation.',
    check=power.check_alpha,
    decides=False,
  )
  seeds: int = config.flag(
    3,
    'The number of runs of each alpha.',
    low=1,
    high=settings_lib.MAX_RUNS,
    decides=False,
  )
  steps: int = config.flag(
    5_000,
    'The number of training steps.',
    low=1,
    high=settings_lib.MAX_STEPS,
  )
  batch_size: int = config.flag(60, 'The number of examples per step.', low=1)
  max_shift: int = config.flag(
    0,
    'The largest number of pixels by which training images are shifted at'
    ' random.',
    low=0,
  )
  update_rule: tuple[str, ...] = config.flag(
    ('target_propagation',),
    'Whether the optimiser sees the gradient at theta (target_propagation) or'
    ' the one at phi (chain_rule).',
    choices=optimisers.UPDATE_RULES,
    decides=False,
  )
  scope: tuple[str, ...] = config.flag(
    ('layer',),
    'Whether the fractions of --kept are those of each layer, or of all weights'
    ' together.',
    choices=('layer', 'global'),
  )
  kept: tuple[float, ...] = config.flag(
    presets.KEPT,
    'The densities: the fractions of the weights to keep.',
    check=masks.check_density,
  )
  out_dir: str = config.like(
    settings_lib.Output, 'out_dir', 'results/mnist_pruning', own=True
  )

  def __post_init__(self):
    super().__post_init__()
    if min(self.kept) < _LEAST_KEPT:
      raise ValueError(
        f'--kept={min(self.kept):g} keeps next to no weight. Keep at least'
        f' {_LEAST_KEPT:g}.'
      )


class Job(NamedTuple):
  """One run: a network to train and to prune."""

  alpha: float
  update_rule: str
  seed: int

  @property
  def name(self) -> str:
    """The name of its files."""
    return f'alpha={self.alpha}-{self.update_rule}-seed={self.seed}'


class Functions(NamedTuple):
  """The jitted functions that the runs of one alpha and update rule share.

  Attributes:
    init: maps (init_key, run_key, images) to the state to start from.
    run_steps: takes training steps.
    to_theta: maps phi to theta.
    sweeps: for each scope, maps (theta, model_state, images, labels) to the
      accuracies at all densities.
  """

  init: Callable[..., training.TrainState]
  run_steps: feeds.RunSteps
  to_theta: Callable[[types.Params], types.Params]
  sweeps: dict[str, Callable[..., list[float]]]  # By scope.


def make_jobs(settings: Settings) -> list[Job]:
  """The runs of the settings, the seeds of an alpha one after another.

  Args:
    settings: those of the binary.

  Returns:
    The runs. At alpha = 1 there are those of the first update rule only.
  """
  rules = tuple(dict.fromkeys(settings.update_rule))
  return [
    Job(alpha, rule, seed)
    for alpha in dict.fromkeys(settings.alphas)
    # At alpha = 1 both rules do the same.
    for rule in (rules if alpha > 1 else rules[:1])
    for seed in range(settings.seeds)
  ]


def _prune_options(scope: str) -> dict[str, Any]:
  """The options of `pruning.prune` for a scope."""
  # In the paper's MNIST experiment the output layer keeps twice the fraction.
  scale = {'logits': 2.0} if scope == 'layer' else None
  return {'scope': scope, 'density_scale': scale}


def make_functions(
  settings: Settings,
  alpha: float,
  update_rule: str,
  data: in_memory.Dataset,
) -> Functions:
  """Builds the functions of a run; nothing is compiled yet.

  Args:
    settings: those of the binary.
    alpha: the power.
    update_rule: one of `optimisers.UPDATE_RULES`.
    data: the data set.

  Returns:
    The functions.

  Raises:
    ValueError: if the settings do not fit one another or the data.
  """
  _, height, width, _ = data.train.images.shape
  if settings.max_shift >= min(height, width):
    raise ValueError(
      f'--max_shift={settings.max_shift} moves images of {height} x {width}'
      f' pixels out of sight. Give less than {min(height, width)}.'
    )
  network = networks.build(settings.network, data.num_classes)
  transform, tx = optimisers.make(
    settings, alpha, steps=settings.steps, update_rule=update_rule
  )

  def init(init_key, run_key, images):
    images = augment.scale(None, images, False)
    theta, model_state = network.init(init_key, images, True)
    return training.init_state(run_key, theta, model_state, tx, transform)

  key, image = jax.random.key(0), data.train.images[:1]
  params = jax.eval_shape(init, key, key, image).phi
  optimisers.check_scale(settings, params)
  shift = settings.max_shift
  prepare = augment.crop_and_flip(shift, False) if shift else augment.scale
  accuracy = classification.make_accuracy(network.apply)
  loss_fn = classification.make_loss(network.apply, prepare=prepare)
  step = training.make_train_step(loss_fn, tx, transform)
  return Functions(
    init=jax.jit(init),
    run_steps=feeds.compile_steps(step, None),
    to_theta=jax.jit(transform.to_theta),
    sweeps={
      scope: pruning.make_prune_sweep(
        accuracy, settings.kept, **_prune_options(scope)
      )
      for scope in settings.scope
    },
  )


def run(
  job: Job,
  functions: Functions,
  settings: Settings,
  weights_path: epath.Path,
  data: tuple[in_memory.Split, ...],
  watch: runs.Watch,
) -> dict[str, Any]:
  """Trains and prunes one network.

  Args:
    job: which run it is.
    functions: made by `make_functions`.
    settings: those of the binary.
    weights_path: the file to write the trained weights to, for `export_model`.
    data: the train, valid and test splits, on the device.
    watch: follows the run and stops it.

  Returns:
    The result of the run, a dict that JSON can hold.

  Raises:
    loop.Diverged: if the loss becomes NaN or infinite.
    loop.Interrupted: if the run is stopped.
  """
  begin = time.time()
  train_split, valid_split, test_split = data
  init_key, run_key, data_key = jax.random.split(jax.random.key(job.seed), 3)
  state = functions.init(init_key, run_key, train_split.images[:1])
  initial = functions.to_theta(state.phi)
  advance = feeds.make_advance(
    functions.run_steps,
    (train_split.images, train_split.labels),
    data_key,
    batch_size=settings.batch_size,
    size=len(train_split.labels),
  )
  step, state = loop.run(
    advance,
    state,
    start=0,
    stop=settings.steps,
    chunk=_CHUNK,
    report=watch.report,
    recipe=optimisers.recipe(settings, job.alpha),
    stopped=watch.stopped,
  )
  if step < settings.steps:
    raise loop.Interrupted
  theta, seconds = functions.to_theta(state.phi), time.time() - begin
  last = optimisers.last_alpha(settings, job.alpha)
  export.save_compressed(weights_path, theta, masks={}, alpha=last)

  def sweep(split):
    return {
      scope: f(theta, state.model_state, *split)
      for scope, f in functions.sweeps.items()
    }

  kept, options = settings.kept, _prune_options(settings.scope[0])
  return {
    **job._asdict(),
    'valid_accuracy': sweep(valid_split),
    'test_accuracy': sweep(test_split),
    'overlap': analysis.mask_overlap(initial, theta, kept, **options),
    # Figures 1c and 1d are at a sparsity of 90 %.
    'weights': analysis.weight_distribution(initial, theta, 0.1, **options),
    'seconds': seconds,
  }


def summarise(
  results: Sequence[dict[str, Any]], settings: Settings, out_dir: epath.Path
) -> None:
  """Writes summary.json and the figures, and prints the table.

  Args:
    results: what `run` returned of each finished run.
    settings: those of the binary.
    out_dir: the folder of results.
  """
  rules = {r['update_rule'] for r in results}
  groups: dict[str, list[Any]] = {}
  for result in results:
    label = str(result['alpha'])
    if len(rules) > 1 and result['alpha'] > 1:
      label += f' {result["update_rule"]}'
    groups.setdefault(label, []).append(result)

  def columns(name):
    return {
      label if scope == settings.scope[0] else f'{label} {scope}': (
        np.transpose([r[name][scope] for r in rows])
      )
      for scope in settings.scope
      for label, rows in groups.items()
    }

  summary = analysis.summarise(
    settings.kept, columns('test_accuracy'), columns('valid_accuracy')
  )
  output.write_json(out_dir / 'summary.json', summary)
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
  numbers = {label: len(rows) for label, rows in groups.items()}
  seeds = max(numbers.values())
  mean = f', mean ± standard deviation of {seeds} seeds' if seeds > 1 else ''
  print(f'\nTest accuracy (%) at each percentage of weights kept{mean}:\n')
  print(analysis.accuracy_table(summary))
  for label, number in numbers.items():
    if number < seeds:
      print(f'{label}: {number} of {seeds} seeds ended')
  print(f'\nIn {out_dir}: summary.json, {", ".join(figures)}')


def warn_of_little_decay(settings: Settings) -> None:
  """Warns of powers whose decay is too little for one-shot pruning.

  Args:
    settings: those of the binary.
  """
  few = {}
  for alpha in dict.fromkeys(settings.alphas):
    nats = optimisers.nats(settings, alpha, settings.steps)
    has_power = optimisers.last_alpha(settings, alpha) > 1
    if has_power and nats is not None and nats < _ENOUGH_NATS:
      few[alpha] = nats
  if not few:
    return
  found = 'There is no decay of phi, as in the paper'
  if any(few.values()):
    nats = ', '.join(f'{n:.1f} nats at alpha = {a:g}' for a, n in few.items())
    found = f'The decay of phi has {nats}'
  print(
    f'{found}. With {_ENOUGH_NATS} nats of decay networks can be pruned much'
    ' further; in 10,000 steps of SGD the 7 of --phi_decay=1e-3 are enough.'
    ' docs/choosing.md has the settings.',
    file=sys.stderr,
  )


def main(settings: Settings) -> None:
  """Makes the runs that are not finished yet, and summarises finished ones."""
  jobs = make_jobs(settings)
  # This comes before `announce`, which has JAX make its devices.
  runs.use_cores(len(jobs))
  output.announce('mnist_pruning')
  with config.refusing():
    data = settings_lib.load_in_memory(settings, settings.batch_size)
    functions = {
      kind: make_functions(settings, *kind, data)
      for kind in dict.fromkeys((job.alpha, job.update_rule) for job in jobs)
    }
  warn_of_little_decay(settings)
  deciding = config.deciding(settings) | {'data': in_memory.fingerprint(data)}
  with output.opened(settings.out_dir, 'mnist_pruning', deciding) as out_dir:
    todo = {
      job.name: functools.partial(
        run,
        job,
        functions[job.alpha, job.update_rule],
        settings,
        out_dir / 'runs' / f'{job.name}.safetensors',
      )
      for job in jobs
    }
    splits = (data.train, data.valid, data.test)
    ended = runs.run_all(
      todo, splits, settings.steps, out_dir, fields=Job._fields
    )
    results = runs.finished(out_dir, todo)
    if results:
      summarise(list(results.values()), settings, out_dir)
      print(output.about_accuracy(len(data.test.labels)))
  runs.finish(*ended, len(results), len(todo))


if __name__ == '__main__':
  config.run(main, Settings, presets.PRESETS)

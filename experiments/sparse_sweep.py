"""Accuracy against sparsity of every sparse training method, in one table.

Trains small networks by each method, at each sparsity, with and without
Powerpropagation, on a data set that fits in memory:

  python -m experiments.sparse_sweep --alphas=1,2 --sparsities=0.9,0.98

One network trains on each device, so that on a CPU every core has one. The
results are written to --out_dir: config.json, metrics.jsonl, one file per run
in runs/, summary.json and a figure for each distribution. A command that was
interrupted continues when it is given again. `sparse_training` trains a single
network, of any size, with every flag there is.

The default recipe is that of the preset `mnist`, which trials on validation
data found for alpha = 1 and for alpha = 1.5 alike. On the 500 test digits of
the default data set a standard error is about a point, and differences between
powers are no larger: the preset shows them, on all of MNIST.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.presets import sparse_sweep as presets
from experiments.support import config
from experiments.support import methods as methods_lib
from experiments.support import optimisers
from experiments.support import output
from experiments.support import runs
from experiments.support import settings as settings_lib
from experiments.support import sweep_report
from powerprop_jax import analysis
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax import types
from powerprop_jax.data import augment
from powerprop_jax.data import in_memory
from powerprop_jax.models import networks
from powerprop_jax.sparse import flops
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import updaters
from powerprop_jax.training import classification
from powerprop_jax.training import feeds
from powerprop_jax.training import loop


@dataclasses.dataclass(frozen=True)
class Settings(
  optimisers.Settings,
  settings_lib.Network,
  settings_lib.Data,
  settings_lib.Output,
):
  """What is compared."""

  methods: tuple[str, ...] = config.flag(
    methods_lib.METHODS,
    'The sparse training methods.',
    choices=methods_lib.METHODS,
    decides=False,
  )
  alphas: tuple[float, ...] = config.flag(
    (1.0, 1.5),
    'The powers alpha, each at least 1; 1 is the baseline without'
    ' Powerpropagation.',
    check=power.check_alpha,
    decides=False,
  )
  learning_rates: tuple[float, ...] = config.flag(
    (),
    'A learning rate for each of --alphas. Without them all have'
    ' --learning_rate.',
    low=0.0,
    decides=False,
  )
  phi_decays: tuple[float, ...] = config.flag(
    (),
    'A decay of phi for each of --alphas. Without them all have --phi_decay.',
    low=0.0,
    decides=False,
  )
  clip_norms: tuple[float, ...] = config.flag(
    (),
    'A norm to clip at for each of --alphas. Without them all have'
    ' --clip_norm.',
    low=0.0,
    decides=False,
  )
  sparsities: tuple[float, ...] = config.flag(
    (0.8, 0.9, 0.95, 0.98, 0.99),
    'The sparsities: the fractions of the weights to remove.',
    low=0.0,
    high=1.0,
    decides=False,
  )
  distributions: tuple[str, ...] = config.flag(
    ('erk',),
    'How a sparsity is shared out among layers.',
    choices=('uniform', 'erk', 'er'),
    decides=False,
  )
  seeds: int = config.flag(
    1,
    'The number of networks of each setting.',
    low=1,
    high=settings_lib.MAX_RUNS,
    decides=False,
  )
  steps: int = config.flag(
    1_000, 'The number of training steps.', low=1, high=settings_lib.MAX_STEPS
  )
  batch_size: int = config.flag(100, 'The number of examples per step.', low=1)
  update_every: int = config.like(methods_lib.Method, 'update_every')
  drop_fraction: float = config.like(methods_lib.Method, 'drop_fraction')
  exploration_penalty: float = config.like(
    methods_lib.Method, 'exploration_penalty'
  )
  # Those of a run are in its recipe.
  learning_rate: float = config.like(
    optimisers.Optimiser, 'learning_rate', 0.2, decides=False
  )
  clip_norm: float = config.like(
    optimisers.Optimiser, 'clip_norm', 1.0, decides=False
  )
  phi_decay: float = config.like(
    optimisers.Decay, 'phi_decay', 2e-4, decides=False
  )
  phi_decay_schedule: str = config.like(
    optimisers.Decay, 'phi_decay_schedule', 'cosine'
  )
  momentum: float = config.like(optimisers.Optimiser, 'momentum', 0.9)
  schedule: str = config.like(optimisers.Optimiser, 'schedule', 'cosine')
  out_dir: str = config.like(
    settings_lib.Output, 'out_dir', 'results/sparse_sweep', own=True
  )

  def __post_init__(self):
    super().__post_init__()
    for name in ('learning_rates', 'phi_decays', 'clip_norms'):
      count, wanted = len(getattr(self, name)), len(self.alphas)
      if count not in (0, wanted):
        raise ValueError(
          f'--{name} has {count} values for {wanted} alphas. Give one for each,'
          ' or none.'
        )


class Recipe(NamedTuple):
  """How networks of one alpha are trained."""

  alpha: float
  learning_rate: float
  phi_decay: float
  clip_norm: float


def _shown(x: float) -> str:
  """A number as short as it can be without becoming another."""
  return f'{x:g}' if float(f'{x:g}') == x else repr(x)


class Job(NamedTuple):
  """A setting, and how many networks to train in it.

  One job trains them all, on one device: what is compiled for a setting takes
  as long to compile as a network of the size of LeNet to train.
  """

  method: str
  distribution: str
  sparsity: float
  recipe: Recipe
  seeds: int

  @property
  def name(self) -> str:
    """The name of its file."""
    alpha, rate, decay, clip = map(_shown, self.recipe)
    return (
      f'{self.method}-{self.distribution}-{_shown(self.sparsity)}-alpha={alpha}'
      f'-lr={rate}-decay={decay}-clip={clip}-seeds={self.seeds}'
    )


def make_recipes(settings: Settings) -> list[Recipe]:
  """A recipe for each of the alphas."""
  columns = [
    several or (one,) * len(settings.alphas)
    for several, one in (
      (settings.learning_rates, settings.learning_rate),
      (settings.phi_decays, settings.phi_decay),
      (settings.clip_norms, settings.clip_norm),
    )
  ]
  return list(map(Recipe, settings.alphas, *columns))


def make_jobs(settings: Settings) -> list[Job]:
  """The jobs that are asked for, each once."""
  jobs = []
  for method in settings.methods:
    # Dense networks have no sparsity, and SNIP ranks all weights together.
    for distribution in settings.distributions:
      for sparsity in settings.sparsities if method != 'dense' else [0.0]:
        for recipe in make_recipes(settings):
          d = 'uniform' if method in ('dense', 'snip') else distribution
          jobs.append(Job(method, d, sparsity, recipe, settings.seeds))
  return list(dict.fromkeys(jobs))


class Functions(NamedTuple):
  """What a job needs, compiled."""

  init: Callable[..., training.TrainState]
  init_masks: training.MaskStep
  update_masks: training.MaskStep
  run_steps: feeds.RunSteps
  theta: Callable[[training.TrainState], types.Params]
  accuracy: Callable[..., jax.Array]
  method: methods_lib.Plan
  layer_flops: dict[str, float]


def make_plan(
  job: Job,
  settings: Settings,
  theta: Any,
  fresh: Callable[[jax.Array], Any],
) -> methods_lib.Plan:
  """The method of a job, in other respects as in `sparse_training`.

  Args:
    job: which one.
    settings: of the binary.
    theta: the weights, or their shapes and dtypes.
    fresh: draws weights as at initialisation, from a key.

  Returns:
    The plan.

  Raises:
    ValueError: if the job is impossible.
  """
  method = methods_lib.Method(
    method=job.method,
    sparsity=job.sparsity,
    distribution=job.distribution,
    scope='global' if job.method == 'snip' else 'layer',
    update_every=settings.update_every,
    drop_fraction=settings.drop_fraction,
    exploration_penalty=settings.exploration_penalty,
  )
  return methods_lib.make_plan(
    method, theta, moves_zeros=False, steps=settings.steps, fresh=fresh
  )


def make_functions(
  settings: Settings, data: in_memory.Dataset
) -> Callable[[Job], Functions]:
  """A function that builds what a job needs; nothing is compiled yet.

  What does not depend on the method is compiled once for a recipe.

  Args:
    settings: of the binary.
    data: the data set.

  Returns:
    A function of a job. It raises ValueError if the job is impossible.
  """
  network = networks.build(settings.network, data.num_classes)
  images = jnp.zeros((1, *data.train.images.shape[1:]))

  def init_network(key):
    return network.init(key, images, True)

  shapes = jax.eval_shape(init_network, jax.random.key(0))
  optimisers.check_scale(settings, shapes[0])
  layer_flops = flops.layer_flops(
    lambda p, s, x: network.apply(p, s, None, x, False)[0], *shapes, images
  )
  prepare = augment.usual(settings.dataset)
  loss_fn = classification.make_loss(network.apply, prepare)
  accuracy = jax.jit(classification.make_accuracy(network.apply, prepare))

  @functools.cache
  def update_rule(recipe):
    options = recipe._asdict()
    alpha = options.pop('alpha')
    chosen = dataclasses.replace(settings, **options)
    transform, tx = optimisers.make(chosen, alpha, steps=settings.steps)

    def init(init_key, run_key):
      theta, model_state = init_network(init_key)
      return training.init_state(run_key, theta, model_state, tx, transform)

    def theta(state):
      return training.masked_theta(state, transform)

    return transform, tx, jax.jit(init), jax.jit(theta)

  @functools.cache
  def run_steps(recipe, penalty):
    transform, tx, _, _ = update_rule(recipe)
    step = training.make_train_step(loss_fn, tx, transform, penalty=penalty)
    return feeds.compile_steps(step, None)

  # One object, as it is part of the key of the cache.
  penalty = functools.partial(
    updaters.exploration_penalty, strength=settings.exploration_penalty
  )

  def make(job):
    recipe = job.recipe
    transform, tx, init, theta = update_rule(recipe)
    plan = make_plan(job, settings, shapes[0], lambda key: init_network(key)[0])
    init_masks, update_masks = (
      jax.jit(f, donate_argnums=0)
      for f in training.make_mask_updates(loss_fn, tx, plan.updater, transform)
    )
    return Functions(
      init=init,
      init_masks=init_masks,
      update_masks=update_masks,
      run_steps=run_steps(recipe, plan.penalty and penalty),
      theta=theta,
      accuracy=accuracy,
      method=plan,
      layer_flops=layer_flops,
    )

  return make


def _train(
  job: Job,
  functions: Functions,
  settings: Settings,
  split: in_memory.Split,
  state: training.TrainState,
  data_key: jax.Array,
  seed: int,
  watch: runs.Watch,
) -> training.TrainState:
  """Trains one network from its initial state, which is donated."""
  size = len(split.labels)

  def mask_batch(step):
    key = jax.random.fold_in(jax.random.fold_in(data_key, 1), step)
    index = jax.random.randint(key, (1, settings.batch_size), 0, size)
    return split.images[index], split.labels[index]

  advance = feeds.make_advance(
    functions.run_steps,
    (split.images, split.labels),
    data_key,
    batch_size=settings.batch_size,
    size=size,
  )
  masks = loop.Hook(
    functions.method.due,
    lambda step, state: functions.update_masks(state, mask_batch(step)),
  )
  step, state = loop.run(
    advance,
    functions.init_masks(state, mask_batch(0)),
    start=0,
    stop=settings.steps,
    chunk=settings.update_every,
    before=[masks],
    report=watch.report,
    recipe={**job.recipe._asdict(), 'seed': seed},
    stopped=watch.stopped,
  )
  if step < settings.steps:
    raise loop.Interrupted
  return state


def relative_flops(
  method: methods_lib.Plan, layers: dict[str, float], masks: masks_lib.Masks
) -> tuple[float, float]:
  """Operations relative to those of a dense network.

  Args:
    method: the plan of the method.
    layers: dense operations of each layer at inference.
    masks: at the end of the run.

  Returns:
    Those at inference, and those of training.
  """
  forward, backward = (jax.tree.map(jnp.mean, mask) for mask in masks)
  # Of the masks and not of the flags: a global ranking chooses its own layers.
  densities = methods_lib.Densities(
    forward, backward, ever=jax.tree.map(lambda _: 1.0, forward)
  )
  dense = math.fsum(layers.values())
  inference = math.fsum(flops.inference_flops(layers, forward).values())
  step = method.training_flops(layers, densities)
  return inference / dense, step / flops.training_flops(dense)


def run(
  job: Job,
  make: Callable[[Job], Functions],
  settings: Settings,
  data: tuple[in_memory.Split, ...],
  watch: runs.Watch,
) -> dict[str, Any]:
  """Trains the networks of a job, one after another.

  Args:
    job: which ones.
    make: returned by `make_functions`.
    settings: of the binary.
    data: train, valid and test split, on the device.
    watch: follows the run, by the steps of all its networks, and stops it.

  Returns:
    What the summary needs: the fields of the job, accuracies by seed, the mean
    share of surviving weights that changed their sign, and operations relative
    to a dense network.

  Raises:
    loop.Diverged: if the loss becomes NaN.
    loop.Interrupted: if it is stopped.
  """
  train_split, *others = data
  functions, accuracies, costs, changes = make(job), [], [], []
  for seed in range(job.seeds):

    def report(step, metrics, done=seed * settings.steps):
      watch.report(done + step, metrics)

    init_key, run_key, data_key = jax.random.split(jax.random.key(seed), 3)
    start = functions.init(init_key, run_key)
    before = jax.device_get(functions.theta(start))
    state = _train(
      job,
      functions,
      settings,
      train_split,
      start,
      data_key,
      seed,
      watch._replace(report=report),
    )
    theta = functions.theta(state)
    changes.append(
      analysis.sign_changes(
        before, *jax.device_get((theta, state.masks.forward))
      )
    )
    accuracies.append(
      [float(functions.accuracy(theta, state.model_state, *s)) for s in others]
    )
    costs.append(
      relative_flops(functions.method, functions.layer_flops, state.masks)
    )
  valid, test = (list(column) for column in zip(*accuracies))
  inference, step = np.mean(costs, axis=0).tolist()
  return {
    **job._asdict(),
    'recipe': job.recipe._asdict(),
    'valid_accuracy': valid,
    'test_accuracy': test,
    'sign_changes': float(np.mean(changes)),
    'inference_flops': inference,
    'training_flops': step,
  }


def main(settings: Settings) -> None:
  """Runs what is not finished, and reports what is."""
  jobs = make_jobs(settings)
  # Before JAX makes its devices, which `announce` does.
  runs.use_cores(len(jobs))
  output.announce('sparse_sweep')
  with config.refusing():
    data = settings_lib.load_in_memory(settings, settings.batch_size)
    make = make_functions(settings, data)
    for job in jobs:
      make(job)  # What is impossible fails here.
  deciding = config.deciding(settings) | {'data': in_memory.fingerprint(data)}
  with output.opened(settings.out_dir, 'sparse_sweep', deciding) as out_dir:
    todo = {
      job.name: functools.partial(run, job, make, settings) for job in jobs
    }
    splits = (data.train, data.valid, data.test)
    steps = settings.steps * settings.seeds
    fields = (*Job._fields, 'sign_changes')
    ended = runs.run_all(todo, splits, steps, out_dir, fields=fields)
    results = runs.finished(out_dir, todo)
    if results:
      sweep_report.write(
        list(results.values()), settings.distributions, out_dir
      )
      print(output.about_accuracy(len(data.test.labels)))
  runs.finish(*ended, len(results), len(todo))


if __name__ == '__main__':
  config.run(main, Settings, presets.PRESETS)

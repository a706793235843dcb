"""One run of a sweep over sparse training methods, on one device."""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import feeds
from experiments import methods
from experiments import optimiser_flags
from experiments import runner
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


class Recipe(NamedTuple):
  """How networks of one alpha are trained."""

  alpha: float
  learning_rate: float
  phi_decay: float
  clip_norm: float


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


class Functions(NamedTuple):
  """What a job needs, compiled."""

  init: Callable[..., training.TrainState]
  init_masks: training.MaskStep
  update_masks: training.MaskStep
  run_steps: Callable[..., tuple[training.TrainState, Any]]
  theta: Callable[[training.TrainState], types.Params]
  accuracy: Callable[..., jax.Array]
  method: methods.Method
  layer_flops: dict[str, float]


def _make_method(
  job: Job,
  settings: dict[str, Any],
  theta: Any,
  fresh: Callable[[jax.Array], Any],
) -> methods.Method:
  """The method of a job, with the defaults of `sparse_training`."""
  return methods.make_method(
    job.method,
    theta,
    alpha=job.recipe.alpha,
    steps=settings['steps'],
    sparsity=job.sparsity,
    backward_sparsity=None,
    distribution=job.distribution,
    dense_layers=(),
    update_every=settings['update_every'],
    update_start=None,
    update_stop=None,
    regrow='init',
    exploration_penalty=settings['exploration_penalty'],
    fresh=fresh,
    scope='global' if job.method == 'snip' else 'layer',
    drop_fraction=settings['drop_fraction'],
    drop_schedule='cosine',
    regrow_dropped=False,
  )


def make_functions(
  settings: dict[str, Any], input_shape: Sequence[int], num_classes: int
) -> Callable[[Job], Functions]:
  """A function that builds what a job needs; nothing is compiled yet.

  What does not depend on the method is compiled once for a recipe.

  Args:
    settings: the flags of `sparse_sweep.RUN_FLAGS`.
    input_shape: of an image.
    num_classes: number of classes.

  Returns:
    A function of a job. It raises ValueError if the job is impossible.
  """
  network = networks.build(settings['network'], num_classes)
  images = jnp.zeros((1, *input_shape))
  shapes = jax.eval_shape(
    lambda key: network.init(key, images, True), jax.random.key(0)
  )
  layer_flops = flops.layer_flops(
    lambda p, s, x: network.apply(p, s, None, x, False)[0], *shapes, images
  )
  prepare = augment.usual(settings['dataset'])
  loss_fn = classification.make_loss(network.apply, prepare)
  accuracy = jax.jit(classification.make_accuracy(network.apply, prepare))

  @functools.cache
  def update_rule(recipe):
    transform = power.power_transform(recipe.alpha)
    options = {**settings, **recipe._asdict()}
    options = {name: options[name] for name in optimiser_flags.NAMES}
    tx = optimiser_flags.make_tx(
      transform,
      steps=settings['steps'],
      update_rule='target_propagation',
      **options,
    )

    def init(init_key, run_key):
      theta, model_state = network.init(init_key, images, True)
      return training.init_state(run_key, theta, model_state, tx, transform)

    def theta(state):
      return training.masked_theta(state, transform)

    return transform, tx, jax.jit(init), jax.jit(theta)

  @functools.cache
  def run_steps(recipe, penalty):
    transform, tx, _, _ = update_rule(recipe)
    step = training.make_train_step(loss_fn, tx, transform, penalty=penalty)
    return feeds.compile_steps(step, None, shapes[0])

  def fresh(key):
    return network.init(key, images, True)[0]

  # One object, as it is part of the key of the cache.
  penalty = functools.partial(
    updaters.exploration_penalty, strength=settings['exploration_penalty']
  )

  def make(job):
    recipe = job.recipe
    transform, tx, init, theta = update_rule(recipe)
    made = _make_method(job, settings, shapes[0], fresh)
    init_masks, update_masks = (
      jax.jit(f, donate_argnums=0)
      for f in training.make_mask_updates(loss_fn, tx, made.updater, transform)
    )
    return Functions(
      init=init,
      init_masks=init_masks,
      update_masks=update_masks,
      run_steps=run_steps(recipe, made.penalty and penalty),
      theta=theta,
      accuracy=accuracy,
      method=made,
      layer_flops=layer_flops,
    )

  return make


def _train(
  functions: Functions,
  settings: dict[str, Any],
  split: in_memory.Split,
  seed: int,
  report: runner.Report,
) -> training.TrainState:
  """Trains one network."""
  init_key, run_key, data_key = jax.random.split(jax.random.key(seed), 3)

  def mask_batch(step):
    key = jax.random.fold_in(jax.random.fold_in(data_key, 1), step)
    shape = (1, settings['batch_size'])
    index = jax.random.randint(key, shape, 0, len(split.labels))
    return split.images[index], split.labels[index]

  def update_masks(step, state):
    if not functions.method.due(step):
      return state
    return functions.update_masks(state, mask_batch(step))

  state = functions.init(init_key, run_key)
  return runner.train(
    functions.init_masks(state, mask_batch(0)),
    functions.run_steps,
    (split.images, split.labels),
    data_key,
    steps=settings['steps'],
    batch_size=settings['batch_size'],
    report=report,
    chunk=settings['update_every'],
    before=update_masks,
  )


def _relative_flops(
  method: methods.Method, layers: dict[str, float], masks: masks_lib.Masks
) -> tuple[float, float]:
  """Operations at inference, and of the run, relative to a dense network."""
  forward, backward = (jax.tree.map(jnp.mean, mask) for mask in masks)
  # Of the masks and not of the flags: a global ranking chooses its own layers.
  densities = methods.Densities(
    forward, backward, ever=jax.tree.map(lambda _: 1.0, forward)
  )
  dense = math.fsum(layers.values())
  inference = math.fsum(flops.inference_flops(layers, forward).values())
  step = method.training_flops(layers, densities)
  return inference / dense, step / flops.training_flops(dense)


def run(
  job: Job,
  make: Callable[[Job], Functions],
  settings: dict[str, Any],
  data: tuple[in_memory.Split, ...],
  report: runner.Report,
) -> dict[str, Any]:
  """Trains the networks of a job, one after another.

  Args:
    job: which ones.
    make: as of `make_functions`.
    settings: the flags that are not in the job.
    data: train, valid and test split, on the device.
    report: called with the step, over all networks, and the metrics.

  Returns:
    What the summary needs: the fields of the job, accuracies by seed, and
    operations relative to a dense network.

  Raises:
    runner.Diverged: if the loss becomes NaN.
  """
  train_split, *others = data
  functions, steps = make(job), settings['steps']
  recipe, accuracies, costs = job.recipe._asdict(), [], []
  for seed in range(job.seeds):
    try:
      state = _train(
        functions,
        settings,
        train_split,
        seed,
        lambda step, metrics, done=seed * steps: report(done + step, metrics),
      )
    except runner.Diverged as e:
      values = ', '.join(f'{k} = {v:g}' for k, v in recipe.items())
      raise runner.Diverged(
        f'{e}, with {values} and seed {seed}. Lower the learning rate.'
      ) from e
    theta = functions.theta(state)
    accuracies.append(
      [float(functions.accuracy(theta, state.model_state, *s)) for s in others]
    )
    costs.append(
      _relative_flops(functions.method, functions.layer_flops, state.masks)
    )
  valid, test = (list(column) for column in zip(*accuracies))
  inference, step = np.mean(costs, axis=0).tolist()
  return {
    **job._replace(recipe=recipe)._asdict(),
    'valid_accuracy': valid,
    'test_accuracy': test,
    'inference_flops': inference,
    'training_flops': step,
  }

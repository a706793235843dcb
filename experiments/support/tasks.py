"""Builds, from settings, the functions that learn a sequence of tasks.

Everything that differs between tasks is an argument of the compiled functions:
data, masks, counts and anchors. So they are compiled once, however many tasks
there are.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.support import config
from experiments.support import optimisers
from experiments.support import settings as settings_lib
from powerprop_jax import continual
from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax.continual import benchmarks
from powerprop_jax.continual import ewc
from powerprop_jax.continual import layouts
from powerprop_jax.continual import search
from powerprop_jax.data import augment
from powerprop_jax.data import in_memory
from powerprop_jax.models import networks
from powerprop_jax.training import classification
from powerprop_jax.training import devices
from powerprop_jax.training import feeds
from powerprop_jax.training import loop

METHODS = ('epn', 'packnet', 'finetune', 'independent', 'ewc')
_CHUNK = 500  # The number of steps between two checks of the loss.
_FISHER_EXAMPLES = 500  # EWC estimates the Fisher information from these.
_MAX_TASKS = 65_535  # The owner of a weight is an integer of 16 bits.


@dataclasses.dataclass(frozen=True)
class Sequence(config.Settings):
  """The tasks."""

  benchmark: str = config.flag(
    'permuted',
    'What the tasks are. permuted gives each task an order of the pixels,'
    ' rotated gives it an angle, and split gives it some of the classes.',
    choices=('permuted', 'rotated', 'split'),
  )
  tasks: int = config.flag(
    5,
    'The number of tasks to learn. Only PackNet needs to know it beforehand.',
    low=1,
    high=_MAX_TASKS,
  )
  classes_per_task: int = config.flag(
    2, 'The number of classes of each task of the benchmark split.', low=2
  )


@dataclasses.dataclass(frozen=True)
class Kept(config.Settings):
  """What belongs to a task besides its mask."""

  heads: str = config.flag(
    'task',
    'Whether each task has a last layer of its own, or all share one.',
    choices=('task', 'shared'),
  )
  biases: str = config.flag(
    'task',
    'Whether each task has a copy of the biases, or they stay as the first task'
    ' left them.',
    choices=('task', 'frozen'),
  )
  norm: str = config.flag(
    'task',
    'Whether each task has a copy of the parameters and the statistics of'
    ' normalisation, or they stay as the first task left them.',
    choices=('task', 'frozen'),
  )


@dataclasses.dataclass(frozen=True)
class Pruning(config.Settings):
  """How EfficientPackNet prunes (method epn)."""

  gamma: float = config.flag(
    0.99,
    'The share of the validation accuracy of the dense network that pruning has'
    ' to leave.',
    low=0.0,
    high=1.0,
  )
  search: str = config.flag(
    'binary',
    'How the lowest density (the fraction kept) is found that leaves the share'
    ' --gamma. linear tries the densities from the largest down, binary bisects'
    ' them, and taylor predicts the loss at all of them.',
    choices=('linear', 'binary', 'taylor'),
  )
  search_steps: int = config.flag(
    5, 'How many times the binary search bisects the densities.', low=0
  )
  densities: tuple[float, ...] = config.flag(
    tuple(float(f'{p:.4g}') for p in np.geomspace(0.01, 1.0, 24)),
    'The densities to choose from, which are fractions of the weights to keep,'
    ' rising from one to the next, above 0 and at most 1.',
  )
  min_density: float = config.flag(
    0.0,
    'The smallest density, the fraction of the weights kept, of a task.',
    low=0.0,
    high=1.0,
  )
  max_density: float = config.flag(
    1.0,
    'The largest density, the fraction of the weights kept, of a task.',
    low=0.0,
    high=1.0,
  )
  cap: float | None = config.flag(
    None,
    'The largest fraction of all weights that a task may be the first to use.'
    ' By default a task may use all that are free. This limit is not in the'
    ' paper.',
    low=0.0,
    high=1.0,
  )
  omit_first_layer: bool = config.flag(
    False,
    'Whether the training and the mask of a new task leave out the weights of'
    ' earlier tasks in the first layer. This choice is not in the paper.',
  )

  def __post_init__(self):
    super().__post_init__()
    try:
      search.check_densities(self.densities, self.min_density, self.max_density)
    except ValueError as e:
      raise ValueError(f'--densities: {e}') from e


@dataclasses.dataclass(frozen=True)
class Evaluation(config.Settings):
  """What is measured."""

  evaluate_every: int = config.flag(
    1,
    'The number of tasks from one evaluation of all tasks so far to the next.'
    ' The newest task is always evaluated.',
    low=1,
  )
  infer_tasks: tuple[int, ...] = config.flag(
    (),
    'Numbers of tasks: for each number n, the task of test images is inferred'
    ' among the first n tasks, at the end.',
    low=1,
  )


@dataclasses.dataclass(frozen=True)
class Settings(
  Sequence,
  Kept,
  Pruning,
  Evaluation,
  optimisers.Settings,
  settings_lib.Network,
  settings_lib.Data,
):
  """How a task is learnt."""

  steps_per_task: int = config.flag(
    2_000,
    'The number of training steps of each task.',
    low=1,
    high=settings_lib.MAX_STEPS,
  )
  retrain_steps: int = config.flag(
    500,
    'The number of steps for which each task is retrained under its mask; 0'
    ' leaves retraining out. Methods that do not prune add these steps to'
    ' --steps_per_task.',
    low=0,
    high=settings_lib.MAX_STEPS,
  )
  retrain_learning_rate: float | None = config.flag(
    None,
    'The largest learning rate of the training under the mask. The default is'
    ' --learning_rate.',
    low=0.0,
  )
  batch_size: int = config.flag(
    100, 'The number of examples per step, over all devices.', low=1
  )
  ewc_strength: float = config.flag(
    10.0,
    'How strongly EWC pulls the weights to those of earlier tasks (method'
    ' ewc).',
    low=0.0,
  )
  data_parallel: bool = config.flag(
    False,
    'Whether every batch is shared out among all devices. Without it each'
    ' device trains networks of its own.',
  )
  learning_rate: float = config.like(optimisers.Optimiser, 'learning_rate', 0.3)
  momentum: float = config.like(optimisers.Optimiser, 'momentum', 0.9)
  schedule: str = config.like(optimisers.Optimiser, 'schedule', 'cosine')
  clip_norm: float = config.like(optimisers.Optimiser, 'clip_norm', 1.0)
  phi_decay: float = config.like(optimisers.Decay, 'phi_decay', 7e-4)
  phi_decay_schedule: str = config.like(
    optimisers.Decay, 'phi_decay_schedule', 'cosine'
  )

  def __post_init__(self):
    super().__post_init__()
    for count in self.infer_tasks:
      if count > self.tasks:
        raise ValueError(
          f'--infer_tasks={count} is more than --tasks={self.tasks}. Give at'
          f' most {self.tasks}.'
        )


class Job(NamedTuple):
  """One run: a network to be taken through all tasks."""

  method: str
  alpha: float
  seed: int

  @property
  def name(self) -> str:
    """The name of its files."""
    return f'{self.method}-alpha={self.alpha}-seed={self.seed}'


class Problem(NamedTuple):
  """The functions that the runs of one method and alpha share.

  Attributes:
    layout: how every leaf is kept.
    transform: the map between phi and theta.
    omit: paths of leaves of which earlier tasks' weights are left out.
    fresh: maps a key to (phi, model_state) of a new network.
    train: maps (memory, masks, anchors, split, size, key, index, retraining,
      watch) to the memory after training on the first `size` examples of a
      split.
    choose: as `continual.learn_task` takes it; None if nothing is masked.
    accuracy: maps (theta, model_state, split) to the accuracy of a network.
    logits: maps (theta, model_state, images) to the logits.
    recall: maps (memory, task) to (theta, model_state) of its network.
    anchor: maps (memory, anchors, split, key) to the anchors to which EWC
      pulls the weights in the next task; given the memory alone, to those of
      the first task. For other methods it returns None.
  """

  layout: continual.Layout
  transform: power.PowerTransform
  omit: list[str]
  fresh: Callable[[jax.Array], tuple[Any, Any]]
  train: Callable[..., continual.Memory]
  choose: continual.Choose | None
  accuracy: Callable[..., float]
  logits: Callable[..., jax.Array]
  recall: Callable[..., tuple[Any, Any]]
  anchor: Callable[..., Any]


def make_benchmark(
  settings: Settings, data: in_memory.Dataset, seed: int
) -> benchmarks.Benchmark:
  """The sequence of tasks, on the device that holds the data.

  Args:
    settings: those of the run.
    data: the data set of which tasks are made.
    seed: that of the run.

  Returns:
    A benchmark of the first `settings.tasks` tasks, with parts of one shape.

  Raises:
    ValueError: if there are fewer tasks, or fewer examples than in a batch.
  """
  if settings.benchmark == 'permuted':
    benchmark = benchmarks.permuted(data, settings.tasks, seed)
  elif settings.benchmark == 'rotated':
    benchmark = benchmarks.rotated(data, settings.tasks)
  else:
    benchmark = benchmarks.split(data, settings.classes_per_task)
  if settings.tasks > benchmark.num_tasks:
    raise ValueError(
      f'--tasks={settings.tasks}: {data.name} has {benchmark.num_tasks} tasks'
      f' of {benchmark.num_classes} classes. Ask for fewer, or lower'
      ' --classes_per_task.'
    )
  benchmark = benchmark._replace(num_tasks=settings.tasks)
  least = min(benchmark.size(t, 'train') for t in range(settings.tasks))
  settings_lib.check_batch_size(
    settings.batch_size, least, f'a task of {benchmark.name}'
  )
  return benchmarks.padded(benchmark)


def _layout(settings: Settings, method: str, params: Any) -> continual.Layout:
  """How the method keeps every leaf of the network."""
  if method == 'independent':
    return layouts.make_layout(
      params, weights='private', biases='private', norm='private'
    )
  kinds = {'task': 'private', 'shared': 'shared', 'frozen': 'frozen'}
  heads = kinds[settings.heads]
  if method in ('finetune', 'ewc'):
    return layouts.make_layout(
      params, weights='shared', heads=heads, biases='shared', norm='shared'
    )
  return layouts.make_layout(
    params,
    heads=heads,
    biases=kinds[settings.biases],
    norm=kinds[settings.norm],
  )


def _for_retraining(settings: Settings) -> Settings:
  """The settings of retraining, without the decay that makes weights sparse."""
  rate, last = settings.retrain_learning_rate, settings.alpha_steps[-1:]
  return dataclasses.replace(
    settings,
    # The last power, from the first step on.
    alpha_steps=tuple(f'{text.split(":")[0]}:0' for text in last),
    learning_rate=settings.learning_rate if rate is None else rate,
    warmup_steps=0,
    phi_decay=0.0,
    phi_decay_warmup_steps=0,
  )


def _make_train(settings, alpha, make_loss, transform, layout, axis):
  """The `train` of a `Problem`."""
  steps = {False: settings.steps_per_task, True: settings.retrain_steps}
  if not layouts.paths_of(layout, 'masked'):
    # Methods that do not prune take the steps of both at once.
    steps = {False: sum(steps.values()), True: 0}
  recipes = {False: settings, True: _for_retraining(settings)}
  txs = {
    retraining: optimisers.make(recipes[retraining], alpha, steps=count)[1]
    for retraining, count in steps.items()
    if count
  }
  tx_init = {retraining: jax.jit(tx.init) for retraining, tx in txs.items()}

  @functools.cache
  def run_steps(retraining, frozen_norm):
    def run(state, anchors, data, indices):
      penalty = None if anchors is None else ewc.penalty(*anchors)
      step = training.make_train_step(
        make_loss(frozen_norm), txs[retraining], transform, axis, penalty
      )
      return training.make_run_steps(step)(state, data, indices)

    return devices.on_devices(run, axis)

  def train(
    memory, chosen, anchors, split, size, key, index, retraining, watch
  ):
    home = split.labels.device
    state_key, data_key = jax.random.split(key)
    # These are copies, as compiled steps overwrite their state.
    state = training.TrainState(
      phi=jax.tree.map(jnp.copy, memory.phi),
      model_state=jax.tree.map(jnp.copy, memory.model_state),
      opt_state=tx_init[retraining](memory.phi),
      masks=jax.tree.map(jnp.copy, chosen),
      step=jnp.zeros([], jnp.int32),
      key=state_key,
    )
    state, data, anchors = devices.replicate(
      (state, tuple(split), anchors), axis
    )
    compiled = run_steps(retraining, layout.state == 'frozen' and index > 0)

    def take(state, data, indices):
      return compiled(state, anchors, data, indices)

    step, state = loop.run(
      feeds.make_advance(
        feeds.metrics_on_host(take, axis),
        data,
        data_key,
        batch_size=settings.batch_size,
        size=size,
        axis=axis,
      ),
      state,
      start=0,
      stop=steps[retraining],
      chunk=_CHUNK,
      report=watch.report,
      recipe={'task': index + 1}
      | optimisers.recipe(recipes[retraining], alpha),
      stopped=watch.stopped,
    )
    if step < steps[retraining]:
      raise loop.Interrupted
    if axis is not None:  # The next task begins on the device of the data.
      state = jax.device_put(devices.unreplicate(state, axis), home)
    return memory._replace(phi=state.phi, model_state=state.model_state)

  return train


def _make_anchor(settings, logits, transform, layout):
  """The `anchor` of a `Problem`, for EWC."""
  shared = layouts.paths_of(layout, 'shared')

  @jax.jit
  def add(memory, anchors, images, key):
    theta = transform.to_theta(memory.phi)
    information = ewc.fisher(
      lambda theta, x: logits(theta, memory.model_state, x),
      theta,
      images,
      key=key,
    )
    held = leaves.put(
      jax.tree.map(lambda _: False, theta), dict.fromkeys(shared, True)
    )
    return ewc.add_task(
      anchors, information, theta, settings.ewc_strength, held
    )

  def anchor(memory, anchors=None, split=None, key=None):
    if split is None:
      return ewc.no_anchor(memory.phi)
    return add(memory, anchors, split.images[:_FISHER_EXAMPLES], key)

  return anchor


class _Functions(NamedTuple):
  """The functions of a network that training and searches use.

  Attributes:
    make_loss: makes the loss, given whether normalisation is frozen.
    accuracy: maps (theta, model_state, images, labels) to the accuracy.
    logits: maps (theta, model_state, images) to the logits.
    mean_loss: maps (theta, model_state, (images, labels)) to the mean loss.
  """

  make_loss: Callable[[bool], training.LossFn]
  accuracy: Callable[..., jax.Array]
  logits: Callable[..., jax.Array]
  mean_loss: Callable[..., jax.Array]


def _make_functions(
  network_apply: Callable[..., Any], prepare: augment.Prepare
) -> _Functions:
  """The functions of a network, in which examples of padding do not count."""

  def make_loss(frozen_norm):
    def apply(theta, model_state, key, x, is_training):
      # Frozen statistics normalise in training too, so that the network that is
      # trained is the one that is evaluated.
      return network_apply(
        theta, model_state, key, x, is_training and not frozen_norm
      )

    return classification.make_loss(apply, prepare)

  def logits(theta, model_state, images):
    return network_apply(
      theta, model_state, None, prepare(None, images, False), False
    )[0]

  def mean_loss(theta, model_state, batch):
    images, labels = batch
    total = classification.counted(logits(theta, model_state, images), labels)
    known = jnp.sum(labels != classification.PADDING)
    return total['loss'] / jnp.maximum(known, 1)  # A batch may be padding only.

  accuracy = classification.make_accuracy(network_apply, prepare)
  return _Functions(make_loss, accuracy, logits, mean_loss)


def _make_choose(settings, method, functions, transform, omit):
  """The `choose` of a `Problem`."""
  if method == 'packnet':
    return continual.packnet(settings.tasks, omit)
  if method != 'epn':
    return None
  return continual.efficient_packnet(
    jax.jit(functions.accuracy),
    transform,
    densities=settings.densities,
    gamma=settings.gamma,
    search=settings.search,
    search_steps=settings.search_steps,
    loss=functions.mean_loss,
    min_density=settings.min_density,
    max_density=settings.max_density,
    cap=1.0 if settings.cap is None else settings.cap,
    omit=omit,
  )


def make_problem(
  settings: Settings,
  method: str,
  alpha: float,
  input_shape: tuple[int, ...],
  num_classes: int,
) -> Problem:
  """Builds the functions of a method; nothing is compiled yet.

  Args:
    settings: those of the run.
    method: one of `METHODS`.
    alpha: the power.
    input_shape: the shape of an image, (height, width, channels).
    num_classes: the number of classes of a task.

  Returns:
    A `Problem`.

  Raises:
    ValueError: if the settings are impossible.
  """
  axis = devices.axis_name() if settings.data_parallel else None
  if settings.data_parallel:
    devices.check_batch_size(settings.batch_size)
  network = networks.build(
    settings.network, num_classes, cross_replica_axis=axis
  )
  transform = optimisers.make_transform(settings, alpha)
  images = jnp.zeros((1, *input_shape))

  def fresh(key):
    theta, model_state = network.init(key, images, True)
    return transform.to_phi(theta), model_state

  params = jax.eval_shape(fresh, jax.random.key(0))[0]
  optimisers.check_scale(settings, params)
  layout = _layout(settings, method, params)
  masked = layouts.paths_of(layout, 'masked')
  omit = [p for p in masked if 'initial' in p and settings.omit_first_layer]
  prepare = augment.usual(settings.dataset, axis)
  functions = _make_functions(network.apply, prepare)
  evaluate = jax.jit(functions.accuracy)
  train = _make_train(
    settings, alpha, functions.make_loss, transform, layout, axis
  )
  return Problem(
    layout=layout,
    transform=transform,
    omit=omit,
    fresh=jax.jit(fresh),
    train=train,
    choose=_make_choose(settings, method, functions, transform, omit),
    accuracy=lambda theta, state, split: float(evaluate(theta, state, *split)),
    logits=functions.logits,
    recall=jax.jit(functools.partial(continual.recall, transform=transform)),
    anchor=_make_anchor(settings, functions.logits, transform, layout)
    if method == 'ewc'
    else lambda *args: None,
  )

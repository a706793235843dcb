"""A run of sparse training, built from its settings: steps, masks and data."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from experiments.support import config
from experiments.support import methods
from experiments.support import optimisers
from experiments.support import settings as settings_lib
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax.data import augment
from powerprop_jax.data import in_memory
from powerprop_jax.data import streams
from powerprop_jax.models import networks
from powerprop_jax.sparse import flops
from powerprop_jax.training import classification
from powerprop_jax.training import devices
from powerprop_jax.training import feeds


class Sources(NamedTuple):
  """The splits of a data set that is read as a stream.

  Attributes:
    train: the training images.
    valid: the validation images; None if none are held out.
    test: the test images.
  """

  train: streams.Source
  valid: streams.Source | None
  test: streams.Source


Data = in_memory.Dataset | Sources
_STREAMED = ('imagenet2012', 'folder')


@dataclasses.dataclass(frozen=True)
class Settings(
  methods.Method,
  optimisers.Settings,
  settings_lib.Network,
  settings_lib.Data,
):
  """What is trained, and for how long."""

  alpha: float = config.flag(
    2.0,
    'The power alpha, at least 1; 1 is the baseline without Powerpropagation.',
    check=power.check_alpha,
  )
  steps: int = config.flag(
    5_000,
    'The number of training steps.',
    low=1,
    high=settings_lib.MAX_STEPS,
  )
  steps_multiplier: float = config.flag(
    1.0,
    'The factor by which the run and its schedules are stretched (extended'
    ' training). --update_every stays as it is.',
    low=1e-6,
    high=1e6,
  )
  batch_size: int = config.flag(
    100, 'The number of examples per step, over all devices.', low=1
  )
  gradient_batches: int = config.flag(
    1,
    'The number of batches over which the gradient that scores weights is'
    ' averaged when masks are chosen.',
    low=1,
    high=10_000,
  )
  label_smoothing: float = config.flag(
    0.0,
    'The label smoothing: the weight of the uniform distribution in the'
    ' targets.',
    low=0.0,
    high=1.0,
  )
  norms: bool = config.flag(
    False,
    'Whether the metrics have the norms of the gradient and of the update of'
    ' phi. They cost two passes over the parameters in each step.',
  )
  bfloat16: bool = config.flag(
    False,
    'Whether activations are bfloat16. Parameters and statistics are float32.',
  )
  seed: int = config.flag(
    0,
    'The random seed, which decides the initialisation, the order of the'
    ' examples and every other random choice.',
    low=0,
    high=settings_lib.MAX_SEED,
  )
  dataset: str = config.like(
    settings_lib.Data,
    'dataset',
    more='folder and imagenet2012 are read as streams of encoded images: folder'
    ' is --data_dir with the folders train and val, each with a folder per'
    ' class. The test images are those of val, and for imagenet2012 those of'
    ' its validation split.',
  )
  image_size: int = config.flag(
    224,
    'The height and the width of streamed images, in pixels.',
    low=8,
    high=8192,
  )
  validation_images: int | None = config.flag(
    None,
    'The number of training images of a stream that are held out as validation'
    ' images; 0 holds none out. By default one in a hundred is held out. Data'
    ' sets in memory have a validation split of their own.',
    low=0,
  )
  num_workers: int | None = config.flag(
    None,
    'The number of processes that decode streamed images; 0 decodes them in'
    ' threads of the program. The default is the number of cores.',
    low=0,
    high=4096,
    decides=False,
  )


T = TypeVar('T', bound=Settings)


class Problem(NamedTuple):
  """The parts of a run.

  Attributes:
    transform: the map between phi and theta.
    method: the plan of the sparse training method.
    init: makes the state to start from, as one device holds it.
    step: the train step, to be compiled for the axis.
    init_masks: chooses the first masks; compiled.
    update_masks: changes them; compiled.
    make_feed: makes the batches, and what trains and evaluates with them.
    layer_flops: dense operations of each layer at inference, for one example.
    axis: the name of the axis of devices; None on a single one.
  """

  transform: power.PowerTransform
  method: methods.Plan
  init: Callable[[], training.TrainState]
  step: training.TrainStep
  init_masks: training.MaskStep
  update_masks: training.MaskStep
  make_feed: Callable[[], feeds.Feed]
  layer_flops: dict[str, float]
  axis: str | None


def stretched(settings: T) -> T:
  """The settings of a run that is `steps_multiplier` times as long.

  Args:
    settings: those of the run, as they are given.

  Returns:
    The same settings with other numbers of steps.

  Raises:
    ValueError: if the numbers of steps become too small or too large.
  """
  names = ('steps', 'warmup_steps', 'phi_decay_warmup_steps')
  names += ('update_start', 'update_stop')
  numbers = {
    name: round(getattr(settings, name) * settings.steps_multiplier)
    for name in names
    if getattr(settings, name) is not None
  }
  try:
    return dataclasses.replace(settings, **numbers)
  except ValueError as e:
    raise ValueError(
      f'--steps_multiplier={settings.steps_multiplier:g} leads to {e}'
    ) from e


def load(settings: Settings) -> Data:
  """Loads the data set of a run.

  Args:
    settings: those of the run.

  Returns:
    A data set in memory, or sources of encoded images.

  Raises:
    ValueError: if it cannot be loaded, is smaller than a batch, or has too few
      images to hold out, or if images of a set in memory are to be held out.
  """
  name, place = settings.dataset, settings.data_dir
  held_out = settings.validation_images
  if name not in _STREAMED:
    if held_out is not None:
      raise ValueError(
        f'--validation_images={held_out}: {name} is held in memory, and has a'
        ' validation split of its own. Leave it out.'
      )
    return settings_lib.load_in_memory(settings, settings.batch_size)
  if name == 'folder':
    if place is None:
      raise ValueError('--dataset=folder needs --data_dir.')
    try:
      train, test = (streams.folder_source(place, s) for s in ('train', 'val'))
    except ValueError as e:
      raise ValueError(f'--data_dir={place}: {e}') from e
  else:
    train, test = (
      streams.tfds_source(name, s, place) for s in ('train', 'validation')
    )
  if held_out is None:
    held_out = max(1, train.size // 100)
  valid = None
  if held_out:
    try:
      train, valid = streams.hold_out(train, held_out)
    except ValueError as e:
      raise ValueError(f'--validation_images={held_out}: {e}') from e
  settings_lib.check_batch_size(settings.batch_size, train.size, name)
  return Sources(train, valid, test)


def fingerprint(data: Data) -> str:
  """A short text that tells one data set from another.

  Args:
    data: returned by `load`.

  Returns:
    The text, which is part of what must be equal for a run to go on.
  """
  if isinstance(data, in_memory.Dataset):
    return in_memory.fingerprint(data)
  return '-'.join(streams.fingerprint(source) for source in data if source)


def _make_feed(settings: Settings, data: Data, **arguments: Any) -> feeds.Feed:
  arguments['batch_size'] = settings.batch_size
  if isinstance(data, in_memory.Dataset):
    key = jax.random.key(settings.seed)
    return feeds.in_memory(data, key=key, **arguments)
  workers = settings.num_workers
  return feeds.streamed(
    *data,
    image_size=settings.image_size,
    seed=settings.seed,
    num_workers=settings_lib.num_cores() if workers is None else workers,
    **arguments,
  )


def make(settings: Settings, data: Data) -> Problem:
  """Builds the parts of a run; nothing is compiled or trained yet.

  Args:
    settings: those of the run, returned by `stretched`.
    data: returned by `load`.

  Returns:
    A `Problem`.

  Raises:
    ValueError: if the settings are impossible for these data or this network.
  """
  devices.check_batch_size(settings.batch_size)
  axis, side = devices.axis_name(), settings.image_size
  if isinstance(data, in_memory.Dataset):
    shape, num_classes = data.train.images.shape[1:], data.num_classes
  else:
    shape, num_classes = (side, side, 3), data.train.num_classes
  network = networks.build(
    settings.network,
    num_classes,
    dtype=jnp.bfloat16 if settings.bfloat16 else jnp.float32,
    cross_replica_axis=axis,
    # A last scale of zero in each block would hide the block from SNIP.
    **({'zero_init': False} if 'resnet' in settings.network else {}),
  )
  transform, tx = optimisers.make(
    settings, settings.alpha, steps=settings.steps
  )

  def init(key):
    return network.init(key, jnp.zeros((1, *shape)), True)

  theta, model_state = jax.eval_shape(init, jax.random.key(0))
  optimisers.check_scale(settings, theta)
  powers = set(settings.powers(settings.alpha, settings.steps).values())
  method = methods.make_plan(
    settings,
    theta,
    moves_zeros=settings.floor > 0 or powers <= {1.0},
    steps=settings.steps,
    fresh=lambda key: init(key)[0],
  )
  name = settings.dataset
  # A folder of images is streamed as ImageNet is.
  prepare = augment.usual('imagenet2012' if name in _STREAMED else name, axis)
  loss_fn = classification.make_loss(
    network.apply, prepare, settings.label_smoothing
  )
  step = training.make_train_step(
    loss_fn, tx, transform, axis, method.penalty, settings.norms
  )
  mask_steps = training.make_mask_updates(
    loss_fn, tx, method.updater, transform, axis
  )
  init_masks, update_masks = (devices.on_devices(f, axis) for f in mask_steps)

  def init_state():
    init_key, key = jax.random.split(jax.random.key(settings.seed))
    theta, model_state = jax.jit(init)(init_key)
    return training.init_state(key, theta, model_state, tx, transform)

  return Problem(
    transform=transform,
    method=method,
    init=init_state,
    step=step,
    init_masks=init_masks,
    update_masks=update_masks,
    make_feed=functools.partial(
      _make_feed,
      settings,
      data,
      step=step,
      apply=network.apply,
      prepare=prepare,
      axis=axis,
    ),
    layer_flops=flops.layer_flops(
      lambda p, s, x: network.apply(p, s, None, x, False)[0],
      theta,
      model_state,
      jax.ShapeDtypeStruct((1, *shape), jnp.float32),
    ),
    axis=axis,
  )

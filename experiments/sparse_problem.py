"""A run of sparse training, built from its flags."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import common
from experiments import feeds
from experiments import methods
from powerprop_jax import augment
from powerprop_jax import classification
from powerprop_jax import datasets
from powerprop_jax import devices
from powerprop_jax import flops
from powerprop_jax import networks
from powerprop_jax import power
from powerprop_jax import streams
from powerprop_jax import training

_STREAMED = ('imagenet2012', 'folder')
METHOD_FLAGS = (
  'sparsity',
  'backward_sparsity',
  'distribution',
  'dense_layers',
  'scope',
  'update_every',
  'update_start',
  'update_stop',
  'drop_fraction',
  'drop_schedule',
  'regrow',
  'regrow_dropped',
  'exploration_penalty',
)


class Problem(NamedTuple):
  """What a run is made of."""

  transform: power.PowerTransform
  method: methods.Method
  init: Callable[[], training.TrainState]
  init_masks: training.MaskStep
  update_masks: training.MaskStep
  make_feed: Callable[[], feeds.Feed]
  layer_flops: dict[str, float]
  axis: str | None


def stretched(settings: dict[str, Any]) -> dict[str, Any]:
  """The settings of a run that is `steps_multiplier` as long."""
  names = ('steps', 'warmup_steps', 'update_start', 'update_stop')
  stretched = {
    name: round(settings[name] * settings['steps_multiplier'])
    for name in names
    if settings[name] is not None
  }
  return settings | stretched


def load(settings: dict[str, Any], data_dir: str | None) -> Any:
  """The data set: in memory, or a pair of sources of encoded images."""
  name = settings['dataset']
  if name == 'folder':
    if data_dir is None:
      raise ValueError('--dataset=folder needs --data_dir.')
    return tuple(streams.folder_source(data_dir, s) for s in ('train', 'val'))
  if name == 'imagenet2012':
    return tuple(
      streams.tfds_source(name, s, data_dir) for s in ('train', 'validation')
    )
  return datasets.load(name, data_dir)


def _prepare(dataset: str, axis: str | None) -> augment.Prepare:
  """From bytes to what the network sees, with the usual augmentation."""
  if dataset in _STREAMED:
    return augment.standardise(*augment.IMAGENET)
  statistics = {'cifar10': augment.CIFAR10, 'cifar100': augment.CIFAR100}
  if dataset not in statistics:
    return augment.scale
  then = augment.standardise(*statistics[dataset])
  return augment.crop_and_flip(then=then, axis_name=axis)


def make_problem(
  settings: dict[str, Any], data: Any, num_workers: int
) -> Problem:
  """Builds everything; nothing is compiled or trained yet.

  Args:
    settings: the flags, after `stretched`.
    data: as of `load`.
    num_workers: how many processes decode streamed images.

  Returns:
    A `Problem`.

  Raises:
    ValueError: if the settings are impossible.
  """
  devices.check_batch_size(settings['batch_size'])
  axis, seed = devices.axis_name(), settings['seed']
  streamed = not isinstance(data, datasets.Dataset)
  classes = data[0].num_classes if streamed else data.num_classes
  side = settings['image_size']
  shape = (side, side, 3) if streamed else data.train.images.shape[1:]
  images = jnp.zeros((1, *shape))
  network = networks.build(
    settings['network'],
    classes,
    dtype=jnp.bfloat16 if settings['bfloat16'] else jnp.float32,
    cross_replica_axis=axis,
    # A last scale of zero in each block would hide the block from SNIP.
    **({'zero_init': False} if 'resnet' in settings['network'] else {}),
  )
  transform = power.power_transform(settings['alpha'])
  tx = common.make_tx(
    transform,
    steps=settings['steps'],
    update_rule='target_propagation',
    **{name: settings[name] for name in common.OPTIMISER_FLAGS},
  )

  def fresh(key):
    return network.init(key, images, True)[0]

  theta = jax.eval_shape(fresh, jax.random.key(0))
  method = methods.make_method(
    settings['method'],
    theta,
    alpha=settings['alpha'],
    steps=settings['steps'],
    fresh=fresh,
    **{name: settings[name] for name in METHOD_FLAGS},
  )
  prepare = _prepare(settings['dataset'], axis)
  loss_fn = classification.make_loss(
    network.apply, prepare, settings['label_smoothing']
  )
  step = training.make_train_step(loss_fn, tx, transform, axis, method.penalty)
  init_masks, update_masks = (
    devices.on_devices(f, axis)
    for f in training.make_mask_steps(
      loss_fn, tx, method.updater, transform, axis
    )
  )

  def init():
    init_key, key = jax.random.split(jax.random.key(seed))
    theta, model_state = jax.jit(network.init, static_argnums=2)(
      init_key, images, True
    )
    return training.init_state(key, theta, model_state, tx, transform)

  options = {'batch_size': settings['batch_size'], 'seed': seed, 'axis': axis}
  make_feed = functools.partial(
    feeds.in_memory, data, step, network.apply, prepare, **options
  )
  if streamed:
    make_feed = functools.partial(
      feeds.streamed,
      *data,
      step,
      network.apply,
      prepare,
      image_size=side,
      num_workers=num_workers,
      **options,
    )
  state = jax.eval_shape(
    lambda k: network.init(k, images, True)[1], jax.random.key(0)
  )
  layers = flops.layer_flops(
    lambda p, s, x: network.apply(p, s, None, x, False)[0], theta, state, images
  )
  return Problem(
    transform,
    method,
    init,
    init_masks,
    update_masks,
    make_feed,
    layers,
    axis,
  )

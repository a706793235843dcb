"""A run of sparse training, built from its flags."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import feeds
from experiments import methods
from experiments import optimiser_flags
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax.data import augment
from powerprop_jax.data import in_memory
from powerprop_jax.data import streams
from powerprop_jax.models import networks
from powerprop_jax.sparse import flops
from powerprop_jax.training import classification
from powerprop_jax.training import devices

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
  """What a run is made of.

  Attributes:
    transform: the power map.
    method: the sparse training method.
    init: makes the state to start from, of one device.
    step: the train step, to be compiled for the axis.
    init_masks: chooses the first masks; compiled.
    update_masks: changes them; compiled.
    make_feed: makes the batches, and what trains and evaluates with them.
    layer_flops: dense operations of each layer at inference, for one example.
    axis: as of `devices.axis_name`.
  """

  transform: power.PowerTransform
  method: methods.Method
  init: Callable[[], training.TrainState]
  step: training.TrainStep
  init_masks: training.MaskStep
  update_masks: training.MaskStep
  make_feed: Callable[[], feeds.Feed]
  layer_flops: dict[str, float]
  axis: str | None


def stretched(settings: dict[str, Any]) -> dict[str, Any]:
  """The settings of a run that is `steps_multiplier` as long."""
  names = ('steps', 'warmup_steps', 'phi_decay_warmup_steps')
  names += ('update_start', 'update_stop')
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
  return in_memory.load(name, data_dir)


def _make_network(settings: dict[str, Any], num_classes: int, axis: str | None):
  # A last scale of zero in each block would hide the block from SNIP.
  options = {'zero_init': False} if 'resnet' in settings['network'] else {}
  return networks.build(
    settings['network'],
    num_classes,
    dtype=jnp.bfloat16 if settings['bfloat16'] else jnp.float32,
    cross_replica_axis=axis,
    **options,
  )


def _make_tx(
  settings: dict[str, Any], transform: power.PowerTransform
) -> optax.GradientTransformation:
  return optimiser_flags.make_tx(
    transform,
    steps=settings['steps'],
    update_rule='target_propagation',
    **{name: settings[name] for name in optimiser_flags.NAMES},
  )


def _layer_flops(network, theta, model_state, shape) -> dict[str, float]:
  return flops.layer_flops(
    lambda p, s, x: network.apply(p, s, None, x, False)[0],
    theta,
    model_state,
    jax.ShapeDtypeStruct((1, *shape), jnp.float32),
  )


def _feed_maker(
  settings: dict[str, Any],
  data: Any,
  num_workers: int,
  theta: Any,
  **arguments: Any,
) -> Callable[[], feeds.Feed]:
  """What makes the feed of a data set, as of `load`."""
  arguments |= {name: settings[name] for name in ('batch_size', 'seed')}
  if isinstance(data, in_memory.Dataset):
    return functools.partial(feeds.in_memory, data, params=theta, **arguments)
  return functools.partial(
    feeds.streamed,
    *data,
    image_size=settings['image_size'],
    num_workers=num_workers,
    **arguments,
  )


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
  axis, side = devices.axis_name(), settings['image_size']
  if isinstance(data, in_memory.Dataset):
    shape, num_classes = data.train.images.shape[1:], data.num_classes
  else:
    shape, num_classes = (side, side, 3), data[0].num_classes
  network = _make_network(settings, num_classes, axis)
  transform = power.power_transform(settings['alpha'])
  tx = _make_tx(settings, transform)

  def init(key):
    return network.init(key, jnp.zeros((1, *shape)), True)

  theta, model_state = jax.eval_shape(init, jax.random.key(0))
  method = methods.make_method(
    settings['method'],
    theta,
    alpha=settings['alpha'],
    steps=settings['steps'],
    fresh=lambda key: init(key)[0],
    **{name: settings[name] for name in METHOD_FLAGS},
  )
  name = settings['dataset']
  # A folder of images is streamed as ImageNet is.
  prepare = augment.usual('imagenet2012' if name in _STREAMED else name, axis)
  loss_fn = classification.make_loss(
    network.apply, prepare, settings['label_smoothing']
  )
  step = training.make_train_step(loss_fn, tx, transform, axis, method.penalty)
  mask_steps = training.make_mask_updates(
    loss_fn, tx, method.updater, transform, axis
  )
  init_masks, update_masks = (devices.on_devices(f, axis) for f in mask_steps)

  def init_state():
    init_key, key = jax.random.split(jax.random.key(settings['seed']))
    theta, model_state = jax.jit(init)(init_key)
    return training.init_state(key, theta, model_state, tx, transform)

  return Problem(
    transform=transform,
    method=method,
    init=init_state,
    step=step,
    init_masks=init_masks,
    update_masks=update_masks,
    make_feed=_feed_maker(
      settings,
      data,
      num_workers,
      theta,
      step=step,
      apply=network.apply,
      prepare=prepare,
      axis=axis,
    ),
    layer_flops=_layer_flops(network, theta, model_state, shape),
    axis=axis,
  )

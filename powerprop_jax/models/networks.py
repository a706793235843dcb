"""Networks of the paper and of the pruning literature, in Haiku.

Each network is a plain function, written for `hk.transform_with_state`; `build`
transforms one by name. The weights it creates are ordinary ones (theta): the
power of Powerpropagation (section 2 of the paper) is applied outside, to the
tree of parameters. Two names are the same everywhere, since pruning treats
these layers specially: the path of the first layer's weight contains `initial`,
that of the last layer's contains `logits`.

All networks take `images`, floats of shape [n, h, w, c]; `is_training`, whether
BatchNorm normalises by the batch and updates its statistics; `num_classes`; and
`cross_replica_axis`, the mapped axis over which the statistics of a batch are
averaged, if any. They return logits of shape [n, num_classes], and raise
ValueError for images that they cannot take. Images are too small if a layer
would be left with nothing, or with a single pixel to stride over.

`build` computes the convolutions of a network by `convolutions`, whose
gradients are fast on CPUs in a loop of steps; parameters are those of
`hk.Conv2D`.

Every weight starts at random. A layer that starts at zero, as the last one of
`hk.nets.ResNet` does by default, would never leave zero for alpha > 1, where
zero is a critical point of the dynamics.

References:
  LeCun et al, `Gradient-based learning applied to document recognition
  <https://doi.org/10.1109/5.726791>`_, 1998.
  Lee et al, `SNIP: Single-shot network pruning based on connection sensitivity
  <https://arxiv.org/abs/1810.02340>`_, 2019 (LeNet-5-Caffe, AlexNet-s).
  Zagoruyko et al, `Wide residual networks <https://arxiv.org/abs/1605.07146>`_,
  2016.
  He et al, `Deep residual learning for image recognition
  <https://arxiv.org/abs/1512.03385>`_, 2016.
  Goyal et al, `Accurate, large minibatch SGD
  <https://arxiv.org/abs/1706.02677>`_, 2017 (initialisation of ResNet-50).
"""

from collections.abc import Callable
import contextlib
import functools
import inspect
from typing import Any, TypeAlias

import haiku as hk
import jax
import jax.numpy as jnp
import jmp

from powerprop_jax.models import convolutions

#: Maps (images, is_training, ...) to logits, inside of a Haiku transform.
Network: TypeAlias = Callable[..., jax.Array]

_FAN_IN = hk.initializers.VarianceScaling(1.0, 'fan_in', 'truncated_normal')
_HE = hk.initializers.VarianceScaling(2.0, 'fan_in', 'truncated_normal')


def _check_images(images: jax.Array, network: str, side: int) -> None:
  """Raises ValueError if the network cannot take these images."""
  if images.ndim != 4 or min(images.shape[1:3]) < side:
    raise ValueError(
      f'{network} takes images of shape [n, h, w, c] with h and w at least'
      f' {side}, got shape {images.shape}.'
    )
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f'{network} takes images of floats, got {images.dtype}. Scale them first,'
      ' for example by images.astype(float32) / 255.'
    )


def lenet_300_100(
  images: jax.Array,
  is_training: bool,
  num_classes: int,
  cross_replica_axis: str | None = None,
) -> jax.Array:
  """LeNet-300-100: two hidden layers with ReLU; 266,200 weights on MNIST.

  Weights start from a truncated normal distribution of variance 1 / fan-in and
  biases at zero, which are the settings of the paper's MNIST experiment.

  Args:
    images: floats of shape [n, h, w, c], with sides of at least 1 pixel.
    is_training: not used.
    num_classes: the number of outputs.
    cross_replica_axis: not used.

  Returns:
    Logits of shape [n, num_classes].

  Raises:
    ValueError: if the images do not fit.

  >>> import jax
  >>> network = build('lenet_300_100', num_classes=10)
  >>> images = jax.ShapeDtypeStruct([1, 28, 28, 1], 'float32')
  >>> theta, _ = jax.eval_shape(
  ...   lambda x: network.init(jax.random.key(0), x, is_training=True), images
  ... )
  >>> sum(x.size for x in jax.tree.leaves(theta))
  266610
  """
  del is_training, cross_replica_axis
  _check_images(images, 'lenet_300_100', 1)
  x = hk.Flatten()(images)
  x = jax.nn.relu(hk.Linear(300, w_init=_FAN_IN, name='initial_linear')(x))
  x = jax.nn.relu(hk.Linear(100, w_init=_FAN_IN, name='linear_1')(x))
  return hk.Linear(num_classes, w_init=_FAN_IN, name='logits')(x)


def lenet_5(
  images: jax.Array,
  is_training: bool,
  num_classes: int,
  cross_replica_axis: str | None = None,
) -> jax.Array:
  """LeNet-5 in the variant of Caffe that is usual in pruning; 430,500 weights.

  It has two convolutions (20 and 50 filters of 5 x 5, no padding), each
  followed by ReLU and a 2 x 2 maximum, a hidden layer of 500 units, and the
  outputs: 431,080 parameters on MNIST. It is initialised as `lenet_300_100` is.

  Args:
    images: floats of shape [n, h, w, c], with sides of at least 16 pixels.
    is_training: not used.
    num_classes: the number of outputs.
    cross_replica_axis: not used.

  Returns:
    Logits of shape [n, num_classes].

  Raises:
    ValueError: if the images do not fit.

  >>> import jax
  >>> network = build('lenet_5', num_classes=10)
  >>> images = jax.ShapeDtypeStruct([1, 28, 28, 1], 'float32')
  >>> theta, _ = jax.eval_shape(
  ...   lambda x: network.init(jax.random.key(0), x, is_training=True), images
  ... )
  >>> sum(x.size for x in jax.tree.leaves(theta))
  431080
  """
  del is_training, cross_replica_axis
  _check_images(images, 'lenet_5', 16)
  x = images
  for channels, name in (20, 'initial_conv'), (50, 'conv_1'):
    x = hk.Conv2D(channels, 5, padding='VALID', w_init=_FAN_IN, name=name)(x)
    x = convolutions.max_pool(jax.nn.relu(x), 2)
  x = hk.Flatten()(x)
  x = jax.nn.relu(hk.Linear(500, w_init=_FAN_IN, name='linear_2')(x))
  return hk.Linear(num_classes, w_init=_FAN_IN, name='logits')(x)


def _normalise(x, is_training, cross_replica_axis, name):
  norm = hk.BatchNorm(
    True, True, 0.9, 1e-5, cross_replica_axis=cross_replica_axis, name=name
  )
  return norm(x, is_training)


def _conv(x, channels, kernel, stride, name):
  conv = hk.Conv2D(
    channels, kernel, stride, with_bias=False, w_init=_HE, name=name
  )
  return conv(x)


def alexnet_s(
  images: jax.Array,
  is_training: bool,
  num_classes: int,
  cross_replica_axis: str | None = None,
) -> jax.Array:
  """AlexNet for 32 x 32 images, as in SNIP (there AlexNet-s); 5.1 M weights.

  It has five convolutions of stride 2 instead of pooling, and two hidden layers
  of 1024 units, with BatchNorm and ReLU after each.

  Args:
    images: floats of shape [n, h, w, c], with sides of at least 17 pixels.
    is_training: whether BatchNorm normalises by the batch.
    num_classes: the number of outputs.
    cross_replica_axis: the mapped axis that BatchNorm averages over, if any.

  Returns:
    Logits of shape [n, num_classes].

  Raises:
    ValueError: if the images do not fit.

  >>> import jax
  >>> network = build('alexnet_s', num_classes=10)
  >>> images = jax.ShapeDtypeStruct([1, 32, 32, 3], 'float32')
  >>> theta, _ = jax.eval_shape(
  ...   lambda x: network.init(jax.random.key(0), x, is_training=True), images
  ... )
  >>> sum(x.size for x in jax.tree.leaves(theta))
  5073642
  """
  _check_images(images, 'alexnet_s', 17)
  x = images
  for i, (channels, kernel) in enumerate(
    ((96, 11), (256, 5), (384, 3), (384, 3), (256, 3))
  ):
    x = _conv(x, channels, kernel, 2, f'conv_{i}' if i else 'initial_conv')
    x = _normalise(x, is_training, cross_replica_axis, f'batchnorm_{i}')
    x = jax.nn.relu(x)
  x = hk.Flatten()(x)
  for i in (5, 6):
    x = hk.Linear(1024, with_bias=False, w_init=_HE, name=f'linear_{i}')(x)
    x = _normalise(x, is_training, cross_replica_axis, f'batchnorm_{i}')
    x = jax.nn.relu(x)
  return hk.Linear(num_classes, w_init=_FAN_IN, name='logits')(x)


def _wide_block(x, channels, stride, norm):
  """BatchNorm, ReLU, convolution, twice, and the shortcut around them."""
  out = jax.nn.relu(norm(x, name='batchnorm_0'))
  # Where the shape changes, the shortcut starts from the activations.
  changes = x.shape[-1] != channels or stride != 1
  shortcut = _conv(out, channels, 1, stride, 'shortcut_conv') if changes else x
  out = _conv(out, channels, 3, stride, 'conv_0')
  out = jax.nn.relu(norm(out, name='batchnorm_1'))
  return _conv(out, channels, 3, 1, 'conv_1') + shortcut


def wide_resnet(
  images: jax.Array,
  is_training: bool,
  num_classes: int,
  cross_replica_axis: str | None = None,
  *,
  depth: int,
  width: int,
) -> jax.Array:
  """Wide ResNet for small images; WRN-22-2 has 1.08 M weights.

  Args:
    images: floats of shape [n, h, w, c], with sides of at least 3 pixels.
    is_training: whether BatchNorm normalises by the batch.
    num_classes: the number of outputs.
    cross_replica_axis: the mapped axis that BatchNorm averages over, if any.
    depth: the number of layers, 6 n + 4 for three groups of n blocks.
    width: the factor of the 16, 32 and 64 channels of the groups.

  Returns:
    Logits of shape [n, num_classes].

  Raises:
    ValueError: if depth is not 6 n + 4 with n >= 1, or the images do not fit.

  >>> import jax
  >>> network = build('wrn_22_2', num_classes=10)
  >>> images = jax.ShapeDtypeStruct([1, 32, 32, 3], 'float32')
  >>> theta, _ = jax.eval_shape(
  ...   lambda x: network.init(jax.random.key(0), x, is_training=True), images
  ... )
  >>> sum(x.size for x in jax.tree.leaves(theta))
  1079642
  """
  blocks, rest = divmod(depth - 4, 6)
  if blocks < 1 or rest:
    raise ValueError(f'depth must be 6 n + 4 with n >= 1, got {depth}.')
  _check_images(images, f'wrn_{depth}_{width}', 3)
  norm = functools.partial(
    _normalise, is_training=is_training, cross_replica_axis=cross_replica_axis
  )
  x = _conv(images, 16, 3, 1, 'initial_conv')
  for group, channels in enumerate((16, 32, 64)):
    for block in range(blocks):
      stride = 2 if group and not block else 1
      with hk.name_scope(f'group_{group}_block_{block}'):
        x = _wide_block(x, channels * width, stride, norm)
  x = jnp.mean(jax.nn.relu(norm(x, name='final_batchnorm')), axis=(1, 2))
  return hk.Linear(num_classes, w_init=_FAN_IN, name='logits')(x)


def _scales_of_last_norms(last: str, value: float) -> Any:
  """A Haiku creator for the scale of the last BatchNorm of every block."""

  def creator(next_creator, shape, dtype, init, context):
    if context.full_name.endswith(f'/{last}/scale'):
      init = hk.initializers.Constant(value)
    return next_creator(shape, dtype, init)

  return creator


# Haiku's network and the name of the last BatchNorm of its blocks, by depth.
_RESNETS = {
  18: (hk.nets.ResNet18, 'batchnorm_1'),
  50: (hk.nets.ResNet50, 'batchnorm_2'),
}


def resnet(
  images: jax.Array,
  is_training: bool,
  num_classes: int,
  cross_replica_axis: str | None = None,
  *,
  depth: int,
  zero_init: bool = True,
) -> jax.Array:
  """ResNet-18 or ResNet-50 for ImageNet; the latter has 25.5 M weights.

  The blocks are Haiku's, with the stride in the 3 x 3 convolution ("v1.5"),
  BatchNorm with decay 0.9 and epsilon 1e-5, and outputs that start from a
  normal distribution of standard deviation 0.01.

  Args:
    images: floats of shape [n, h, w, c], with sides of at least 17 pixels.
    is_training: whether BatchNorm normalises by the batch.
    num_classes: the number of outputs.
    cross_replica_axis: the mapped axis that BatchNorm averages over, if any.
    depth: 18 or 50.
    zero_init: whether the scale of the last BatchNorm of every block starts at
      zero, so that the blocks start as the identity. The gradient of every
      weight inside a block is then zero at the start: methods that score
      weights by it, such as SNIP, need False.

  Returns:
    Logits of shape [n, num_classes].

  Raises:
    ValueError: if there is no such depth, or the images do not fit.

  >>> import jax
  >>> network = build('resnet18', num_classes=1000)
  >>> images = jax.ShapeDtypeStruct([1, 64, 64, 3], 'float32')
  >>> theta, _ = jax.eval_shape(
  ...   lambda x: network.init(jax.random.key(0), x, is_training=True), images
  ... )
  >>> sum(x.size for x in jax.tree.leaves(theta))
  11689512
  """
  if depth not in _RESNETS:
    raise ValueError(f'depth must be one of {list(_RESNETS)}, got {depth}.')
  _check_images(images, f'resnet{depth}', 17)
  module, last = _RESNETS[depth]
  scales = _scales_of_last_norms(last, 0.0 if zero_init else 1.0)
  with hk.custom_creator(scales):
    network = module(
      num_classes,
      bn_config={
        'decay_rate': 0.9,
        'eps': 1e-5,
        'cross_replica_axis': cross_replica_axis,
      },
      logits_config={'w_init': hk.initializers.RandomNormal(0.01)},
      name=f'resnet{depth}',
    )
    return network(images, is_training)


#: The networks by name, with the settings that the names stand for.
#:
#: :meta hide-value:
NETWORKS: dict[str, Network] = {
  'lenet_300_100': lenet_300_100,
  'lenet_5': lenet_5,
  'alexnet_s': alexnet_s,
  'wrn_10_1': functools.partial(wide_resnet, depth=10, width=1),
  'wrn_22_2': functools.partial(wide_resnet, depth=22, width=2),
  'resnet18': functools.partial(resnet, depth=18),
  'resnet50': functools.partial(resnet, depth=50),
}


@contextlib.contextmanager
def _activations_in(dtype):
  """Activations in `dtype`; parameters and BatchNorm's sums in float32."""
  with contextlib.ExitStack() as stack:
    if dtype != jnp.float32:
      layer = jmp.Policy(jnp.float32, dtype, dtype)
      norm = jmp.Policy(jnp.float32, jnp.float32, dtype)
      for module, policy in (
        (hk.Linear, layer),
        (hk.Conv2D, layer),
        (hk.BatchNorm, norm),
      ):
        stack.enter_context(hk.mixed_precision.push_policy(module, policy))
    yield


def _options(network: Network) -> set[str]:
  """The names of the arguments that a network of `NETWORKS` leaves open."""
  fixed = getattr(network, 'keywords', {})
  parameters = inspect.signature(network).parameters.values()
  return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - set(fixed)


def build(
  name: str,
  num_classes: int,
  *,
  dtype: jax.typing.DTypeLike = jnp.float32,
  cross_replica_axis: str | None = None,
  **options,
) -> hk.TransformedWithState:
  """Builds a network by its name, as a pair of pure functions.

  `init(rng, images, is_training)` gives parameters (theta) and state, and
  `apply(params, state, rng, images, is_training)` gives (logits, state), with
  logits in float32. `images` are floats of shape [n, h, w, c], `is_training` is
  a Python bool, and rng may be None in `apply`, where nothing is random.

  Args:
    name: one of `NETWORKS`.
    num_classes: the number of outputs.
    dtype: the dtype of the activations: float32, bfloat16 or float16.
      Parameters are always float32, as is the arithmetic of BatchNorm.
    cross_replica_axis: the mapped axis over which BatchNorm averages its batch
      statistics, or None, by which every replica has statistics of its own.
      `init` runs outside of the map in either case.
    **options: keyword arguments of the network, such as `zero_init`.

  Returns:
    An `hk.TransformedWithState`.

  Raises:
    ValueError: if the name, the number of classes, the dtype or an option is
      not possible; from `init` and `apply`, if the images do not fit.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> network = build('lenet_300_100', num_classes=10)
  >>> images = jnp.zeros([2, 28, 28, 1])
  >>> theta, state = network.init(jax.random.key(0), images, is_training=True)
  >>> logits, _ = network.apply(theta, state, None, images, is_training=False)
  >>> logits.shape
  (2, 10)
  """
  if name not in NETWORKS:
    raise ValueError(f'No network {name!r}; there are {sorted(NETWORKS)}.')
  if num_classes < 1:
    raise ValueError(f'num_classes must be at least 1, got {num_classes}.')
  dtype = jnp.dtype(dtype)
  if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise ValueError(
      f'dtype must be float32, bfloat16 or float16, got {dtype.name}.'
    )
  network = NETWORKS[name]
  known = _options(network)
  if not known.issuperset(options):
    raise ValueError(
      f'The options of {name} are {sorted(known)}, got {sorted(options)}.'
    )

  def forward(images, is_training, axis):
    with _activations_in(dtype), convolutions.in_haiku():
      logits = network(images, is_training, num_classes, axis, **options)
    return logits.astype(jnp.float32)

  # The axis is bound only where the step is mapped, which `init` is not.
  return hk.TransformedWithState(
    hk.transform_with_state(functools.partial(forward, axis=None)).init,
    hk.transform_with_state(
      functools.partial(forward, axis=cross_replica_axis)
    ).apply,
  )

"""The preparation of images on the device: scaling and augmentation.

Data sets stay uint8 in memory, and every step turns its own batch into floats:
a `Prepare` is a pure function that a loss calls on its images. The standard
augmentation of small images (He et al. 2016, section 4.2) pads every image by
four pixels, crops it at random to its old size and mirrors it with probability
1/2; an image is then new in every epoch and no copies are kept.

References:
  He et al, `Deep residual learning for image recognition
  <https://arxiv.org/abs/1512.03385>`_, CVPR 2016.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

#: (key, images, is_training) -> images, from uint8 [n, height, width, channels]
#: to float32 of the same shape. The key may be None where is_training is False.
Prepare: TypeAlias = Callable[[jax.Array | None, jax.Array, bool], jax.Array]

#: (mean, std) of every channel, in units of the brightest pixel. For CIFAR they
#: are those of all pixels of the training set together; the smaller deviations
#: that are often copied (0.2023, 0.1994, 0.2010) are means over images.
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
#: (mean, std) of every channel of CIFAR-100, in the same way.
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
#: (mean, std) of every channel of ImageNet, the numbers with which its models
#: have been published since torchvision.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_STATISTICS = {
  'cifar10': CIFAR10,
  'cifar100': CIFAR100,
  'imagenet2012': IMAGENET,
}


def scale(
  key: jax.Array | None, images: jax.Array, is_training: bool
) -> jax.Array:
  """Scales bytes to floats in [0, 1]: the plainest `Prepare`.

  Args:
    key: not used.
    images: uint8 [n, height, width, channels].
    is_training: not used.

  Returns:
    float32 of the same shape.

  >>> import jax.numpy as jnp
  >>> scale(None, jnp.array([0, 51, 255], jnp.uint8), False).round(3).tolist()
  [0.0, 0.20000000298023224, 1.0]
  """
  del key, is_training
  return images.astype(jnp.float32) / 255.0


def standardise(mean: Sequence[float], std: Sequence[float]) -> Prepare:
  """Makes a `Prepare` that standardises each channel by its mean and deviation.

  It scales images to [0, 1], subtracts the mean and divides by the standard
  deviation.

  Args:
    mean: the mean of each channel, where 1 is the brightest pixel.
    std: the standard deviation of each channel; positive.

  Returns:
    A `Prepare`, such as `standardise(*CIFAR10)`.

  Raises:
    ValueError: if there is not one finite mean and one finite and positive
      deviation for every channel; and, when images are prepared, if they have
      another number of channels.

  >>> import jax.numpy as jnp
  >>> prepare = standardise([0.5], [0.25])
  >>> prepare(None, jnp.full([1, 1, 1, 1], 255, jnp.uint8), False).tolist()
  [[[[2.0]]]]
  """
  means, stds = np.asarray(mean, np.float32), np.asarray(std, np.float32)
  if means.ndim != 1 or means.shape != stds.shape:
    raise ValueError(
      f'mean={mean} and std={std} must have one number for every channel'
    )
  if not (np.isfinite(means).all() and np.isfinite(stds).all()):
    raise ValueError(f'mean={mean} and std={std} must be finite')
  if not (stds > 0).all():
    raise ValueError(f'std={std} must be positive')

  def prepare(key, images, is_training):
    if images.shape[-1] != len(means):
      raise ValueError(
        f'mean={mean} is for images of {len(means)} channels, but these have '
        f'{images.shape[-1]}; give one number for every channel'
      )
    return (scale(key, images, is_training) - means) / stds

  return prepare


def crop_and_flip(
  pad: int = 4,
  flip: bool = True,
  then: Prepare = scale,
  axis_name: str | None = None,
) -> Prepare:
  """The standard augmentation of CIFAR; outside training, `then` alone.

  Each image is padded by `pad` black pixels on every side, cropped to its old
  size at random and mirrored left to right with probability 1/2. Padding comes
  before `then`: what is outside of the image is black, not the mean colour.

  Every image has a key of its own, by its place in the batch. With `axis_name`
  that is its place in the batch of all devices, so that any number of devices
  trains on the same crops, and no two devices share theirs.

  Args:
    pad: by how many pixels an image is moved at most.
    flip: whether to mirror images; digits and letters should not be mirrored.
    then: what to do with the images afterwards.
    axis_name: the axis of the pmap that the step runs under, whose devices hold
      consecutive parts of the batch.

  Returns:
    A `Prepare`.

  Raises:
    ValueError: if `pad` is negative; and, in training, if there is no key.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> prepare = crop_and_flip(pad=2)
  >>> images = jnp.zeros([3, 8, 8, 1], jnp.uint8)
  >>> prepare(jax.random.key(0), images, True).shape
  (3, 8, 8, 1)
  """
  if pad < 0:
    raise ValueError(f'pad={pad} must be 0 or more pixels')

  def augment(key, image):
    crop_key, flip_key = jax.random.split(key)
    row, column = jax.random.randint(crop_key, [2], 0, 2 * pad + 1)
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    crop = jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
    mirrored = flip & jax.random.bernoulli(flip_key)
    return jnp.where(mirrored, crop[:, ::-1], crop)

  def prepare(key, images, is_training):
    if is_training:
      if key is None:
        raise ValueError(
          'crop_and_flip draws at random in training and needs a key, got'
          ' key=None'
        )
      index = jnp.arange(len(images))
      if axis_name is not None:
        index += len(images) * jax.lax.axis_index(axis_name)
      keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
      images = jax.vmap(augment)(keys, images)
    return then(key, images, is_training)

  return prepare


def usual(dataset: str, axis_name: str | None = None) -> Prepare:
  """The `Prepare` that is usual in the literature for a data set.

  CIFAR is augmented by `crop_and_flip` and standardised. ImageNet, whose images
  the stream has augmented, is standardised. The others are only scaled.

  Args:
    dataset: the name of the data set, as TFDS has it.
    axis_name: the axis of the pmap that the step runs under, if any, as for
      `crop_and_flip`.

  Returns:
    A `Prepare`.

  >>> usual('mnist') is scale
  True
  """
  if dataset not in _STATISTICS:
    return scale
  then = standardise(*_STATISTICS[dataset])
  if dataset == 'imagenet2012':
    return then
  return crop_and_flip(then=then, axis_name=axis_name)

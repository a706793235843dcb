"""Tests of `augment`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.data import augment

# 2 x 3 pixels of two channels, none of them black.
IMAGE = np.arange(1, 13, dtype=np.uint8).reshape(2, 3, 2)


def crops(image, pad, flip):
  """All images that augmentation may return, by hand."""
  height, width, _ = image.shape
  padded = np.zeros((height + 2 * pad, width + 2 * pad, 2), np.uint8)
  padded[pad : pad + height, pad : pad + width] = image
  found = []
  for row in range(2 * pad + 1):
    for column in range(2 * pad + 1):
      crop = padded[row : row + height, column : column + width]
      found += [crop, crop[:, ::-1]] if flip else [crop]
  return found


def keep(key, images, is_training):
  """A `Prepare` that does nothing."""
  del key, is_training
  return images


@functools.partial(jax.jit, static_argnums=0)
def train(prepare, key, images):
  return prepare(key, images, True)


def test_scale_at_every_byte():
  images = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
  scaled = augment.scale(None, images, False)
  assert scaled.dtype == jnp.float32
  assert (scaled.min(), scaled.max()) == (0, 1)
  # XLA multiplies by the reciprocal, which may change the last bit.
  np.testing.assert_allclose(scaled.ravel(), np.arange(256) / 255, rtol=2e-7)


def test_standardise_by_hand():
  prepare = augment.standardise([0.5, 0.2], [0.25, 0.1])
  images = jnp.asarray([0, 51, 255, 102], jnp.uint8).reshape(1, 1, 2, 2)
  # (0 - 0.5) / 0.25; (0.2 - 0.2) / 0.1; (1 - 0.5) / 0.25; (0.4 - 0.2) / 0.1.
  for key, is_training in ((None, False), (jax.random.key(0), True)):
    standard = prepare(key, images, is_training)
    assert standard.dtype == jnp.float32
    np.testing.assert_allclose(standard.ravel(), [-2, 0, 2, 2], atol=1e-6)


@pytest.mark.parametrize(
  'statistics', [augment.CIFAR10, augment.CIFAR100, augment.IMAGENET]
)
def test_published_statistics_are_of_colour_images(statistics):
  images = jnp.full([1, 4, 4, 3], 128, jnp.uint8)
  standard = augment.standardise(*statistics)(None, images, False)
  # Mid-grey is near the mean of photographs.
  assert jnp.abs(standard).max() < 0.6


@pytest.mark.parametrize(
  ('mean', 'std', 'message'),
  [
    ([0.5], [0.5, 0.5], 'one number for every channel'),
    (0.5, 0.5, 'one number for every channel'),
    ([0.5, 0.5], [0.5, 0.0], r'std=\[0.5, 0.0\] must be positive'),
    ([0.5], [-1.0], 'must be positive'),
    ([float('nan')], [1.0], 'must be finite'),
    ([0.5], [float('inf')], 'must be finite'),
  ],
)
def test_impossible_statistics_stop_at_once(mean, std, message):
  with pytest.raises(ValueError, match=message):
    augment.standardise(mean, std)


def test_statistics_of_another_number_of_channels_are_an_error():
  images = jnp.zeros([1, 4, 4, 1], jnp.uint8)
  with pytest.raises(ValueError, match='3 channels, but these have 1'):
    augment.standardise(*augment.CIFAR10)(None, images, False)


@pytest.mark.parametrize('flip', [True, False])
def test_crops_are_all_possible_ones_about_equally_often(flip):
  expected = crops(IMAGE, 1, flip)  # 9 places in two directions.
  n = 400 * len(expected)
  images = jnp.asarray(np.broadcast_to(IMAGE, (n, *IMAGE.shape)))
  prepare = augment.crop_and_flip(1, flip, keep)
  found = np.asarray(train(prepare, jax.random.key(0), images))
  counts = [(found == crop).all(axis=(1, 2, 3)).sum() for crop in expected]
  assert sum(counts) == n  # All different, hence each is found exactly once.
  # Five standard deviations of a count, which is 20 at most.
  assert np.abs(np.asarray(counts) - 400).max() < 100


def test_no_padding_and_no_flip_change_nothing():
  images = jnp.asarray(np.stack([IMAGE, IMAGE + 100]))
  prepare = augment.crop_and_flip(0, False)
  np.testing.assert_array_equal(
    train(prepare, jax.random.key(0), images),
    train(augment.scale, None, images),
  )


def test_evaluation_sees_images_as_they_are():
  images = jnp.asarray(IMAGE[None])
  then = augment.standardise([0.5, 0.2], [0.25, 0.1])
  prepare = augment.crop_and_flip(then=then)
  np.testing.assert_array_equal(
    prepare(None, images, False), then(None, images, False)
  )


def test_standardised_padding_is_black():
  then = augment.standardise([0.5, 0.2], [0.25, 0.1])
  images = jnp.full([50, 3, 3, 2], 255, jnp.uint8)
  prepare = augment.crop_and_flip(1, then=then)
  found = np.asarray(train(prepare, jax.random.key(0), images))
  values = np.unique(found[..., 0].round(6))
  np.testing.assert_allclose(values, [-2, 2], atol=1e-6)  # Black and white.


def test_the_key_decides():
  images = jnp.asarray(np.broadcast_to(IMAGE, (64, *IMAGE.shape)))
  prepare = augment.crop_and_flip(2)
  first, again, other = (
    train(prepare, jax.random.key(seed), images) for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_devices_together_crop_what_one_crops():
  images = np.random.default_rng(0).integers(256, size=[8, 5, 4, 3], dtype='u1')
  key = jax.random.key(0)
  whole = train(augment.crop_and_flip(), key, images)
  prepare = augment.crop_and_flip(axis_name='devices')
  # vmap gives its axis the same index that pmap gives to devices.
  parts = jax.vmap(
    functools.partial(train, prepare, key), axis_name='devices', axis_size=4
  )(images.reshape(4, 2, 5, 4, 3))
  np.testing.assert_array_equal(parts.reshape(whole.shape), whole)


def test_padding_must_not_be_negative_and_training_needs_a_key():
  with pytest.raises(ValueError, match='pad=-1 '):
    augment.crop_and_flip(-1)
  with pytest.raises(ValueError, match='key=None'):
    augment.crop_and_flip()(None, jnp.asarray(IMAGE[None]), True)


@pytest.mark.parametrize('name', ['cifar10', 'imagenet2012', 'mnist'])
def test_usual_preparation_of_a_data_set(name):
  images, key = jnp.arange(48, dtype=jnp.uint8), jax.random.key(0)
  images = images.reshape(1, 4, 4, 3)
  by_hand = {
    'cifar10': augment.crop_and_flip(
      then=augment.standardise(*augment.CIFAR10)
    ),
    'imagenet2012': augment.standardise(*augment.IMAGENET),
    'mnist': augment.scale,
  }[name]
  prepare = augment.usual(name)
  for is_training in True, False:
    np.testing.assert_array_equal(
      prepare(key, images, is_training), by_hand(key, images, is_training)
    )

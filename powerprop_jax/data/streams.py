"""Image streams for sets that do not fit in memory, such as ImageNet.

All examples form one endless stream, epoch after epoch, each in an order of its
own. Its batches are dealt out to the hosts in turn, and grain deals those of a
host out to its worker processes. Order, crops and mirroring depend on the seed
and the place in the stream alone: the batches of all hosts side by side are the
same for any number of hosts and workers, and a stream can start at any batch.
Training sees Inception crops (Szegedy et al. 2015): 8 to 100 % of the area at
an aspect of 3/4 to 4/3, mirrored with probability 1/2. Evaluation sees the
central square of 7/8 of the shorter side: 224 pixels of an image resized to
256.

References:
  Szegedy et al, `Going deeper with convolutions
  <https://arxiv.org/abs/1409.4842>`_, CVPR 2015.
"""

import atexit
from collections.abc import Callable, Iterator, Sequence
import functools
import gc
import hashlib
import io
import logging
import math
import multiprocessing
import os
import signal
import threading
from typing import Any, NamedTuple, TypeAlias
import weakref
import zlib

import numpy as np

from powerprop_jax import extras
from powerprop_jax import paths
from powerprop_jax.data import prepared

with extras.needed('data'):
  from absl import flags
  import grain

_LOG = logging.getLogger(__name__)
_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.webp')
_MODES = {1: 'L', 3: 'RGB'}
_LOOKED_AT = 500
# What else can be done if a TFDS set is missing, and the flags for it.
_INSTEAD = {'read a folder': '--dataset=folder --data_dir=...'}

#: The left, top, right and bottom of a crop; the last two are excluded.
Box: TypeAlias = tuple[int, int, int, int]


class Example(NamedTuple):
  """An image as it is stored.

  Attributes:
    data: the bytes of the file: JPEG, PNG or whatever else PIL reads.
    label: the class.
    name: where the image came from, for messages.

  >>> from PIL import Image
  >>> Image.new('RGB', (9, 9)).save(file := io.BytesIO(), 'png')
  >>> example = Example(file.getvalue(), label=3, name='black.png')
  >>> example.data[1:4], example.label
  (b'PNG', 3)
  """

  data: bytes
  label: int
  name: str


class Source(NamedTuple):
  """A set of encoded images with random access.

  Attributes:
    read: maps an index to its example; it is pickled and sent to the workers.
    size: the number of examples.
    num_classes: the number of classes.
    identity: what is known of all examples without reading them, such as their
      names and labels; a part of `fingerprint`.

  >>> source = Source(lambda i: Example(b'', i % 2, f'{i}.png'), 100, 2)
  >>> source.read(7).name, source.size, source.num_classes
  ('7.png', 100, 2)
  """

  read: Callable[[int], Example]
  size: int
  num_classes: int
  identity: str = ''


def fingerprint(source: Source) -> str:
  """A short text that tells one source from another.

  It is made of the size, the number of classes, what is known of all examples
  without reading them (`Source.identity`), and the bytes and labels of up to 64
  examples spread over the source. It belongs among the settings of an
  experiment, as `in_memory.fingerprint` does.

  Args:
    source: the source.

  Returns:
    16 hexadecimal digits, which do not depend on where the files lie.

  >>> source = Source(lambda i: Example(b'png', i % 2, f'{i}.png'), 100, 2)
  >>> fingerprint(source) == fingerprint(source._replace(size=99))
  False
  """
  digest = hashlib.sha256(
    repr((source.size, source.num_classes, source.identity)).encode()
  )
  for i in _spread(source.size, 64):
    example = source.read(i)
    checksum = zlib.crc32(example.data)
    digest.update(f'{len(example.data)} {checksum} {example.label};'.encode())
  return digest.hexdigest()[:16]


def folder_source(root: str | os.PathLike[str], split: str) -> Source:
  """A folder of class folders of images: root/split/class/image.

  Images are the files that end in .jpg, .jpeg, .png, .bmp or .webp and do not
  start with a dot. Others are skipped, and a warning says how many. Up to 500
  images, spread over the split, are decoded at once, so that most faults show
  before anything trains.

  Pixels are taken as they are stored. An orientation in the EXIF data is not
  applied, as in most pipelines for ImageNet: rotate such photographs yourself.

  Args:
    root: the folder that holds `train`, whose folders, by name, are the classes
      of all splits. It may be the address of a bucket.
    split: a folder in it, such as `train` or `val`.

  Returns:
    The source, in the order of class and file names.

  Raises:
    ValueError: if a folder is missing or empty, if a class is not in `train`,
      or if an image that was decoded cannot be read.

  >>> import tempfile
  >>> from PIL import Image
  >>> with tempfile.TemporaryDirectory() as root:
  ...   for name in ('cat', 'dog'):
  ...     folder = paths.Path(root) / 'train' / name
  ...     folder.mkdir(parents=True)
  ...     Image.new('RGB', (9, 9)).save(folder / '0.png')
  ...   source = folder_source(root, 'train')
  ...   source.size, source.num_classes, source.read(1).label
  (2, 2, 1)
  """
  folder = paths.resolve(root)
  classes = _class_names(folder, 'train')
  names = classes if split == 'train' else _class_names(folder, split)
  unknown = [name for name in names if name not in classes]
  if unknown:
    raise ValueError(
      f'{folder / split}: expected the classes of {folder / "train"}, found '
      f'{len(unknown)} others: {", ".join(unknown[:9])}'
    )
  files, labels, skipped = [], [], []
  for name in names:
    _, folders, found = next(iter((folder / split / name).walk()))
    images = sorted(f for f in found if _is_image(f))
    others = sorted({*folders, *found} - {*images})
    if not images:
      raise ValueError(
        f'{folder / split / name}: expected images ({", ".join(_SUFFIXES)}), '
        f'found {others[:9]}'
      )
    files += [os.fsencode(f'{name}/{f}') for f in images]
    labels += [classes.index(name)] * len(images)
    skipped += [f'{name}/{f}' for f in others]
  if skipped:
    _LOG.warning(
      '%s: skipped %d beside %d images (hidden, folders or no %s): %s',
      folder / split,
      len(skipped),
      len(files),
      ', '.join(_SUFFIXES),
      ', '.join(skipped[:9]),
    )
  # As bytes in one array, the million paths of ImageNet are 40 MB to pickle.
  table = np.asarray(files), np.asarray(labels, np.int32)
  read = functools.partial(_read_file, os.fspath(folder / split), *table)
  identity = hashlib.sha256(b'\0'.join(files) + table[1].tobytes()).hexdigest()
  source = Source(read, len(files), len(classes), identity)
  for i in _spread(source.size, _LOOKED_AT):
    _pixels(source.read(i), centre_box, size=16, channels=3)
  return source


def _is_image(name: str) -> bool:
  # Beside x.jpg, macOS writes a hidden `._x.jpg`, which is no image.
  return name.lower().endswith(_SUFFIXES) and not name.startswith('.')


def _spread(size: int, count: int) -> list[int]:
  """At most `count` places, spread evenly over `size` places."""
  count = min(size, count)
  return [i * size // count for i in range(count)]


def _class_names(root: paths.Path, split: str) -> list[str]:
  folder = root / split
  names = sorted(path.name for path in folder.glob('[!.]*') if path.is_dir())
  if not names:
    there = folder if folder.is_dir() else root
    if not there.is_dir():
      raise ValueError(f'there is no folder {there}')
    found = sorted(x.name for x in there.iterdir())
    raise ValueError(
      f'expected one folder of images for every class in {folder}; found in '
      f'{there}: {found[:9] or "nothing"}'
    )
  return names


def _read_file(folder, files, labels, index):
  path = paths.Path(folder) / os.fsdecode(files[index])
  return Example(path.read_bytes(), int(labels[index]), os.fspath(path))


def tfds_source(
  name: str, split: str, data_dir: str | os.PathLike[str] | None = None
) -> Source:
  """A split of a TFDS set that was prepared as array_record.

  Args:
    name: the name of the set, such as `imagenet2012` or
      `imagenette/320px-v2`.
    split: a split as TFDS writes it, such as `train` or `train[:-10000]`.
    data_dir: the root of the TFDS sets (default: $TFDS_DATA_DIR, else
      ~/tensorflow_datasets).

  Returns:
    The source.

  Raises:
    ValueError: if the set or the split is not there, empty, damaged or of
      another kind.

  >>> tfds_source('imagenet2012', 'train', '/nowhere')
  Traceback (most recent call last):
  ValueError: data set 'imagenet2012' is not prepared: looked for ...
  """
  with extras.needed('data'):
    import tensorflow_datasets as tfds

  directory = prepared.find(name, data_dir, _INSTEAD)
  builder, num_classes = prepared.open_builder(name, directory)
  # Images stay as they are stored, for the workers to decode.
  decoders = {'image': tfds.decode.SkipDecoding()}
  try:
    rows = builder.as_data_source(split, decoders=decoders)
    size = len(rows)
  except Exception as error:  # Whatever TFDS and array_record raise.
    raise ValueError(f'{directory}: cannot read {split!r}: {error}') from error
  read = functools.partial(_read_row, rows, f'{directory} {split}')
  counts = {k: tuple(v.shard_lengths) for k, v in builder.info.splits.items()}
  identity = repr((builder.info.full_name, split, sorted(counts.items())))
  return Source(read, size, num_classes, identity)


def _read_row(rows, title, index):
  row = rows[index]
  return Example(row['image'], int(row['label']), f'{title} [{index}]')


def hold_out(source: Source, count: int) -> tuple[Source, Source]:
  """Takes validation examples out of a source of training examples.

  They are spread evenly over the source. In a folder, whose images are in the
  order of their classes, every class gives its share of them.

  Args:
    source: the training images.
    count: how many to take, at least 1 and fewer than there are.

  Returns:
    Two sources: what is left, and what was taken.

  Raises:
    ValueError: if the count is out of range.

  >>> source = Source(lambda i: Example(b'', i % 2, str(i)), 6, 2)
  >>> train, valid = hold_out(source, 2)
  >>> [s.read(i).name for s in (train, valid) for i in range(s.size)]
  ['1', '2', '4', '5', '0', '3']
  """
  if not 0 < count < source.size:
    raise ValueError(
      f'{count} of {source.size} images cannot be held out: take at least one,'
      ' and leave at least one.'
    )
  taken = np.asarray(_spread(source.size, count), np.int64)
  left = np.delete(np.arange(source.size), taken)

  def part(indices, name):
    read = functools.partial(_read_part, source.read, indices)
    identity = f'{source.identity} {name} {count} of {source.size}'
    return Source(read, len(indices), source.num_classes, identity)

  return part(left, 'without'), part(taken, 'the')


def _read_part(read, indices, index):
  return read(int(indices[index]))


def random_box(
  width: int, height: int, draws: Sequence[Sequence[float]] | np.ndarray
) -> Box:
  """The Inception crop of an image of width x height pixels.

  Args:
    width: the width of the image.
    height: the height of the image.
    draws: numbers in [0, 1) of shape [tries, 4]: for every try the area, the
      aspect, and the place from left to right and from top to bottom.

  Returns:
    The first crop that fits into the image; where none does, the largest crop
    of an allowed aspect in the middle.

  >>> random_box(100, 100, [[0.0, 0.0, 0.0, 0.0]])  # 8 % of the area, 3 to 4.
  (0, 0, 24, 33)
  """
  for area, aspect, x, y in draws:
    pixels = (0.08 + 0.92 * area) * width * height
    ratio = (4 / 3) ** (2 * aspect - 1)  # Uniform in its logarithm.
    w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
      return left, top, left + w, top + h
  w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
  return _middle(width, height, w, h)


def centre_box(width: int, height: int) -> Box:
  """The central square of 7/8 of the shorter side, for evaluation.

  Args:
    width: the width of the image.
    height: the height of the image.

  Returns:
    The box of the square, whose side is at least one pixel.

  >>> centre_box(256, 256)
  (16, 16, 240, 240)
  """
  side = max(1, round(min(width, height) * 224 / 256))
  return _middle(width, height, side, side)


def _middle(width, height, w, h):
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def _pixels(
  example: Example,
  choose_box: Callable[[int, int], Box],
  size: int,
  channels: int,
) -> np.ndarray:
  """Decodes an image, cuts a box from it and resizes that to a square."""
  with extras.needed('data'):
    from PIL import Image

  try:
    image = Image.open(io.BytesIO(example.data))
    left, top, right, bottom = choose_box(*image.size)
    # A JPEG can shrink 2, 4 or 8 times while it is decoded, which is cheap.
    times = min(right - left, bottom - top) // size
    shrink = max(s for s in (1, 2, 4, 8) if s <= max(1, times))
    smaller = (image.width // shrink, image.height // shrink)
    if shrink == 1 or not image.draft(None, smaller):
      shrink = 1
    if image.mode[0] in 'IF':
      raise ValueError(f'expected 8 bits per channel, found mode {image.mode}')
    if image.mode == 'P' and 'transparency' in image.info:
      image = image.convert('RGBA')  # PIL warns if this step is left out.
    image = image.convert(_MODES[channels])
    box = (left / shrink, top / shrink, right / shrink, bottom / shrink)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box)
  except Exception as error:  # OSError, SyntaxError, and PIL's own.
    raise ValueError(f'{example.name}: unreadable image: {error}') from error
  return np.asarray(image).reshape(size, size, channels)


def _train_example(read, size, channels, index, rng):
  example = read(index)
  choose_box = functools.partial(random_box, draws=rng.random([10, 4]))
  pixels = _pixels(example, choose_box, size, channels)
  if rng.random() < 0.5:
    pixels = pixels[:, ::-1]
  return pixels, np.int32(example.label)


def _eval_example(read, num_examples, size, channels, index):
  if index >= num_examples:
    return np.zeros([size, size, channels], np.uint8), np.int32(-1)
  example = read(index)
  pixels = _pixels(example, centre_box, size, channels)
  return pixels, np.int32(example.label)


class Stream(Iterator[tuple[np.ndarray, np.ndarray]]):
  """Batches of (images, labels), and the processes that make them.

  It adds three things to an iterator of grain: it closes itself when its
  batches or the program end, it gives back the memory that it shares with its
  workers, and it raises an error that says so when a worker was killed.

  >>> dataset = grain.MapDataset.source([3, 5]).to_iter_dataset()
  >>> list(Stream(iter(dataset)))
  [3, 5]
  """

  def __init__(self, batches: grain.DatasetIterator):
    """Takes over an iterator of grain."""
    self._batches: grain.DatasetIterator | None = batches
    _OPEN.add(self)

  def __next__(self) -> tuple[np.ndarray, np.ndarray]:
    if self._batches is None:
      raise StopIteration
    try:
      return next(self._batches)
    except StopIteration:
      self.close()
      raise
    except RuntimeError as error:
      if 'Worker process' not in str(error):
        raise
      self.close()
      raise ChildProcessError(
        'A process that decodes images has been killed, as happens where memory'
        f' is short: use fewer workers, or smaller batches. {error}'
      ) from error

  def _opened(self) -> grain.DatasetIterator:
    if self._batches is None:
      raise ValueError('The stream is closed.')
    return self._batches

  def get_state(self) -> dict[str, Any]:
    """The place in the stream, for `set_state`.

    Returns:
      A dictionary that JSON and Orbax can hold.

    Raises:
      ValueError: if the stream is closed.
    """
    return self._opened().get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a place in the stream.

    Args:
      state: what `get_state` of a stream with the same arguments returned.

    Raises:
      ValueError: if the stream is closed.
    """
    self._opened().set_state(state)

  def close(self) -> None:
    """Ends the workers and the stream; closing again does nothing."""
    if self._batches is not None:
      self._batches.close()
      self._batches = None
      # Frames of grain's threads hold the last batches in cycles, whose shared
      # memory would be reported as leaked when the program ends.
      gc.collect()


_OPEN: weakref.WeakSet[Stream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
  for stream in tuple(_OPEN):
    stream.close()


class Batches:
  """Batches to iterate over as often as needed.

  >>> batches = Batches(grain.MapDataset.source([3, 5]).to_iter_dataset())
  >>> list(batches), list(batches)
  ([3, 5], [3, 5])
  """

  def __init__(self, dataset: grain.IterDataset):
    """Takes the data set of grain that makes the batches."""
    self._dataset = dataset

  def __iter__(self) -> Stream:
    return Stream(iter(self._dataset))


def train_stream(
  source: Source,
  *,
  batch_size: int,
  image_size: int,
  seed: int,
  start: int = 0,
  num_workers: int = 0,
  shard_index: int = 0,
  shard_count: int = 1,
  channels: int = 3,
) -> Stream:
  """An endless stream of training batches.

  A run goes on with the very next batch if what `get_state` returned is given
  to `set_state` of a stream with the very same arguments. With `start` a run
  can do so with another number of workers too.

  Args:
    source: where the images come from.
    batch_size: the number of examples in a batch of this host.
    image_size: the height and the width of the images in pixels.
    seed: an integer in [0, 2^32), which decides the order, the crops and the
      mirroring.
    start: how many batches to leave out, which takes no time.
    num_workers: how many processes decode images; 0 decodes them in threads of
      this process. Each holds about three batches in memory. They start afresh
      and import the main module, so a script needs
      `if __name__ == '__main__'`.
    shard_index: which host this is, as `jax.process_index()` gives it.
    shard_count: how many hosts there are.
    channels: 3 for colour, 1 for grey; images of the other kind are converted.

  Returns:
    A `Stream` of (images, labels): uint8 [batch_size, image_size, image_size,
    channels] and int32 [batch_size].

  Raises:
    ValueError: if an argument is out of range; and, while iterating, if an
      image cannot be read.
    ChildProcessError: while iterating, if a worker has been killed.

  >>> from PIL import Image
  >>> Image.new('RGB', (9, 9)).save(file := io.BytesIO(), 'png')
  >>> source = Source(lambda i: Example(file.getvalue(), i, str(i)), 4, 4)
  >>> stream = train_stream(source, batch_size=2, image_size=8, seed=0)
  >>> images, labels = next(stream)
  >>> stream.close()
  >>> images.shape, labels.dtype
  ((2, 8, 8, 3), dtype('int32'))
  """
  _check(source, batch_size, image_size, channels)
  if not 0 <= seed < 2**32 or start < 0:
    raise ValueError(
      f'expected seed={seed} in [0, 2^32) and start={start} >= 0'
    )
  example = functools.partial(_train_example, source.read, image_size, channels)
  examples = grain.MapDataset.range(source.size).seed(seed).shuffle().repeat()
  # An endless length overflows in grain where batches may be short.
  batches = examples.random_map(example).batch(batch_size, drop_remainder=True)
  dealt = _deal(batches, start, num_workers, shard_index, shard_count)
  return Stream(iter(dealt))


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  image_size: int,
  num_workers: int = 0,
  shard_index: int = 0,
  shard_count: int = 1,
  channels: int = 3,
) -> Batches:
  """Batches that have every example exactly once, over all hosts together.

  The examples come in order. All hosts get the same number of batches of the
  same size. What is missing at the end is filled with black images of label -1,
  which no prediction equals: count correct predictions and divide by
  `source.size`.

  Args:
    source: where the images come from.
    batch_size: the number of examples in a batch of this host.
    image_size: the height and the width of the images in pixels.
    num_workers: how many processes decode images, as for `train_stream`.
    shard_index: which host this is, as `jax.process_index()` gives it.
    shard_count: how many hosts there are.
    channels: 3 for colour, 1 for grey; images of the other kind are converted.

  Returns:
    The batches, to iterate over as often as needed: (images, labels), which are
    uint8 [batch_size, image_size, image_size, channels] and int32 [batch_size].

  Raises:
    ValueError: if an argument is out of range; and, while iterating, if an
      image cannot be read.
    ChildProcessError: while iterating, if a worker has been killed.

  >>> from PIL import Image
  >>> Image.new('RGB', (9, 9)).save(file := io.BytesIO(), 'png')
  >>> source = Source(lambda i: Example(file.getvalue(), i, str(i)), 3, 3)
  >>> batches = eval_batches(source, batch_size=2, image_size=8)
  >>> [labels.tolist() for _, labels in batches]
  [[0, 1], [2, -1]]
  """
  _check(source, batch_size, image_size, channels)
  step = batch_size * max(1, shard_count)
  example = functools.partial(
    _eval_example, source.read, source.size, image_size, channels
  )
  examples = grain.MapDataset.range(-(-source.size // step) * step)
  batches = examples.map(example).batch(batch_size)
  return Batches(_deal(batches, 0, num_workers, shard_index, shard_count))


def _check(source, batch_size, image_size, channels):
  if min(source.size, batch_size, image_size) < 1 or channels not in _MODES:
    raise ValueError(
      f'batch_size={batch_size}, image_size={image_size} and the number of '
      f'examples, {source.size}, must be positive, and channels={channels} '
      'must be 1 or 3'
    )


def _deal(batches, start, num_workers, index, count):
  """The batches of one host, made by its workers."""
  if not 0 <= index < count or num_workers < 0:
    raise ValueError(
      f'shard_index={index} must be in [0, shard_count={count}) and '
      f'num_workers={num_workers} must not be negative'
    )
  if num_workers and not flags.FLAGS.is_parsed():
    # Grain reads flags when it starts workers, even if a program has none.
    flags.FLAGS.mark_as_parsed()
  # Whole batches are read ahead, 500 of them by default in grain. A worker has
  # its own queue; without workers, two threads keep ahead of the training.
  ahead = 0 if num_workers else 2
  threads = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
  processes = grain.MultiprocessingOptions(num_workers=num_workers)
  # Whole batches are dealt, so that they do not depend on the workers.
  mine = batches.slice(slice(index + start * count, None, count))
  return mine.to_iter_dataset(threads).mp_prefetch(processes, _start_worker)


def _start_worker(index: int, count: int) -> None:
  """Ties the life of a worker process to that of the training."""
  del index, count
  # Ctrl-C reaches the whole process group; it is for the training to handle.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # A worker whose parent was killed would wait for it forever.
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)

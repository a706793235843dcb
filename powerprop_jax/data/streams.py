"""Image streams for sets that do not fit in memory, as ImageNet, with grain.

All examples form one endless stream, epoch after epoch, each in an order of its
own. Its batches are dealt out to the hosts in turn, and every host deals its
own to worker processes. Order, crops and mirroring depend on the seed and the
place in the stream alone: the batches of all hosts side by side are the same
for any number of hosts and workers, and a stream can start at any batch.
Training sees Inception crops (Szegedy et al. 2015): 8 to 100 % of the area at
an aspect of 3/4 to 4/3, mirrored with probability 1/2. Evaluation sees the
central 7/8 of the shorter side: 224 pixels of an image resized to 256.
"""

from collections.abc import Callable, Sequence
import functools
import hashlib
import io
import math
import multiprocessing
import os
import pathlib
import signal
import threading
from typing import NamedTuple
import zlib

import numpy as np

from powerprop_jax import extras
from powerprop_jax.data import prepared

with extras.needed('data'):
  from absl import flags
  import grain

_SUFFIXES = ('.jpeg', '.jpg', '.png')
_MODES = {1: 'L', 3: 'RGB'}
Box = tuple[int, int, int, int]  # left, top, right, bottom; the last excluded.


class Example(NamedTuple):
  """An image as it is stored."""

  data: bytes  # The file: JPEG, PNG or what else PIL reads.
  label: int
  name: str  # Where it came from, for messages.


class Source(NamedTuple):
  """A set of encoded images with random access.

  Attributes:
    read: gives the example of an index; it is pickled and sent to the workers.
    size: the number of examples.
    num_classes: the number of classes.
    identity: what is known of all examples without reading them, such as their
      names and labels; a part of `fingerprint`.
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
  for i in range(min(source.size, 64)):
    example = source.read(i * source.size // min(source.size, 64))
    checksum = zlib.crc32(example.data)
    digest.update(f'{len(example.data)} {checksum} {example.label};'.encode())
  return digest.hexdigest()[:16]


def folder_source(root: str | os.PathLike[str], split: str) -> Source:
  """A folder of class folders of JPEGs or PNGs: root/split/class/image.

  Args:
    root: the folder that holds `train`, whose folders, by name, are the classes
      of all splits.
    split: a folder in it, as `train` or `val`.

  Returns:
    The source.

  Raises:
    ValueError: a folder is missing or empty, or a class is not in `train`.
  """
  folder = pathlib.Path(root).expanduser()
  classes = _class_names(folder, 'train')
  names = classes if split == 'train' else _class_names(folder, split)
  unknown = [name for name in names if name not in classes]
  if unknown:
    raise ValueError(
      f'{folder / split}: expected the classes of {folder / "train"}, found '
      f'{len(unknown)} others: {", ".join(unknown[:9])}'
    )
  paths, labels = [], []
  for name in names:
    files = sorted(os.listdir(folder / split / name))
    images = [f for f in files if f.lower().endswith(_SUFFIXES)]
    if not images:
      raise ValueError(
        f'{folder / split / name}: expected images ({", ".join(_SUFFIXES)}), '
        f'found {files[:9]}'
      )
    paths += [os.fsencode(f'{name}/{f}') for f in images]
    labels += [classes.index(name)] * len(images)
  # As bytes in one array, the million paths of ImageNet are 40 MB to pickle.
  table = np.asarray(paths), np.asarray(labels, np.int32)
  read = functools.partial(_read_file, os.fspath(folder / split), *table)
  identity = hashlib.sha256(b'\0'.join(paths) + table[1].tobytes()).hexdigest()
  return Source(read, len(paths), len(classes), identity)


def _class_names(root: pathlib.Path, split: str) -> list[str]:
  folder = root / split
  names = sorted(path.name for path in folder.glob('[!.]*') if path.is_dir())
  if not names:
    there = folder if folder.is_dir() else root
    found = sorted(os.listdir(there))[:9] if there.is_dir() else 'nothing'
    raise ValueError(
      f'expected one folder of images for every class in {folder}; found in '
      f'{there}: {found}'
    )
  return names


def _read_file(folder, paths, labels, index):
  path = pathlib.Path(folder, os.fsdecode(paths[index]))
  return Example(path.read_bytes(), int(labels[index]), str(path))


def tfds_source(
  name: str, split: str, data_dir: str | os.PathLike[str] | None = None
) -> Source:
  """A split of a TFDS set that was prepared as array_record.

  Args:
    name: as in `in_memory.load`: `imagenet2012`, `imagenette/320px-v2`, ...
    split: as in TFDS: `train`, `validation`, `train[:-10000]`, ...
    data_dir: as in `in_memory.load`.

  Returns:
    The source.

  Raises:
    ValueError: the set or the split is not there, damaged or of another kind.
  """
  with extras.needed('data'):
    import tensorflow_datasets as tfds

  directory = prepared.find(name, data_dir)
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


def random_box(
  width: int, height: int, draws: Sequence[Sequence[float]] | np.ndarray
) -> Box:
  """The Inception crop of an image of width x height pixels.

  Args:
    width: of the image.
    height: of the image.
    draws: numbers in [0, 1), one row a try: for the area, the aspect, the place
      from left to right and from top to bottom.

  Returns:
    The first crop that fits into the image; where none does, the largest in the
    middle of an allowed aspect.
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
  """The central square of 7/8 of the shorter side, for evaluation."""
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
      raise ValueError(f'expected 8 bits a channel, found mode {image.mode}')
    if image.mode == 'P' and 'transparency' in image.info:
      image = image.convert('RGBA')  # PIL warns where this step is left out.
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
) -> grain.DatasetIterator:
  """An endless stream of training batches.

  A run goes on with the very next batch if it was restored by `get_state()`, a
  dictionary for JSON or Orbax, and `set_state` on a stream with the very same
  arguments. With `start` it does so for other numbers of workers too.

  Args:
    source: where the images come from.
    batch_size: examples in a batch of this host.
    image_size: height and width of the images.
    seed: an integer in [0, 2^32).
    start: how many batches to leave out, which takes no time.
    num_workers: how many processes decode; 0 decodes in threads of this one.
      Each holds about three batches in memory. They start afresh and import
      the main module, so a script needs `if __name__ == '__main__'`.
    shard_index: which host this is, as `jax.process_index()`.
    shard_count: how many hosts there are.
    channels: 3 for colour, 1 for grey; images of the other kind are converted.

  Returns:
    An iterator over (images, labels): uint8 [batch_size, image_size,
    image_size, channels] and int32 [batch_size]. `close()` ends the workers.

  Raises:
    ValueError: an argument is out of range; and, while iterating, an image
      cannot be read.
  """
  _check(source, batch_size, image_size, channels)
  if not 0 <= seed < 2**32 or start < 0:
    raise ValueError(f'expected seed={seed} in [0, 2^32), start={start} >= 0')
  example = functools.partial(_train_example, source.read, image_size, channels)
  examples = grain.MapDataset.range(source.size).seed(seed).shuffle().repeat()
  # An endless length overflows in grain where batches may be short.
  batches = examples.random_map(example).batch(batch_size, drop_remainder=True)
  return iter(_deal(batches, start, num_workers, shard_index, shard_count))


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  image_size: int,
  num_workers: int = 0,
  shard_index: int = 0,
  shard_count: int = 1,
  channels: int = 3,
) -> grain.IterDataset:
  """Every example exactly once, in order, over all hosts together.

  All hosts get the same number of batches of the same size. What is missing at
  the end is filled with black images of label -1, which no prediction equals:
  count correct predictions and divide by `source.size`. Arguments, elements and
  errors are those of `train_stream`.

  Returns:
    The batches, to iterate over as often as needed.
  """
  _check(source, batch_size, image_size, channels)
  step = batch_size * max(1, shard_count)
  example = functools.partial(
    _eval_example, source.read, source.size, image_size, channels
  )
  examples = grain.MapDataset.range(-(-source.size // step) * step)
  batches = examples.map(example).batch(batch_size)
  return _deal(batches, 0, num_workers, shard_index, shard_count)


def _check(source, batch_size, image_size, channels):
  if min(source.size, batch_size, image_size) < 1 or channels not in _MODES:
    raise ValueError(
      f'batch_size={batch_size}, image_size={image_size} and the number of '
      f'examples, {source.size}, must be positive, channels={channels} 1 or 3'
    )


def _deal(batches, start, num_workers, index, count):
  """The batches of one host, made by its workers."""
  if not 0 <= index < count or num_workers < 0:
    raise ValueError(
      f'shard_index={index} must be in [0, shard_count={count}) and '
      f'num_workers={num_workers} not negative'
    )
  if num_workers and not flags.FLAGS.is_parsed():
    # Grain reads flags where it starts workers, in programs without them too.
    flags.FLAGS.mark_as_parsed()
  # What is read ahead are whole batches, of which grain's default is 500. A
  # worker has its own queue; here two threads keep ahead of the training.
  ahead = 0 if num_workers else 2
  threads = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
  processes = grain.MultiprocessingOptions(num_workers=num_workers)
  # Batches are dealt, not examples, hence they do not depend on the workers.
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

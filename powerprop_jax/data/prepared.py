"""Where TFDS keeps prepared data sets, and what to do where there is none.

A set that was prepared as array_record is read without TensorFlow. Sets are
found here and not by TFDS, whose search insists on the version its code knows
and which takes a while to import.
"""

from collections.abc import Iterator
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


def _prepared(root: pathlib.Path, pattern: str) -> list[pathlib.Path]:
  """Lists the folders of sets that TFDS has finished preparing."""
  folders = [p.parent for p in root.glob(f'{pattern}/dataset_info.json')]
  return sorted(p for p in folders if re.fullmatch(r'\d+\.\d+\.\d+', p.name))


def _explain_missing(name: str, root: pathlib.Path) -> str:
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
  return (
    f'data set {name!r} is not prepared: {looked} Do one of these:\n'
    "  prepare it, once:  pip install 'powerprop_jax[prepare]'\n"
    f'                     python -c {shlex.quote(prepare)}\n'
    '  read idx files:    --dataset=idx --data_dir=...\n'
    '  use a small set:   --dataset=mnist_5k'
  )


def find(name: str, data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
  """The folder of the newest prepared version of a set.

  Args:
    name: of the set, 'mnist' or 'imagenette/320px-v2'.
    data_dir: where to look (default: $TFDS_DATA_DIR, else
      ~/tensorflow_datasets).

  Returns:
    The folder that holds its dataset_info.json.

  Raises:
    ValueError: if there is none; with the commands that would fix it.
  """
  root = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  root = pathlib.Path(root).expanduser()
  found = _prepared(root / name, '*') if name else []
  if not found:
    raise ValueError(_explain_missing(name, root))
  return max(found, key=lambda p: [int(i) for i in p.name.split('.')])


@contextlib.contextmanager
def calls(directory: pathlib.Path) -> Iterator[None]:
  """Silences the log of TFDS, and makes one kind of error of all it raises."""
  with extras.needed('data'):
    from absl import logging

  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  except Exception as error:  # RuntimeError, ParseError, KeyError, ...
    raise ValueError(
      f'{directory}: expected a whole TFDS data set in array_record format, '
      f'found: {error}\nDelete that folder or choose another --data_dir; the '
      'commands that prepare the set are then printed at the next start'
    ) from error
  finally:
    logging.set_verbosity(verbosity)


def open_builder(name: str, directory: pathlib.Path) -> tuple[Any, int]:
  """The TFDS builder of a set of labelled images, and its number of classes.

  Raises:
    ValueError: if the set is damaged, or of another kind.
  """
  with extras.needed('data'):
    import tensorflow_datasets as tfds

  with calls(directory):
    builder: Any = tfds.builder_from_directory(directory)
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

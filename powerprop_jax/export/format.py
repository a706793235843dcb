"""The files of `export`: sections of leaves in a safetensors container.

A section is a set of leaves that are written together: a whole network, or what
a task of a sequence has for itself. The values of its leaves follow each other
in one tensor per dtype, which has the name of the dtype, and the codes of its
masks in the tensor `masks`; the name of each tensor starts with the prefix of
the section. A tensor of its own for every leaf would cost more bytes than the
masks do in a network of the size of LeNet.

The metadata of the container hold one JSON text, `powerprop_jax`: the version
of the format, alpha, the dtype that values were rounded to, the CRC-32 of every
tensor, and for each section a list of leaves: path, dtype and shape, followed,
if the leaf is pruned, by the number of weights kept, the density, and the Rice
parameter and the length in bytes of the code of its mask. Last comes the CRC-32
of the text before it.

Reading a file executes nothing, and takes no more memory than the caller
allows. Whatever is damaged is refused: each checksum of what is read must be
right, no path may come twice and nothing may be left over. Version 1 of the
format, which version 0.1 of the package wrote, had no checksums; its files are
read with a warning.
"""

from collections.abc import Mapping, Sequence
import json
import logging
import math
import os
import pathlib
from typing import Any, NamedTuple
import uuid
import zlib

import jax.numpy as jnp
import numpy as np

from powerprop_jax import extras
from powerprop_jax import paths
from powerprop_jax import power
from powerprop_jax.export import codes

with extras.needed('experiments'):
  import safetensors
  import safetensors.numpy

_LOG = logging.getLogger(__name__)
_VERSION = 2
_KEY = 'powerprop_jax'
_ROUNDED = ('float16', 'bfloat16')
# The dtypes that safetensors both writes from numpy arrays and reads into them.
_DTYPES = (
  'bool',
  'int8',
  'int16',
  'int32',
  'int64',
  'uint8',
  'uint16',
  'uint32',
  'uint64',
  *_ROUNDED,
  'float32',
  'float64',
  'complex64',
)


class _NoTaskError(ValueError):
  """A file is whole, and has no such task."""


class Sizes(NamedTuple):
  """The size of a file, and the sizes to compare it with, in bytes.

  Attributes:
    file: the size of the file.
    bound: the least size: the values that are kept, other leaves included, and
      the entropy of the positions of kept weights.
    dense: the size of all leaves without pruning.
  """

  file: int
  bound: int
  dense: int


class Leaf(NamedTuple):
  """A leaf in the metadata.

  Attributes:
    path: the path of the leaf.
    dtype: the name of its dtype; None for positions without values.
    shape: its shape.
    kept: the number of weights kept; None if it is not pruned.
    density: the fraction of the weights kept; None if it is not pruned.
    rice: the parameter of the code of its mask; None if it is not pruned.
    code_bytes: the length of the code of its mask in bytes.
  """

  path: str
  dtype: str | None
  shape: list[int]
  kept: int | None = None
  density: float | None = None
  rice: int | None = None
  code_bytes: int = 0


class Section(NamedTuple):
  """Leaves that are written together: a network, or what one task has alone.

  Attributes:
    rows: the leaves, in order.
    tensors: the parts of every tensor, by the name of the tensor.
    bound_bits: the least number of bits that values and positions take.
  """

  rows: list[Leaf]
  tensors: dict[str, list[np.ndarray]]
  bound_bits: float


class Found(NamedTuple):
  """A leaf that was read.

  Attributes:
    leaf: its row in the metadata.
    values: the values that are kept, in order; a vector.
    mask: where they belong; a boolean vector of the size of the leaf.
  """

  leaf: Leaf
  values: np.ndarray
  mask: np.ndarray


def _local(path: str | os.PathLike[str]) -> pathlib.Path:
  found = os.fspath(paths.resolve(path))
  if '://' in found:
    raise ValueError(
      f'{found!r}: these files are written and read in local folders only. Copy'
      ' it from one or to one.'
    )
  return pathlib.Path(found)


def check_alpha(alpha: Any) -> float | dict[str, float] | None:
  """Checks the power, or the powers by path, that a file holds.

  Args:
    alpha: a number, a mapping of numbers by path, or None.

  Returns:
    A Python float, a dictionary of them, or None.

  Raises:
    ValueError: if a power is no finite number of at least 1.

  >>> check_alpha({'mlp/linear/w': 2})
  {'mlp/linear/w': 2.0}
  """
  if alpha is None:
    return None
  if isinstance(alpha, Mapping):
    return {str(path): _check_power(a) for path, a in alpha.items()}
  return _check_power(alpha)


def _check_power(alpha: Any) -> float:
  if isinstance(alpha, str | bytes | bool):
    raise ValueError(f'alpha must be a number, got {alpha!r}.')
  return power.check_alpha(alpha)


def check_values(values: Any) -> str | None:
  """Checks the dtype that values are rounded to, and returns its name.

  Args:
    values: float16 or bfloat16, or None for no rounding.

  Returns:
    The name of the dtype, or None.

  Raises:
    ValueError: for any other dtype.

  >>> import jax.numpy as jnp
  >>> check_values(jnp.bfloat16)
  'bfloat16'
  """
  name = None if values is None else jnp.dtype(values).name
  if name not in (None, *_ROUNDED):
    raise ValueError(f'values must be float16, bfloat16 or None, got {name!r}.')
  return name


def _stored_dtype(dtype: str, values: str | None) -> str:
  """The dtype in which the values of a pruned leaf are written."""
  return values if values and dtype in ('float32', 'float64') else dtype


def _kept_values(path: str, x: np.ndarray, values: str | None) -> np.ndarray:
  with np.errstate(over='ignore'):
    stored = x.astype(jnp.dtype(_stored_dtype(x.dtype.name, values)))
  if not np.isfinite(stored[np.isfinite(x)]).all():
    wider = 'None' if values == 'bfloat16' else 'bfloat16'
    raise ValueError(f'{path!r} has values beyond {values}. Use {wider}.')
  return stored


def section(
  entries: Sequence[tuple[str, Any, Any]], values: str | None
) -> Section:
  """Encodes leaves for `write`.

  Args:
    entries: (path, leaf, mask) for each leaf: numpy arrays of one shape. The
      mask is None where a leaf is not pruned, and the leaf is None where only
      positions are to be written.
    values: the name of the dtype to round the values of pruned leaves to; None
      does not round them.

  Returns:
    A `Section`.

  Raises:
    ValueError: if a dtype cannot be stored, or if a value is too large for
      float16.

  >>> import numpy as np
  >>> x, mask = np.arange(4.0), np.array([False, True, False, True])
  >>> found = section([('w', x, mask)], None)
  >>> found.rows[0].kept, found.tensors['float64'][0].tolist()
  (2, [1.0, 3.0])
  """
  rows, tensors, bits = [], {}, 0.0
  for path, x, mask in entries:
    if x is not None and x.dtype.name not in _DTYPES:
      raise ValueError(
        f'{path!r} is of dtype {x.dtype.name}, which a file cannot hold. Cast'
        f' it to one of {", ".join(_DTYPES)}.'
      )
    shape = list((mask if x is None else x).shape)
    row = Leaf(path, None if x is None else x.dtype.name, shape)
    if mask is not None:
      kept = int(np.count_nonzero(mask))
      rice, code = codes.encode(mask)
      density = round(kept / max(mask.size, 1), 6)
      row = row._replace(
        kept=kept, density=density, rice=rice, code_bytes=code.size
      )
      tensors.setdefault('masks', []).append(code)
      bits += codes.entropy_bits(mask.size, kept)
      x = None if x is None else _kept_values(path, x[mask], values)
    if x is not None:
      tensors.setdefault(x.dtype.name, []).append(x.ravel())
      bits += 8 * x.nbytes
    rows.append(row)
  return Section(rows, tensors, bits)


def _columns(section: Section) -> list[list[Any]]:
  return [list(r if r.kept is not None else r[:3]) for r in section.rows]


def _as_text(metadata: Mapping[str, Any]) -> str:
  return json.dumps(metadata, separators=(',', ':'))


def _checksum(array: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def write(
  path: str | os.PathLike[str],
  sections: Mapping[str, Section],
  *,
  alpha: float | dict[str, float] | None,
  values: str | None,
  dense: int,
) -> Sizes:
  """Writes a file as a whole or not at all.

  Args:
    path: the file; one that exists is replaced.
    sections: the sections by prefix, that of the shared leaves first.
    alpha: the power or the powers by path, as `check_alpha` returns them.
    values: the dtype that values were rounded to, as for `section`.
    dense: the bytes of all leaves without pruning, for the result.

  Returns:
    The `Sizes` of the file.

  Raises:
    ValueError: if the path is not local.
    OSError: if the file cannot be written.

  >>> import tempfile
  >>> import numpy as np
  >>> found = section([('w', np.arange(4.0), None)], None)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   name = os.path.join(folder, 'model')
  ...   write(name, {'': found}, alpha=2.0, values=None, dense=32).bound
  32
  """
  path = _local(path)
  tensors = {
    prefix + name: np.concatenate(parts)
    for prefix, section in sections.items()
    for name, parts in section.tensors.items()
  }
  metadata = {
    'version': _VERSION,
    'alpha': alpha,
    'values': values,
    'tensors': {name: _checksum(x) for name, x in tensors.items()},
    'leaves': {k: _columns(section) for k, section in sections.items()},
  }
  metadata['crc32'] = zlib.crc32(_as_text(metadata).encode())
  # This is not save_file, whose files nobody but their owner may read.
  content = safetensors.numpy.save(tensors, {_KEY: _as_text(metadata)})
  # Threads and processes that write to one path must not share this name.
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
  try:
    with temporary.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  bits = sum(section.bound_bits for section in sections.values())
  return Sizes(len(content), math.ceil(bits / 8), dense)


def _is_count(x: Any) -> bool:
  return type(x) is int and 0 <= x < 2**48


def _parse_rows(rows: Any, prefix: str) -> list[Leaf]:
  """The leaves of a section, each checked by itself."""
  leaves = []
  for row in rows:
    if type(row) is not list or len(row) not in (3, 7):
      raise ValueError(f'{row!r} is no leaf.')
    leaf = Leaf(*row)
    pruned = len(row) == 7
    numbers = [leaf.kept, leaf.rice, leaf.code_bytes] if pruned else []
    if not (
      type(leaf.path) is str
      and (leaf.dtype in _DTYPES or (leaf.dtype is None and pruned and prefix))
      and type(leaf.shape) is list
      and all(map(_is_count, [*leaf.shape, *numbers]))
      and type(leaf.density) in ((float,) if pruned else (type(None),))
    ):
      raise ValueError(f'{row!r} is no leaf.')
    leaves.append(leaf)
  names = [leaf.path for leaf in leaves]
  if len(set(names)) < len(names):
    raise ValueError('A path comes twice.')
  return leaves


def _unpacked_bytes(leaves: Sequence[Leaf]) -> int:
  """The memory for the values, the masks and what they are made of."""
  return sum(
    math.prod(leaf.shape) * (2 + jnp.dtype(leaf.dtype or 'bool').itemsize)
    for leaf in leaves
  )


def _read_tensors(
  file: Any, names: Sequence[str], prefix: str, checksums: dict[str, Any] | None
) -> dict[str, np.ndarray]:
  """The tensors of a section by their names without the prefix, checked."""
  tensors = {}
  for name in names:
    kind, tensor = name.removeprefix(prefix), file.get_tensor(name)
    dtype = 'uint8' if kind == 'masks' else kind
    if tensor.ndim != 1 or tensor.dtype.name != dtype:
      raise ValueError(f'{name} is not a vector of its dtype.')
    if checksums is not None and checksums[name] != _checksum(tensor):
      raise ValueError(f'The checksum of {name} is wrong.')
    tensors[kind] = tensor
  return tensors


def _unpack(
  leaves: Sequence[Leaf], tensors: dict[str, np.ndarray], values: str | None
) -> dict[str, Found]:
  """The leaves of a section by path, which have to use its tensors up."""
  done = dict.fromkeys(tensors, 0)

  def take(name, count):
    start = done[name]
    done[name] = start + count
    if done[name] > tensors[name].size:
      raise ValueError(f'The tensor {name} is too short.')
    return tensors[name][start : done[name]]

  found = {}
  for leaf in leaves:
    size = kept = math.prod(leaf.shape)
    content, mask = np.zeros(0, bool), None
    if leaf.kept is not None and leaf.rice is not None:
      kept, code = leaf.kept, take('masks', leaf.code_bytes)
      mask = codes.decode(code, size, kept, leaf.rice)
    if leaf.dtype is not None:
      stored = leaf.dtype if mask is None else _stored_dtype(leaf.dtype, values)
      content = take(stored, kept).astype(jnp.dtype(leaf.dtype))
    # Only now, when the values are known to be there.
    mask = np.ones(size, bool) if mask is None else mask
    found[leaf.path] = Found(leaf, content, mask)
  if any(done[name] < tensor.size for name, tensor in tensors.items()):
    raise ValueError('There are values that belong to no leaf.')
  return found


def _parse_metadata(text: str, path: pathlib.Path) -> dict[str, Any]:
  """The metadata of a file, checked as far as they do not depend on a task."""
  metadata = json.loads(text)
  version, checksum = metadata['version'], metadata.pop('crc32', None)
  if version == 1 and checksum is None:
    _LOG.warning(
      '%s was written by version 0.1, without a checksum: damage would not be'
      ' noticed. Write it again.',
      path,
    )
    metadata['tensors'] = None
  elif version != _VERSION:
    raise ValueError(f'Its version is {version!r}.')
  elif checksum != zlib.crc32(_as_text(metadata).encode()):
    raise ValueError('The checksum of the metadata is wrong.')
  metadata['alpha'] = check_alpha(metadata['alpha'])
  metadata['values'] = check_values(metadata['values'])
  tasks = [f'tasks/{i}/' for i in range(len(metadata['leaves']) - 1)]
  if set(metadata['leaves']) != {'', *tasks}:
    raise ValueError('Its sections are neither a network nor tasks.')
  return metadata


def read(
  path: str | os.PathLike[str], task: int | None, limit: int
) -> tuple[float | dict[str, float] | None, dict[str, Found], dict[str, Found]]:
  """Reads the shared leaves of a file, and those of one task.

  Args:
    path: the file.
    task: which task, from 0; None for a file of one network.
    limit: how many bytes of memory the leaves may take.

  Returns:
    The power or the powers by path, the shared leaves by path, and those of the
    task, which may hold positions among the kept values of shared leaves.

  Raises:
    ValueError: if the file is damaged, of another kind or larger than the
      limit, or if there is no such task.
    OSError: if the file cannot be opened.

  >>> import tempfile
  >>> import numpy as np
  >>> found = section([('w', np.arange(4.0), None)], None)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   name = os.path.join(folder, 'model')
  ...   _ = write(name, {'': found}, alpha=2.0, values=None, dense=32)
  ...   alpha, shared, own = read(name, None, limit=1000)
  >>> alpha, shared['w'].values.tolist(), own
  (2.0, [0.0, 1.0, 2.0, 3.0], {})
  """
  path = _local(path)
  try:
    with safetensors.safe_open(os.fspath(path), framework='np') as file:
      metadata = _parse_metadata((file.metadata() or {})[_KEY], path)
      last = len(metadata['leaves']) - 2  # One section is the shared leaves.
      if task is None and last >= 0:
        raise ValueError('It holds tasks: use load_task.')
      if task is not None and not 0 <= task <= last:
        raise _NoTaskError(
          f'{os.fspath(path)!r} has no task {task}. Tasks are counted from 0,'
          f' and the last is {last}.'
        )
      prefixes = [''] if task is None else ['', f'tasks/{task}/']
      rows = {k: _parse_rows(metadata['leaves'][k], k) for k in prefixes}
      needed = sum(map(_unpacked_bytes, rows.values()))
      if needed > limit:
        raise ValueError(
          f'It needs {needed} bytes of memory, which is more than'
          f' limit={limit}. If the file is to be trusted, raise the limit.'
        )
      names, checksums = list(file.keys()), metadata['tensors']
      if checksums is not None and set(checksums) != set(names):
        raise ValueError('Its tensors are not those of the metadata.')
      found = {}
      for prefix in prefixes:
        folder = prefix.removesuffix('/')
        mine = [name for name in names if name.rpartition('/')[0] == folder]
        tensors = _read_tensors(file, mine, prefix, checksums)
        found[prefix] = _unpack(rows[prefix], tensors, metadata['values'])
    own = {} if task is None else found[prefixes[1]]
    return metadata['alpha'], found[''], own
  except (OSError, _NoTaskError):
    raise
  except Exception as error:  # Damage shows as errors of many types.
    raise ValueError(
      f'{os.fspath(path)!r} is no whole file of this format (version'
      f' {_VERSION}), or not what is asked for: {error!r}'[:1000]
    ) from error

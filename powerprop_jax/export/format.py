"""The files of `export`: sections of leaves in a safetensors container.

A section is a set of leaves that are written together: a whole network, or what
a task of a sequence has for itself. The values of its leaves follow each other
in a tensor a dtype, named by it, and the codes of its masks in the tensor
`masks`, each name with the prefix of the section. A tensor of its own for every
leaf would cost more than the masks do in a network of the size of LeNet.

The metadata of the container hold one JSON text, `powerprop_jax`: the version
of the format, alpha, the dtype that values were rounded to, and for each
section a list of leaves: path, dtype and shape, followed, if the leaf is
pruned, by the number of weights kept, the density, and the Rice parameter and
the bytes of the code of its mask. Reading it executes nothing.
"""

from collections.abc import Mapping, Sequence
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from powerprop_jax import extras
from powerprop_jax.export import codes

with extras.needed('experiments'):
  import safetensors
  import safetensors.numpy

_VERSION = 1
_KEY = 'powerprop_jax'


class Sizes(NamedTuple):
  """The bytes of a file, and what to compare them with.

  Attributes:
    file: the size of the file.
    bound: the values that are kept, other leaves included, and the entropy of
      the positions of kept weights.
    dense: all leaves without pruning.
  """

  file: int
  bound: int
  dense: int


class Leaf(NamedTuple):
  """A leaf in the metadata; the last four only if it is pruned."""

  path: str
  dtype: str | None  # None for positions without values.
  shape: list[int]
  kept: int | None = None
  density: float | None = None
  rice: int | None = None
  code_bytes: int = 0


class Section(NamedTuple):
  """What is written together: the network, or what a task has for itself."""

  rows: list[Leaf]
  tensors: dict[str, list[np.ndarray]]
  bound_bits: float


class Found(NamedTuple):
  """A leaf as it was read: the kept values, and where they belong."""

  leaf: Leaf
  values: np.ndarray
  mask: np.ndarray


def _stored_dtype(dtype: Any, values: Any) -> np.dtype:
  """The dtype in which the values of a pruned leaf are written."""
  dtype = jnp.dtype(dtype)
  wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 2
  return jnp.dtype(values) if wide and values is not None else dtype


def _kept_values(path: str, x: np.ndarray, values: Any) -> np.ndarray:
  with np.errstate(over='ignore'):
    stored = x.astype(_stored_dtype(x.dtype, values))
  if not np.isfinite(stored[np.isfinite(x)]).all():
    raise ValueError(f'{path!r} has values beyond {values}. Use bfloat16.')
  return stored


def section(
  entries: Sequence[tuple[str, Any, Any]], values: str | None
) -> Section:
  """Codes leaves for `write`.

  Args:
    entries: (path, leaf, mask): the mask is None where a leaf is not pruned,
      the leaf where only positions are to be written.
    values: the dtype to round the values of pruned leaves to.

  Returns:
    A `Section`.
  """
  rows, tensors, bits = [], {}, 0.0
  for path, x, mask in entries:
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


def write(
  path: str | os.PathLike[str],
  sections: Mapping[str, Section],
  metadata: dict[str, Any],
  dense: int,
) -> Sizes:
  """Writes a file at once or not at all; sections by prefix."""
  path = pathlib.Path(path)
  tensors = {
    prefix + name: np.concatenate(parts)
    for prefix, section in sections.items()
    for name, parts in section.tensors.items()
  }
  table = {k: _columns(section) for k, section in sections.items()}
  text = json.dumps(
    {'version': _VERSION, **metadata, 'leaves': table}, separators=(',', ':')
  )
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    # Not by save_file, whose files nobody but their owner may read.
    temporary.write_bytes(safetensors.numpy.save(tensors, {_KEY: text}))
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  bits = sum(section.bound_bits for section in sections.values())
  return Sizes(path.stat().st_size, math.ceil(bits / 8), dense)


def _read_section(
  file: Any, prefix: str, rows: list[Any], values: str | None
) -> dict[str, Found]:
  """The leaves of a section by path; reads its tensors and no others."""
  tensors, done = {}, {}

  def take(name, count):
    if name not in tensors:
      tensors[name] = file.get_tensor(prefix + name)
    start = done.get(name, 0)
    done[name] = start + count
    if not start <= done[name] <= tensors[name].size:
      raise ValueError(f'{prefix + name} is too short.')
    return tensors[name][start : done[name]]

  found = {}
  for leaf in (Leaf(*row) for row in rows):
    size = kept = math.prod(leaf.shape)
    mask = np.ones(size, bool)
    if leaf.kept is not None:
      kept, code = leaf.kept, take('masks', leaf.code_bytes)
      mask = codes.decode(code, size, kept, leaf.rice or 0)
    content = np.zeros(0)
    if leaf.dtype is not None:
      pruned = values if leaf.kept is not None else None
      stored = _stored_dtype(leaf.dtype, pruned)
      content = take(stored.name, kept).astype(jnp.dtype(leaf.dtype))
    found[leaf.path] = Found(leaf, content, mask)
  return found


def read(
  path: str | os.PathLike[str], task: int | None
) -> tuple[dict[str, Any], dict[str, Found], dict[str, Found]]:
  """The metadata, the leaves of the network, and those of a task."""
  try:
    with safetensors.safe_open(os.fspath(path), framework='np') as file:
      metadata = json.loads((file.metadata() or {})[_KEY])
      if metadata['version'] != _VERSION:
        raise ValueError(f'Its version is {metadata["version"]}.')
      rows, own = metadata['leaves'], {}
      last = len(rows) - 2  # One row is that of the shared leaves.
      if task is None and last >= 0:
        raise ValueError('It holds tasks: use load_task.')
      if task is not None and not 0 <= task <= last:
        raise ValueError(f'There is no task {task}; the last is {last}.')
      read = lambda k: _read_section(file, k, rows[k], metadata['values'])
      if task is not None:
        own = read(f'tasks/{task}/')
      return metadata, read(''), own
  except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as e:
    raise ValueError(
      f'{os.fspath(path)!r} is no whole file of this format (version'
      f' {_VERSION}), or not what is asked for: {e!r}'
    ) from e

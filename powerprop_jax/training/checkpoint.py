"""Checkpoints, by which training that is killed goes on as if it had not been.

A thin layer over Orbax, which writes in the background, under another name
until a checkpoint is whole, and keeps the newest few. A tree is stored as a
flat dictionary of arrays by path, with a record beside it: the configuration,
the type of every leaf, and extras such as the position in the data. A checksum
tells a damaged checkpoint from a whole one, and the one before is used. To
restore under another configuration or into another tree is an error that lists
the differences.

In a program of several processes every process calls every function. The first
process writes, all read, and the first decides from which step they go on. The
folder must therefore lie on a file system that they share.
"""

import base64
from collections.abc import Mapping
import json
import logging
import os
import pathlib
import shutil
import threading
from typing import Any, NamedTuple
import zlib

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from powerprop_jax import extras
from powerprop_jax import leaves as leaves_lib

with extras.needed('experiments'):
  import orbax.checkpoint as ocp

_LOG = logging.getLogger(__name__)

# Orbax tells saves apart by a counter of the process, so that threads with a
# manager each, which save at the same time, would mix them up.
_TURN = threading.Lock()
_WRITING: list[ocp.CheckpointManager] = []  # At most one.


class Manager(NamedTuple):
  """The folder of checkpoints of a run.

  Attributes:
    directory: the folder.
    config: the configuration of the run, as JSON knows it.
    writer: Orbax's manager; None in a process that does not write.
  """

  directory: pathlib.Path
  config: dict[str, Any]
  writer: ocp.CheckpointManager | None


class Checkpoint(NamedTuple):
  """A checkpoint, read without knowledge of the tree it was made from.

  Attributes:
    step: its step.
    config: the configuration of the run that wrote it.
    extra: what was saved beside the state.
    types: the type and shape of every leaf by path, as 'float32[784, 300]'.
    arrays: every leaf by path, as 'phi/linear/w': numpy arrays, and typed keys.
  """

  step: int
  config: dict[str, Any]
  extra: Any
  types: dict[str, str]
  arrays: dict[str, Any]


def _alone() -> ocp.options.MultiprocessingOptions:
  """Tells Orbax not to wait for other processes: each has the whole state."""
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=me,
    active_processes={me},
    barrier_sync_key_prefix=f'process_{me}',
  )


def open_manager(
  directory: str | os.PathLike[str], config: Mapping[str, Any], keep: int = 3
) -> Manager:
  """Opens a folder of checkpoints, and makes it where there is none.

  Args:
    directory: the folder.
    config: what must be equal for a run to go on from a checkpoint, such as the
      network, the method and alpha; values that JSON can hold.
    keep: how many checkpoints to keep.

  Returns:
    A `Manager`, to be closed with `close`.

  Raises:
    ValueError: if keep < 1.
  """
  if keep < 1:
    raise ValueError(f'keep must be at least 1, got {keep}.')
  directory = pathlib.Path(directory).absolute()
  directory.mkdir(parents=True, exist_ok=True)
  writer = None
  if jax.process_index() == 0:
    options = ocp.CheckpointManagerOptions(
      create=False,
      cleanup_tmp_directories=True,
      preservation_policy=ocp.checkpoint_managers.LatestN(keep),
      multiprocessing_options=_alone(),
    )
    writer = ocp.CheckpointManager(directory, options=options)
  return Manager(directory, json.loads(json.dumps(dict(config))), writer)


def _type(leaf: Any) -> str:
  leaf = leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)
  return f'{leaf.dtype}{list(leaf.shape)}'


def _encode(value: Any) -> dict[str, str]:
  if isinstance(value, bytes):
    return {'__bytes__': base64.b64encode(value).decode()}
  raise TypeError(f'{value!r} can be held neither by JSON nor as bytes.')


def _decode(value: dict[str, Any]) -> Any:
  if value.keys() == {'__bytes__'}:
    return base64.b64decode(value['__bytes__'])
  return value


def _checksum(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> int:
  checksum = zlib.crc32(json.dumps(record, sort_keys=True).encode())
  for path in sorted(arrays):
    array = np.ascontiguousarray(arrays[path]).reshape(-1)
    checksum = zlib.crc32(array.view(np.uint8).data, checksum)
  return checksum


def _steps(directory: pathlib.Path) -> list[int]:
  return sorted(int(x.name) for x in directory.glob('*') if x.name.isdigit())


def save(manager: Manager, step: int, state: Any, extra: Any = None) -> None:
  """Starts to write a checkpoint; does nothing if it is the newest already.

  The state is copied before the function returns, so that its buffers may be
  donated. If the writing of the checkpoint before this one has failed, the
  error is raised here.

  Args:
    manager: a `Manager`.
    step: the step.
    state: a pytree of arrays, typed keys and numbers, as one device holds it.
    extra: what JSON can hold, and bytes, such as the state of a data iterator.

  Raises:
    ValueError: if there is a checkpoint of a later step.
  """
  if manager.writer is None:
    return
  # The manager knows of the one it is just writing.
  steps = {*_steps(manager.directory), *manager.writer.all_steps()}
  if steps and step < max(steps):
    raise ValueError(
      f'{manager.directory} holds step {max(steps)}, which is after step'
      f' {step}. Restore it first, or use another folder.'
    )
  if step in steps:
    return
  leaves = leaves_lib.by_path(state)
  keys = {
    path: str(jax.random.key_impl(leaf))
    for path, leaf in leaves.items()
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
  }
  raw = {**leaves, **{k: jax.random.key_data(leaves[k]) for k in keys}}
  arrays = {k: np.asarray(v) for k, v in jax.device_get(raw).items()}
  record = {
    'config': manager.config,
    'extra': json.loads(json.dumps(extra, default=_encode)),
    'types': {k: _type(v) for k, v in leaves.items()},
    'keys': keys,
  }
  record['checksum'] = _checksum(record, arrays)
  state, record = ocp.args.PyTreeSave(arrays), ocp.args.JsonSave(record)
  args = ocp.args.Composite(state=state, record=record)
  with _TURN:
    if manager.writer not in _WRITING:
      for other in _WRITING:
        other.wait_until_finished()
      _WRITING[:] = [manager.writer]
    manager.writer.save(step, args=args)


def close(manager: Manager) -> None:
  """Waits for the last checkpoint to be whole; raises if it cannot be."""
  if manager.writer is not None:
    with _TURN:
      _WRITING[:] = [w for w in _WRITING if w is not manager.writer]
      manager.writer.close()


def _read(path: pathlib.Path) -> Checkpoint:
  """Reads one checkpoint; raises some error if it is damaged."""
  state, record = ocp.args.PyTreeRestore(), ocp.args.JsonRestore()
  args = ocp.args.Composite(state=state, record=record)
  with ocp.Checkpointer(
    ocp.CompositeCheckpointHandler(), multiprocessing_options=_alone()
  ) as reader:
    items = reader.restore(path, args=args)
  arrays, record = items['state'], items['record']
  checksum = record.pop('checksum')
  if _checksum(record, arrays) != checksum:
    raise ValueError('The checksum is wrong.')
  for key, impl in record.pop('keys').items():
    arrays[key] = jax.random.wrap_key_data(arrays[key], impl=impl)
  extra = json.loads(json.dumps(record.pop('extra')), object_hook=_decode)
  return Checkpoint(step=int(path.name), extra=extra, arrays=arrays, **record)


def _newest(directory: pathlib.Path) -> tuple[Checkpoint | None, list]:
  """The newest whole checkpoint, and the paths of the damaged ones after it."""
  damaged = []
  for step in reversed(_steps(directory)):
    path = directory / str(step)
    try:
      return _read(path), damaged
    except Exception as error:  # Damage shows as errors of many types.
      damaged.append(path)
      reason = f'{type(error).__name__}: {error}'[:300]
      _LOG.warning('Skipped %s, which cannot be read. %s', path, reason)
  return None, damaged


def load(directory: str | os.PathLike[str]) -> Checkpoint:
  """Reads the newest whole checkpoint of any run, and changes nothing.

  Args:
    directory: the folder given to `open_manager`.

  Returns:
    A `Checkpoint`; `fill` makes trees of it.

  Raises:
    FileNotFoundError: if there is none.
  """
  directory = pathlib.Path(directory).absolute()
  found, _ = _newest(directory)
  if found is None:
    raise FileNotFoundError(f'There is no whole checkpoint in {directory}.')
  return found


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
  """Lines that say where two dictionaries differ; '' if they are equal."""
  lines = [
    f'\n  {k}: {there.get(k, "absent")} there, {here.get(k, "absent")} here'
    for k in sorted({*there, *here})
    if k not in there or k not in here or there[k] != here[k]
  ]
  more = f'\n  and {len(lines) - 20} more' if len(lines) > 20 else ''
  return ''.join(lines[:20]) + more


def _like(leaf: Any, value: Any) -> Any:
  if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
    return jnp.array(value)  # A copy: numpy's buffers must not be donated.
  if isinstance(leaf, np.ndarray):
    return value
  return value[()] if isinstance(leaf, np.generic) else value.item()


def fill(like: Any, found: Checkpoint, partial: bool = False) -> Any:
  """Puts the arrays of a checkpoint into a tree.

  Args:
    like: a tree of arrays or of `jax.ShapeDtypeStruct`. Its paths count and not
      its containers: the key 'phi' of a dictionary takes the field of a state.
    found: a checkpoint.
    partial: whether the checkpoint may hold more.

  Returns:
    A tree as `like`: numpy arrays and Python numbers where it has them, else
    arrays on the default device.

  Raises:
    ValueError: if the trees differ; it lists the paths that do.
  """
  leaves = leaves_lib.by_path(like)
  here = {k: _type(v) for k, v in leaves.items()}
  there = {k: v for k, v in found.types.items() if k in here or not partial}
  differences = _differences(there, here)
  if differences:
    raise ValueError(
      f'The tree that is asked for ("here") is not that of the checkpoint of'
      f' step {found.step} ("there"):{differences}'
    )
  filled = [_like(leaf, found.arrays[path]) for path, leaf in leaves.items()]
  return jax.tree.unflatten(jax.tree.structure(like), filled)


def restore_latest(manager: Manager, like: Any) -> tuple[int, Any, Any] | None:
  """Restores the newest whole checkpoint.

  Damaged ones are reported by a warning and renamed to '<step>.damaged'.

  Args:
    manager: a `Manager`.
    like: a tree as of `fill`, such as a fresh training state.

  Returns:
    (step, state, extra) as they were saved, or None if there is no checkpoint.

  Raises:
    ValueError: if the configuration or the tree differ from what was saved.
    FileNotFoundError: if there are checkpoints, and all of them are damaged.
  """
  found = None
  if manager.writer is not None:
    manager.writer.wait_until_finished()
    found, damaged = _newest(manager.directory)
    # Their places must be free: the run will come to these steps again.
    # Nothing is deleted, as the fault may lie with the file system.
    for path in damaged if found is not None else []:
      aside = path.with_name(f'{path.name}.damaged')
      shutil.rmtree(aside, ignore_errors=True)
      path.rename(aside)
    manager.writer.reload()
  # Differences are errors below this line, which all processes have to reach.
  step = int(
    multihost_utils.broadcast_one_to_all(np.int32(found.step if found else -1))
  )
  if step < 0:
    if not _steps(manager.directory):
      return None
    raise FileNotFoundError(
      f'Nothing in {manager.directory} is whole. Move it away to start anew.'
    )
  if found is None:
    found = _read(manager.directory / str(step))
  differences = _differences(found.config, manager.config)
  if differences:
    raise ValueError(
      f'The checkpoints in {manager.directory} ("there") were written under'
      f' another configuration than this one ("here"):{differences}\n'
      'Use the same flags, or another folder.'
    )
  return found.step, fill(like, found), found.extra

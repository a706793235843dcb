"""Checkpoints, from which a killed run goes on as if it had not been killed.

Orbax writes them in the background, under another name until a checkpoint is
whole. The newest few are kept, and the best one as well if there is a metric
that tells which it is. This module adds what Orbax lacks.

*   A state is stored as a flat dictionary of arrays by path, with a record
    beside it: the configuration of the run, the type of every leaf, and extras
    such as the position in the data. So a checkpoint can be read without the
    tree that it was made from, on any number of devices, and restoring it under
    another configuration or into another tree is an error that lists the
    differences.
*   A checksum tells a damaged checkpoint from a whole one, and the newest whole
    one is used.
*   A checkpoint that is still being written when a program ends is finished.

In a program of several processes every process calls every function. The first
process writes, all of them read, and the first decides from which step all go
on. The folder must therefore lie on a file system that they share.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import json
import logging
import math
import operator
import os
import re
import threading
from typing import Any, NamedTuple
import zlib

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from powerprop_jax import extras
from powerprop_jax import leaves as leaves_lib
from powerprop_jax import paths

with extras.needed('experiments'):
  import orbax.checkpoint as ocp

_LOG = logging.getLogger(__name__)
_STEP = re.compile(r'0|[1-9][0-9]*')
# What Orbax puts into a checkpoint of ours.
_ITEMS = {'state', 'record', '_CHECKPOINT_METADATA'}
# The path under which a state that is a single array is stored, as Orbax before
# 0.12.4 cannot store an array whose path is empty.
_ROOT = 'root'
# Where Orbax writes the metrics of a checkpoint, in its folder.
_METRICS = ('metrics', 'metrics')
# The managers whose last checkpoint may be unfinished.
_OPEN: set[ocp.CheckpointManager] = set()


def _finish() -> None:
  """Finishes what is being written, however many managers were left open."""
  with contextlib.ExitStack() as stack:
    for writer in tuple(_OPEN):
      stack.callback(writer.close)


# Orbax finishes nothing when a program ends. `atexit` would be too late: the
# executors that Orbax writes with no longer accept work by then.
threading._register_atexit(_finish)  # pyright: ignore[reportAttributeAccessIssue]


class Manager(NamedTuple):
  """The folder of checkpoints of a run; a context manager that closes itself.

  Attributes:
    directory: the folder.
    config: the configuration of the run, as JSON holds it.
    writer: Orbax's manager, or None in a process that does not write.
  """

  directory: paths.Path
  config: dict[str, Any]
  writer: ocp.CheckpointManager | None

  def __enter__(self) -> 'Manager':
    return self

  def __exit__(self, *_: object) -> None:
    close(self)


class Checkpoint(NamedTuple):
  """A checkpoint that was read without knowledge of its tree.

  Attributes:
    step: the step at which it was saved.
    config: the configuration of the run that wrote it.
    extra: what was saved beside the state.
    types: the type and shape of every leaf by path, such as 'float32[784, 300]'
      for 'phi/linear/w'.
    arrays: every leaf by path: numpy arrays, and arrays of typed keys.
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


def _is_step(path: paths.Path) -> bool:
  """Whether a path is that of a checkpoint, be it whole or damaged."""
  if not _STEP.fullmatch(path.name):
    return False
  content = {x.name for x in path.iterdir()} if path.is_dir() else set()
  return not content or bool(content & _ITEMS)


def _steps(directory: paths.Path) -> list[int]:
  return sorted(int(x.name) for x in directory.glob('*') if _is_step(x))


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
  """A configuration as a checkpoint gives it back."""
  for key, value in config.items():
    try:
      json.dumps({key: value}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
      raise ValueError(
        f'config[{key!r}] = {value!r} cannot be compared with what is stored'
        f' ({error}). Use finite numbers, texts, booleans, None, lists and'
        ' dictionaries.'
      ) from error
  return json.loads(json.dumps(dict(config)))


def _rank(metrics: Mapping[str, float] | None, best: str) -> float:
  """The number that is largest for the best checkpoint.

  Checkpoints without the metric come last. They have empty metrics, and not
  none at all, for which Orbax would write a warning.
  """
  return (metrics or {}).get(best, -math.inf)


def open_manager(
  directory: str | os.PathLike[str],
  config: Mapping[str, Any],
  keep: int = 3,
  best: str | None = None,
) -> Manager:
  """Opens a folder of checkpoints, and makes it where there is none.

  Args:
    directory: a folder for these checkpoints only; a local one, or an address
      that starts with gs://.
    config: what must be equal for a run to go on from a checkpoint, such as the
      program, the network, the method and alpha. JSON must hold its values.
    keep: how many of the newest checkpoints to keep, at least 1.
    best: a name among the metrics that `save` is given. The checkpoint with the
      largest value, the newest of several, is kept as well. None keeps the
      newest ones only.

  Returns:
    A `Manager`, to be used in a `with` statement or closed by `close`.

  Raises:
    ValueError: if keep < 1, if the configuration cannot be stored or compared,
      if the directory is an address of another kind, or if something in it has
      a number for a name and is no checkpoint.

  >>> import tempfile
  >>> import jax.numpy as jnp
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   with open_manager(folder, {'alpha': 2.0}) as manager:
  ...     save(manager, 7, {'w': jnp.ones(2)})
  ...     step, state, _ = restore_latest(manager, {'w': jnp.zeros(2)})
  >>> step, state['w'].tolist()
  (7, [1.0, 1.0])
  """
  if keep < 1:
    raise ValueError(f'keep must be at least 1, got {keep}.')
  config = _as_json(config)
  directory = paths.resolve(directory)
  if '://' not in os.fspath(directory):
    directory = directory.absolute()  # Orbax takes no other.
  elif not os.fspath(directory).startswith('gs://'):
    # Orbax would say so only at the first checkpoint, when hours may be lost.
    raise ValueError(
      f'{directory}: checkpoints can be written to local folders and to'
      ' addresses that start with gs://, and to no others.'
    )
  directory.mkdir(parents=True, exist_ok=True)
  for path in directory.glob('*'):
    if _STEP.fullmatch(path.name) and not _is_step(path):
      raise ValueError(
        f'{path} is no checkpoint. Orbax would take it for one, and delete it'
        ' in time: use a folder that is for checkpoints only.'
      )
  writer = None
  if jax.process_index() == 0:
    policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
    rank = None
    if best is not None:
      rank = functools.partial(_rank, best=best)
      policies.append(ocp.checkpoint_managers.BestN(get_metric_fn=rank, n=1))
    options = ocp.CheckpointManagerOptions(
      create=False,
      cleanup_tmp_directories=True,
      best_fn=rank,  # For Orbax to write the metrics; the policy decides.
      preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(
        policies
      ),
      multiprocessing_options=_alone(),
      # If it makes folders in the background, Orbax tells saves apart by one
      # counter per process, and mixes up threads that save at the same time.
      async_options=ocp.options.AsyncOptions(
        create_directories_asynchronously=False
      ),
    )
    writer = ocp.CheckpointManager(directory, options=options)
    _OPEN.add(writer)
  return Manager(directory, config, writer)


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


def save(
  manager: Manager,
  step: int,
  state: Any,
  extra: Any = None,
  metrics: Mapping[str, float] | None = None,
) -> None:
  """Starts to write a checkpoint; does nothing if it is the newest already.

  The state is copied before the function returns, so that its buffers may be
  donated. If the writing of the checkpoint before this one has failed, the
  error is raised here.

  Args:
    manager: a `Manager`.
    step: the step, an integer of 0 or more.
    state: a pytree of arrays, typed keys and numbers, as one device holds it.
    extra: what JSON can hold, and bytes, such as the state of a data iterator.
    metrics: numbers by name, among them the one by which the manager finds the
      best checkpoint. A manager that was opened without `best` does not store
      them.

  Raises:
    ValueError: if the step is no such integer, or if there is a checkpoint of a
      later step.
    TypeError: if extra holds what JSON cannot hold.
    OSError: if a checkpoint cannot be written, as on a full disk.

  >>> import tempfile
  >>> import jax.numpy as jnp
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   with open_manager(folder, {'alpha': 2.0}) as manager:
  ...     save(manager, 0, {'w': jnp.ones(2)}, extra={'epoch': 3})
  ...   load(folder).extra
  {'epoch': 3}
  """
  try:
    number = operator.index(step)
  except TypeError as error:
    raise ValueError(f'step must be an integer, got {step!r}.') from error
  if number < 0:
    raise ValueError(f'step must be 0 or more, got {number}.')
  if manager.writer is None:
    return
  newest = manager.writer.latest_step()  # Also one that is being written.
  if newest is not None and number < newest:
    raise ValueError(
      f'{manager.directory} holds step {newest}, which is after step {number}.'
      ' Restore it first, or use another folder.'
    )
  if number == newest:
    return
  leaves = leaves_lib.by_path(state)
  keys = {
    path: str(jax.random.key_impl(leaf))
    for path, leaf in leaves.items()
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
  }
  raw = {**leaves, **{k: jax.random.key_data(leaves[k]) for k in keys}}
  # As numpy arrays, which Orbax gives back on any number of devices.
  arrays = {k: np.asarray(v) for k, v in jax.device_get(raw).items()}
  record = {
    'config': manager.config,
    'extra': json.loads(json.dumps(extra, default=_encode)),
    'types': {k: _type(v) for k, v in leaves.items()},
    'keys': keys,
    # Orbax refuses arrays without elements: they are stored as their types.
    'empty': {
      k: [v.dtype.name, v.shape] for k, v in arrays.items() if not v.size
    },
  }
  record['checksum'] = _checksum(record, arrays)
  filled = {k or _ROOT: v for k, v in arrays.items() if v.size}
  # Nor does Orbax save trees without any array.
  filled = ocp.args.PyTreeSave(filled or {_ROOT: np.zeros(1)})
  args = ocp.args.Composite(state=filled, record=ocp.args.JsonSave(record))
  with _writing(manager):
    manager.writer.save(number, args=args, metrics=dict(metrics or {}))


@contextlib.contextmanager
def _writing(manager: Manager) -> Iterator[None]:
  """Makes an OSError of each error by which Orbax says that it cannot write."""
  try:
    yield
  except OSError:
    raise
  except Exception as error:
    lines = str(error).splitlines() or [type(error).__name__]
    raise OSError(
      f'{manager.directory}: a checkpoint cannot be written: {lines[0]}'
    ) from error


def close(manager: Manager) -> None:
  """Waits until the last checkpoint is whole, and closes the manager.

  Args:
    manager: a `Manager`; closing it again does nothing.

  Raises:
    OSError: if that checkpoint cannot be written, as on a full disk.

  >>> import tempfile
  >>> import jax.numpy as jnp
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   manager = open_manager(folder, {})
  ...   save(manager, 7, {'w': jnp.ones(2)})
  ...   close(manager)
  ...   load(folder).step
  7
  """
  if manager.writer in _OPEN:
    _OPEN.discard(manager.writer)
    with _writing(manager):
      manager.writer.close()


def _read(path: paths.Path) -> Checkpoint:
  """Reads one checkpoint; raises an error of some type if it is damaged."""
  args = ocp.args.Composite(
    state=ocp.args.PyTreeRestore(), record=ocp.args.JsonRestore()
  )
  with ocp.Checkpointer(
    ocp.CompositeCheckpointHandler(), multiprocessing_options=_alone()
  ) as reader:
    items = reader.restore(path, args=args)
  state, record = items['state'], items['record']
  checksum = record.pop('checksum')
  # Version 0.1 knew no arrays without elements.
  empty = {
    k: np.zeros(shape, jnp.dtype(dtype))
    for k, (dtype, shape) in record.get('empty', {}).items()
  }
  # A state that is one array was stored under its empty path by version 0.1.
  arrays = {
    k: empty[k] if k in empty else state[k if k in state else _ROOT]
    for k in record['types']
  }
  if _checksum(record, arrays) != checksum:
    raise ValueError('The checksum is wrong.')
  for key, impl in record['keys'].items():
    arrays[key] = jax.random.wrap_key_data(jnp.asarray(arrays[key]), impl=impl)
  extra = json.loads(json.dumps(record['extra']), object_hook=_decode)
  return Checkpoint(
    int(path.name), record['config'], extra, record['types'], arrays
  )


def _by_metric(directory: paths.Path, best: str) -> list[int]:
  """The steps that have the metric, the best one last."""
  ranks = {}
  for step in _steps(directory):
    path = directory.joinpath(str(step), *_METRICS)
    found = json.loads(path.read_text()) if path.exists() else {}
    if best in found:
      ranks[step] = found[best]
  return sorted(ranks, key=ranks.__getitem__)


def _last_whole(
  directory: paths.Path, steps: Sequence[int]
) -> tuple[Checkpoint | None, list[paths.Path]]:
  """The last whole checkpoint, and the paths of the damaged ones after it."""
  damaged = []
  for step in reversed(steps):
    path = directory / str(step)
    try:
      return _read(path), damaged
    except Exception as error:  # Damage shows as errors of many types.
      damaged.append(path)
      reason = f'{type(error).__name__}: {error}'[:300]
      _LOG.warning('Skipped %s, which cannot be read. %s', path, reason)
  return None, damaged


def load(
  directory: str | os.PathLike[str], best: str | None = None
) -> Checkpoint:
  """Reads the newest whole checkpoint of a run, and changes nothing.

  Args:
    directory: the folder that was given to `open_manager`.
    best: the name of a metric by which `open_manager` was told to keep the best
      checkpoint. If given, the whole checkpoint with the largest value is read,
      and not the newest.

  Returns:
    A `Checkpoint`, from which `fill` makes trees.

  Raises:
    FileNotFoundError: if there is no whole checkpoint, or none with the metric.

  >>> import tempfile
  >>> import jax.numpy as jnp
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   with open_manager(folder, {'alpha': 2.0}) as manager:
  ...     save(manager, 7, {'w': jnp.ones(2)})
  ...   found = load(folder)
  >>> found.config, found.types
  ({'alpha': 2.0}, {'w': 'float32[2]'})
  """
  directory = paths.resolve(directory)
  if '://' not in os.fspath(directory):
    directory = directory.absolute()
  if best is None:
    found, _ = _last_whole(directory, _steps(directory))
  else:
    found, _ = _last_whole(directory, _by_metric(directory, best))
  if found is None:
    having = f' with the metric {best!r}' if best else ''
    raise FileNotFoundError(
      f'There is no whole checkpoint{having} in {directory}.'
    )
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
      its containers: the key 'phi' of a dictionary takes the field `phi` of a
      state.
    found: a `Checkpoint`, as `load` returns it.
    partial: whether the checkpoint may hold more than the tree asks for.

  Returns:
    A tree of the structure of `like`: numpy arrays and Python numbers where it
    has them, and arrays on the default device elsewhere.

  Raises:
    ValueError: if the trees differ; the error lists the paths that do.

  >>> import numpy as np
  >>> found = Checkpoint(7, {}, None, {'w': 'int64[2]'}, {'w': np.arange(2)})
  >>> fill({'w': np.zeros(2, np.int64)}, found)
  {'w': array([0, 1])}
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

  Newer ones that are damaged are reported by a warning, and renamed to
  '<step>.damaged' if there is a whole one.

  Args:
    manager: a `Manager`.
    like: a tree that `fill` can fill, such as a fresh training state.

  Returns:
    (step, state, extra) as they were saved, or None if there is no checkpoint.

  Raises:
    ValueError: if the configuration or the tree differs from what was saved.
    FileNotFoundError: if there are checkpoints, and all of them are damaged.
    OSError: if a checkpoint that this manager is still writing cannot be
      written.

  >>> import tempfile
  >>> import jax.numpy as jnp
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   with open_manager(folder, {'alpha': 2.0}) as manager:
  ...     print(restore_latest(manager, {'w': jnp.zeros(2)}))
  None
  """
  found = None
  if manager.writer is not None:
    with _writing(manager):
      manager.writer.wait_until_finished()
    found, damaged = _last_whole(manager.directory, _steps(manager.directory))
    # Their places must be free: the run will come to these steps again.
    # Nothing is deleted, as the fault may lie with the file system.
    for path in damaged if found is not None else []:
      aside = path.with_name(f'{path.name}.damaged')
      if aside.is_dir():
        aside.rmtree()
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
      f'No checkpoint in {manager.directory} is whole. Move it away to start'
      ' anew.'
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

"""What binaries write: folders, files, metrics, progress and tables.

A file is written at once or not at all, and the file that it replaces stays
until it is on the disk. A folder of results has one writer at a time: its lock
is held by the operating system for as long as the process lives, so that a
process that was killed does not keep it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
from typing import Any

from etils import epath
import jax
import numpy as np
import tabulate
import tqdm

from experiments.support import config
from experiments.support import events
from powerprop_jax import paths
from powerprop_jax.training import devices

_LINE_EVERY = 30.0  # Seconds between two lines if there is no terminal.


def environment() -> dict[str, Any]:
  """Versions and devices, for config.json."""
  packages = ('jax', 'jaxlib', 'dm-haiku', 'optax', 'numpy')
  return {
    'versions': {p: importlib.metadata.version(p) for p in packages},
    'python': sys.version.split()[0],
    'devices': [d.device_kind for d in jax.devices()],
  }


def announce(binary: str) -> None:
  """Prints the first line of a binary: its name, devices and versions.

  Args:
    binary: the name of the binary.
  """
  if jax.process_index():
    return
  found = environment()
  kinds = {
    kind: found['devices'].count(kind) for kind in sorted({*found['devices']})
  }
  on = ', '.join(f'{count} x {kind}' for kind, count in kinds.items())
  versions = ', '.join(f'{k} {v}' for k, v in found['versions'].items())
  print(f'{binary} on {on} (Python {found["python"]}, {versions})', flush=True)


def is_remote(path: epath.Path) -> bool:
  """Whether a path is in a bucket, and not in a file system of this machine."""
  return '://' in str(path)


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file at once or not at all.

  Args:
    path: the path of the file; its folder must exist.
    text: the content of the file.
  """
  if is_remote(path):
    path.write_text(text)  # Buckets show a file only when it is whole.
    return
  name = f'.{path.name}.{os.getpid()}.{threading.get_ident()}'
  temporary = path.with_name(name)
  try:
    with open(temporary, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


def write_json(path: epath.Path, content: Any) -> None:
  """Writes a file of JSON at once or not at all.

  Args:
    path: the path of the file; its folder must exist.
    content: what JSON can hold.
  """
  write_text(path, json.dumps(content, indent=1) + '\n')


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a file that holds a JSON object.

  Args:
    path: the path of the file.

  Returns:
    The object as a dict.

  Raises:
    config.Refused: if the file holds something else.
  """
  try:
    content = json.loads(path.read_text())
  except ValueError as e:
    raise config.Refused(f'{path} holds no JSON ({e}). Move it away.') from e
  if not isinstance(content, dict):
    raise config.Refused(f'{path} holds no JSON object. Move it away.')
  return content


@contextlib.contextmanager
def _locked(path: epath.Path) -> Iterator[None]:
  """Holds the lock of a folder.

  The lock is one of the kernel (flock) on a file that says who holds it. All
  processes of this machine respect it, and on NFS those of other machines. On a
  file system without such locks, and in a bucket, the folder stays unlocked,
  and one line says so.
  """
  if is_remote(path):
    print(f'{path} cannot be locked: do not start twice.', file=sys.stderr)
    yield
    return
  descriptor = os.open(path / '.lock', os.O_RDWR | os.O_CREAT, 0o666)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = os.read(descriptor, 1000).decode(errors='replace').strip()
      raise config.Refused(
        f'--out_dir={path} is in use by {holder or "another process"}. Wait'
        ' until that has ended, or choose another --out_dir.'
      ) from None
    except OSError as e:
      if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
        raise
      print(f'{path} cannot be locked: do not start twice.', file=sys.stderr)
    os.ftruncate(descriptor, 0)
    holder = f'process {os.getpid()} on {socket.gethostname()}\n'
    os.write(descriptor, holder.encode())
    yield
  finally:
    os.close(descriptor)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
  return '; '.join(
    f'{k}: {found.get(k)} there, {wanted.get(k)} now'
    for k in sorted(found.keys() | wanted.keys())
    if found.get(k) != wanted.get(k)
  )


def _check_config(path: epath.Path, wanted: Mapping[str, Any]) -> None:
  """Compares a new experiment with that of a folder; may raise `Refused`."""
  file = path / 'config.json'
  if not file.exists():
    return
  found = read_json(file)
  if not isinstance(found.get('settings'), dict):
    raise config.Refused(
      f'{file} was not written by this program. Choose another --out_dir.'
    )
  there = found.get('binary')
  if there != wanted['binary']:
    raise config.Refused(
      f'{path} holds an experiment of {there or "another program"}. Choose'
      ' another --out_dir.'
    )
  differences = _differences(found['settings'], wanted['settings'])
  if differences:
    raise config.Refused(
      f'{path} holds an experiment with other settings. Choose another'
      f' --out_dir. The differences are: {differences}.'
    )
  if found.get('devices') != wanted['devices']:
    count = len(found.get('devices') or [])
    print(
      f'{path} was begun on {count} device(s), whose number or kind is not that'
      f' of the {len(wanted["devices"])} of now. A run that goes on here does'
      ' not end with the same bits.',
      file=sys.stderr,
    )


def _check_kinds(path: epath.Path) -> None:
  """Refuses files in the place of a binary's folders, and vice versa."""
  for name, is_folder in (
    ('runs', True),
    ('checkpoints', True),
    ('metrics.jsonl', False),
    ('summary.json', False),
  ):
    place = path / name
    if place.exists() and place.is_dir() != is_folder:
      kinds = ('folder', 'file') if is_folder else ('file', 'folder')
      raise config.Refused(
        f'{place} is a {kinds[1]} and has to be a {kinds[0]}. Move it away.'
      )


def about_accuracy(num_examples: int) -> str:
  """A line below a table, on how much the accuracies in it may be off.

  Args:
    num_examples: how many examples they were measured on.

  Returns:
    The line.
  """
  error = 100 * (0.95 * 0.05 / num_examples) ** 0.5
  return (
    f'Higher is better. With {num_examples:,} test images the standard error of'
    f' an accuracy of 95 % is {error:.1f} points.'
  )


@contextlib.contextmanager
def opened(
  out_dir: str, binary: str, settings: Mapping[str, Any]
) -> Iterator[epath.Path]:
  """Opens the folder of results for this process alone.

  An experiment that was started in it may be continued. If a program runs on
  several hosts, the first one holds the lock and writes config.json, all of
  them compare their settings, and all of them are refused if one is.

  Args:
    out_dir: the path of the folder.
    binary: the name of the program.
    settings: the settings that decide the results, returned by
      `config.deciding`, with the fingerprint of the data.

  Yields:
    The folder, with a config.json.

  Raises:
    config.Refused: if the folder cannot be used, is in use, or holds an
      experiment with other settings; the message lists the differences.
  """
  first = jax.process_index() == 0
  wanted = {'binary': binary, 'settings': settings, **environment()}
  wanted = json.loads(json.dumps(wanted, allow_nan=False))
  with contextlib.ExitStack() as stack:
    path = error = None
    try:
      if re.match(r'(?!gs:)[a-z][a-z0-9+.-]+://', out_dir):
        # This comes before `resolve`, which would ask for a package to install.
        raise config.Refused(
          f'--out_dir={out_dir}: runs write to local folders and to addresses'
          ' that start with gs://, and to no others.'
        )
      path = paths.resolve(out_dir)
      path.mkdir(parents=True, exist_ok=True)
      if first:
        stack.enter_context(_locked(path))
        _check_kinds(path)
      _check_config(path, wanted)
    except config.Refused as e:
      error = e
    except (OSError, ValueError) as e:
      error = config.Refused(f'--out_dir={out_dir} cannot be used: {e}')
    if devices.any_host(error is not None):
      raise error or config.Refused('another host has refused --out_dir.')
    assert path is not None
    if first:
      try:
        write_json(path / 'config.json', wanted)
      except OSError as e:
        raise config.Refused(f'--out_dir={out_dir} cannot be used: {e}') from e
    yield path


def _scalars(
  metrics: Mapping[str, Any], prefix: str = ''
) -> Iterator[tuple[str, float]]:
  """The tags and values of all numbers among metrics, also in dictionaries."""
  for name, value in metrics.items():
    if isinstance(value, Mapping):
      yield from _scalars(value, f'{prefix}{name}/')
    elif isinstance(value, int | float) and not isinstance(value, bool):
      yield f'{prefix}{name}', value


class Metrics:
  """A file of metrics, one JSON object per line, and event files of the same.

  If tensorboardX is installed, event files are written into `events` beside the
  file, and there into a folder for each `run`. There are none in buckets.
  """

  def __init__(self, path: epath.Path, keep: Callable[[dict[str, Any]], bool]):
    """Opens a file to add to it.

    Args:
      path: the path of the file.
      keep: whether a line of an earlier start stays, given the object that it
        holds. A line that a run will write again must not stay, or it would be
        there twice. For an event the object has the 'step' and, if there are
        several runs, the 'run'.
    """
    self._path, self._turn = path, threading.Lock()
    self._writers: dict[str, events.Writer] = {}
    self._events: pathlib.Path | None = None

    def kept(line):
      try:
        found = json.loads(line)
      except ValueError:
        return False  # The end of a file that was cut off.
      return isinstance(found, dict) and keep(found)

    # Bytes that are not text are no metrics, and their line is left out.
    read = path.read_bytes() if path.exists() else b''
    lines = read.decode(errors='replace').splitlines()
    self._text = ''.join(f'{line}\n' for line in lines if kept(line))
    write_text(path, self._text)
    if events.installed() and not is_remote(path):
      self._events = pathlib.Path(path).parent / 'events'
      events.forget(self._events, lambda step: keep({'step': step}))
      for place in self._events.glob('*/'):
        run = {'run': place.name}
        events.forget(place, lambda step, run=run: keep(run | {'step': step}))

  def __call__(
    self,
    metrics: Mapping[str, Any],
    histograms: Mapping[str, np.ndarray] | None = None,
  ) -> None:
    """Adds a line. Several threads may call it at once.

    Args:
      metrics: values by name, with the `step`, and the `run` if there are
        several; numbers and dictionaries of numbers are written as events too.
      histograms: arrays by tag, which are written as events only.
    """
    line = json.dumps(metrics) + '\n'
    with self._turn:
      if is_remote(self._path):
        # A file in a bucket cannot be appended to: it is written as a whole.
        self._text += line
        write_text(self._path, self._text)
      else:
        with self._path.open('a') as file:
          file.write(line)
      if self._events is None:
        return
      others = {k: v for k, v in metrics.items() if k not in ('run', 'step')}
      run = metrics.get('run', '')
      if run not in self._writers:
        self._writers[run] = events.Writer(self._events / run)
      self._writers[run].write(
        metrics['step'], dict(_scalars(others)), histograms or {}
      )

  def close(self, run: str | None = None) -> None:
    """Closes the event files of a run, or those of all runs."""
    with self._turn:
      for name in [*self._writers] if run is None else [run]:
        if name in self._writers:
          self._writers.pop(name).close()


class Progress:
  """Shows progress: by a bar on a terminal, else by a line now and then."""

  def __init__(
    self, total: int, initial: int = 0, unit: str = 'step', stay: bool = True
  ):
    """Begins to show progress.

    Args:
      total: the number of steps.
      initial: how many of them have been taken already.
      unit: the name of a step.
      stay: whether the bar stays, or a last line is written, at the end.
    """
    self._total, self._initial, self._step = total, initial, initial
    self._unit, self._stay = unit, stay
    self._shown = time.monotonic()
    self._turn, self._at = threading.Lock(), {}
    # When the first report came, and at which step: until then XLA compiles.
    self._first: tuple[float, int] | None = None
    self._text, self._bar = '', None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=total, initial=initial, unit=unit, smoothing=0.1, leave=stay
      )

  def at(
    self, step: int, metrics: Mapping[str, float], run: str | None = None
  ) -> None:
    """Shows at which step the program or a run is, with some metrics."""
    with self._turn:
      steps = step - self._at.get(run, 0 if run else self._initial)
      self._at[run] = step
      self._step += steps
      self._text = ', '.join(f'{k} {v:.4g}' for k, v in metrics.items())
      if run is not None:
        self._text = f'{self._text} ({run})'.lstrip()
      if self._bar is not None:
        self._bar.update(steps)
        self._bar.set_postfix_str(self._text)
      elif time.monotonic() - self._shown > _LINE_EVERY:
        self._line()
      self._first = self._first or (time.monotonic(), self._step)

  def _line(self) -> None:
    self._shown = time.monotonic()
    shown = f'{self._unit} {self._step} of {self._total}'
    begun, first = self._first or (self._shown, self._step)
    if self._shown > begun and self._step > first:
      rate = (self._step - first) / (self._shown - begun)
      left = tqdm.tqdm.format_interval((self._total - self._step) / rate)
      shown += f', {rate:.3g} {self._unit}s per second, {left} left'
    print(
      f'{shown}: {self._text}' if self._text else shown,
      file=sys.stderr,
      flush=True,
    )

  def close(self) -> None:
    """Ends the bar, or writes a last line if there is to be one."""
    if self._bar is not None:
      self._bar.close()
    elif self._stay and self._step > self._initial:
      self._line()


def table(rows: Sequence[Sequence[str]], headers: Sequence[str] = ()) -> str:
  """A table as text, with all columns but the first aligned to the right.

  Args:
    rows: the cells of each row.
    headers: the headings of the columns; there is no heading line without them.

  Returns:
    Text of several lines.
  """
  return tabulate.tabulate(
    rows,
    headers,
    tablefmt='simple' if headers else 'plain',
    colglobalalign='right',
    colalign=('left',),
    disable_numparse=True,
  )

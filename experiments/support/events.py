"""Reads and writes event files, which TensorBoard shows, with tensorboardX.

They are written record by record and at once, so that after a run is killed
they hold the same as metrics.jsonl. Events that a run which goes on will write
again are taken out of them first.
"""

from collections.abc import Callable, Iterator, Mapping
import importlib.util
import itertools
import os
import pathlib
import struct
import time
from typing import Any

import numpy as np

from powerprop_jax import extras

_NUMBER = itertools.count()
_HEADER, _FOOTER = 12, 4  # Bytes of a record before and after its event.
# The sections of TensorBoard for metrics that do not come from the training
# batches.
_SECTIONS = {
  'dead_units': 'masks',
  'explored': 'masks',
  'sign_changes': 'masks',
  'learning_rate': 'optimiser',
  'gradient_norm': 'optimiser',
  'update_norm': 'optimiser',
  'steps_per_second': 'speed',
  'images_per_second': 'speed',
}


def installed() -> bool:
  """Whether event files can be written: whether tensorboardX is installed."""
  return importlib.util.find_spec('tensorboardX') is not None


def tag(name: str) -> str:
  """The tag of a metric, whose first word is a section of TensorBoard.

  Args:
    name: the name of the metric in metrics.jsonl.

  Returns:
    The tag.
  """
  split, _, rest = name.partition('_')
  if '/' in name:
    return name
  if split in ('valid', 'test'):
    return f'{split}/{rest}'
  return f'{_SECTIONS.get(name, "train")}/{name}'


def _records(content: bytes) -> Iterator[tuple[bytes, Any]]:
  """The records of a file with their events, but none that was cut off."""
  with extras.needed('tensorboard'):
    from tensorboardX.proto import event_pb2

  start = 0
  while start + _HEADER <= len(content):
    (size,) = struct.unpack_from('<Q', content, start)
    end = start + _HEADER + size + _FOOTER
    if end > len(content):
      return
    record = content[start:end]
    # The classes of protocol buffers are made when they are imported.
    event = event_pb2.Event()  # pyright: ignore[reportAttributeAccessIssue]
    event.ParseFromString(record[_HEADER:-_FOOTER])
    yield record, event
    start = end


def read(folder: pathlib.Path) -> Iterator[tuple[int, str, float]]:
  """Reads the numbers in the event files of a folder.

  Args:
    folder: that of one run.

  Yields:
    (step, tag, value) of every number, in the order of writing.
  """
  for path in sorted(folder.glob('*.tfevents.*')):
    for _, event in _records(path.read_bytes()):
      for value in event.summary.value:
        if value.HasField('simple_value'):
          yield event.step, value.tag, value.simple_value


def forget(folder: pathlib.Path, keep: Callable[[int], bool]) -> None:
  """Takes events out of the files of a folder.

  Args:
    folder: that of one run.
    keep: whether the events of a step stay.
  """
  for path in folder.glob('*.tfevents.*'):
    content = path.read_bytes()
    kept = b''.join(
      record
      for record, event in _records(content)
      if event.WhichOneof('what') == 'file_version' or keep(event.step)
    )
    if kept != content:
      temporary = path.with_name(f'.{path.name.replace("tfevents", "new")}')
      temporary.write_bytes(kept)
      os.replace(temporary, path)


class Writer:
  """Writes event files of one run."""

  def __init__(self, folder: pathlib.Path):
    """Begins a file in a folder, which is made if there is none."""
    with extras.needed('tensorboard'):
      from tensorboardX import event_file_writer

    folder.mkdir(parents=True, exist_ok=True)
    # The name that the file gets has the time in seconds, but a run can be
    # killed and started again within one second.
    suffix = f'.{os.getpid()}.{next(_NUMBER)}'
    self._file = event_file_writer.EventsWriter(str(folder / 'events'), suffix)

  def write(
    self,
    step: int,
    scalars: Mapping[str, float],
    histograms: Mapping[str, np.ndarray],
  ) -> None:
    """Writes the events of a step.

    Args:
      step: the step.
      scalars: numbers by name.
      histograms: arrays by tag, whose distributions are written.
    """
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2

    found = [summary.scalar(tag(name), x) for name, x in scalars.items()]
    found += [
      summary.histogram(name, x, 'auto', 64) for name, x in histograms.items()
    ]
    for one in found:
      event = event_pb2.Event(  # pyright: ignore[reportAttributeAccessIssue]
        step=step, wall_time=time.time(), summary=one
      )
      self._file.write_event(event)
    self._file.flush()

  def close(self) -> None:
    """Ends the file."""
    self._file.close()

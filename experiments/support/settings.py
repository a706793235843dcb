"""Groups of settings that several binaries share."""

import dataclasses
import os

import jax

from experiments.support import config
from powerprop_jax import paths
from powerprop_jax.data import in_memory
from powerprop_jax.models import networks

# JAX makes its keys from 32 bits, and the streams add 1.
MAX_SEED = 2**32 - 2
MAX_STEPS = 2**31 - 1
MAX_RUNS = 10_000


@dataclasses.dataclass(frozen=True)
class Data(config.Settings):
  """The data."""

  dataset: str = config.flag(
    'mnist_5k',
    'The data set. mnist_5k comes with an installed package; idx is a folder of'
    ' four files in the format of MNIST; any other name is that of a data set'
    ' of TensorFlow Datasets (TFDS), which must have been prepared.',
  )
  data_dir: str | None = config.flag(
    None,
    'The folder of the TFDS data sets, of the idx files or of the images. By'
    ' default TFDS looks in $TFDS_DATA_DIR or ~/tensorflow_datasets.',
    decides=False,
  )

  def __post_init__(self):
    super().__post_init__()
    if self.data_dir:
      try:
        paths.resolve(self.data_dir)
      except ValueError as e:
        raise ValueError(f'--data_dir={self.data_dir}: {e}') from e


@dataclasses.dataclass(frozen=True)
class Network(config.Settings):
  """The network."""

  network: str = config.flag(
    'lenet_300_100', 'The network to train.', choices=networks.NETWORKS
  )


@dataclasses.dataclass(frozen=True)
class Output(config.Settings):
  """The results."""

  out_dir: str = config.flag(
    'results',
    'The folder of results. A command that was interrupted goes on when it is'
    ' given again with the same folder.',
    decides=False,
  )


def _check_coordinator(text: str) -> None:
  host, colon, port = text.rpartition(':')
  if text != 'auto' and not (host and colon and port.isdecimal()):
    raise ValueError('must be host:port, or auto')


@dataclasses.dataclass(frozen=True)
class Hosts(config.Settings):
  """Several hosts."""

  coordinator: str | None = config.flag(
    None,
    'The address of the first of several hosts, as host:port, or auto on Slurm'
    ' and on cloud TPUs.',
    check=_check_coordinator,
    decides=False,
  )
  num_processes: int | None = config.flag(
    None,
    'The number of hosts, if --coordinator is host:port.',
    low=1,
    decides=False,
  )
  process_index: int | None = config.flag(
    None,
    'The index of this host, from 0 on, if --coordinator is host:port.',
    low=0,
    decides=False,
  )

  def __post_init__(self):
    super().__post_init__()
    count, index = self.num_processes, self.process_index
    if self.coordinator in (None, 'auto'):
      if count is not None or index is not None:
        raise ValueError(
          f'--num_processes={count} and --process_index={index} need the'
          ' --coordinator=host:port to join.'
        )
    elif count is None or index is None or index >= count:
      raise ValueError(
        f'--coordinator={self.coordinator} needs --num_processes and a'
        f' --process_index below it, got {count} and {index}.'
      )


def connect(settings: Hosts) -> None:
  """Joins the other hosts, if there are any.

  Args:
    settings: the settings of the hosts.

  Raises:
    ValueError: if the connection fails.
  """
  if settings.coordinator is None:
    return
  try:
    if settings.coordinator == 'auto':
      jax.distributed.initialize()
    else:
      jax.distributed.initialize(
        settings.coordinator, settings.num_processes, settings.process_index
      )
  except (RuntimeError, ValueError) as e:
    hint = ''
    if settings.coordinator == 'auto':
      hint = (
        ' This works on Slurm and on cloud TPUs. Elsewhere give'
        ' --coordinator=host:port, --num_processes and --process_index.'
      )
    raise ValueError(f'--coordinator={settings.coordinator}: {e}{hint}') from e


def num_cores() -> int:
  """How many cores this process may use, which need not be all there are."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def load_in_memory(settings: Data, batch_size: int) -> in_memory.Dataset:
  """Loads the data set, and checks that it is large enough for a batch.

  Args:
    settings: the settings of the data.
    batch_size: the number of examples per step.

  Returns:
    The data set.

  Raises:
    ValueError: if it cannot be loaded or is smaller than a batch.
  """
  data = in_memory.load(settings.dataset, settings.data_dir)
  check_batch_size(batch_size, len(data.train.labels), data.name)
  return data


def check_batch_size(batch_size: int, size: int, name: str) -> None:
  """Raises ValueError if a batch is larger than a data set.

  Args:
    batch_size: the number of examples per step.
    size: the number of training examples.
    name: the name of the data set.
  """
  if batch_size > size:
    raise ValueError(
      f'--batch_size={batch_size} is more than the {size} training examples of'
      f' {name}. Give at most {size}.'
    )

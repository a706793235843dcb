"""Groups of settings that several binaries share."""

import dataclasses

from experiments.support import config
from powerprop_jax.models import networks

# JAX makes its keys from 32 bits, and the streams add 1.
MAX_SEED = 2**32 - 2
MAX_STEPS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Data(config.Settings):
  """The data."""

  dataset: str = config.flag(
    'mnist_5k',
    'The data set. mnist_5k comes with an installed package; idx is a folder of'
    ' four files in the format of MNIST; any other name is that of a TFDS set,'
    ' which must have been prepared.',
  )
  data_dir: str | None = config.flag(
    None,
    'The folder in which the TFDS sets or the idx files lie. Without it TFDS'
    ' looks in $TFDS_DATA_DIR or ~/tensorflow_datasets.',
    decides=False,
  )


@dataclasses.dataclass(frozen=True)
class Network(config.Settings):
  """The network."""

  network: str = config.flag(
    'lenet_300_100', 'The network to train.', choices=sorted(networks.NETWORKS)
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

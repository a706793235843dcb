"""Sharding: the weight-sparse transformer, cut into pieces on many devices.

  python -m examples.sharded

Eight virtual devices of a CPU form a mesh of 4 x 2. Matrices are cut along both
axes, and batches along the first. The training loop is that of the example
`equinox_transformer`, without a change: masks, moments and the ranking of the
weights follow where the arrays lie, and no device ever holds a whole matrix.
"""

import os

import equinox as eqx
import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from examples import equinox_transformer


def main(steps: int = 200, density: float = 0.05) -> dict[float, float]:
  """Prints and returns bits per character for each alpha."""
  mesh = jax.make_mesh((4, 2), ('data', 'model'), (AxisType.Auto,) * 2)

  def place(x, *axes):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

  def cut(model):
    arrays, rest = eqx.partition(model, eqx.is_array)
    arrays = jax.tree.map(
      lambda x: place(x, *(('data', 'model') if x.ndim == 2 else ())), arrays
    )
    print('the output layer is on', arrays.output.weight.sharding.spec)
    return eqx.combine(arrays, rest)

  return equinox_transformer.main(
    steps, density, cut, lambda batch: place(batch, 'data')
  )


if __name__ == '__main__':
  os.environ['NPROC'] = '64'  # Threads, in which devices wait for each other.
  jax.config.update('jax_num_cpu_devices', 8)
  main()

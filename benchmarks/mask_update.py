"""Times an exact mask update of RigL on a tree of the size of ResNet-50.

  python -m benchmarks.mask_update

Prints the seconds of one update of all layers, after compilation. Values for
the weights that are grown are not drawn. The masks must be identical to those
of a stable argsort in numpy, or the script fails.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import topk
from powerprop_jax import leaves
from powerprop_jax.models import networks
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import updaters

_SPARSITY = 0.9
_DROP = 0.3


def largest(scores: np.ndarray, count: int) -> np.ndarray:
  """The mask of the `count` largest scores, of the shape of `scores`.

  Ties go to the lower index.
  """
  mask = np.zeros(scores.size, bool)
  mask[np.argsort(-scores.ravel(), kind='stable')[:count]] = True
  return mask.reshape(scores.shape)


def update_by_sorting(
  theta: np.ndarray, grad: np.ndarray, active: np.ndarray
) -> np.ndarray:
  """RigL's update of the mask of one layer, as published.

  Args:
    theta: the weights, of any shape.
    grad: their gradient, of the same shape.
    active: the mask before, of the same shape.

  Returns:
    The mask after the update, of the same shape.
  """
  count = int(active.sum())
  changes = int(masks.floor_multiply(_DROP, count))
  remaining = largest(np.where(active, np.abs(theta), -1.0), count - changes)
  growth = np.where(remaining, -np.inf, np.abs(grad))
  return remaining | largest(growth, changes)


def main() -> None:
  network = networks.build('resnet50', 1000)
  shapes, _ = jax.eval_shape(
    lambda key: network.init(key, jnp.zeros([1, 224, 224, 3]), True),
    jax.random.key(0),
  )
  rng = np.random.default_rng(0)
  theta, grads = (
    jax.tree.map(
      lambda x: jnp.asarray(rng.standard_normal(x.shape, dtype=np.float32)),
      shapes,
    )
    for _ in range(2)
  )
  updater = updaters.rigl(
    distributions.erdos_renyi(_SPARSITY), lambda step: jnp.asarray(_DROP), None
  )
  key = jax.random.key(0)
  before = updater.init(key, theta, grads)
  start = time.perf_counter()
  update = jax.jit(updater.update).lower(key, 0, theta, before, grads).compile()
  compiling = time.perf_counter() - start
  (_, after), seconds = topk.best_of(7, update, key, 0, theta, before, grads)

  start = time.perf_counter()
  for path, x, grad, old, new in leaves.weight_rows(
    theta, leaves.is_weight, grads, before.forward, after.forward
  ):
    expected = update_by_sorting(*map(np.asarray, (x, grad, old)))
    if not np.array_equal(new, expected):
      raise SystemExit(f'The masks of {path} differ.')
  sorting = time.perf_counter() - start
  kept, size = masks.count(after.forward, leaves.weight_mask(theta))
  print(
    f'RigL update of {size} weights, of which {kept} are kept: {seconds:.3f} s'
    f' (compiled in {compiling:.0f} s), identical masks; by sorting in numpy'
    f' {sorting:.1f} s; {jax.devices()[0].device_kind}, jax {jax.__version__}'
  )


if __name__ == '__main__':
  main()

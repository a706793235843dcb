"""What a mask keeps of each layer, as a plain dictionary."""

from typing import Any

import numpy as np

from powerprop_jax import leaves

Params = Any  # A pytree of arrays.
Mask = Any  # A pytree of boolean arrays.


def _dead_units(path: str, mask: np.ndarray) -> int:
  """Outputs without an incoming weight: the last axis, but Equinox's first."""
  units = 0 if path.rsplit('/', 1)[-1].startswith('weight') else -1
  inputs = np.moveaxis(mask, units, 0).reshape(mask.shape[units], -1)
  return int(np.sum(~inputs.any(axis=1)))


def sparsity_report(
  mask: Mask, theta: Params, is_weight: leaves.IsWeight = leaves.is_weight
) -> dict[str, Any]:
  """What a mask keeps of each layer. Weights only: biases are not counted.

  Args:
    mask: a pytree of boolean arrays.
    theta: the parameters of that mask, or their shapes and dtypes.
    is_weight: a function of (path, leaf).

  Returns:
    A dict of 'layers', dicts of 'path', 'shape', 'size', 'kept', 'density' and
    'dead' (output units without an incoming weight), and of 'total', a dict of
    'size', 'kept', 'density' and 'dead'.
  """
  rows = [
    {
      'path': str(path),
      'shape': list(leaf.shape),
      'size': leaf.size,
      'kept': int(np.sum(m)),
      'density': float(np.mean(m)),
      'dead': _dead_units(path, np.asarray(m)),
    }
    for path, leaf, m in leaves.weight_rows(theta, is_weight, mask)
  ]
  size, kept, dead = (sum(r[k] for r in rows) for k in ('size', 'kept', 'dead'))
  total = {'size': size, 'kept': kept, 'density': kept / size, 'dead': dead}
  return {'layers': rows, 'total': total}

"""How many weights a mask keeps in each layer, as a plain dictionary.

Sparsity is counted on weights only (section 2 of the paper leaves biases and
normalisation alone), and what is reported is the *density*, the fraction of the
weights that is kept. A unit without any incoming weight is dead: its output is
its bias, whatever enters the network.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from powerprop_jax import leaves
from powerprop_jax import types


def _layers(
  path: str, mask: np.ndarray, axes: types.Axes
) -> Iterator[tuple[str, np.ndarray, tuple[int, ...]]]:
  """The path, the mask and the axes of the units of each layer of a leaf."""
  ndim, stack = mask.ndim, axes.stack
  if not stack:
    yield path, mask, axes.outputs
    return
  rest = [i for i in range(ndim) if i not in stack]
  outputs = tuple(rest.index(i) for i in axes.outputs)
  moved = np.transpose(mask, (*stack, *rest))
  for index in np.ndindex(*moved.shape[: len(stack)]):
    yield f'{path}[{", ".join(map(str, index))}]', moved[index], outputs


def _row(
  path: str, mask: np.ndarray, outputs: tuple[int, ...]
) -> dict[str, Any]:
  others = tuple(i for i in range(mask.ndim) if i not in outputs)
  return {
    'path': path,
    'shape': list(mask.shape),
    'size': mask.size,
    'kept': int(np.sum(mask)),
    'density': float(np.mean(mask)) if mask.size else 0.0,
    'dead': int(np.sum(~mask.any(axis=others))),
  }


def sparsity_report(
  mask: types.Mask,
  theta: types.Params,
  is_weight: types.IsWeight = leaves.is_weight,
  axes: types.AxesOf = leaves.axes,
) -> dict[str, Any]:
  """Counts the weights that a mask keeps in each layer, without any biases.

  Args:
    mask: a pytree of boolean arrays, of the structure and the shapes of theta.
    theta: the parameters of that mask, or their shapes and dtypes.
    is_weight: a function of (path, leaf).
    axes: a function of (path, leaf) that tells stacked layers, each of which
      has a row of its own ('blocks/w[0]', 'blocks/w[1]', ...), and outputs.

  Returns:
    A dict of 'layers', a list of dicts of 'path', 'shape', 'size', 'kept',
    'density' and 'dead' (the number of output units without an incoming
    weight), and of 'total', a dict of 'size', 'kept', 'density' and 'dead'.

  Raises:
    ValueError: if there is no weight, or the trees differ in how many leaves
      they have.

  >>> mask = {'linear': {'w': np.array([[True, False], [True, False]])}}
  >>> sparsity_report(mask, {'linear': {'w': np.zeros([2, 2], 'f')}})['total']
  {'size': 4, 'kept': 2, 'density': 0.5, 'dead': 1}
  """
  rows = [
    _row(*layer)
    for path, leaf, m in leaves.weight_rows(theta, is_weight, mask)
    for layer in _layers(
      str(path), np.asarray(jax.device_get(m)), axes(path, leaf)
    )
  ]
  size, kept, dead = (sum(r[k] for r in rows) for k in ('size', 'kept', 'dead'))
  total = {
    'size': size,
    'kept': kept,
    'density': kept / size if size else 0.0,
    'dead': dead,
  }
  return {'layers': rows, 'total': total}

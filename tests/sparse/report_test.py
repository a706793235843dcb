"""Tests of reports on stacked layers and on the kinds of kernels."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax import leaves
from powerprop_jax.sparse import report


def _like(mask):
  return {
    module: {name: jnp.zeros(m.shape) for name, m in leaf.items()}
    for module, leaf in mask.items()
  }


def test_each_layer_of_a_stack_has_a_row():
  w = np.ones((3, 4, 2), bool)
  w[1, :, 0] = False  # One unit of the second layer is cut.
  w[2, 0] = False
  mask = {'layers': {'w': w}}
  axes = functools.partial(leaves.axes, stacked='^layers/')
  found = report.sparsity_report(mask, _like(mask), axes=axes)
  assert found['layers'] == [
    {
      'path': f'layers/w[{i}]',
      'shape': [4, 2],
      'size': 8,
      'kept': kept,
      'density': kept / 8,
      'dead': dead,
    }
    for i, kept, dead in ((0, 8, 0), (1, 4, 1), (2, 6, 0))
  ]
  assert found['total'] == {'size': 24, 'kept': 18, 'density': 0.75, 'dead': 1}


@pytest.mark.parametrize(
  ('module', 'name', 'shape', 'cut', 'dead'),
  [
    # A head of eight units without inputs.
    ('query', 'kernel', (32, 4, 8), np.s_[:, 1], 8),
    # One of the 32 inputs is cut, and then one of the 32 outputs.
    ('out', 'kernel', (4, 8, 32), np.s_[0, 0], 0),
    ('out', 'kernel', (4, 8, 32), np.s_[..., 5], 1),
    # Haiku's transposed convolution has its outputs before its inputs.
    ('conv2_d_transpose', 'w', (2, 2, 3, 5), np.s_[:, :, 0], 1),
    ('conv2_d_transpose', 'w', (2, 2, 3, 5), np.s_[..., 0], 0),
    ('conv2_d', 'w', (2, 2, 3, 5), np.s_[..., 0], 1),
    ('linear', 'w', (3, 5), np.s_[0], 0),
    ('linear', 'w', (3, 5), np.s_[:, 0], 1),
  ],
)
def test_dead_units_are_outputs(module, name, shape, cut, dead):
  mask = {module: {name: np.ones(shape, bool)}}
  mask[module][name][cut] = False
  found = report.sparsity_report(mask, _like(mask))
  assert found['total']['dead'] == dead
  assert len(found['layers']) == 1

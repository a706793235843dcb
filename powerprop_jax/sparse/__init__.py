"""Masks, pruning and sparse training of networks."""

from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import flops
from powerprop_jax.sparse import masking
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import pruning
from powerprop_jax.sparse import report
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters
from powerprop_jax.sparse.sparsify import Sparse
from powerprop_jax.sparse.sparsify import SparseState
from powerprop_jax.sparse.sparsify import sparsify

__all__ = (
  'Sparse',
  'SparseState',
  'distributions',
  'flops',
  'masking',
  'masks',
  'pruning',
  'report',
  'schedules',
  'sparsify',
  'updaters',
)

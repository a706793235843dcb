"""Sparse networks and how they come about."""

from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import flops
from powerprop_jax.sparse import masking
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import pruning
from powerprop_jax.sparse import report
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters

__all__ = (
  'distributions',
  'flops',
  'masking',
  'masks',
  'pruning',
  'report',
  'schedules',
  'updaters',
)

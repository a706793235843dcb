"""Powerpropagation in JAX: weights that prune themselves while they learn."""

import importlib
from typing import TYPE_CHECKING, Any

from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import sparse
from powerprop_jax import transforms
from powerprop_jax import types
from powerprop_jax.leaves import is_weight
from powerprop_jax.leaves import weight_mask
from powerprop_jax.power import PowerTransform
from powerprop_jax.power import change_alpha
from powerprop_jax.power import describe
from powerprop_jax.power import nats
from powerprop_jax.power import power_transform
from powerprop_jax.power import psi
from powerprop_jax.power import psi_derivative
from powerprop_jax.power import psi_inverse
from powerprop_jax.sparse.masks import Masks
from powerprop_jax.sparse.masks import apply_mask
from powerprop_jax.sparse.masks import topk_mask
from powerprop_jax.sparse.sparsify import sparsify
from powerprop_jax.training.step import TrainState
from powerprop_jax.training.step import init_state
from powerprop_jax.training.step import make_train_step
from powerprop_jax.transforms import decay_phi
from powerprop_jax.transforms import powerprop
from powerprop_jax.transforms import scale_by_power_jacobian
from powerprop_jax.transforms import target_propagation

if TYPE_CHECKING:
  from powerprop_jax import analysis
  from powerprop_jax import continual
  from powerprop_jax import data
  from powerprop_jax import export
  from powerprop_jax import models
  from powerprop_jax import plots
  from powerprop_jax import reparam
  from powerprop_jax import training
  from powerprop_jax.reparam import reparameterise

__version__ = '0.2.0'

__all__ = (
  'Masks',
  'PowerTransform',
  'TrainState',
  'analysis',
  'apply_mask',
  'change_alpha',
  'continual',
  'data',
  'decay_phi',
  'describe',
  'export',
  'init_state',
  'is_weight',
  'leaves',
  'make_train_step',
  'models',
  'nats',
  'plots',
  'power',
  'power_transform',
  'powerprop',
  'psi',
  'psi_derivative',
  'psi_inverse',
  'reparam',
  'reparameterise',
  'scale_by_power_jacobian',
  'sparse',
  'sparsify',
  'target_propagation',
  'topk_mask',
  'training',
  'transforms',
  'types',
  'weight_mask',
)


def __getattr__(name: str) -> Any:
  """Imports the modules that need further packages when they are first used."""
  if name == 'reparameterise':
    return importlib.import_module('powerprop_jax.reparam').reparameterise
  if name in __all__:
    return importlib.import_module(f'powerprop_jax.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})

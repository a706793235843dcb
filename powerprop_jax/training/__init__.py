"""The train step of a masked, reparameterised network, and its loop."""

import importlib
from typing import TYPE_CHECKING, Any

from powerprop_jax.training.step import LossFn
from powerprop_jax.training.step import MaskStep
from powerprop_jax.training.step import Metrics
from powerprop_jax.training.step import Penalty
from powerprop_jax.training.step import TrainState
from powerprop_jax.training.step import TrainStep
from powerprop_jax.training.step import batch_indices
from powerprop_jax.training.step import init_state
from powerprop_jax.training.step import make_mask_updates
from powerprop_jax.training.step import make_run_steps
from powerprop_jax.training.step import make_train_step
from powerprop_jax.training.step import masked_theta

if TYPE_CHECKING:
  from powerprop_jax.training import checkpoint
  from powerprop_jax.training import classification
  from powerprop_jax.training import devices
  from powerprop_jax.training import feeds
  from powerprop_jax.training import loop

__all__ = (
  'LossFn',
  'MaskStep',
  'Metrics',
  'Penalty',
  'TrainState',
  'TrainStep',
  'batch_indices',
  'checkpoint',
  'classification',
  'devices',
  'feeds',
  'init_state',
  'loop',
  'make_mask_updates',
  'make_run_steps',
  'make_train_step',
  'masked_theta',
)


def __getattr__(name: str) -> Any:
  """Imports a module of this package when it is first used."""
  if name in __all__:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

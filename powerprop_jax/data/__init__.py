"""Data sets, in memory and in streams, and the preparation of images."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from powerprop_jax.data import augment
  from powerprop_jax.data import in_memory
  from powerprop_jax.data import prepared
  from powerprop_jax.data import streams

__all__ = (
  'augment',
  'in_memory',
  'prepared',
  'streams',
)


def __getattr__(name: str) -> Any:
  """Imports a module of this package when it is first used."""
  if name in __all__:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

"""The networks of the experiments, in Haiku, and their fast convolutions."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from powerprop_jax.models import convolutions
  from powerprop_jax.models import networks

__all__ = ('convolutions', 'networks')


def __getattr__(name: str) -> Any:
  """Imports a module of this package when it is first used."""
  if name in __all__:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

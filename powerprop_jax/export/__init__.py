"""Export of pruned networks: files, dictionaries and sparse matrices."""

from powerprop_jax.export.model import Model
from powerprop_jax.export.model import from_dict
from powerprop_jax.export.model import load_compressed
from powerprop_jax.export.model import load_task
from powerprop_jax.export.model import save_compressed
from powerprop_jax.export.model import save_tasks
from powerprop_jax.export.model import to_dict
from powerprop_jax.export.model import to_sparse

__all__ = (
  'Model',
  'from_dict',
  'load_compressed',
  'load_task',
  'save_compressed',
  'save_tasks',
  'to_dict',
  'to_sparse',
)

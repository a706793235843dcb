"""Continual learning: many tasks in one network, none forgotten (section 4)."""

from powerprop_jax.continual.layouts import Layout
from powerprop_jax.continual.layouts import make_layout
from powerprop_jax.continual.memory import Memory
from powerprop_jax.continual.memory import Task
from powerprop_jax.continual.memory import Train
from powerprop_jax.continual.memory import begin_task
from powerprop_jax.continual.memory import claim
from powerprop_jax.continual.memory import free_count
from powerprop_jax.continual.memory import init_memory
from powerprop_jax.continual.memory import learn_task
from powerprop_jax.continual.memory import num_bytes
from powerprop_jax.continual.memory import recall
from powerprop_jax.continual.memory import retraining_masks
from powerprop_jax.continual.memory import store
from powerprop_jax.continual.memory import training_masks
from powerprop_jax.continual.packnet import packnet_counts
from powerprop_jax.continual.packnet import packnet_mask

__all__ = (
  'Layout',
  'Memory',
  'Task',
  'Train',
  'begin_task',
  'claim',
  'free_count',
  'init_memory',
  'learn_task',
  'make_layout',
  'num_bytes',
  'packnet_counts',
  'packnet_mask',
  'recall',
  'retraining_masks',
  'store',
  'training_masks',
)

"""Continual learning of many tasks in one network (section 4 of the paper)."""

from powerprop_jax.continual import benchmarks
from powerprop_jax.continual import ewc
from powerprop_jax.continual import layouts
from powerprop_jax.continual import report
from powerprop_jax.continual import search
from powerprop_jax.continual import task_inference
from powerprop_jax.continual.efficient_packnet import Choice
from powerprop_jax.continual.efficient_packnet import efficient_packnet
from powerprop_jax.continual.layouts import Layout
from powerprop_jax.continual.layouts import make_layout
from powerprop_jax.continual.memory import Choose
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
from powerprop_jax.continual.packnet import packnet
from powerprop_jax.continual.packnet import packnet_counts
from powerprop_jax.continual.packnet import packnet_mask

__all__ = (
  'Choice',
  'Choose',
  'Layout',
  'Memory',
  'Task',
  'Train',
  'begin_task',
  'benchmarks',
  'claim',
  'efficient_packnet',
  'ewc',
  'free_count',
  'init_memory',
  'layouts',
  'learn_task',
  'make_layout',
  'num_bytes',
  'packnet',
  'packnet_counts',
  'packnet_mask',
  'recall',
  'report',
  'retraining_masks',
  'search',
  'store',
  'task_inference',
  'training_masks',
)

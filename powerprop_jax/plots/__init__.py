"""Figures of the dictionaries that `analysis` and the reports return."""

from powerprop_jax.plots.continual import accuracy_by_task
from powerprop_jax.plots.continual import accuracy_matrix
from powerprop_jax.plots.continual import capacity
from powerprop_jax.plots.continual import overlap_matrix
from powerprop_jax.plots.pruning import accuracy_against_kept
from powerprop_jax.plots.pruning import accuracy_against_sparsity
from powerprop_jax.plots.pruning import accuracy_against_steps
from powerprop_jax.plots.pruning import mask_overlap
from powerprop_jax.plots.pruning import one_weight
from powerprop_jax.plots.pruning import save
from powerprop_jax.plots.pruning import sign_changes
from powerprop_jax.plots.pruning import weight_scatter

__all__ = (
  'accuracy_against_kept',
  'accuracy_against_sparsity',
  'accuracy_against_steps',
  'accuracy_by_task',
  'accuracy_matrix',
  'capacity',
  'mask_overlap',
  'one_weight',
  'overlap_matrix',
  'save',
  'sign_changes',
  'weight_scatter',
)

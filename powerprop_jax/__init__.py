"""Powerpropagation in JAX: weights that prune themselves while they learn."""

from powerprop_jax.leaves import is_weight as is_weight
from powerprop_jax.leaves import weights as weights
from powerprop_jax.masks import Masks as Masks
from powerprop_jax.masks import apply_mask as apply_mask
from powerprop_jax.masks import topk_mask as topk_mask
from powerprop_jax.power import PowerTransform as PowerTransform
from powerprop_jax.power import change_alpha as change_alpha
from powerprop_jax.power import describe as describe
from powerprop_jax.power import power_transform as power_transform
from powerprop_jax.power import psi as psi
from powerprop_jax.power import psi_derivative as psi_derivative
from powerprop_jax.power import psi_inverse as psi_inverse
from powerprop_jax.propagation import powerprop as powerprop
from powerprop_jax.propagation import (
  scale_by_power_jacobian as scale_by_power_jacobian,
)
from powerprop_jax.propagation import target_propagation as target_propagation
from powerprop_jax.reparam import reparameterise as reparameterise
from powerprop_jax.training import TrainState as TrainState
from powerprop_jax.training import init_state as init_state
from powerprop_jax.training import make_train_step as make_train_step

__version__ = '0.1.0'

"""Presets of `mnist_pruning`."""

import numpy as np

# The 20 fractions of the paper's published notebook.
KEPT = [f'{p:.6g}' for p in np.geomspace(0.01, 1.0, 20)]
# Trained to be pruned; LOG.md says how these were chosen. Layers that keep few
# weights at a density get more decay. L1 at alpha = 1 is the same penalty on
# theta as L2 on phi at alpha = 2.
_TUNED = {
  'dataset': 'mnist',
  'seeds': 5,
  'steps': 100_000,
  'batch_size': 60,
  'optimizer': 'sgd',
  'momentum': 0.9,
  'schedule': 'cosine',
  'phi_decay_schedule': 'cosine',
  'scope': ['layer', 'global'],
  'kept': ['0.005', '0.007', *KEPT],
}
_ALPHA_2 = {'alphas': ['2'], 'learning_rate': 0.2, 'phi_decay_norm': 'l2'}
_ALPHA_1 = {'alphas': ['1'], 'phi_decay_norm': 'l1'}
PRESETS = {
  # The settings of the paper's published notebook.
  'paper': {
    'dataset': 'mnist',
    'alphas': ['1', '2', '3', '4', '5'],
    'seeds': 5,
    'steps': 50_000,
    'batch_size': 60,
    'optimizer': 'sgd',
    'learning_rate': 0.1,
    'schedule': 'constant',
  },
  'best': {
    **_TUNED,
    **_ALPHA_2,
    'max_shift': 1,
    'phi_decay': 4.5e-4,
    'phi_decay_warmup_steps': 30_000,
    'phi_decay_scale': ['logits=8', 'linear_1=3'],
  },
  'baseline': {
    **_TUNED,
    **_ALPHA_1,
    'max_shift': 1,
    'steps': 50_000,
    'learning_rate': 0.03,
    'phi_decay': 7e-5,
    'phi_decay_scale': ['logits=6', 'linear_1=2.5'],
  },
  # On the images as they are.
  'best-unshifted': {
    **_TUNED,
    **_ALPHA_2,
    'phi_decay': 3.5e-4,
    'phi_decay_scale': ['logits=5', 'linear_1=2.2'],
  },
  'baseline-unshifted': {
    **_TUNED,
    **_ALPHA_1,
    'learning_rate': 0.03,
    'phi_decay': 3.75e-5,
    'phi_decay_scale': ['logits=6', 'linear_1=2.5'],
  },
  # For less than one per cent: a stronger decay, which rises from zero.
  'sparsest': {
    **_TUNED,
    **_ALPHA_2,
    'phi_decay': 6e-4,
    'phi_decay_warmup_steps': 30_000,
    'phi_decay_scale': ['logits=7', 'linear_1=2.8'],
  },
}

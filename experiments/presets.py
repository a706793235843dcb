"""Settings to start from: flags of the binaries, by the name of a preset."""

import numpy as np

# The 20 fractions of the paper's published notebook.
KEPT = [f'{p:.6g}' for p in np.geomspace(0.01, 1.0, 20)]
# What `best` and `baseline` share; LOG.md says how they were chosen. Layers
# that keep few weights at a density get more decay.
_TUNED = {
  'dataset': 'mnist',
  'seeds': 5,
  'steps': 100_000,
  'batch_size': 60,
  'optimizer': 'sgd',
  'schedule': 'cosine',
  'phi_decay_schedule': 'cosine',
  'scope': ['layer', 'global'],
  'kept': ['0.005', '0.007', *KEPT],
}
MNIST_PRUNING = {
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
    'alphas': ['2'],
    'learning_rate': 0.2,
    'momentum': 0.9,
    'phi_decay': 3.5e-4,
    'phi_decay_norm': 'l2',
    'phi_decay_scale': ['logits=5', 'linear_1=2.2'],
  },
  # alpha = 1, with an L1 decay: what L2 on phi is to theta at alpha = 2.
  'baseline': {
    **_TUNED,
    'alphas': ['1'],
    'learning_rate': 0.03,
    'momentum': 0.9,
    'phi_decay': 3.75e-5,
    'phi_decay_norm': 'l1',
    'phi_decay_scale': ['logits=6', 'linear_1=2.5'],
  },
}
SPARSE_SWEEP = {
  'mnist': {
    'dataset': 'mnist',
    'alphas': ['1', '1.5'],
    'learning_rates': ['0.1', '0.1'],
    'phi_decay': 5e-5,
    'distributions': ['uniform', 'erk'],
    'seeds': 3,
    'steps': 10_000,
    'batch_size': 60,
    'optimizer': 'sgd',
    'momentum': 0.9,
    'schedule': 'cosine',
  },
}

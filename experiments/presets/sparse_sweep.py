"""Presets of `sparse_sweep`."""

# The recipes were chosen on validation data; LOG.md has the trials.
_SWEEP = {
  'dataset': 'mnist',
  'seeds': 3,
  'steps': 10_000,
  'batch_size': 60,
  'optimizer': 'sgd',
  'momentum': 0.9,
  'schedule': 'cosine',
  'phi_decay_schedule': 'cosine',
  'distributions': ['erk'],
}
PRESETS = {
  'mnist': {
    **_SWEEP,
    'alphas': ['1', '1.5'],
    'learning_rates': ['0.2', '0.2'],
    'phi_decays': ['2e-4', '2e-4'],
    'clip_norms': ['1', '1'],
  },
  # Without clipping as well, which Top-KAST needs and others pay for.
  'mnist-unclipped': {
    **_SWEEP,
    'methods': ['static', 'snip', 'set', 'rigl', 'magnitude'],
    'alphas': ['1', '1', '1.5', '1.5'],
    'learning_rates': ['0.2', '0.1', '0.2', '0.2'],
    'phi_decays': ['2e-4', '7e-5', '2e-4', '2e-4'],
    'clip_norms': ['1', '0', '1', '0'],
    'sparsities': ['0.98', '0.99'],
  },
  # Recipes of earlier trials, on the other network.
  'lenet-5': {
    **_SWEEP,
    'network': 'lenet_5',
    'alphas': ['1', '1.5'],
    'learning_rates': ['0.1', '0.3'],
    'phi_decays': ['5e-5', '2e-4'],
    'clip_norms': ['1', '1'],
    'sparsities': ['0.9', '0.98'],
    'seeds': 1,
    'steps': 600,
    'update_every': 50,
  },
}

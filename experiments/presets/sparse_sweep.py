r"""Presets of `sparse_sweep`: all methods of sparse training on one network.

LeNet-300-100 on full MNIST, 10,000 steps of 60 images, layers by Erdos-Renyi
(ERK), three seeds. The recipe of each power was chosen on validation data of
one seed after twelve trials each, of rate, decay and clipping (LOG.md). Figures
are test accuracies in percent at 99 % of the weights removed, the mean and
standard deviation over seeds, on two cores of an AMD EPYC with jax 0.10.2; all
sparsities are in experiments/results/sparse_sweep-*.json. DIR is the folder of
the TFDS sets.

`mnist` clips the gradient to norm 1, which Top-KAST needs. About 40 minutes on
one core:

  python -m experiments.sparse_sweep --preset=mnist --data_dir=DIR \
    --out_dir=results/sparse

`mnist-unclipped` lets validation data choose between that recipe and the best
one without clipping, for the methods that can do without.

                                  mnist                  mnist-unclipped
                      alpha = 1    alpha = 1.5     alpha = 1    alpha = 1.5
  magnitude        97.59 ± 0.06   97.83 ± 0.13  97.66 ± 0.03   97.77 ± 0.20
  top_kast         97.41 ± 0.19   96.86 ± 0.29
  acdc             96.90 ± 0.10   97.44 ± 0.21
  rigl             96.17 ± 0.44   95.78 ± 0.29  96.06 ± 0.11   95.67 ± 0.14
  snip             94.58 ± 0.15   94.31 ± 0.29  94.58 ± 0.15   94.31 ± 0.29
  set              95.44 ± 0.27   93.57 ± 0.47  95.44 ± 0.27   93.49 ± 0.30
  static           88.49 ± 1.13   79.86 ± 6.19  88.49 ± 1.13   79.75 ± 5.94
  dense            98.36 ± 0.03   98.48 ± 0.04

`lenet-5` trains the other network for 600 steps, by the recipes that
`benchmarks.sparse` chose for gradual pruning after six trials for each power;
those that it chose for the other methods are in docs/results.md. For gradual
pruning it gives, with alpha = 1 / 1.5, 98.04 / 98.09 at 98 % removed and 97.39
/ 97.67 at 99 %. It takes 20 to 25 minutes on one core.
"""

from typing import Any

_SWEEP = {
  'dataset': 'mnist',
  'seeds': 3,
  'steps': 10_000,
  'batch_size': 60,
  'optimizer': 'sgd',
  'momentum': 0.9,
  'schedule': 'cosine',
  'phi_decay_schedule': 'cosine',
  'distributions': ('erk',),
}
PRESETS: dict[str, dict[str, Any]] = {
  'mnist': {
    **_SWEEP,
    'alphas': (1.0, 1.5),
    'learning_rates': (0.2, 0.2),
    'phi_decays': (2e-4, 2e-4),
    'clip_norms': (1.0, 1.0),
  },
  'mnist-unclipped': {
    **_SWEEP,
    'methods': ('static', 'snip', 'set', 'rigl', 'magnitude'),
    'alphas': (1.0, 1.0, 1.5, 1.5),
    'learning_rates': (0.2, 0.1, 0.2, 0.2),
    'phi_decays': (2e-4, 7e-5, 2e-4, 2e-4),
    'clip_norms': (1.0, 0.0, 1.0, 0.0),
    'sparsities': (0.98, 0.99),
  },
  'lenet-5': {
    **_SWEEP,
    'network': 'lenet_5',
    'methods': ('rigl', 'top_kast', 'magnitude'),
    'alphas': (1.0, 1.5),
    'learning_rates': (0.2, 0.4),
    'phi_decays': (3.33e-4, 2.22e-4),
    'clip_norms': (1.0, 1.0),
    'sparsities': (0.98, 0.99),
    'steps': 600,
    'update_every': 50,
  },
}

r"""Presets of `sparse_training`.

`imagenet` has the usual schedule for ResNet-50 on ImageNet (Evci et al., 2020;
Kusupati et al., 2020): 100 epochs in batches of 4096, five of them for the
warm-up. The power, the decay of phi and the clipping were chosen by analogy
with trials on MNIST (LOG.md), which also had momentum 0.9. In the first of
these trials, with ERK layers and without a floor, all ended well that clipped
the gradient to norm 1 and let the decay follow a cosine, at powers of 1, 1.5
and 2; without clipping many ended in NaN. Their best decays had 1 to 1.5
nats, as this one has; later trials at 99 % found 5 to 10, but for Top-KAST.
A power of 1.375 is computed by products and roots, which are cheap. No ImageNet
run was made here, so that no accuracy and no duration are given;
docs/imagenet.md has all commands:

  python -m experiments.sparse_training --preset=imagenet --method=rigl \
    --data_dir=DIR --out_dir=results/imagenet

A preset sets the flags that it names, and flags that are given on the command
line take precedence over it. Without a preset,
`python -m experiments.sparse_training --method=rigl` trains a network on
mnist_5k in a minute.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
  'imagenet': {
    'dataset': 'imagenet2012',
    'network': 'resnet50',
    'alpha': 1.375,
    'batch_size': 4096,
    'steps': 31_250,
    'optimizer': 'sgd',
    'learning_rate': 1.6,
    'momentum': 0.9,
    'nesterov': True,
    'schedule': 'steps',
    'warmup_steps': 1_563,
    'label_smoothing': 0.1,
    'clip_norm': 1.0,
    'phi_decay': 6.4e-5,
    'phi_decay_schedule': 'cosine',
    'bfloat16': True,
    'distribution': 'erk',
    'checkpoint_every': 1_000,
    'evaluate_every': 1_000,
    'norms': True,
  },
}

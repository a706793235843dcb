r"""Presets of `sparse_training`.

`imagenet` has the settings of the field for ResNet-50 on ImageNet (Evci et al.,
2020; Kusupati et al., 2020): 100 epochs of batches of 4096, five of them to
warm up. No ImageNet run was made here, so there are no figures and no minutes:

  python -m experiments.sparse_training --preset=imagenet --method=rigl \
    --data_dir=DIR --out_dir=results/imagenet

A preset sets what it names, and flags that are given come before it. Without a
preset, `python -m experiments.sparse_training --method=rigl` trains a network
on mnist_5k in a minute.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
  'imagenet': {
    'dataset': 'imagenet2012',
    'network': 'resnet50',
    'batch_size': 4096,
    'steps': 31_250,
    'optimizer': 'sgd',
    'learning_rate': 1.6,
    'momentum': 0.9,
    'nesterov': True,
    'schedule': 'steps',
    'warmup_steps': 1_563,
    'label_smoothing': 0.1,
    'weight_decay': 1e-4,
    'bfloat16': True,
    'distribution': 'erk',
    'checkpoint_every': 1_000,
  },
}

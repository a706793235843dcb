"""Setup of powerprop_jax: a light core, and extras for the other rooms."""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).parent
_VERSION = re.search(
  r"^__version__ = '(.+)'$",
  (_HERE / 'powerprop_jax' / '__init__.py').read_text(),
  re.MULTILINE,
).group(1)

# The floors are the oldest versions that pass the tests, which `.ci/floors`
# shows. Below 0.10.2, jax gives wrong accuracies in continual learning, or it
# hangs.
_CORE = [
  'chex>=0.1.90',
  'dm-haiku>=0.0.17',
  'jax>=0.10.2',
  'jaxlib>=0.10.2',
  'jmp>=0.0.4',
  'numpy>=2.0',
  'optax>=0.2.6',
  'tabulate>=0.10',
]
_DATA = [
  'absl-py>=2.1',
  'etils[epath]>=1.14',
  'grain>=0.2.16',
  # tensorflow-datasets imports it, and does not declare it.
  'importlib_resources>=6.0',
  'mlxtend>=0.23',
  # TFDS decodes images with it.
  'pillow>=10.4',
  'tensorflow-datasets>=4.9.10',
  'tqdm>=4.66',
]
_PLOTS = [
  'matplotlib>=3.10.7',
  'scipy>=1.14',
]
_TENSORBOARD = [
  'tensorboardX>=2.6.4',
]
_EXPERIMENTS = [
  *_DATA,
  *_PLOTS,
  *_TENSORBOARD,
  # Before 0.11.20, Orbax leaves what a killed run had begun to write; before
  # 0.11.33 it loses what is written when a script ends without `close`.
  'orbax-checkpoint>=0.11.33',
  'safetensors>=0.5',
]
_DEV = [
  *_EXPERIMENTS,
  'equinox>=0.13.1',
  'flax>=0.12.7',
  'ipykernel>=6.29',
  'myst-parser>=4.0',
  'nbclient>=0.10',
  'nbformat>=5.10',
  'pre-commit>=4.0',
  'pyright==1.1.414',
  'pytest>=8.3',
  'pytest-xdist>=3.6.1',
  'ruff==0.17.6',
  'sphinx>=8.1',
]

setuptools.setup(
  name='powerprop_jax',
  version=_VERSION,
  description='Powerpropagation: sparsity inducing training, in JAX.',
  long_description=(_HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=setuptools.find_packages(
    include=['powerprop_jax', 'powerprop_jax.*']
  ),
  package_data={'powerprop_jax': ['py.typed', 'plots/*.mplstyle']},
  python_requires='>=3.11',
  install_requires=_CORE,
  extras_require={
    'data': _DATA,
    'plots': _PLOTS,
    'tensorboard': _TENSORBOARD,
    'experiments': _EXPERIMENTS,
    'dev': _DEV,
    # One of these, in the command that installs everything else: then jax and
    # its plugin have one version, with the pins as without them.
    **{name: [f'jax[{name}]>=0.10.2'] for name in ('cuda12', 'cuda13', 'tpu')},
    # Only to prepare a TFDS data set; reading one needs no TensorFlow.
    'prepare': [*_DATA, 'tensorflow-cpu>=2.18'],
  },
)

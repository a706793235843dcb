"""Setup of powerprop_jax."""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).parent
_VERSION = re.search(
  r"^__version__ = '(.+)'$",
  (_HERE / 'powerprop_jax' / '__init__.py').read_text(),
  re.MULTILINE,
).group(1)

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
  install_requires=[
    'absl-py>=2.1',
    'chex>=0.1.90',
    'dm-haiku>=0.0.16',
    'grain>=0.2.12',
    # tensorflow-datasets imports it, and does not declare it.
    'importlib_resources>=6.0',
    'jax>=0.8',
    'jaxlib>=0.8',
    'matplotlib>=3.9',
    'mlxtend>=0.23',
    'numpy>=2.0',
    'optax>=0.2.6',
    'orbax-checkpoint>=0.11',
    # TFDS decodes images with it.
    'pillow>=10.0',
    'safetensors>=0.5',
    'tensorflow-datasets>=4.9.9',
    'tqdm>=4.66',
  ],
  extras_require={
    'dev': [
      'equinox>=0.13',
      'flax>=0.12',
      'ipykernel>=6.29',
      'myst-parser>=4.0',
      'nbclient>=0.10',
      'nbformat>=5.10',
      'pre-commit>=4.0',
      'pyright==1.1.414',
      'pytest>=8.3',
      'pytest-xdist>=3.6',
      'ruff==0.17.6',
      'sphinx>=8.1',
    ],
    # Only to prepare a TFDS data set; reading one needs no TensorFlow.
    'prepare': ['tensorflow-cpu>=2.18'],
  },
)

"""Fixtures of all tests."""

import os
import pathlib

# Before JAX is imported, and for the programs that tests start: most of the
# time of the tests is that of the compiler.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

import pytest


@pytest.fixture(scope='session')
def tfds_dir() -> pathlib.Path:
  """The folder of prepared TFDS data sets beside the repository."""
  path = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'tfds'
  if not path.is_dir():
    pytest.skip('no prepared TFDS data sets in ../shared/tfds')
  return path

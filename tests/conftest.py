"""Fixtures of all tests, and flags that let their programs compile fast."""

import os
import pathlib
import subprocess
import sys

import pytest


def _are_known(flags: list[str]) -> bool:
  """Whether the installed XLA has all flags; it aborts on unknown ones."""
  asked = subprocess.run(
    [sys.executable, '-c', 'import jax; jax.devices()'],
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join(flags)},
    capture_output=True,
  )
  return asked.returncode == 0


def _compile_fast() -> None:
  """Sets flags before JAX is imported, also for programs that tests start.

  Most of the time of the tests is that of the compiler: for programs as small
  as theirs it takes less than half as long without optimisations, with the
  older of its two emitters of fused loops, and with each program in one piece
  instead of one for each of many threads. Tests that give XLA flags of their
  own add them to these. The golden tests use none of these flags, and compile
  as users do.
  """
  os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  given = os.environ.setdefault('XLA_FLAGS', '')
  values = {
    'xla_cpu_use_fusion_emitters': 'false',
    'xla_cpu_parallel_codegen_split_count': '1',
  }
  # Workers of pytest inherit the flags, and do not ask again.
  flags = [f'--{name}={x}' for name, x in values.items() if name not in given]
  if flags and not _are_known(flags):
    flags = [flag for flag in flags if _are_known([flag])]
  os.environ['XLA_FLAGS'] = ' '.join([given, *flags]).strip()


_compile_fast()


@pytest.fixture(scope='session')
def tfds_dir() -> pathlib.Path:
  """The folder of prepared TFDS data sets beside the repository."""
  path = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'tfds'
  if not path.is_dir():
    pytest.skip('no prepared TFDS data sets in ../shared/tfds')
  return path

"""Tests that the examples run as they are, with few steps."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

_FOLDER = pathlib.Path(__file__).parent.parent / 'examples'


def _run(name, **arguments):
  path = _FOLDER / f'{name}.py'
  spec = importlib.util.spec_from_file_location(f'example_{name}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.main(**arguments)


def test_every_example_is_short_and_run_here():
  names = {path.stem for path in _FOLDER.glob('*.py')}
  assert names == {'equinox_transformer', 'sharded', *_LEARN}
  for path in _FOLDER.glob('*.py'):
    assert len(path.read_text().splitlines()) < 100


# The steps, the density, and the accuracy to be reached, far above chance.
_LEARN = {
  'flax_nnx': ({'steps': 40, 'density': 0.3}, 0.4),
  'finetune_pretrained': ({'steps': 100, 'density': 0.3}, 0.7),
  'haiku_rigl': ({'steps': 48}, 0.25),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', _LEARN)
def test_examples_learn_digits_and_print_how_well(name, capsys):
  arguments, least = _LEARN[name]
  results = _run(name, **arguments)
  out = capsys.readouterr().out
  assert len(results) == 2  # One with a power, and one without.
  for accuracies in results.values():
    if name != 'finetune_pretrained':
      accuracies = [accuracies]
    assert accuracies[0] > least
    for accuracy in accuracies:
      assert f'{accuracy:.1%}' in out
  if name == 'finetune_pretrained':
    # The decay of phi makes this difference.
    assert results['powerprop'][1] > 0.5


@pytest.mark.slow
def test_the_transformer_learns_to_read_on_one_device_and_on_eight(capsys):
  plain = _run('equinox_transformer', steps=8, density=0.5)
  out = capsys.readouterr().out
  assert list(plain) == [1.0, 2.0]
  for bits in plain.values():
    assert 2.0 < bits < 6.5  # 7 bits hold any character.
    assert f'{bits} bits' in out

  # The devices do the same at alpha = 1, without the power.
  script = (
    'from examples import equinox_transformer, sharded;'
    'del equinox_transformer.RATES[1.0]; print(sharded.main(8, 0.5))'
  )
  flags = os.environ['XLA_FLAGS']
  flags += ' --xla_force_host_platform_device_count=8'
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', script],
    cwd=_FOLDER.parent,
    env=os.environ
    | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'NPROC': '64'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  *_, last = done.stdout.splitlines()
  expected = {2.0: pytest.approx(plain[2.0], abs=0.02)}
  assert ast.literal_eval(last) == expected
  assert done.stdout.count("is on P('data', 'model')") == 1

"""The examples run as they are, with few steps."""

import importlib.util
import pathlib

import jax
import pytest

_FOLDER = pathlib.Path(__file__).parent.parent / 'examples'


@pytest.fixture(autouse=True)
def _compile_quickly():
  """Compiling is most of these runs; unoptimised it takes half the time."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def _run(name, **arguments):
  path = _FOLDER / f'{name}.py'
  assert len(path.read_text().splitlines()) < 80
  spec = importlib.util.spec_from_file_location(f'example_{name}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.main(**arguments)


def test_every_example_is_run_here():
  names = {path.stem for path in _FOLDER.glob('*.py')}
  assert names == {'equinox_transformer', *_LEARN}


# Steps, the density, and the accuracy to be reached, far above chance.
_LEARN = {
  'flax_nnx': ({'steps': 40, 'density': 0.3}, 0.7),
  'finetune_pretrained': ({'steps': 100, 'density': 0.3}, 0.7),
  'haiku_rigl': ({'steps': 48}, 0.25),
}


@pytest.mark.parametrize('name', _LEARN)
def test_examples_learn_digits_and_print_how_well(name, capsys):
  arguments, least = _LEARN[name]
  results = _run(name, **arguments)
  out = capsys.readouterr().out
  if name == 'haiku_rigl':
    results = {'90% sparse': [results]}
  for accuracies in results.values():
    assert accuracies[0] > least
    for accuracy in accuracies:
      assert f'{accuracy:.1%}' in out
  if name == 'finetune_pretrained':
    # What the decay of phi is for.
    assert results['powerprop'][1] > 0.5


def test_the_transformer_learns_to_read(capsys):
  results = _run('equinox_transformer', steps=8)
  out = capsys.readouterr().out
  assert list(results) == ['1', '1.5 and 2']
  for dense, pruned in results.values():
    assert 2.0 < dense < 6.5  # 7 bits hold any character.
    assert pruned > dense
    assert f'[{dense}, {pruned}]' in out

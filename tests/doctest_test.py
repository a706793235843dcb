"""Tests that the examples in docstrings of the package give what they say."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import powerprop_jax

_MODULES = sorted(
  module.name
  for module in pkgutil.walk_packages(
    powerprop_jax.__path__, f'{powerprop_jax.__name__}.'
  )
)


@pytest.mark.parametrize('name', _MODULES)
def test_examples(name):
  module = importlib.import_module(name)
  flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
  failed, _ = doctest.testmod(module, optionflags=flags)
  assert not failed


# Functions make these, and not their users; the examples of the functions show
# them.
_RESULTS = {
  'continual.efficient_packnet.Choice',
  'continual.ewc.Anchor',
  'continual.layouts.Layout',
  'continual.memory.Memory',
  'continual.memory.Task',
  'continual.search.Found',
  'continual.search.Ranking',
  'export.format.Found',
  'export.format.Leaf',
  'export.format.Section',
  'export.format.Sizes',
  'export.model.Model',
  'power.Description',
  'power.PowerTransform',
  'sparse.sparsify.Sparse',
  'sparse.sparsify.SparseState',
  'training.checkpoint.Checkpoint',
  'training.checkpoint.Manager',
  'training.step.TrainState',
  'transforms.DecayPhiState',
  'transforms.PowerpropState',
}
_NOTHING_TO_SHOW = {
  'sparse.schedules.Cadence',  # Functions beside it show this protocol.
  'training.loop.Diverged',  # An exception without fields.
  'training.loop.Interrupted',  # Likewise.
}


def _public(name):
  """The public functions and classes that a module defines."""
  module = importlib.import_module(name)
  short = name.removeprefix(f'{powerprop_jax.__name__}.')
  for attribute, value in vars(module).items():
    here = getattr(value, '__module__', None) == name
    if here and not attribute.startswith('_') and callable(value):
      yield f'{short}.{attribute}', value


def test_every_public_function_has_an_example():
  """Every class that users of the package construct has one, too."""
  found = dict(item for name in _MODULES for item in _public(name))
  assert 'power.psi' in found and 'sparse.masks.Masks' in found
  without = {
    name
    for name, value in found.items()
    if '>>> ' not in (inspect.getdoc(value) or '')
  }
  assert without == _RESULTS | _NOTHING_TO_SHOW

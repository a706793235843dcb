"""The examples in the docstrings of the package give what they say."""

import doctest
import importlib
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

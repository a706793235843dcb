"""Tests of what may import what."""

import ast
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_PACKAGE = _ROOT / 'powerprop_jax'
# A module may import those of lower layers only.
_LAYERS = (
  {'leaves', 'masks', 'schedules', 'networks', 'prepared', 'augment'}
  | {'figure_style', 'export_codes', 'task_inference', 'continual_report'},
  {'checkpoint', 'devices', 'plotting', 'layouts', 'export_file', 'search'}
  | {'continual_plotting'},
  {'power', 'datasets', 'streams'},
  {'reparam', 'propagation', 'distributions', 'updaters', 'flops', 'pruning'}
  | {'tasks', 'continual', 'export'},
  {'analysis', 'top_kast'},
  {'training'},
  {'classification', 'ewc'},
  {'__init__'},
)


def _imports(path):
  """The names of all modules that a file imports, also inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_every_module_has_a_layer():
  layers = sorted(name for layer in _LAYERS for name in layer)
  assert layers == sorted(path.stem for path in _PACKAGE.glob('*.py'))


@pytest.mark.parametrize(
  'layer', range(len(_LAYERS)), ids=[min(layer) for layer in _LAYERS]
)
def test_modules_import_lower_layers_only(layer):
  lower = set().union(*_LAYERS[:layer])
  for name in _LAYERS[layer]:
    for imported in _imports(_PACKAGE / f'{name}.py'):
      assert not imported.startswith('experiments'), f'{name}: {imported}'
      if imported.startswith('powerprop_jax.'):
        assert imported.split('.')[1] in lower, f'{name}: {imported}'


def test_absl_flags_belong_to_the_binaries():
  users = {
    path.stem
    for path in _PACKAGE.glob('*.py')
    if 'absl.flags' in set(_imports(path))
  }
  # Grain itself asks for parsed flags where it starts workers.
  assert users == {'streams'}


def test_haiku_belongs_to_two_modules():
  users = {
    path.stem
    for path in _PACKAGE.glob('*.py')
    if any(name.split('.')[0] == 'haiku' for name in _imports(path))
  }
  assert users == {'reparam', 'networks'}


def test_import_is_light():
  heavy = (
    'tensorflow',
    'tensorflow_datasets',
    'matplotlib',
    'grain',
    'orbax',
    'mlxtend',
    'PIL',
  )
  code = (
    f'import sys, powerprop_jax;print([m for m in {heavy} if m in sys.modules])'
  )
  out = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert out.stdout.strip() == '[]'

"""Tests of which room (subpackage) may import which: one line for each."""

import ast
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_PACKAGE = _ROOT / 'powerprop_jax'
_CORE = {'types', 'leaves', 'power'}
# The rooms of the package that each room may import, beside itself.
_MAY_IMPORT = {
  'types': set(),
  'extras': set(),
  'paths': set(),
  'leaves': {'types'},
  'power': {'types', 'leaves'},
  'transforms': _CORE,
  'reparam': _CORE,
  'sparse': {*_CORE, 'transforms'},
  'data': {'types'},
  'models': {'types'},
  'plots': {'types'},
  'training': {*_CORE, 'transforms', 'sparse', 'data'},
  'continual': {*_CORE, 'transforms', 'sparse', 'data', 'training'},
  'export': {*_CORE, 'sparse'},
  'analysis': {*_CORE, 'sparse'},
}


def _room(path):
  """The room of a file: its folder, or its own name at the top."""
  return path.relative_to(_PACKAGE).parts[0].removesuffix('.py')


def _imports(path):
  """The names of all modules that a file imports, also inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


_FILES = [p for p in sorted(_PACKAGE.rglob('*.py')) if _room(p) != '__init__']


def test_every_room_has_a_rule():
  assert {_room(path) for path in _FILES} == set(_MAY_IMPORT)


@pytest.mark.parametrize('room', _MAY_IMPORT)
def test_rooms_import_what_they_may(room):
  allowed = {room, 'extras', 'paths', *_MAY_IMPORT[room]}
  for path in _FILES:
    for imported in _imports(path) if _room(path) == room else ():
      assert not imported.startswith('experiments'), f'{path}: {imported}'
      if imported.startswith('powerprop_jax.'):
        assert imported.split('.')[1] in allowed, f'{path}: {imported}'


@pytest.mark.parametrize('folder', ['tests', 'examples', 'experiments'])
def test_only_benchmarks_import_the_experiments(folder):
  for path in (_ROOT / folder).rglob('*.py'):
    inside = path.relative_to(_ROOT).parts[:2]
    for imported in _imports(path):
      if imported.startswith('experiments'):
        assert 'experiments' in inside or inside[0] == 'tests', path


@pytest.mark.parametrize(
  ('library', 'rooms'),
  [
    ('haiku', {'reparam', 'models'}),
    ('matplotlib', {'plots'}),
    ('orbax', {'training'}),
    ('grain', {'data'}),
    ('tensorflow_datasets', {'data'}),
  ],
)
def test_libraries_belong_to_their_rooms(library, rooms):
  users = {
    _room(path)
    for path in _FILES
    if any(name.split('.')[0] == library for name in _imports(path))
  }
  assert users == rooms


def test_absl_flags_belong_to_the_binaries():
  users = {p.stem for p in _FILES if 'absl.flags' in set(_imports(p))}
  # Grain itself needs parsed flags when it starts workers.
  assert users == {'streams'}


def test_import_is_light():
  heavy = ('tensorflow', 'tensorflow_datasets', 'matplotlib', 'grain', 'orbax')
  heavy += ('haiku', 'mlxtend', 'PIL', 'scipy.stats', 'tqdm')
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


def test_rooms_are_attributes_of_the_package():
  code = (
    'import powerprop_jax as p;'
    'p.sparse.pruning.prune, p.training.checkpoint.save, p.data.in_memory.load,'
    'p.models.networks.build, p.plots.save, p.continual.learn_task,'
    'p.export.to_dict, p.analysis.summarise, p.reparameterise'
  )
  subprocess.run([sys.executable, '-c', code], cwd=_ROOT, check=True)

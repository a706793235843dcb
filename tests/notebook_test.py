"""Tests of the notebook, also executed with fast settings."""

import ast
import base64
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from powerprop_jax import extras

nbclient = pytest.importorskip('nbclient')
nbformat = pytest.importorskip('nbformat')
pytest.importorskip('ipykernel')

_ROOT = pathlib.Path(__file__).parent.parent
_PATH = _ROOT / 'colab' / 'powerprop_mnist.ipynb'
_FIRST = "import warnings\nwarnings.simplefilter('error')"
_FAST = """
alphas, seeds, steps, kept = [1.0, 3.0], 1, 100, [0.05, 0.3, 1.0]
batch_size, task_steps = 20, 100
"""
# Nothing was forgotten, the file is the network, and the kernel may end.
_LAST = """
assert [len(row) for row in accuracies] == [1, 2, 3]
assert all(row == accuracies[-1][: len(row)] for row in accuracies)
assert min(accuracies[-1]) > 0.3
assert jax.tree.all(
  jax.tree.map(
    lambda a, b: bool((a == b).all()),
    loaded,
    powerprop_jax.apply_mask(theta, mask),
  )
)
warnings.simplefilter('default')
"""
_NUM_FIGURES = 7


def _read():
  return nbformat.read(_PATH, as_version=4)


def _parameters(notebook):
  """The one cell that holds the settings."""
  (cell,) = [
    cell
    for cell in notebook.cells
    if 'parameters' in cell.metadata.get('tags', [])
  ]
  return cell


@pytest.fixture(scope='module')
def execute():
  """The program that stores the notebook with its outputs."""
  path = _ROOT / 'colab' / 'execute.py'
  spec = importlib.util.spec_from_file_location('execute', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_is_stored_with_its_outputs():
  notebook = _read()
  nbformat.validate(notebook)
  assert set(notebook.metadata) == {'kernelspec', 'language_info'}
  assert all(set(cell.metadata) <= {'tags'} for cell in notebook.cells)
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  counts = [cell.execution_count for cell in code]
  assert counts == [*range(1, len(code) + 1)]  # Run once, and in order.
  outputs = [output for cell in code for output in cell.outputs]
  assert {o.get('name', 'stdout') for o in outputs} == {'stdout'}
  assert all(o.output_type != 'error' for o in outputs)
  figures = [
    base64.b64decode(o.data['image/png'])
    for o in outputs
    if 'image/png' in o.get('data', {})
  ]
  assert len(figures) == _NUM_FIGURES
  assert max(map(len, figures)) < 60_000
  assert _PATH.stat().st_size < 500_000


def test_a_figure_is_followed_by_what_it_shows():
  cells = _read().cells
  for cell, after in itertools.pairwise(cells):
    if any('image/png' in o.get('data', {}) for o in cell.get('outputs', ())):
      assert after.cell_type == 'markdown'
      assert not after.source.startswith('#'), cell.source


def test_what_is_said_below_figures_is_what_they_show():
  """It compares the lines and columns of stored tables that the text names."""
  tables = {}
  for cell in _read().cells:
    for output in cell.get('outputs', ()):
      for table in re.findall(
        r'^ *kept.*(?:\n.+)+', output.get('text', ''), re.M
      ):
        heading, *rows = table.splitlines()
        rows = [re.sub(r'± +\S+', '', row).split() for row in rows]
        found = {float(k): [*map(float, row)] for k, *row in rows}
        tables[len(re.findall('alpha', heading))] = found
  plain, adam, decayed = tables[4], tables[3], tables[5]
  # The baseline is the first column.
  assert all(row[0] == max(row) for k, row in plain.items() if k >= 10)
  assert all(row[0] == min(row) for k, row in plain.items() if 1 < k < 5)
  assert all(row[2] > row[1] for k, row in adam.items() if k >= 10)
  assert all(row[1] > row[2] for k, row in adam.items() if k < 5)
  assert all(row[4] > row[2] for k, row in decayed.items() if k > 4)
  assert all(row[2] > row[4] for k, row in decayed.items() if k < 4)
  assert decayed[1][2] - decayed[1][3] > 10
  assert decayed[100][2] - decayed[1][2] < 2


def _first_cell():
  return next(c.source for c in _read().cells if c.cell_type == 'code')


def test_the_floors_of_the_first_cell_are_those_of_setup():
  setup = (_ROOT / 'setup.py').read_text()
  (floors,) = re.findall(r'^floors = (.*)$', _first_cell(), re.M)
  for name, floor in ast.literal_eval(floors).items():
    assert f"'{name}>={floor}'," in setup
  badge = _read().cells[0].source
  if extras.REPOSITORY is not None:  # This is its only place.
    assert f"repository = '{extras.REPOSITORY}'" in _first_cell()
    assert '/'.join(extras.REPOSITORY.split('/')[-2:]) in badge
  assert 'colab-badge.svg' in badge


# The first cell runs this, but here pip only says what it would do.
_DRY = """
import subprocess
import sys
run = subprocess.run
dry = ['--dry-run', '--report', sys.argv[1]]
subprocess.run = lambda words, **kwargs: run([*words, *dry], **kwargs)
"""
# pip looks for versions of these that fit the installed packages. All others of
# requirements.txt are installed, as in Colab, so that pip queries fewer.
_NVIDIA = [
  f'nvidia_{name}_cu12'
  for name in (
    *('cublas', 'cuda_cupti', 'cuda_nvcc', 'cuda_nvrtc', 'cuda_runtime'),
    *('cudnn', 'cufft', 'cusolver', 'cusparse', 'nccl', 'nvjitlink'),
    'nvshmem',
  )
]
_SOUGHT = {'chex', 'dm-haiku', 'jmp', 'optax', 'orbax-checkpoint'}


@pytest.fixture(scope='module')
def colab(tmp_path_factory):
  """Runs the first cell in a new environment with certain versions."""
  newest = subprocess.run(
    [_ROOT / '.ci' / 'newest-python'], capture_output=True, text=True
  ).stdout.strip()
  if not newest:
    pytest.skip('there is no newer Python')
  root = tmp_path_factory.mktemp('colab')
  subprocess.run([newest, '-m', 'venv', root / 'venv'], check=True)
  (site,) = (root / 'venv' / 'lib').glob('python*/site-packages')

  def install(versions):
    # pip takes a package with such metadata for installed.
    for name, version in versions.items():
      folder = site / f'{name.replace("-", "_")}-{version}.dist-info'
      folder.mkdir()
      (folder / 'METADATA').write_text(
        f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
      )
      (folder / 'RECORD').write_text('')
      yield folder

  def run(**versions):
    lines = (_ROOT / 'requirements.txt').read_text().splitlines()[1:]
    pins = dict(x.partition(';')[0].split('==') for x in lines)
    there = {k: v for k, v in pins.items() if k not in _SOUGHT}
    for name, version in versions.items():
      there[name.replace('_', '-')] = version
    folders = [*install({k: v for k, v in there.items() if v})]
    report = root / 'report.json'
    report.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run(
      [root / 'venv' / 'bin' / 'python', '-c', _DRY + _first_cell(), report],
      cwd=_PATH.parent,
      env=environment,
      capture_output=True,
      text=True,
    )
    for folder in folders:
      shutil.rmtree(folder)
    if 'NewConnectionError' in done.stderr:
      pytest.skip('pip has no index')
    found = json.loads(report.read_text())['install']
    names = {x['metadata']['name']: x['metadata']['version'] for x in found}
    assert 'powerprop_jax' in names, done.stderr
    return done, names

  return run


@pytest.mark.slow
def test_the_first_cell_changes_neither_jax_nor_numpy(colab):
  plugin = {'jax_cuda12_plugin': '0.10.2'}
  done, names = colab(jax='0.10.2', jaxlib='0.10.2', numpy='2.1.3', **plugin)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('Installing')
  assert 'replaced' not in done.stdout
  assert names.keys() >= _SOUGHT
  changed = {'jax', 'jaxlib', 'numpy', 'jax-cuda12-plugin'}
  assert not changed & names.keys()


@pytest.mark.slow
def test_the_first_cell_exchanges_an_old_jax_with_its_plugin(colab):
  plugin = {'jax_cuda12_plugin': '0.7.2', 'jax_cuda12_pjrt': '0.7.2'}
  old = {'jax': '0.7.2', 'jaxlib': '0.7.2', **plugin}
  # Querying the requirements of the plugin takes long.
  nvidia = dict.fromkeys(_NVIDIA, '99')
  done, names = colab(numpy='2.1.3', **old, **nvidia)
  assert 'jax 0.7.2 is older than 0.10.2 and will be replaced' in done.stdout
  assert done.returncode == 1
  assert 'Now restart the runtime' in done.stderr
  assert {names[name.replace('_', '-')] for name in old} == {names['jax']}
  assert 'numpy' not in names


@pytest.mark.slow
def test_executes_with_warnings_as_errors(tmp_path, execute):
  notebook = _read()
  notebook.cells.insert(0, nbformat.v4.new_code_cell(_FIRST))
  notebook.cells.append(nbformat.v4.new_code_cell(_LAST))
  _parameters(notebook).source += _FAST
  execute.run(notebook, tmp_path)
  outputs = [o for cell in notebook.cells for o in cell.get('outputs', ())]
  text = ''.join(o.text for o in outputs if o.output_type == 'stream')
  assert {o.name for o in outputs if o.output_type == 'stream'} == {'stdout'}
  figures = [o for o in outputs if 'image/png' in o.get('data', {})]
  assert len(figures) == _NUM_FIGURES
  assert 'alpha = 3, seed 0' in text
  assert (tmp_path / 'lenet.safetensors').stat().st_size < 1_200_000

"""The notebook, executed whole with fast settings and warnings as errors."""

import pathlib

import pytest

nbclient = pytest.importorskip('nbclient')
nbformat = pytest.importorskip('nbformat')
pytest.importorskip('ipykernel')

_ROOT = pathlib.Path(__file__).parent.parent
_PATH = _ROOT / 'colab' / 'powerprop_mnist.ipynb'
_FIRST = "import warnings\nwarnings.simplefilter('error')"
_FAST = """
alphas, seeds, steps, kept = [1.0, 3.0], 1, 200, [0.05, 0.3, 0.7, 1.0]
task_steps = 100
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


def test_is_stored_clean():
  notebook = _read()
  nbformat.validate(notebook)
  assert set(notebook.metadata) == {'kernelspec', 'language_info'}
  for cell in notebook.cells:
    assert set(cell.metadata) <= {'tags'}
    if cell.cell_type == 'code':
      assert not cell.outputs
      assert cell.execution_count is None


def _execute(notebook, folder, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(_ROOT))
  monkeypatch.setenv('IPYTHONDIR', str(folder / 'ipython'))
  client = nbclient.NotebookClient(
    notebook, timeout=600, resources={'metadata': {'path': str(folder)}}
  )
  client.execute()
  return [
    output
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
  ]


@pytest.mark.slow
def test_executes_with_warnings_as_errors(tmp_path, monkeypatch):
  notebook = _read()
  notebook.cells.insert(0, nbformat.v4.new_code_cell(_FIRST))
  notebook.cells.append(nbformat.v4.new_code_cell(_LAST))
  _parameters(notebook).source += _FAST
  outputs = _execute(notebook, tmp_path, monkeypatch)
  text = ''.join(o.text for o in outputs if o.output_type == 'stream')
  assert {o.name for o in outputs if o.output_type == 'stream'} == {'stdout'}
  figures = [o for o in outputs if 'image/png' in o.get('data', {})]
  assert len(figures) == _NUM_FIGURES
  assert 'alpha = 3, seed 0' in text
  assert (tmp_path / 'lenet.safetensors').stat().st_size < 1_200_000

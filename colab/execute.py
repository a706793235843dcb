"""Runs the notebook and stores it with its outputs, so that it can be read.

  python colab/execute.py

takes some minutes on two cores, and what pip installs for the extra `dev`. The
outputs are those of the digits that come with a package, at the settings of the
notebook. What a test checks is that a notebook with faster settings runs, and
that the stored one has all of its outputs.
"""

import base64
import io
import os
import pathlib
import tempfile

import nbclient
import nbformat
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
PATH = ROOT / 'colab' / 'powerprop_mnist.ipynb'


def run(notebook: nbformat.NotebookNode, folder: pathlib.Path) -> None:
  """Runs all cells of a notebook, which then holds their outputs.

  Args:
    notebook: the notebook, which is changed.
    folder: where its files are written.

  Raises:
    nbclient.exceptions.CellExecutionError: if a cell fails.
  """
  metadata = dict(notebook.metadata)
  # The kernel takes the package from here, and writes nothing at home.
  places = {'PYTHONPATH': str(ROOT), 'IPYTHONDIR': str(folder / 'ipython')}
  client = nbclient.NotebookClient(
    notebook,
    timeout=3_600,
    record_timing=False,
    coalesce_streams=True,
    resources={'metadata': {'path': str(folder)}},
  )
  client.execute(env=os.environ | places)
  notebook.metadata = nbformat.from_dict(metadata)
  for cell in notebook.cells:
    for output in cell.get('outputs', ()):
      if 'image/png' in output.get('data', {}):
        output.data['image/png'] = _smaller(output.data['image/png'])


def _smaller(text: str) -> str:
  """The same figure with a palette of 64 colours, a third as large."""
  image = Image.open(io.BytesIO(base64.b64decode(text))).convert('RGB')
  file = io.BytesIO()
  image.quantize(64).save(file, 'PNG', optimize=True)
  return base64.b64encode(file.getvalue()).decode()


def main() -> None:
  """Writes the notebook with its outputs in the place of the old one."""
  notebook = nbformat.read(PATH, as_version=4)
  with tempfile.TemporaryDirectory() as folder:
    run(notebook, pathlib.Path(folder))
  nbformat.write(notebook, PATH)


if __name__ == '__main__':
  main()

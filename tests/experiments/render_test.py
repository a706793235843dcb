"""Tests that the tables of the documents are those of the results."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments import render
from experiments.presets import continual
from experiments.presets import mnist_pruning
from experiments.presets import sparse_sweep

_DOCUMENTS = {
  name: (render.ROOT / name).read_text() for name in render.DOCUMENTS
}

_INDEX = (render.ROOT / 'docs' / 'index.md').read_text()


@pytest.mark.parametrize('name', _DOCUMENTS)
def test_tables_are_what_the_results_say(name):
  assert render.render(_DOCUMENTS[name]) == _DOCUMENTS[name], (
    'Run: python -m experiments.render'
  )


def test_presets_of_mnist_pruning_say_what_the_results_say():
  doc, count = mnist_pruning.__doc__, 0
  _, layer, everywhere = re.split('pruned by layer|pruned globally', doc)
  for text, is_global in ((layer, False), (everywhere, True)):
    for line in re.findall(r'^  [\w-]+(?: +[\d.]+ ± [\d.]+){3}$', text, re.M):
      name, *cells = line.replace(' ± ', '±').split()
      results = render.load(f'mnist_pruning-{name}')
      found, *_ = (  # What a preset is compared with comes after it.
        row
        for label, row in results['results'].items()
        if label.endswith('global') == is_global
      )
      kept = np.array(results['kept'])
      at = [abs(kept - p).argmin() for p in (0.0207, 0.01, 0.005)]
      shown = [f'{100 * found["mean"][i]:.2f}' for i in at]
      assert [cell.partition('±')[0] for cell in cells] == shown, name
      count += 1
  assert count == 20


def test_presets_of_continual_learning_say_what_the_results_say():
  files = ('ten', 'hundred')
  rows = [r for x in files for r in render.load(f'continual-{x}')['results']]
  said = dict(
    re.findall(r'^  ([\w.-]+) +([\d.]+.*, worst.*)$', continual.__doc__, re.M)
  )
  first = {r['preset']: r for r in reversed(rows)}
  assert said.keys() == first.keys()
  for name, r in first.items():
    numbers = [f'{100 * r[key]:.2f}' for key in ('average', 'worst')]
    assert re.match(r'[\d.]+', said[name])[0] == numbers[0], name
    assert f'worst {numbers[1]}' in said[name], name
    if 'used' in r:
      assert f'{100 * r["used"]:.1f} in use' in said[name], name


def test_presets_of_sparse_sweep_say_what_the_results_say():
  said, found = {}, {}
  pattern = r'^  (\w+) +(\d+\.\d\d ± .*)$'
  for name, cells in re.findall(pattern, sparse_sweep.__doc__, re.M):
    said[name] = re.findall(r'[\d.]+ ± [\d.]+', cells)
  for table in ('mnist', 'mnist-unclipped'):
    for r in render.load(f'sparse_sweep-{table}')['results']:
      if r['sparsity'] in (0.0, 0.99):
        cell = f'{100 * r["mean"]:.2f} ± {100 * r["std"]:.2f}'
        found.setdefault(r['method'], []).append(cell)
  assert said == found


def test_every_table_is_in_some_document():
  text = '\n'.join(_DOCUMENTS.values())
  for name in render.TABLES:
    assert f'<!-- table: {name} -->' in text, name


def test_every_result_says_where_it_is_from():
  for path in render.RESULTS.glob('*.json'):
    source = json.loads(path.read_text())['source']
    assert source['machine']
    assert source.get('commands') or source['setting'], path


def test_every_result_is_shown(monkeypatch):
  shown = set()
  load = render.load
  monkeypatch.setattr(
    render, 'load', lambda name: shown.add(name) or load(name)
  )
  for show in [*render.TABLES.values(), *render.FIGURES.values()]:
    show()
  files = {path.stem for path in render.RESULTS.glob('*.json')}
  # Trials are in no table: LOG.md reports them.
  assert files - shown == {x for x in files if x.startswith('trials-')}


def test_figures_are_where_documents_show_them():
  for name in render.FIGURES:
    assert (render.ROOT / 'docs' / f'{name}.png').exists()
    assert f'({name}.png)' in _DOCUMENTS['docs/results.md'] + _INDEX, name


def test_another_number_is_another_table(tmp_path, monkeypatch):
  shutil.copytree(render.RESULTS, tmp_path, dirs_exist_ok=True)
  monkeypatch.setattr(render, 'RESULTS', tmp_path)
  path = tmp_path / 'mnist_pruning-paper.json'
  content = json.loads(path.read_text())
  content['results']['2.0']['mean'][0] += 0.0001  # It is 31.99 %.
  path.write_text(json.dumps(content))
  page = _DOCUMENTS['docs/results.md']
  (line,) = set(render.render(page).split('\n')) - set(page.split('\n'))
  assert '32.00 ± 4.40' in line


def test_a_table_that_does_not_exist_is_refused():
  text = '<!-- table: speed_of_light -->\n<!-- end of table -->'
  with pytest.raises(ValueError, match="no table 'speed_of_light'"):
    render.render(text)


@pytest.mark.slow
def test_check_as_a_user_runs_it():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.render', '--check'],
    cwd=render.ROOT,
    check=False,
  )
  assert done.returncode == 0

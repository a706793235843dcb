"""Tests of the comparison of runs of continual learning."""

import json
import pathlib

from etils import epath
import figures
import pytest

from experiments import continual_compare
from experiments.support import comparison
from experiments.support import config


def _write(folder, method, seed, accuracies, used=None):
  """A finished run of two tasks, as `continual_learning` writes it."""
  run = {
    'method': method,
    'alpha': 2.0,
    'seed': seed,
    'num_tasks': 2,
    'accuracy_matrix': [[0.9, None], accuracies],
    'average_accuracy': sum(accuracies) / 2,
    'worst_accuracy': min(accuracies),
    'valid_accuracy': accuracies,
  }
  if used:
    run |= {'used': used, 'capacity_used': used[-1]}
  path = folder / 'runs' / f'{method}-seed={seed}.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(run))


@pytest.fixture
def folders(tmp_path):
  _write(tmp_path / 'narrow', 'epn', 0, [0.96, 0.94], [0.1, 0.2])
  _write(tmp_path / 'narrow', 'epn', 1, [0.98, 0.96], [0.2, 0.4])
  _write(tmp_path / 'wide', 'epn', 0, [0.91, 0.93], [0.5, 0.9])
  _write(tmp_path / 'alone', 'independent', 0, [0.99, 0.99])
  _write(tmp_path / 'alone', 'independent', 1, [0.99, 0.99])
  return [str(tmp_path / name) for name in ('narrow', 'wide', 'alone')]


def test_folders_are_the_rows(folders, tmp_path, capsys):
  out_dir = epath.Path(tmp_path / 'out')
  continual_compare.write(continual_compare.load(folders), out_dir)
  rows = [line.split() for line in capsys.readouterr().out.split('\n')]
  # Transfer is the gain of the second task, when learnt, over its own network.
  assert ['narrow', '2', '96.00', '±', '1.41', '95.00', '30.0', '-4.00'] in rows
  assert ['wide', '2', '92.00', '91.00', '90.0', '-6.00'] in rows
  assert ['alone', '2', '99.00', '±', '0.00', '99.00', '-', '0.00'] in rows
  for name in ('accuracy.png', 'capacity.png'):
    assert (out_dir / name).read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'


def test_methods_of_one_folder_are_rows_of_their_own(tmp_path):
  _write(tmp_path / 'mixed', 'epn', 0, [0.96, 0.94])
  _write(tmp_path / 'mixed', 'packnet', 0, [0.91, 0.93])
  runs = continual_compare.load([str(tmp_path / 'mixed')])
  names = {run['method']: run['average_accuracy'] for run in runs}
  assert names == {'mixed/epn': 0.95, 'mixed/packnet': 0.92}


def test_legends_name_methods_and_folders_only_where_they_must(folders):
  runs = continual_compare.load(folders)
  accuracy = comparison.figures(runs)['accuracy.png']
  assert figures.legend(accuracy.legends[0]) == [
    r'$\alpha$ = 2, EfficientPackNet (narrow)',
    r'$\alpha$ = 2, EfficientPackNet (wide)',
    r'$\alpha$ = 2, one network per task',
  ]
  capacity = comparison.figures(continual_compare.load(folders[1:]))
  assert figures.legend(capacity['capacity.png'].legends[0]) == [
    r'$\alpha$ = 2, EfficientPackNet'
  ]


def test_settings_that_differ(folders):
  assert not continual_compare.differences(folders)  # Nothing is known.
  for path, gamma in zip(map(pathlib.Path, folders), (0.9, 0.95, 0.9)):
    kept = {'tasks': 10, 'gamma': gamma, 'network': 'lenet_300_100'}
    if gamma > 0.9:
      kept['search'] = 'binary'
    (path / 'config.json').write_text(json.dumps({'settings': kept}))
  assert continual_compare.differences(folders) == [
    ['gamma', '0.9', '0.95', '0.9'],
    ['search', '-', '"binary"', '-'],
  ]


def _parse(*folders):
  return config.parse(
    continual_compare.Settings, [f'--runs={",".join(map(str, folders))}']
  )


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    ([], '--runs must name folders'),
    (['one/narrow', 'other/narrow'], 'last names, which must differ'),
  ],
)
def test_impossible_names(names, message):
  with pytest.raises(ValueError, match=message):
    _parse(*names)


def test_impossible_folders(folders, tmp_path):
  assert len(continual_compare.load(_parse(*folders).runs)) == 5
  with pytest.raises(ValueError, match='absent holds no finished run'):
    continual_compare.load([*folders, str(tmp_path / 'absent')])


@pytest.mark.parametrize(
  'content', ['', '[]', 'null', '{"valid_accuracy": 1, "alpha": 2.0}']
)
def test_results_of_something_else(folders, tmp_path, content):
  (tmp_path / 'narrow' / 'runs' / 'foreign.json').write_text(content)
  with pytest.raises(ValueError, match='narrow'):
    continual_compare.load(folders)

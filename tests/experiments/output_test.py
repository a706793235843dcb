"""Tests of the files that programs write."""

import importlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from experiments.support import events
from experiments.support import output
from experiments.support import runs
from powerprop_jax import paths
from powerprop_jax.data import in_memory

_SETTINGS = {'alpha': 2.0, 'layers': ['a']}


def _open(path, binary='test', settings=_SETTINGS):
  return output.opened(str(path), binary, settings)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = paths.resolve(str(tmp_path)) / 'summary.json'
  output.write_json(path, {'a': 1})
  assert json.loads(path.read_text()) == {'a': 1}

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    output.write_json(path, {'a': 2})
  assert json.loads(path.read_text()) == {'a': 1}
  assert os.listdir(tmp_path) == ['summary.json']  # Nothing is left over.


@pytest.mark.parametrize(
  'name',
  [
    *('mnist_pruning', 'sparse_training', 'sparse_sweep'),
    *('continual_learning', 'continual_compare', 'export_model'),
  ],
)
def test_a_program_says_first_where_it_runs(name, monkeypatch):
  """It does so before it reads data or results, which may take minutes."""
  program = importlib.import_module(f'experiments.{name}')
  needed = {
    'continual_compare': {'runs': ('nothing',)},
    'export_model': {'checkpoint': 'nothing'},
  }

  class Announced(Exception):
    pass

  def announce(binary):
    raise Announced(binary)

  monkeypatch.setattr(output, 'announce', announce)
  monkeypatch.setattr(runs, 'use_cores', lambda num_runs: None)
  monkeypatch.setattr(in_memory, 'load', lambda *args: pytest.fail('loaded'))
  with pytest.raises(Announced, match=name):
    program.main(program.Settings(**needed.get(name, {})))


def test_threads_write_the_same_file(tmp_path):
  path = paths.resolve(str(tmp_path)) / 'a.json'
  threads = [
    threading.Thread(target=output.write_json, args=(path, [i] * 1000))
    for i in range(8)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(set(json.loads(path.read_text()))) == 1
  assert os.listdir(tmp_path) == ['a.json']


def test_a_folder_of_the_home(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  with _open('~/results') as path:
    assert pathlib.Path(path) == tmp_path / 'results'
  assert (tmp_path / 'results' / 'config.json').exists()


def test_an_experiment_goes_on_with_equal_settings_alone(tmp_path):
  with _open(tmp_path):
    pass
  with _open(tmp_path):  # Lists are as JSON reads them.
    pass
  before = (tmp_path / 'config.json').read_text()
  message = r'alpha: 2\.0 there, 3\.0 now; layers: \[.a.\] there, None now'
  with (
    pytest.raises(ValueError, match=message),
    _open(tmp_path, settings={'alpha': 3.0}),
  ):
    pass
  with (
    pytest.raises(ValueError, match='holds an experiment of test'),
    _open(tmp_path, binary='other'),
  ):
    pass
  # The refusal has changed nothing: a run with the right settings goes on.
  assert (tmp_path / 'config.json').read_text() == before
  with _open(tmp_path):
    pass


def test_other_data_are_another_experiment(tmp_path):
  with _open(tmp_path, settings=_SETTINGS | {'data': '0123'}):
    pass
  with (
    pytest.raises(ValueError, match='data: 0123 there, 4567 now'),
    _open(tmp_path, settings=_SETTINGS | {'data': '4567'}),
  ):
    pass


def test_a_setting_that_is_not_a_number_is_never_written(tmp_path):
  with pytest.raises(ValueError), _open(tmp_path, settings={'a': float('nan')}):
    pass
  assert not (tmp_path / 'config.json').exists()


@pytest.mark.parametrize('content', ['[]', 'null', '{}', '', '{"settings": 1}'])
def test_a_config_of_another_kind(tmp_path, content):
  (tmp_path / 'config.json').write_text(content)
  with (
    pytest.raises(ValueError, match=r'config\.json .*(Move|Choose)'),
    _open(tmp_path),
  ):
    pass
  assert (tmp_path / 'config.json').read_text() == content


@pytest.mark.parametrize(
  ('name', 'is_folder', 'message'),
  [
    ('runs', False, 'runs is a file and has to be a folder'),
    ('metrics.jsonl', True, 'metrics.jsonl is a folder and has to be a file'),
    ('summary.json', True, 'summary.json is a folder and has to be a file'),
  ],
)
def test_what_is_in_the_way_is_refused(tmp_path, name, is_folder, message):
  place = tmp_path / name
  place.mkdir() if is_folder else place.write_text('')
  with pytest.raises(ValueError, match=message), _open(tmp_path):
    pass
  assert not (tmp_path / 'config.json').exists()


def test_places_that_cannot_be_folders(tmp_path):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'b' / 'config.json').mkdir(parents=True)
  for name in ('file', 'file/inside', 'b'):
    with (
      pytest.raises(ValueError, match='--out_dir=.* cannot be used'),
      _open(tmp_path / name),
    ):
      pass


def test_other_devices_are_said(tmp_path, capfd):
  with _open(tmp_path):
    pass
  assert not capfd.readouterr().err
  found = json.loads((tmp_path / 'config.json').read_text())
  found['devices'] = ['cpu'] * 64
  (tmp_path / 'config.json').write_text(json.dumps(found))
  with _open(tmp_path):
    pass
  assert 'begun on 64 device(s)' in capfd.readouterr().err


_HOLD = """
import sys, time
from experiments.support import output
with output.opened(sys.argv[1], 'test', {}):
  print('held', flush=True)
  time.sleep(100)
"""


@pytest.mark.slow
def test_a_folder_has_one_writer_and_the_dead_hold_none(tmp_path):
  process = subprocess.Popen(
    [sys.executable, '-c', _HOLD, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == 'held\n'
  holder = f'process {process.pid} on {socket.gethostname()}'
  with (
    pytest.raises(ValueError, match=f'is in use by {holder}'),
    _open(tmp_path, settings={}),
  ):
    pass
  process.send_signal(signal.SIGKILL)
  process.communicate()
  with _open(tmp_path, settings={}):
    pass


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_forget_what_comes_again(tmp_path, monkeypatch):
  path = paths.resolve(str(tmp_path)) / 'metrics.jsonl'
  write = output.Metrics(path, lambda line: True)
  for step in (1, 2, 3):
    write({'step': step})
  write.close()
  with path.open('ab') as file:
    # These are strange lines, and one that was cut off.
    file.write(b'[1]\n7\n\n\xff\xfe\n{"ste')
  write = output.Metrics(path, lambda line: line['step'] < 3)
  write({'step': 3, 'again': True})
  write.close()
  assert _lines(path) == [{'step': 1}, {'step': 2}, {'step': 3, 'again': True}]

  # A kill while the file is rewritten loses nothing.
  monkeypatch.setattr(os, 'replace', lambda *args: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    output.Metrics(path, lambda line: False)
  assert len(_lines(path)) == 3


def test_events_are_what_the_lines_are(tmp_path):
  path = paths.resolve(str(tmp_path)) / 'metrics.jsonl'

  def found(run):
    return list(events.read(tmp_path / 'events' / run))

  write = output.Metrics(path, lambda line: True)
  for step in (0, 1, 2):
    write({'run': 'a', 'step': step, 'loss': 0.5, 'name': 'x', 'on': True})
  write({'run': 'b', 'step': 0, 'sparsity': {'total': 1, 'w': 0.25}})
  # Events are on the disk before the file is closed, in case of a kill.
  assert found('a') == [
    (0, 'train/loss', 0.5),
    (1, 'train/loss', 0.5),
    (2, 'train/loss', 0.5),
  ]
  assert found('b') == [(0, 'sparsity/total', 1.0), (0, 'sparsity/w', 0.25)]
  write.close('a')
  write.close()
  # An event that was cut off is left out, and so are those that come again.
  (file,) = (tmp_path / 'events' / 'a').iterdir()
  file.write_bytes(file.read_bytes()[:-1])
  write = output.Metrics(
    path, lambda line: line.get('run') == 'a' and line['step'] != 1
  )
  assert (found('a'), found('b')) == ([(0, 'train/loss', 0.5)], [])
  write({'run': 'a', 'step': 3, 'loss': 1.0}, {'in_use': np.zeros(3)})
  write.close()
  assert found('a') == [(0, 'train/loss', 0.5), (3, 'train/loss', 1.0)]
  assert [x['step'] for x in _lines(path)] == [0, 2, 3]


def test_without_tensorboardx_there_are_lines_only(tmp_path, monkeypatch):
  monkeypatch.setattr(events, 'installed', lambda: False)
  path = paths.resolve(str(tmp_path)) / 'metrics.jsonl'
  write = output.Metrics(path, lambda line: True)
  write({'step': 1, 'loss': 0.5})
  write.close()
  assert _lines(path) == [{'step': 1, 'loss': 0.5}]
  assert os.listdir(tmp_path) == ['metrics.jsonl']


def test_progress_without_a_terminal(monkeypatch, capfd):
  clock = [0.0]
  monkeypatch.setattr(output.time, 'monotonic', lambda: clock[0])
  progress = output.Progress(400, initial=100)
  for i in range(300):
    clock[0] += 0.5
    if i > 100:
      progress.at(i - 100, {'loss': 0.25}, run='alpha=2.0-seed=0')
    else:
      progress.at(101 + i, {'loss': 0.25})
  progress.close()
  lines = capfd.readouterr().err.split('\n')
  assert len(lines) == 6  # One every 30 seconds, the last, and the end.
  shown = 'step 161 of 400, 2 steps per second, 01:59 left: loss 0.25'
  assert lines[0] == shown
  assert lines[-2].endswith('left: loss 0.25 (alpha=2.0-seed=0)')
  assert '\r' not in ''.join(lines)


def test_tables_line_up():
  assert output.table([['a', '1.00'], ['long', '10.00']], ['name', 'x']) == (
    'name        x\n------  -----\na        1.00\nlong    10.00'
  )

"""Tests of many small runs at once."""

import json
import os
import signal

import pytest

from experiments.support import runs
from powerprop_jax import paths
from powerprop_jax.training import loop


@pytest.fixture
def out_dir(tmp_path):
  return paths.resolve(str(tmp_path))


def _run(value):
  """A run of three steps."""

  def run(data, watch):
    for step in (1, 2, 3):
      watch.report(step, {'loss': value / step})
    return {'valid_accuracy': value, 'data': int(data)}

  return run


def _lines(out_dir):
  text = (out_dir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_runs_are_made_once(out_dir):
  todo = {'a': _run(1.0), 'b': _run(2.0)}
  assert runs.run_all(todo, 7, 3, out_dir) == ([], False)
  wanted = {
    'a': {'valid_accuracy': 1.0, 'data': 7},
    'b': {'valid_accuracy': 2.0, 'data': 7},
  }
  assert runs.finished(out_dir) == wanted
  assert (
    sorted(line['run'] for line in _lines(out_dir)) == ['a'] * 3 + ['b'] * 3
  )

  # Only the lines of a run that is lost are written again.
  (out_dir / 'runs' / 'a.json').unlink()
  todo['b'] = lambda data, watch: 1 / 0
  runs.run_all(todo, 7, 3, out_dir)
  assert runs.finished(out_dir, ['b', 'a', 'c']) == wanted
  assert len(_lines(out_dir)) == 6


def test_a_run_that_diverges_leaves_the_others(out_dir):
  def diverge(data, watch):
    raise loop.Diverged('the loss became nan')

  todo = {'a': diverge, 'b': _run(2.0)}
  found = runs.run_all(todo, 7, 3, out_dir)
  assert found == (['a: the loss became nan'], False)
  assert list(runs.finished(out_dir)) == ['b']


def test_a_signal_stops_all_and_keeps_what_is_finished(out_dir):
  def hear(data, watch):
    os.kill(os.getpid(), signal.SIGTERM)
    while not watch.stopped():
      pass
    raise loop.Interrupted

  todo = {'a': _run(1.0), 'b': hear, 'c': _run(2.0)}
  assert runs.run_all(todo, 7, 3, out_dir, workers=1) == ([], True)
  assert list(runs.finished(out_dir)) == ['a']


def test_an_error_of_a_run_is_raised(out_dir):
  def fail(data, watch):
    raise FileNotFoundError('gone')

  with pytest.raises(FileNotFoundError, match='gone'):
    runs.run_all({'a': fail}, 7, 3, out_dir)


_FOREIGN = '{"alpha": 2.0, "valid_accuracy": 0.5}'


@pytest.mark.parametrize('content', ['', '[]', '{}', 'x', _FOREIGN])
def test_what_is_in_the_way_of_a_result(out_dir, content):
  (out_dir / 'runs').mkdir()
  (out_dir / 'runs' / 'a.json').write_text(content)
  with pytest.raises(ValueError, match=r'a\.json .* Move it away'):
    runs.run_all({'a': _run(1.0)}, 7, 3, out_dir, fields=('alpha', 'seed'))
  # A foreign file that is in the way of no run does not matter.
  assert runs.run_all({'b': _run(1.0)}, 7, 3, out_dir) == ([], False)


@pytest.mark.parametrize(
  ('messages', 'interrupted', 'code'),
  [([], False, 0), (['a: nan'], False, 1), (['a: nan'], True, 130)],
)
def test_exit_codes(messages, interrupted, code, capfd):
  with pytest.raises(SystemExit) as e:
    runs.finish(messages, interrupted, 1, 3)
  assert e.value.code == code
  err = capfd.readouterr().err
  assert ('error: a: nan' in err) == bool(messages)
  assert ('with 1 of 3 runs finished' in err) == interrupted

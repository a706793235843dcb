"""Tests of the program `continual_learning`."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from experiments import continual_learning
from experiments.presets import continual as presets
from experiments.support import config
from experiments.support import runs
from experiments.support import sequence
from experiments.support import tasks
from powerprop_jax.continual import benchmarks
from powerprop_jax.data import in_memory
from powerprop_jax.training import checkpoint
from powerprop_jax.training import loop

_ROOT = pathlib.Path(__file__).parents[2]
_QUICK = {
  'tasks': 3,
  'steps_per_task': 40,
  'retrain_steps': 20,
  'batch_size': 20,
  'densities': '0.1,0.2,0.4,0.7,1',
  'search_steps': 3,
  'gamma': 0.97,
  'phi_decay': 0,
  'alpha_steps': '3:0.5',
}


def _read(**options):
  arguments = [f'--{k}={v}' for k, v in (_QUICK | options).items()]
  return config.parse(continual_learning.Settings, arguments, presets.PRESETS)


@functools.cache
def _data():
  """600, 100 and 100 digits of 7 x 7 pixels."""
  data = in_memory.load('mnist_5k')

  def small(split, n):
    return in_memory.Split(split.images[:n, 1::4, 1::4], split.labels[:n])

  return small(data.train, 600), small(data.valid, 100), small(data.test, 100)


@functools.cache
def _problem(method, **options):
  settings = _read(**options)
  return settings, tasks.make_problem(settings, method, 2.0, (7, 7, 1), 10)


def _run(
  out_dir, method='epn', data=None, report=None, stopped=None, **options
):
  settings, problem = _problem(method, **options)
  data, lines = data or _data(), []
  result = sequence.learn_all(
    tasks.Job(method, 2.0, 0),
    problem,
    settings,
    config.deciding(settings),
    in_memory.Dataset('digits', *data, num_classes=10),
    out_dir,
    data,
    runs.Watch(
      report or (lambda *line: lines.append(line)),
      stopped or (lambda: False),
    ),
  )
  return result, lines


def _without_seconds(result):
  """The part of a result that two runs of one experiment have in common."""
  if isinstance(result, dict):
    return {
      k: _without_seconds(v) for k, v in result.items() if 'seconds' not in k
    }
  return (
    [*map(_without_seconds, result)] if isinstance(result, list) else result
  )


def _arrays(out_dir, method='epn'):
  name = tasks.Job(method, 2.0, 0).name
  return checkpoint.load(out_dir / 'checkpoints' / name).arrays


@pytest.fixture(scope='module', autouse=True)
def _compile_once(tmp_path_factory):
  """Compiles functions once that are the same for several methods."""
  names = 'compilation_cache_dir', 'persistent_cache_min_compile_time_secs'
  values = str(tmp_path_factory.mktemp('compiled')), 0
  before = [getattr(jax.config, f'jax_{name}') for name in names]
  for name, value in zip(names, values):
    jax.config.update(f'jax_{name}', value)
  yield
  for name, value in zip(names, before):
    jax.config.update(f'jax_{name}', value)


@pytest.fixture(scope='module')
def epn(tmp_path_factory):
  """A run of EPN: its folder, result and reports."""
  out_dir = tmp_path_factory.mktemp('epn')
  return out_dir, *_run(out_dir)


def test_nothing_is_forgotten_and_something_is_learnt(epn):
  _, result, _ = epn
  assert result['forgetting'] == [0.0, 0.0, 0.0]
  matrix = result['accuracy_matrix']
  for t in range(3):
    assert {row[t] for row in matrix[t:]} == {matrix[t][t]}
    assert matrix[t][t] > 0.3
    assert matrix[t][t] == result['tasks'][t]['test_accuracy']
  assert matrix[0][1:] == [None, None]
  # Accuracies at the end are those from when the task was learnt.
  learnt = [record['valid_accuracy'] for record in result['tasks']]
  assert result['valid_accuracy'] == learnt


def test_every_task_meets_its_target_on_validation_data(epn):
  _, result, _ = epn
  for record in result['tasks']:
    known = dict(record['evaluated'])
    assert record['evaluations'] == len(known)
    assert set(known) <= {0.1, 0.2, 0.4, 0.7, 1.0}
    assert record['target_met']
    target = 0.97 * record['dense_valid_accuracy']
    assert known[record['searched_density']] >= target
    assert record['pruned_valid_accuracy'] >= target
    assert all(v < target for p, v in known.items() if p < record['density'])


def test_capacity_adds_up(epn):
  out_dir, result, _ = epn
  size = 49 * 300 + 300 * 100
  used = np.cumsum(result['new_weights']) / size
  np.testing.assert_allclose(result['used'], used)
  assert result['capacity_used'] == pytest.approx(used[-1])
  assert result['new_weights'][0] / size == pytest.approx(result['density'][0])
  arrays = _arrays(out_dir)
  owners = [v for k, v in arrays.items() if k.startswith('memory/owners/')]
  counts = np.sum([np.bincount(o.ravel(), minlength=4) for o in owners], axis=0)
  assert counts[1:].tolist() == result['new_weights']
  packed = {k: v for k, v in arrays.items() if k.startswith('tasks/packed/')}
  assert {v.shape for v in packed.values()} == {(3, 1838), (3, 3750)}
  assert result['bytes_per_task'] == 1838 + 3750 + 4 * (400 + 1000 + 10)


def test_a_run_goes_on_at_the_task_where_it_was(epn, tmp_path):
  _, expected, lines = epn

  steps = []
  with pytest.raises(loop.Interrupted):
    _run(
      tmp_path,
      report=lambda step, metrics: steps.append(step),
      # The run ends before the retraining of the second task.
      stopped=lambda: steps[-1:] == [100],
    )
  assert steps == [40, 60, 60, 100]
  result, resumed = _run(tmp_path)
  assert _without_seconds(result) == _without_seconds(expected)
  assert resumed == lines
  assert [step for step, _ in lines] == [
    40,
    60,
    60,
    100,
    120,
    120,
    160,
    180,
    180,
  ]
  # A finished run has nothing left to do.
  again, _ = _run(tmp_path)
  assert again == result


def test_decisions_do_not_see_test_data(epn, tmp_path):
  out_dir, _, _ = epn
  train, valid, test = _data()
  wrong = test._replace(labels=(test.labels + 1) % 10)
  result, _ = _run(tmp_path, data=(train, valid, wrong))
  assert result['average_accuracy'] < 0.4
  chex.assert_trees_all_equal(_arrays(tmp_path), _arrays(out_dir))


@pytest.mark.parametrize(
  'method', ['packnet', 'finetune', 'independent', 'ewc']
)
def test_other_methods_take_the_same_way(method, tmp_path):
  result, lines = _run(tmp_path, method, evaluate_every=5)
  assert result['num_tasks'] == 3
  assert lines[-1][0] == 180  # As many steps as with retraining.
  matrix = result['accuracy_matrix']
  assert matrix[1][0] is None  # It is not evaluated in between.
  assert all(x > 0.3 for x in matrix[2][2:])
  if method == 'packnet':
    size = 49 * 300 + 300 * 100
    assert result['new_weights'] == [size // 3] * 3
    assert result['capacity_used'] == 1.0
  else:
    assert 'capacity_used' not in result
  if method in ('packnet', 'independent'):
    assert result['forgetting'] == [0.0, 0.0, 0.0]


def test_a_full_network_stops_and_says_so(tmp_path):
  result, _ = _run(tmp_path, densities=1, retrain_steps=0)
  assert 'no weight is free for task 2' in result['stopped']
  assert result['num_tasks'] == 1
  assert result['capacity_used'] == 1.0
  assert result['average_accuracy'] > 0.4


def test_a_cap_limits_new_weights(tmp_path):
  options = {'retrain_steps': 0, 'search': 'taylor', 'infer_tasks': '2'}
  result, _ = _run(tmp_path, cap='0.05', **options)
  assert result['task_inference'].keys() == {'2'}
  shares = result['task_inference']['2']['entropy']
  assert shares.keys() == {'1', '10', '100'}
  assert 0 < shares['1'] < 1
  assert all(n <= 0.05 * 44_700 for n in result['new_weights'])
  assert result['new_weights'][0] == int(0.05 * 44_700)


def test_a_diverging_loss_is_reported(tmp_path):
  message = 'at step .*, with task = 1, alpha = 2, .* and learning_rate = 1e'
  with pytest.raises(loop.Diverged, match=message):
    _run(tmp_path, clip_norm=0, learning_rate=1e9, momentum=0, retrain_steps=0)


def test_networks_are_evaluated_before_a_task_is_learnt(epn):
  _, result, _ = epn
  before = [record['test_accuracy_before'] for record in result['tasks']]
  initial = result['initial_test_accuracy']
  assert before[0] == initial[0]  # The first task begins with this network.
  assert all(0 <= x < 0.3 for x in [*before, *initial])
  transfer = result['zero_shot_transfer']
  assert transfer[0] is None
  np.testing.assert_allclose(transfer[1:], np.subtract(before, initial)[1:])
  assert result['backward_transfer'] == [0.0, 0.0, 0.0]
  # The evaluation beforehand is no part of what was learnt.
  assert result['accuracy_matrix'][0][1] is None


def test_damaged_checkpoints_are_refused_at_once(epn, tmp_path):
  out_dir, _, _ = epn
  shutil.copytree(out_dir / 'checkpoints', tmp_path / 'checkpoints')
  folder = tmp_path / 'checkpoints' / tasks.Job('epn', 2.0, 0).name
  damaged = [p for p in folder.glob('*/**/*') if p.is_file()]
  assert len([p for p in folder.iterdir() if p.name.isdigit()]) == 2
  for path in damaged:
    path.write_bytes(b'')
  steps = []
  with pytest.raises(ValueError, match='Move it away to start anew'):
    _run(tmp_path, report=lambda step, metrics: steps.append(step))
  assert not steps  # Nothing was trained.


def test_checkpoints_of_other_settings_are_refused(epn, tmp_path):
  out_dir, _, _ = epn
  shutil.copytree(out_dir / 'checkpoints', tmp_path / 'checkpoints')
  with pytest.raises(ValueError, match='gamma: 0.97 there, 0.5 here'):
    _run(tmp_path, gamma=0.5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'gamma': 1.5}, '--gamma=1.5: must be between 0 and 1'),
    ({'gamma': 'nan'}, '--gamma=nan: must be a finite number'),
    ({'cap': 'nan'}, '--cap=nan: must be a finite number'),
    ({'ewc_strength': 'nan'}, '--ewc_strength=nan: must be a finite number'),
    ({'ewc_strength': -1}, '--ewc_strength=-1: must be at least 0'),
    ({'retrain_learning_rate': -1}, '--retrain_learning_rate=-1: must be'),
    ({'densities': '0.5,0.2'}, '--densities.*must rise'),
    ({'densities': '0,0.2'}, '--densities.*must be in'),
    ({'densities': '0.2,1.2'}, '--densities.*must be in'),
    ({'densities': '0.2,x'}, '--densities=0.2,x: must be a number'),
    ({'densities': ''}, '--densities=.*must not be empty'),
    ({'min_density': 0.5, 'max_density': 0.6}, '--densities.*None of'),
    ({'method': 'replay'}, '--method=replay: must be one of epn, packnet'),
    ({'method': ''}, '--method=: '),
    ({'alpha': '0.5'}, '--alpha=0.5.*>= 1'),
    ({'alpha': '2,x'}, '--alpha=2,x: must be a number'),
    ({'alpha': ''}, '--alpha=: must not be empty'),
    ({'seeds': 10**12}, '--seeds=1000000000000: must be between 1 and'),
    ({'tasks': 10**12}, '--tasks=1000000000000: must be between 1 and 65535'),
    ({'infer_tasks': '4'}, '--infer_tasks=4 is more than --tasks=3'),
    ({'infer_tasks': '1.5'}, '--infer_tasks=1.5: must be a whole number'),
    ({'norm': 'shared'}, '--norm=shared.*task.*frozen'),
  ],
)
def test_impossible_flags(options, message):
  with pytest.raises(ValueError, match=message):
    _read(**options)


def test_factors_of_the_decay_have_to_match_a_layer():
  with pytest.raises(ValueError, match=r"--phi_decay_scale=x=2: .*'x' matches"):
    _problem('epn', phi_decay_scale='x=2')


def test_lists_of_flags_make_runs():
  jobs = continual_learning.make_jobs(
    _read(method='epn,packnet,epn', alpha='1,2', seeds=2)
  )
  assert len(jobs) == len({job.name for job in jobs}) == 8
  assert jobs[0].name == 'epn-alpha=1.0-seed=0'
  assert [job.seed for job in jobs] == [0] * 4 + [1] * 4


@pytest.mark.parametrize('name', presets.PRESETS)
def test_presets_set_flags_that_exist(name):
  arguments = [f'--preset={name}', '--seeds=1']
  settings = config.parse(
    continual_learning.Settings, arguments, presets.PRESETS
  )
  assert settings.seeds == 1
  for flag, value in presets.PRESETS[name].items():
    if flag != 'seeds':
      assert getattr(settings, flag) == value, flag


def test_settings_come_back_from_a_checkpoint():
  settings = _read(heads='shared', infer_tasks=2, cap=0.5)
  found = config.restored(tasks.Settings, config.deciding(settings))
  for name in ('heads', 'infer_tasks', 'cap', 'densities', 'learning_rate'):
    assert getattr(found, name) == getattr(settings, name)


def _dataset():
  return in_memory.Dataset('digits', *_data(), num_classes=10)


def test_more_tasks_than_classes():
  with pytest.raises(ValueError, match='--tasks=6: digits has 5 tasks'):
    tasks.make_benchmark(_read(benchmark='split', tasks=6), _dataset(), 0)


def test_a_batch_larger_than_the_smallest_task():
  settings = _read(benchmark='split', tasks=5, batch_size=110)
  data = _dataset()
  sizes = np.bincount(data.train.labels // 2, minlength=5)
  assert sizes.min() < 110 < sizes.max()
  with pytest.raises(ValueError, match=f'more than the {sizes.min()} training'):
    tasks.make_benchmark(settings, data, 0)


def test_parts_of_the_tasks_that_are_learnt_have_one_shape():
  plain = benchmarks.split(_dataset())
  found = tasks.make_benchmark(_read(benchmark='split'), _dataset(), 0)
  sizes = [plain.size(t, 'train') for t in range(3)]
  assert len({*sizes}) > 1
  for t in range(3):
    labels = found.part(t, 'train').labels
    assert len(labels) == max(sizes)
    assert int(np.sum(labels >= 0)) == sizes[t]
  with pytest.raises(ValueError, match='there is no task 5'):
    found.part(5, 'train')


_FEWER_STEPS = [f'--{k}={v}' for k, v in (_QUICK | {'batch_size': 40}).items()]


def _run_here(*arguments):
  """What the binary does, on the device of this process."""
  arguments = [*_FEWER_STEPS, *arguments]
  settings = config.parse(
    continual_learning.Settings, arguments, presets.PRESETS
  )
  with pytest.raises(SystemExit) as ended:
    continual_learning.main(settings)
  assert not ended.value.code


def _start(tmp_path, *arguments, devices=1):
  cache = tmp_path.parent / 'compiled'
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': os.environ['XLA_FLAGS']
    + f' --xla_force_host_platform_device_count={devices}',
  }
  command = [sys.executable, '-W', 'error', '-m']
  return subprocess.Popen(
    [*command, 'experiments.continual_learning', *_FEWER_STEPS, *arguments],
    cwd=_ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _finish(process):
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


def _killed(process, path):
  """Kills a process as soon as a path exists."""
  deadline = time.time() + 500
  while not path.exists() and time.time() < deadline:
    time.sleep(0.01)
  process.kill()
  process.communicate()
  assert path.exists()


def _content(folder):
  """The bytes of all files by path, except the one that names a process."""
  files = [p for p in folder.rglob('*') if p.is_file() and p.name != '.lock']
  return {p: p.read_bytes() for p in files}


@pytest.mark.slow
def test_the_binary_is_killed_and_ends_with_the_same_result(tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  (name,) = ('epn-alpha=1.5-seed=0',)
  arguments = '--tasks=2', f'--out_dir={killed}'
  first = killed / 'checkpoints' / name / '1'
  _killed(_start(tmp_path, *arguments), first)
  code, out, err = _finish(_start(tmp_path, *arguments))
  assert code == 0, err
  assert 'epn' in out and 'forgotten (%): 0.00' in out
  run = json.loads((killed / 'summary.json').read_text())['runs'][name]
  for key in (
    'accuracy_matrix',
    'average_accuracy',
    'forgetting',
    'capacity_used',
    'density',
    'seconds',
  ):
    assert key in run
  for figure in ('accuracy', 'capacity', 'matrix-1.5-epn', 'overlap-1.5-epn'):
    assert (killed / f'{figure}.png').read_bytes()[1:4] == b'PNG'
  settings = json.loads((killed / 'config.json').read_text())['settings']
  assert settings['gamma'] == 0.97

  _run_here('--tasks=2', f'--out_dir={whole}')
  found, expected = (
    _without_seconds(json.loads((path / 'runs' / f'{name}.json').read_text()))
    for path in (killed, whole)
  )
  assert found == expected
  lines = [
    (path / 'metrics.jsonl').read_text().splitlines()
    for path in (killed, whole)
  ]
  assert lines[0] == lines[1]

  before = _content(killed)
  # The program then ends with 2.
  with pytest.raises(config.Refused, match='gamma: 0.97 there, 0.9 now'):
    _run_here(*arguments, '--gamma=0.9')
  # The wrong flag has left no trace.
  assert _content(killed) == before


@pytest.mark.slow
def test_eight_devices_learn_what_one_does(tmp_path):
  one, eight = tmp_path / 'one', tmp_path / 'eight'
  options = (
    '--data_parallel',
    '--tasks=2',
    '--densities=0.3',
    '--retrain_steps=0',
    '--alpha=2',
    '--learning_rate=0.1',  # Larger steps make more of what was rounded.
  )
  process = _start(tmp_path, *options, f'--out_dir={eight}', devices=8)
  _run_here(*options, f'--out_dir={one}')
  code, _, err = _finish(process)
  assert code == 0, err
  runs = [
    json.loads((out / 'summary.json').read_text())['runs'].popitem()[1]
    for out in (one, eight)
  ]
  assert runs[0]['density'] == runs[1]['density']
  assert runs[0]['forgetting'] == runs[1]['forgetting'] == [0.0, 0.0]
  np.testing.assert_allclose(
    runs[0]['accuracy_matrix'][1], runs[1]['accuracy_matrix'][1], atol=0.02
  )
  masks = [
    {k: v for k, v in _arrays(out).items() if k.startswith('tasks/packed/')}
    for out in (one, eight)
  ]
  for path, packed in masks[0].items():
    bits = [np.unpackbits(m[path], axis=1) for m in masks]
    # Sums over a batch differ in their last bit.
    assert np.mean(bits[0] != bits[1]) < 0.01
    assert packed.any()

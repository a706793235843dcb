"""Tests of the program `mnist_pruning`, also run as a user runs it."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import mnist_pruning
from experiments.presets import mnist_pruning as presets
from experiments.support import config
from experiments.support import settings as settings_lib
from powerprop_jax import export
from powerprop_jax.data import in_memory

_ROOT = pathlib.Path(__file__).parents[2]
_QUICK = (
  '--alphas=1,2',
  '--seeds=1',
  '--steps=40',
  '--kept=0.1,1',
  '--scope=layer,global',
)


@pytest.fixture(scope='session')
def _environment(tmp_path_factory):
  """Variables with which processes promote strictly and share a cache."""
  return os.environ | {
    'JAX_NUMPY_DTYPE_PROMOTION': 'strict',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('cache')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


@pytest.fixture
def start(_environment):
  """Starts a program as a user does, with warnings as errors."""
  return functools.partial(_start, _environment)


@pytest.fixture
def run(_environment):
  """Runs a program to its end; returns its exit status, output and errors."""

  def run(*args):
    process = _start(_environment, *args)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err

  return run


def _start(environment, *args):
  return subprocess.Popen(
    [sys.executable, '-W', 'error', '-m', 'experiments.mnist_pruning', *args],
    cwd=_ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_mnist_pruning_writes_and_prints_its_results(run, tmp_path):
  args = (*_QUICK, '--alpha_steps=3:0.5', f'--out_dir={tmp_path}')
  code, out, err = run(*args)
  assert code == 0, err
  for path in (tmp_path / 'runs').glob('*.safetensors'):
    assert export.load_compressed(path).alpha == 3.0  # The last power.
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['kept'] == [0.1, 1.0]
  assert list(summary['results']) == ['1.0', '2.0', '1.0 global', '2.0 global']
  for result in summary['results'].values():
    assert np.shape(result['test_accuracy']) == (2, 1)
    assert np.shape(result['valid_accuracy']) == (2, 1)
    assert 0.3 < result['mean'][1] <= 1.0  # 40 steps are enough to learn.
  assert f'{100 * summary["results"]["2.0"]["mean"][1]:.2f}' in out
  for name in ('accuracy', 'overlap', 'weights'):
    assert (tmp_path / f'{name}.png').read_bytes()[1:4] == b'PNG'
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['settings']['learning_rate'] == 0.1
  assert config['versions']['jax'] == jax.__version__
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert {json.loads(line)['step'] for line in lines} == {40}

  # One run is lost; the same command computes this one again, and no other.
  lost, kept = sorted((tmp_path / 'runs').glob('*.json'))
  before, time_kept = json.loads(lost.read_text()), kept.stat().st_mtime_ns
  lost.unlink()
  code, _, err = run(*args)
  assert code == 0, err
  after = json.loads(lost.read_text())
  assert before.pop('seconds') != after.pop('seconds')
  assert before == after
  assert kept.stat().st_mtime_ns == time_kept
  assert json.loads((tmp_path / 'summary.json').read_text()) == summary


@pytest.mark.slow
def test_mnist_pruning_stops_and_keeps_what_is_finished(start, tmp_path):
  process = start(
    '--alphas=1',
    '--seeds=9',  # Most of which are not begun when the first is finished.
    '--steps=200',
    '--kept=0.5,1',
    f'--out_dir={tmp_path}',
  )
  deadline = time.time() + 240
  while not list(tmp_path.glob('runs/*.json')) and time.time() < deadline:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)  # Ctrl-C has the same effect.
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130, err
  assert 'The same command keeps these' in err
  done = len(list(tmp_path.glob('runs/*.json')))
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert np.shape(summary['results']['1.0']['mean']) == (2,)
  assert np.shape(summary['results']['1.0']['test_accuracy']) == (2, done)


@pytest.mark.slow
def test_mnist_pruning_says_where_it_diverged(run, tmp_path):
  flags = '--alphas=2', '--learning_rate=1e10', f'--out_dir={tmp_path}'
  code, _, err = run(*_QUICK, *flags)
  assert code == 1
  assert 'error: alpha=2.0-target_propagation-seed=0: the loss became' in err
  assert 'with alpha = 2 and learning_rate = 1e+10' in err
  assert 'Traceback' not in err


def _parse(*args):
  return config.parse(mnist_pruning.Settings, args, presets.PRESETS)


@pytest.fixture(scope='module')
def data():
  """A few images of the size of MNIST's."""
  images = np.zeros([60, 28, 28, 1], np.uint8)
  images[:, 0, 0] = 255  # The pixel in the corner alone is bright.
  split = in_memory.Split(images, np.zeros([60], np.int32))
  return in_memory.Dataset('corner', split, split, split, 10)


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--alphas=1,0.5'], r'--alphas=1,0.5: alpha must be .* got 0.5'),
    (['--alphas=two'], r'--alphas=two: must be a number'),
    (['--alphas='], r'--alphas=: must not be empty'),
    (['--kept=0,1'], r'--kept=0,1: density must be in \(0, 1\]'),
    (['--kept=1.5'], r'--kept=1.5: density must be in \(0, 1\]'),
    (['--kept=1e-6,1'], r'--kept=1e-06 keeps next to no weight'),
    (['--update_rule=backprop'], r'one of target_propagation, chain_rule'),
    (['--scope=row'], r'--scope=row: must be one of layer, global'),
    (['--scope='], r'--scope=: must not be empty'),
    (['--seeds=1000000000000'], r'--seeds=1000000000000: must be between'),
    (['--seeds=0'], r'--seeds=0: must be between 1'),
    (['--max_shift=28'], r'--max_shift=28 moves images of 28 x 28'),
    (['--max_shift=1000000000000'], r'moves images .* out of sight'),
    (['--phi_decay_schedule=linear'], r'constant, cosine or a fraction'),
    (['--phi_decay_scale=w=x'], r'must be pattern=factor'),
    (['--phi_decay_scale=conv=2'], r"'conv' matches none of the weights"),
    (
      ['--phi_decay_warmup_steps=1000000'],
      r'phi_decay_warmup_steps=1000000 must be below',
    ),
    (
      ['--weight_decay=0.1', '--update_rule=chain_rule'],
      r'chain_rule does not see',
    ),
  ],
)
def test_bad_flags_stop_before_training(data, args, message):
  with pytest.raises(ValueError, match=message):
    settings = _parse(*args)
    for job in mnist_pruning.make_jobs(settings):
      mnist_pruning.make_functions(settings, job.alpha, job.update_rule, data)


def test_the_data_must_fit():
  with pytest.raises(ValueError, match='no_such_set'):
    settings_lib.load_in_memory(_parse('--dataset=no_such_set'), 60)
  with pytest.raises(ValueError, match='more than the 4000 training examples'):
    settings_lib.load_in_memory(_parse(), 10**12)


def test_presets_yield_to_flags_given_by_hand():
  settings = _parse('--preset=paper', '--seeds=2')
  jobs = mnist_pruning.make_jobs(settings)
  assert settings.steps == 50_000
  assert [(job.alpha, job.seed) for job in jobs[:3]] == [(1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize('name', presets.PRESETS)
def test_presets_set_flags_that_exist(name):
  preset = presets.PRESETS[name]
  settings = _parse(f'--preset={name}')
  for flag, value in preset.items():
    assert getattr(settings, flag) == value, flag
  jobs = mnist_pruning.make_jobs(settings)
  assert len(jobs) == len(preset['alphas']) * preset['seeds']


@pytest.mark.parametrize(('max_shift', 'rows'), [(0, [0]), (1, [0, 1, 28, 29])])
def test_training_images_are_moved(data, max_shift, rows):
  settings = _parse(f'--max_shift={max_shift}', '--steps=3')
  functions = mnist_pruning.make_functions(settings, 2.0, 'chain_rule', data)
  images, labels = data.train
  state = functions.init(jax.random.key(0), jax.random.key(1), images[:1])
  before = np.asarray(state.phi['initial_linear']['w'])
  indices = np.arange(180, dtype=np.int32).reshape(3, 60) % 60
  state, _ = functions.run_steps(state, (images, labels), indices)
  changed = np.any(
    np.asarray(state.phi['initial_linear']['w']) != before, axis=1
  )
  assert np.flatnonzero(changed).tolist() == rows


def test_other_networks_are_trained_if_the_images_fit(data):
  settings = _parse('--network=wrn_10_1', '--steps=3')
  functions = mnist_pruning.make_functions(settings, 2.0, 'chain_rule', data)
  key = jax.random.key(0)
  state = jax.eval_shape(functions.init, key, key, data.train.images[:1])
  assert 'group_0_block_0/conv_0' in state.phi
  split = data.train._replace(images=data.train.images[:, :5, :5])
  with pytest.raises(ValueError, match='lenet_5 takes .* at least 16'):
    mnist_pruning.make_functions(
      _parse('--network=lenet_5'), 2.0, 'chain_rule', data._replace(train=split)
    )


def test_little_decay_is_said(capsys):
  def said(*args):
    arguments = ['--alphas=1,2', '--steps=1000', *args]
    settings = config.parse(mnist_pruning.Settings, arguments, presets.PRESETS)
    mnist_pruning.warn_of_little_decay(settings)
    return capsys.readouterr().err

  assert said().startswith('There is no decay of phi, as in the paper.')
  assert said('--phi_decay=0.004').startswith(
    'The decay of phi has 8.0 nats at alpha = 2. With 10 nats of'
  )
  assert ' 2.0 nats at alpha = 2, 3.0 nats at alpha = 3.' in said(
    '--phi_decay=0.001', '--alphas=2,3'
  )
  assert said('--phi_decay=0.006') == ''
  assert said('--phi_decay_norm=l1') == ''


def test_seeds_and_rules_make_the_runs():
  settings = _parse(
    '--alphas=1,2,2.0', '--update_rule=target_propagation,chain_rule,chain_rule'
  )
  settings = dataclasses.replace(settings, seeds=2)
  assert [tuple(job) for job in mnist_pruning.make_jobs(settings)] == [
    (1.0, 'target_propagation', 0),
    (1.0, 'target_propagation', 1),
    (2.0, 'target_propagation', 0),
    (2.0, 'target_propagation', 1),
    (2.0, 'chain_rule', 0),
    (2.0, 'chain_rule', 1),
  ]

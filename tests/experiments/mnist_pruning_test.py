"""Tests of the binaries, run as a user runs them."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl import flags
import jax
import numpy as np
import optax
import pytest

from experiments import common
from experiments import mnist_pruning
from experiments import optimiser_flags
from experiments.presets import mnist_pruning as presets
from powerprop_jax import power

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
  """Lets one process use what another has compiled."""
  return os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('cache')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


@pytest.fixture
def start(_environment):
  """Starts a binary as a user does, with warnings as errors."""
  return functools.partial(_start, _environment)


@pytest.fixture
def run(_environment):
  """Runs a binary to its end; returns its exit status, output and errors."""

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


def test_mnist_pruning_writes_and_prints_its_results(run, tmp_path):
  args = (*_QUICK, f'--out_dir={tmp_path}')
  code, out, err = run(*args)
  assert code == 0, err
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

  # One run is lost; the same command computes it again, and it alone.
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

  code, _, err = run(*args, '--learning_rate=0.2')
  assert code == 2
  assert 'learning_rate: 0.1 there, 0.2 now' in err


def test_mnist_pruning_stops_and_keeps_what_is_finished(start, tmp_path):
  process = start(
    '--alphas=1',
    '--seeds=3',
    '--steps=2000',
    '--kept=0.5,1',
    f'--out_dir={tmp_path}',
  )
  deadline = time.time() + 240
  while not list(tmp_path.glob('runs/*.json')) and time.time() < deadline:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)  # Ctrl-C takes the same way.
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130, err
  assert 'The same command continues' in err
  done = len(list(tmp_path.glob('runs/*.json')))
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert np.shape(summary['results']['1.0']['mean']) == (2,)
  assert np.shape(summary['results']['1.0']['test_accuracy']) == (2, done)


def test_mnist_pruning_says_where_it_diverged(run, tmp_path):
  code, _, err = run(*_QUICK, '--learning_rate=1e10', f'--out_dir={tmp_path}')
  assert code == 1
  assert 'error: alpha=2.0-target_propagation-seed=0: the loss became' in err
  assert 'with alpha = 2 and learning_rate = 1e+10' in err
  assert 'Traceback' not in err


def _flags(*args):
  values = flags.FlagValues()
  mnist_pruning.define_flags(values)
  values(['test', *args])
  return values


@pytest.mark.parametrize(
  ('flag', 'value', 'message'),
  [
    ('alphas', ['1', '0.5'], r'--alphas=1,0.5: alpha must be .* got 0.5'),
    ('alphas', ['nan'], r'--alphas=nan: alpha must be'),
    ('alphas', ['two'], r'--alphas=two: could not convert'),
    ('kept', ['0', '1'], r'--kept=0,1: density must be in \(0, 1\]'),
    ('kept', ['1.5'], r'--kept=1.5: density must be in \(0, 1\]'),
    ('kept', ['1e-6', '1'], r'--kept=1e-06 keeps no weight'),
    ('update_rule', ['backprop'], r'among target_propagation, chain_rule'),
    ('dataset', 'no_such_set', r'no_such_set'),
    ('scope', ['row'], r"layer, global or both, got 'row'"),
    ('batch_size', 5000, r'more than the 4000 training examples'),
    ('phi_decay_schedule', 'linear', r'constant, cosine or a fraction'),
    (
      'phi_decay_warmup_steps',
      10**9,
      r'phi_decay_warmup_steps=1000000000 must',
    ),
    ('phi_decay_scale', ['w=x'], r'phi_decay_scale takes pattern=factor'),
    ('out_dir', '/dev/null/results', r'--out_dir=/dev/null/results can not'),
  ],
)
def test_bad_flags_stop_before_training(tmp_path, flag, value, message):
  values = _flags(f'--out_dir={tmp_path}', '--phi_decay=1e-4')
  setattr(values, flag, value)
  with pytest.raises(ValueError, match=message):
    _, settings = mnist_pruning.read_flags(values)
    mnist_pruning.load_data(values)
    common.prepare_out_dir(values.out_dir, settings)


@pytest.mark.parametrize('flag', ['--optimizer=agd', '--seeds=0', '--preset=x'])
def test_unknown_choices_list_what_exists(flag):
  with pytest.raises(flags.IllegalFlagValueError) as e:
    _flags(flag)
  if 'optimizer' in flag:
    assert 'adamw' in str(e.value)


def test_presets_yield_to_flags_given_by_hand():
  values = _flags('--preset=paper', '--seeds=2')
  jobs, settings = mnist_pruning.read_flags(values)
  assert settings['steps'] == 50_000
  assert [(job.alpha, job.seed) for job in jobs[:3]] == [(1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize('name', presets.PRESETS)
def test_presets_set_flags_that_exist(name):
  preset = presets.PRESETS[name]
  jobs, settings = mnist_pruning.read_flags(_flags(f'--preset={name}'))
  assert len(jobs) == len(preset['alphas']) * preset['seeds']
  for flag in preset.keys() - {'alphas', 'seeds', 'kept'}:
    assert settings[flag] == preset[flag], flag


@pytest.mark.parametrize(('max_shift', 'rows'), [(0, [0]), (1, [0, 1, 28, 29])])
def test_training_images_are_moved(max_shift, rows):
  values = _flags(f'--max_shift={max_shift}', '--steps=3')
  _, settings = mnist_pruning.read_flags(values)
  functions = mnist_pruning.make_functions(2.0, 'chain_rule', settings, 10)
  # The pixel in the corner alone is bright.
  images = np.zeros([60, 28, 28, 1], np.uint8)
  images[:, 0, 0] = 255
  state = functions.init(jax.random.key(0), jax.random.key(1), images[:1])
  before = np.asarray(state.phi['initial_linear']['w'])
  data = images, np.zeros([60], np.int32)
  indices = np.arange(180, dtype=np.int32).reshape(3, 60) % 60
  state, _ = functions.run_steps(state, data, indices)
  changed = np.any(
    np.asarray(state.phi['initial_linear']['w']) != before, axis=1
  )
  assert np.flatnonzero(changed).tolist() == rows


def test_seeds_and_rules_make_the_runs():
  jobs = mnist_pruning.parse_jobs(
    ['1', '2', '2.0'], ['target_propagation', 'chain_rule'], 2
  )
  assert [(j.alpha, j.update_rule, j.seed) for j in jobs] == [
    (1.0, 'target_propagation', 0),
    (1.0, 'target_propagation', 1),
    (2.0, 'target_propagation', 0),
    (2.0, 'target_propagation', 1),
    (2.0, 'chain_rule', 0),
    (2.0, 'chain_rule', 1),
  ]


_PHI = {'linear': {'w': np.array([2.0, -0.5], np.float32)}}
_GRADS = {'linear': {'w': np.array([1.0, 3.0], np.float32)}}


def _update(steps=1, **flag_values):
  values = {name: _flags()[name].value for name in optimiser_flags.NAMES}
  values = {'update_rule': 'target_propagation', **values, **flag_values}
  tx = optimiser_flags.make_tx(power.power_transform(2.0), steps=100, **values)
  state, updates = tx.init(_PHI), None
  for _ in range(steps):
    updates, state = tx.update(_GRADS, state, _PHI)
  assert updates is not None
  return np.asarray(updates['linear']['w'])


def test_weight_decay_acts_on_theta():
  # theta = (4, -0.25), and the Jacobian 2 |phi| = (4, 1).
  np.testing.assert_allclose(
    _update(weight_decay=0.5), [-0.1 * (1 + 2) * 4, -0.1 * (3 - 0.125)], 1e-6
  )


@pytest.mark.parametrize(
  ('schedule', 'step', 'factor'),
  [
    ('constant', 80, 1.0),
    ('cosine', 51, 0.5),
    ('0.7', 70, 1.0),
    ('0.7', 71, 0.0),
  ],
)
def test_phi_decay_acts_on_phi(schedule, step, factor):
  plain = np.array([-0.1 * 4, -0.1 * 3])
  updates = _update(step, phi_decay=1e-2, phi_decay_schedule=schedule)
  expected = plain - factor * 1e-2 * np.array([2.0, -0.5])
  np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.parametrize(('norm', 'factor'), [(1.0, 0.1**0.5), (4.0, 1.0)])
def test_gradients_are_clipped_at_theta(norm, factor):
  updates = _update(clip_norm=norm, phi_decay=1e-2)
  decay = 1e-2 * np.array([2.0, -0.5])
  expected = -0.1 * factor * np.array([4.0, 3.0]) - decay
  np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.parametrize(('step', 'factor'), [(1, 0.1), (5, 0.5), (11, 1.0)])
def test_phi_decay_warms_up(step, factor):
  plain = np.array([-0.1 * 4, -0.1 * 3])
  updates = _update(step, phi_decay=1e-2, phi_decay_warmup_steps=10)
  expected = plain - factor * 1e-2 * np.array([2.0, -0.5])
  np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_l1_decay_of_phi_stops_at_zero():
  plain = np.array([-0.1 * 4, -0.1 * 3])
  updates = _update(phi_decay=1.0, phi_decay_norm='l1')
  np.testing.assert_allclose(updates, plain - [1.0, -0.5], rtol=1e-6)


def test_layers_can_have_a_phi_decay_of_their_own():
  plain = np.array([-0.1 * 4, -0.1 * 3])
  scale = ['other=5', 'line.r/w=2', 'linear=7']
  updates = _update(phi_decay=1e-2, phi_decay_scale=scale)
  np.testing.assert_allclose(updates, plain - [4e-2, -1e-2], rtol=1e-5)
  with pytest.raises(ValueError, match="phi_decay_scale .* got 'linear'"):
    _update(phi_decay=1e-2, phi_decay_scale=['linear'])


def test_chain_rule_gives_the_optimiser_the_gradient_at_phi():
  adam = optax.adam(0.1)
  at_phi = {'linear': {'w': np.array([4.0, 3.0], np.float32)}}
  expected, _ = adam.update(at_phi, adam.init(_PHI), _PHI)
  updates = _update(update_rule='chain_rule', optimizer='adam')
  np.testing.assert_allclose(updates, expected['linear']['w'], rtol=1e-6)


@pytest.mark.parametrize('optimizer', sorted(optimiser_flags.OPTIMISERS))
def test_every_optimiser_can_be_built_with_decay(optimizer):
  assert np.isfinite(_update(optimizer=optimizer, weight_decay=1e-3)).all()


def test_flags_that_do_not_fit_the_optimiser():
  with pytest.raises(ValueError, match='adam takes no momentum'):
    _update(optimizer='adam', momentum=0.9)
  with pytest.raises(ValueError, match='chain_rule does not see'):
    _update(update_rule='chain_rule', weight_decay=0.1)

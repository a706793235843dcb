"""Tests of the sparse training binary: its methods, devices and restarts."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

from absl import flags
import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from experiments import methods
from experiments import sparse_problem
from experiments import sparse_training
from powerprop_jax import checkpoint
from powerprop_jax import datasets
from powerprop_jax import leaves
from powerprop_jax import masks as masks_lib
from powerprop_jax import power

_ROOT = pathlib.Path(__file__).parent.parent
_QUICK = (
  '--steps=40',
  '--update_every=10',
  '--update_stop=30',
  '--batch_size=80',
  '--checkpoint_every=10',
)
_SIZE = 784 * 300 + 300 * 100 + 100 * 10


@pytest.fixture(autouse=True)
def _handlers():
  """Training that ends in an error leaves its signal handlers."""
  handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
  yield
  for number, handler in handlers.items():
    signal.signal(number, handler)


@pytest.fixture(scope='module')
def data():
  return datasets.load('mnist_5k')


@pytest.fixture(scope='module', autouse=True)
def _cache(tmp_path_factory):
  """Lets this process and others use what one has compiled."""
  options = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('cache')),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
  }
  before = {name: getattr(jax.config, name) for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield {name.upper(): str(value) for name, value in options.items()}
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def start(_cache):
  """Starts the binary."""

  def start(*args, count=1):
    # Compiling is most of these runs; unoptimised it takes half the time.
    options = (
      f'--xla_force_host_platform_device_count={count}'
      ' --xla_backend_optimization_level=0'
    )
    module = 'experiments.sparse_training'
    return subprocess.Popen(
      [sys.executable, '-W', 'error', '-m', module, *args],
      cwd=_ROOT,
      env=os.environ | _cache | {'XLA_FLAGS': options},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


def settings_of(*args):
  values = flags.FlagValues()
  sparse_training.define_flags(values)
  values(['test', *args])
  names = sparse_training._RUN_FLAGS
  return sparse_problem.stretched({name: values[name].value for name in names})


def prepare(data, *args):
  settings = settings_of(*args)
  return settings, sparse_problem.make_problem(settings, data, 0)


def train(data, out_dir, *args, on_collapse='error'):
  """Trains in this process; returns the progress and the summary."""
  settings, problem = prepare(data, *args)
  feed = problem.make_feed()
  out_dir.mkdir(exist_ok=True)
  result = sparse_training.train(
    problem,
    feed,
    checkpoint.open_manager(out_dir / 'checkpoints', settings),
    out_dir,
    settings,
    checkpoint_every=1000,
    on_collapse=on_collapse,
  )
  assert result is not None
  progress, speed = result
  summary = sparse_training.summarise(
    problem, progress, {'test_accuracy': 0.5}, speed, settings['steps']
  )
  return progress, json.loads(json.dumps(summary))


def kept(state, which='forward'):
  mask = getattr(state.masks, which)
  return int(masks_lib.count(mask, leaves.weights(state.phi))[0])


def losses(out_dir):
  lines = (out_dir / 'metrics.jsonl').read_text().splitlines()
  return [(line['step'], line['loss']) for line in map(json.loads, lines)]


def arrays(out_dir):
  """phi and the masks of the last checkpoint, by path."""
  found = checkpoint.load(out_dir / 'checkpoints').arrays
  return {
    k: np.asarray(x)
    for k, x in found.items()
    if k.startswith(('state/phi', 'state/masks', 'ever'))
  }


def summary_of(out_dir):
  return json.loads((out_dir / 'summary.json').read_text())


# --- methods ------------------------------------------------------------------


@pytest.mark.parametrize('method', methods.METHODS)
def test_every_method_trains(data, tmp_path, method):
  args = (f'--method={method}', '--sparsity=0.95', *_QUICK)
  progress, summary = train(data, tmp_path, *args)
  state = progress.state
  wanted = _SIZE if method == 'dense' else round(0.05 * _SIZE)
  assert kept(state) == wanted
  assert summary['sparsity']['total'] == pytest.approx(1 - wanted / _SIZE)
  wide = round(0.15 * _SIZE) if method == 'top_kast' else wanted
  assert kept(state, 'backward') == wide
  for a, b in zip(*map(jax.tree.leaves, state.masks)):
    assert not (a & ~b).any()  # A is inside B.
  explored = round(summary['explored'] * _SIZE)
  if method in ('set', 'rigl'):
    assert wanted < explored < 2 * wanted
  elif method == 'magnitude':
    assert explored == _SIZE  # It starts dense.
  elif method != 'top_kast':
    assert explored == wanted
  inference = summary['inference_flops']
  assert inference['relative'] == pytest.approx(wanted / _SIZE, abs=0.01)
  training_flops = summary['training_flops']['relative']
  assert inference['relative'] <= training_flops * (1 + 1e-9) <= 1 + 1e-9
  found = losses(tmp_path)
  assert [step for step, _ in found][-1] == state.step == 40
  assert np.isfinite([loss for _, loss in found]).all()
  assert len(summary['fingerprint']) == 64


def test_a_sparse_checkpoint_keeps_its_mask(data, tmp_path):
  args = ('--method=static', '--sparsity=0.95', *_QUICK[2:], '--steps=2')
  before, _ = train(data, tmp_path / 'a', *args)
  args = (*args, f'--init_from={tmp_path / "a" / "checkpoints"}', '--alpha=3')
  settings, problem = prepare(data, *args)
  manager = checkpoint.open_manager(tmp_path / 'b', settings)
  step, progress, choose = sparse_training.begin(
    problem, manager, settings['init_from']
  )
  checkpoint.close(manager)
  assert (step, int(progress.state.step), choose) == (0, 0, False)
  jax.tree.map(
    np.testing.assert_array_equal, progress.state.masks, before.state.masks
  )
  # The weights are the same, of another phi.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
    problem.transform.to_theta(progress.state.phi),
    power.power_transform(2.0).to_theta(before.state.phi),
  )


def test_a_dense_checkpoint_is_made_sparse(data, tmp_path):
  args = ('--sparsity=0.95', *_QUICK[2:], '--steps=2')
  train(data, tmp_path / 'a', '--method=dense', *args)
  source = f'--init_from={tmp_path / "a" / "checkpoints"}'
  settings, problem = prepare(data, '--method=snip', source, *args)
  manager = checkpoint.open_manager(tmp_path / 'b', settings)
  _, progress, choose = sparse_training.begin(
    problem, manager, settings['init_from']
  )
  checkpoint.close(manager)
  assert choose
  found = arrays(tmp_path / 'a')['state/phi/linear_1/w']
  np.testing.assert_array_equal(progress.state.phi['linear_1']['w'], found)


# --- errors -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (('--regrow=zero',), 'regrow=zero with alpha = 2: a weight at zero never'),
    (('--sparsity=1',), r'sparsity must be in \[0, 1\), got 1'),
    (('--sparsity=0.999999',), 'The largest possible sparsity is 0.99998'),
    (
      ('--method=top_kast', '--sparsity=0.8', '--backward_sparsity=0.9'),
      'backward_sparsity=0.9 must not be above --sparsity=0.8',
    ),
    (('--steps=40',), 'masks can not be updated from step 100 to step 30'),
    (('--distribution=even',), "pattern=sparsity,..., got 'even'"),
    (('--distribution=conv=0.5',), "pattern 'conv' matches no weight"),
  ],
)
def test_errors_come_before_training(data, args, message):
  with pytest.raises(ValueError, match=message):
    prepare(data, *args)


def test_a_batch_that_does_not_divide(data, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  with pytest.raises(ValueError, match='that do are 96 and 104'):
    prepare(data, '--batch_size=100')


def test_a_lost_layer_is_an_error_or_a_warning(caplog):
  theta = {'a': {'w': np.ones([2, 2])}, 'b': {'w': np.ones([2, 2])}}
  mask = {'a': {'w': np.ones([2, 2], bool)}, 'b': {'w': np.zeros([2, 2], bool)}}
  with pytest.raises(ValueError, match='no weight is left in b/w: nothing'):
    sparse_training.check_collapse(mask, theta, 'error')
  sparse_training.check_collapse(mask, theta, 'warn')
  assert 'No weight is left in b/w' in caplog.text
  sparse_training.check_collapse({**mask, 'b': mask['a']}, theta, 'error')


@pytest.mark.parametrize(
  ('start', 'due', 'every', 'wanted'),
  [
    (0, (), 1000, [100, 200, 250]),
    (0, (30, 60), 1000, [30, 60, 100, 200, 250]),
    (0, (), 70, [70, 100, 140, 200, 210, 250]),
    (140, (), 70, [200, 210, 250]),  # As if it had not been stopped.
  ],
)
def test_segments_end_at_the_same_steps(start, due, every, wanted):
  found = []
  while start < 250:
    start = sparse_training.next_stop(start, 250, lambda s: s in due, every)
    found.append(start)
  assert found == wanted


# --- restarts -----------------------------------------------------------------

_RESTARTED = (
  '--method=rigl',
  '--sparsity=0.8',
  '--dense_layers=linear_1,logits',  # To compile less.
  '--steps=60',
  '--update_every=20',
  '--batch_size=80',
  '--momentum=0.9',
  '--checkpoint_every=10',
)


@pytest.fixture(scope='module')
def uninterrupted(start, tmp_path_factory):
  out_dir = tmp_path_factory.mktemp('uninterrupted')
  out, err = start(*_RESTARTED, f'--out_dir={out_dir}').communicate(timeout=200)
  assert 'fingerprint' in out, err
  return out_dir


def saved(out_dir):
  """The steps of which there are checkpoints, and whether one is written."""
  names = [x.name for x in out_dir.glob('checkpoints/*')]
  steps = [int(name) for name in names if name.isdigit()]
  return max(steps, default=0), any('tmp' in name for name in names)


def wait_until(process, condition):
  deadline = time.time() + 120
  while process.poll() is None and not condition():
    assert time.time() < deadline
    time.sleep(0.0005)


def test_a_killed_run_ends_as_if_it_had_not_been(
  start, uninterrupted, tmp_path
):
  args = (*_RESTARTED, f'--out_dir={tmp_path}')
  rng, killed, writing = random.Random(0), 0, 0
  for i in range(4):
    before, _ = saved(tmp_path)
    process = start(*args)
    if i % 2:  # While a checkpoint is being written.
      wait_until(process, lambda: saved(tmp_path)[1])
    else:
      wait_until(process, lambda b=before: saved(tmp_path)[0] > b)
      time.sleep(0.05 * rng.random())
    writing += saved(tmp_path)[1]
    process.kill()
    process.communicate()
    killed += process.returncode == -signal.SIGKILL
  assert killed >= 3
  assert writing >= 1
  process = start(*args)
  _, err = process.communicate(timeout=200)
  assert process.returncode == 0, err
  found, wanted = summary_of(tmp_path), summary_of(uninterrupted)
  for name in ('fingerprint', 'test_accuracy', 'explored', 'sparsity'):
    assert found[name] == wanted[name]
  # No step is missing in the log, and none is there twice.
  assert losses(tmp_path) == losses(uninterrupted)


def test_a_stopped_run_goes_on(start, uninterrupted, tmp_path):
  args = (*_RESTARTED, f'--out_dir={tmp_path}')
  process = start(*args)
  wait_until(process, lambda: saved(tmp_path)[0] > 0 or saved(tmp_path)[1])
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130, err
  assert 'Interrupted. The same command goes on.' in err
  assert 0 < saved(tmp_path)[0] < 60
  assert not saved(tmp_path)[1]
  assert not (tmp_path / 'summary.json').exists()

  process = start(*args, '--alpha=3', '--sparsity=0.7')
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2
  assert 'alpha: 2.0 there, 3.0 now; sparsity: 0.8 there, 0.7 now' in err
  assert 'Traceback' not in err

  process = start(*args)
  _, err = process.communicate(timeout=200)
  assert process.returncode == 0, err
  wanted = summary_of(uninterrupted)['fingerprint']
  assert summary_of(tmp_path)['fingerprint'] == wanted


# --- devices ------------------------------------------------------------------


def test_any_number_of_devices_trains_alike(start, uninterrupted, tmp_path):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  hosts = (f'--coordinator=localhost:{port}', '--num_processes=2')
  eight, two = tmp_path / 'eight', tmp_path / 'two'
  processes = [
    start(*_RESTARTED, f'--out_dir={eight}', count=8),
    *(
      start(
        *_RESTARTED,
        *hosts,
        f'--process_index={i}',
        f'--out_dir={two}',
        count=2,
      )
      for i in range(2)
    ),
  ]
  for process in processes:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
  wanted = arrays(uninterrupted)
  for out_dir in (eight, two):
    assert [x[0] for x in losses(out_dir)] == [
      x[0] for x in losses(uninterrupted)
    ]
    np.testing.assert_allclose(
      losses(out_dir), losses(uninterrupted), rtol=0, atol=1e-5
    )
    found = arrays(out_dir)
    assert found.keys() == wanted.keys()
    for path, x in found.items():
      if path.startswith('state/phi'):
        np.testing.assert_allclose(x, wanted[path], rtol=0, atol=1e-5)
      else:
        np.testing.assert_array_equal(x, wanted[path], path)

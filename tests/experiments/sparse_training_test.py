"""Tests of the program `sparse_training`: methods, devices and restarts."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import haiku as hk
import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from experiments import sparse_training
from experiments.presets import sparse_training as presets
from experiments.support import config
from experiments.support import evaluation
from experiments.support import events
from experiments.support import methods
from experiments.support import optimisers
from experiments.support import problem as problem_lib
from experiments.support import trained
from powerprop_jax import leaves
from powerprop_jax import paths
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax.data import in_memory
from powerprop_jax.data import streams
from powerprop_jax.models import networks
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import report as report_lib
from powerprop_jax.training import checkpoint
from powerprop_jax.training import loop

_ROOT = pathlib.Path(__file__).parents[2]
_QUICK = (
  '--steps=40',
  '--update_every=10',
  '--update_stop=30',
  '--batch_size=80',
  '--checkpoint_every=10',
)
_SIZE = 784 * 300 + 300 * 100 + 100 * 10


@pytest.fixture(scope='module')
def data():
  return in_memory.load('mnist_5k')


@pytest.fixture
def small_data(monkeypatch):
  """Random images, and a network `tiny` for them, with BatchNorm."""

  def tiny(images, is_training, num_classes, cross_replica_axis=None):
    x = hk.Conv2D(4, 3, with_bias=False, name='initial_conv')(images)
    norm = hk.BatchNorm(True, True, 0.9, cross_replica_axis=cross_replica_axis)
    x = hk.Flatten()(jax.nn.relu(norm(x, is_training)))
    return hk.Linear(num_classes, name='logits')(x)

  monkeypatch.setitem(networks.NETWORKS, 'tiny', tiny)
  rng = np.random.default_rng(0)
  images = rng.integers(256, size=[48, 6, 6, 1], dtype=np.uint8)
  split = in_memory.Split(images, np.arange(48, dtype=np.int32) % 10)
  return in_memory.Dataset('small', split, split, split, 10)


@pytest.fixture(scope='module', autouse=True)
def _cache(tmp_path_factory):
  """A cache with which no process compiles what another has compiled."""
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
  """Starts the program."""

  def start(*args, count=1):
    options = os.environ['XLA_FLAGS']
    options += f' --xla_force_host_platform_device_count={count}'
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
  settings = config.parse(sparse_training.Settings, args, presets.PRESETS)
  return problem_lib.stretched(settings)


def prepare(data, *args):
  settings = settings_of(*args)
  return settings, problem_lib.make(settings, data)


def open_manager(path, settings):
  return checkpoint.open_manager(
    path, config.deciding(settings), best=evaluation.BEST
  )


def run(problem, settings, out_dir):
  """Trains a problem that was built, in this process."""
  out_dir.mkdir(exist_ok=True)
  manager = open_manager(out_dir / 'checkpoints', settings)
  try:
    return sparse_training.train(
      problem,
      problem.make_feed(),
      manager,
      settings,
      paths.resolve(str(out_dir)),
    )
  finally:
    checkpoint.close(manager)


def train(data, out_dir, *args):
  """Trains in this process; returns the progress and the summary."""
  settings, problem = prepare(data, *args)
  result = run(problem, settings, out_dir)
  assert result is not None
  progress, timing = result
  summary = sparse_training.summarise(
    problem, progress, {'test_accuracy': 0.5}, timing, settings.steps
  )
  return progress, json.loads(json.dumps(summary))


def start_or_resume(problem, settings, path):
  """The progress from which a run with checkpoints in a folder goes on."""
  manager = open_manager(path, settings)
  try:
    return sparse_training.start_or_resume(problem, manager, settings.init_from)
  finally:
    checkpoint.close(manager)


def kept(state, which='forward'):
  mask = getattr(state.masks, which)
  return int(masks_lib.count(mask, leaves.weight_mask(state.phi))[0])


def losses(out_dir):
  return [(x['step'], x['loss']) for x in lines_of(out_dir) if 'loss' in x]


def lines_of(out_dir):
  lines = (out_dir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


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
  elif method in ('magnitude', 'acdc'):
    assert explored == _SIZE  # They start dense.
  elif method != 'top_kast':
    assert explored == wanted
  inference = summary['inference_flops']
  assert inference['relative'] == pytest.approx(wanted / _SIZE, abs=0.01)
  training_flops = summary['training_flops']['relative']
  _, problem = prepare(data, *args)
  planned = problem.method.training_flops(problem.layer_flops)
  assert summary['training_flops']['absolute'] == pytest.approx(40 * planned)
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
  start = start_or_resume(problem, settings, tmp_path / 'b')
  progress = start.progress
  assert (start.step, int(progress.state.step), start.choose) == (0, 0, False)
  jax.tree.map(
    np.testing.assert_array_equal, progress.state.masks, before.state.masks
  )
  # The weights are the same, and phi is another.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
    problem.transform.to_theta(progress.state.phi),
    power.power_transform(2.0).to_theta(before.state.phi),
  )


_TINY = ('--network=tiny', '--batch_size=8', '--steps=12', '--update_every=4')


@pytest.mark.parametrize('method', ['set', 'rigl', 'top_kast'])
def test_layers_keep_their_numbers_of_weights(small_data, tmp_path, method):
  # The flags ask for other values of two of the three densities.
  args = (*_TINY, '--method=static', '--distribution=conv=0.5,logits=0.9')
  before, source = train(small_data, tmp_path / 'a', *args)
  args = (*_TINY, f'--method={method}', '--sparsity=0.4', '--distribution=erk')
  source = f'--init_from={tmp_path / "a" / "checkpoints"}'
  after, summary = train(small_data, tmp_path / 'b', *args, source)
  old, new = (
    report_lib.sparsity_report(p.state.masks.forward, p.state.phi)['layers']
    for p in (before, after)
  )
  assert [r['kept'] for r in new] == [r['kept'] for r in old] == [18, 144]
  changed = [
    (a != b).any()
    for a, b in zip(
      jax.tree.leaves(before.state.masks), jax.tree.leaves(after.state.masks)
    )
  ]
  assert any(changed)
  # The convolution has 36 weights for 36 places, the outputs 1440: half of
  # the former and a tenth of the latter are in use.
  sparse = 2 * (36 * 18 + 144)
  dense = 2 * (36 * 36 + 1440)
  wanted = {
    'set': 3 * sparse,
    'rigl': (3 * 4 * sparse + 2 * sparse + dense) / 5,
    # 0.7 of the 1476 weights are updated, 36 of them in the convolution.
    'top_kast': 2 * sparse + 2 * (36 * 36 + round(0.7 * 1476) - 36),
  }[method]
  assert summary['training_flops']['relative'] == pytest.approx(
    wanted / (3 * dense)
  )


def test_gradual_pruning_of_a_sparse_network_costs_less():
  theta = {'a': {'w': np.ones([30, 30])}, 'b': {'w': np.ones([10, 10])}}
  method = methods.make_plan(
    methods.Method(method='magnitude', update_every=4),
    theta,
    moves_zeros=False,
    steps=12,
    fresh=lambda key: theta,
  )
  end = {'a/w': 0.1, 'b/w': 0.4}
  densities = methods.Densities(end, end, {'a/w': 0.5, 'b/w': 1.0})
  # Pruned at 4 and 8 of 12 steps; 7/8 of it is done at 4, from a dense network.
  a = (0.5 + (1 - 7 / 8 * 0.9) + 0.1) / 3
  b = (1.0 + (1 - 7 / 8 * 0.6) + 0.4) / 3
  found = method.training_flops({'a/w': 100.0, 'b/w': 10.0}, densities)
  assert found == pytest.approx(3 * (100 * a + 10 * b))


def test_dense_phases_cost_as_much_as_dense_training():
  theta = {'a': {'w': np.ones([10, 10])}}
  method = methods.make_plan(
    methods.Method(method='acdc', sparsity=0.9, update_every=10),
    theta,
    moves_zeros=False,
    steps=80,
    fresh=lambda key: theta,
  )
  # Phases are sparse from 10 to 20, from 30 to 40 and from 50 on. An update at
  # 60 would start a dense phase, with which the run must not end.
  share = 50 / 80
  expected = 3 * 100.0 * (share * 0.1 + (1 - share))
  assert method.training_flops({'a/w': 100.0}) == pytest.approx(expected)


def test_statistics_come_with_the_weights(small_data, tmp_path):
  settings, problem = prepare(small_data, *_TINY)
  state = problem.init()
  assert jax.tree.leaves(state.model_state)
  state = state._replace(
    model_state=jax.tree.map(lambda x: x + 3, state.model_state)
  )
  manager = open_manager(tmp_path / 'a', settings)
  progress = sparse_training.Progress(state, state.masks.forward)
  checkpoint.save(manager, 7, progress)
  checkpoint.close(manager)
  settings = dataclasses.replace(settings, init_from=str(tmp_path / 'a'))
  found = start_or_resume(problem, settings, tmp_path / 'b').progress
  jax.tree.map(
    np.testing.assert_array_equal, found.state.model_state, state.model_state
  )


def test_a_dense_checkpoint_is_made_sparse(data, tmp_path):
  args = ('--sparsity=0.95', *_QUICK[2:], '--steps=2')
  train(data, tmp_path / 'a', '--method=dense', *args)
  source = f'--init_from={tmp_path / "a" / "checkpoints"}'
  settings, problem = prepare(data, '--method=snip', source, *args)
  start = start_or_resume(problem, settings, tmp_path / 'b')
  assert start.choose
  found = arrays(tmp_path / 'a')['state/phi/linear_1/w']
  np.testing.assert_array_equal(
    start.progress.state.phi['linear_1']['w'], found
  )


def test_bfloat16_activations_leave_the_parameters_alone(small_data, tmp_path):
  args = (*_TINY, '--method=static', '--momentum=0.9')
  train(small_data, tmp_path / 'full', *args)
  half, _ = train(small_data, tmp_path / 'half', *args, '--bfloat16')
  types = {x.dtype.name for x in jax.tree.leaves(half.state.phi)}
  assert types == {'float32'}
  (_, expected), (_, loss) = losses(tmp_path / 'full') + losses(
    tmp_path / 'half'
  )
  assert loss == pytest.approx(expected, rel=0.01)
  assert loss != expected


def test_extended_training_stretches_all_that_is_counted_in_steps():
  settings = settings_of(
    '--steps=100',
    '--steps_multiplier=2.5',
    '--warmup_steps=10',
    '--phi_decay_warmup_steps=20',
    '--update_start=30',
    '--update_stop=60',
    '--update_every=7',
  )
  wanted = {
    'steps': 250,
    'warmup_steps': 25,
    'phi_decay_warmup_steps': 50,
    'update_start': 75,
    'update_stop': 150,
    'update_every': 7,
  }
  assert {name: getattr(settings, name) for name in wanted} == wanted


# --- presets ------------------------------------------------------------------


@pytest.mark.parametrize('multiplier', [1, 2])
def test_the_imagenet_preset_has_the_schedule_of_the_field(multiplier):
  settings = settings_of(
    '--preset=imagenet', f'--steps_multiplier={multiplier}'
  )
  steps, warm = settings.steps, settings.warmup_steps
  rate = optimisers.learning_rate(settings, steps)
  epoch = 1_281_167 / settings.batch_size * multiplier
  assert steps == pytest.approx(100 * epoch, rel=1e-3)
  assert warm == pytest.approx(5 * epoch, rel=1e-3)
  assert rate(0) == pytest.approx(1.6 / warm)
  assert rate(warm // 2 - 1) == pytest.approx(0.8, rel=1e-3)
  assert rate(warm - 1) == rate(warm) == pytest.approx(1.6)
  for drops, end in enumerate((9_375, 18_750, 25_000)):
    before, after = rate(end * multiplier - 1), rate(end * multiplier)
    assert before == pytest.approx(1.6 * 0.1**drops)
    assert after == pytest.approx(1.6 * 0.1 ** (drops + 1))
  assert rate(steps - 1) == pytest.approx(1.6e-3)


def test_the_imagenet_preset_builds():
  source = streams.Source(lambda i: streams.Example(b'', 0, ''), 1000, 1000)
  # A flag on the command line overrides the preset.
  settings = settings_of('--preset=imagenet', '--learning_rate=0.8')
  assert settings.learning_rate == 0.8
  assert settings.nesterov
  sources = problem_lib.Sources(source, None, source)
  problem = problem_lib.make(settings, sources)
  layers = problem.layer_flops
  dense = sum(layers.values())
  assert dense == pytest.approx(8.2e9, rel=0.01)
  # It is the published 0.24 of ERK at 90 %, plus the gradients of all weights.
  relative = problem.method.training_flops(layers) / (3 * dense)
  assert relative == pytest.approx(0.24, abs=0.01)


# --- errors -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (('--regrow=zero',), '--regrow=zero: a weight at zero never'),
    (('--sparsity=1',), r'sparsity must be in \[0, 1\), got 1'),
    (('--sparsity=0.999999',), 'The largest possible sparsity is 0.99998'),
    (
      ('--method=top_kast', '--sparsity=0.8', '--backward_sparsity=0.9'),
      'backward_sparsity=0.9 must not be above --sparsity=0.8',
    ),
    (('--steps=40',), 'masks cannot be updated from step 100 to step 30'),
    (('--distribution=even',), "pattern=sparsity,..., got 'even'"),
    (('--distribution=conv=0.5',), "pattern 'conv' matches no weight"),
  ],
)
def test_errors_come_before_training(data, args, message):
  with pytest.raises(ValueError, match=message):
    prepare(data, *args)


@pytest.mark.parametrize(
  'args',
  [
    ('--method=dense', '--sparsity=1'),
    ('--method=dense', '--sparsity=0.999999', '--distribution=erk'),
    ('--method=set', '--sparsity=0.8', '--backward_sparsity=0.9'),
    ('--method=static', '--regrow=zero'),
  ],
)
def test_flags_that_a_method_does_not_use_are_not_checked(data, args):
  _, problem = prepare(data, *args)
  if 'dense' in args[0]:
    assert sum(jax.tree.leaves(problem.method.counts)) == _SIZE + 410


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (('--steps_multiplier=inf',), 'multiplier=inf: must be a finite number'),
    (
      ('--steps_multiplier=1e6',),
      r'multiplier=1e\+06 leads to --steps=50000000',
    ),
    (('--steps_multiplier=1e-6',), 'multiplier=1e-06 leads to --steps=0: must'),
    (('--seed=9223372036854775808',), '--seed=9223372036854775808: must be'),
    (('--seed=-1',), '--seed=-1: must be between 0'),
    (('--gradient_batches=1000000000000',), 'batches=1000000000000: must be'),
    (('--alpha=nan',), '--alpha=nan: must be a finite number'),
    (('--alpha=0.5',), '--alpha=0.5: alpha must be'),
    (('--method=acrobatics',), 'value should be one of <dense|static'),
    (('--checkpoint_every=0',), '--checkpoint_every=0: must be between 1'),
    (('--label_smoothing=nan',), '--label_smoothing=nan: must be a finite'),
    (('--image_size=0',), '--image_size=0: must be between 8'),
    (('--nesterov',), '--nesterov=True: there is no momentum'),
    (('--dense_layers=(',), 'is no regular expression'),
    (('--coordinator=nope',), '--coordinator=nope: must be host:port, or auto'),
    (('--coordinator=a:1',), 'needs --num_processes and a --process_index'),
    (('--num_processes=2',), 'need the --coordinator=host:port'),
    (
      ('--coordinator=a:1', '--num_processes=2', '--process_index=2'),
      'below it, got 2 and 2',
    ),
  ],
)
def test_impossible_flags(args, message):
  with pytest.raises(ValueError, match=message):
    settings_of(*args)


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (('--batch_size=1000000000000',), 'more than the 4000 training examples'),
    (('--dataset=no_such_set',), 'no_such_set'),
    (('--dataset=folder',), 'folder needs --data_dir'),
    (('--validation_images=5',), 'images=5: mnist_5k is held in memory'),
    (('--phi_decay_scale=conv=2',), "'conv' matches none of the weights"),
    (
      ('--distribution=linear=0.9', '--dense_layers=logits'),
      'Add logits=0 to the distribution',
    ),
  ],
)
def test_flags_that_do_not_fit_the_data_or_the_network(args, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    settings = settings_of(*args)
    problem_lib.make(settings, problem_lib.load(settings))


def test_a_batch_that_does_not_divide(data, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  with pytest.raises(ValueError, match='that do are 96 and 104'):
    prepare(data, '--batch_size=100')


def test_a_lost_layer_is_an_error_or_a_warning(small_data, tmp_path, caplog):
  # The largest hundredth of all weights lies in the convolution.
  args = (*_TINY, '--method=magnitude', '--scope=global', '--sparsity=0.99')
  args = (*args, '--update_start=4', '--update_stop=5', '--learning_rate=0')
  with pytest.raises(loop.Diverged, match='left in logits/w: nothing can'):
    train(small_data, tmp_path / 'a', *args)
  train(small_data, tmp_path / 'b', *args, '--on_collapse=warn')
  assert 'No weight is left in logits/w' in caplog.text


def test_a_run_that_diverges_says_where(small_data, tmp_path):
  args = (*_TINY, '--method=dense', '--learning_rate=1e20')
  with pytest.raises(loop.Diverged, match=r'became \w+ at step \d+, with a'):
    train(small_data, tmp_path, *args)


@pytest.mark.slow
def test_a_run_that_diverges_exits_with_1(start, tmp_path):
  args = ('--method=dense', '--steps=10', '--batch_size=80')
  process = start(*args, '--learning_rate=1e20', f'--out_dir={tmp_path}')
  _, err = process.communicate(timeout=600)
  assert process.returncode == 1, err
  assert 'error: the loss became nan at step ' in err
  assert 'with alpha = 2 and learning_rate = 1e+20. Lower' in err
  assert 'Traceback' not in err


# --- restarts -----------------------------------------------------------------

_RESTARTED = (
  '--method=rigl',
  '--sparsity=0.8',
  '--dense_layers=linear_1,logits',  # To compile less.
  '--steps=60',
  '--update_every=20',
  '--batch_size=80',
  '--momentum=0.9',
  '--phi_decay=1e-3',
  '--alpha_steps=3:0.5',  # At a step that is no update of the masks.
  '--checkpoint_every=5',
)


@pytest.fixture(scope='module')
def uninterrupted(start, tmp_path_factory):
  out_dir = tmp_path_factory.mktemp('uninterrupted')
  out, err = start(*_RESTARTED, f'--out_dir={out_dir}').communicate(timeout=600)
  assert 'fingerprint' in out, err
  return out_dir


def saved(out_dir):
  """The steps that have checkpoints, and whether one is being written."""
  names = [x.name for x in out_dir.glob('checkpoints/*')]
  steps = [int(name) for name in names if name.isdigit()]
  return max(steps, default=0), any('tmp' in name for name in names)


def wait_until(process, condition):
  deadline = time.time() + 120
  while process.poll() is None and not condition():
    assert time.time() < deadline
    time.sleep(0.0005)


@pytest.mark.slow
def test_a_run_is_stopped_and_killed_and_ends_as_if_it_had_not_been(
  start, uninterrupted, tmp_path
):
  args = (*_RESTARTED, f'--out_dir={tmp_path}')
  process = start(*args)
  wait_until(process, lambda: saved(tmp_path)[0] > 0 or saved(tmp_path)[1])
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130, err
  assert 'Interrupted. The same command goes on.' in err
  stopped, writing = saved(tmp_path)
  assert 0 < stopped < 60
  assert not writing
  assert not (tmp_path / 'summary.json').exists()

  process = start(*args, '--alpha=3', '--sparsity=0.7')
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2
  assert 'alpha: 2.0 there, 3.0 now; sparsity: 0.8 there, 0.7 now' in err
  assert 'Traceback' not in err

  process = start(*args)  # Where it was stopped.
  wait_until(process, lambda: saved(tmp_path)[0] > stopped)
  time.sleep(0.02)
  process.kill()
  _, err = process.communicate()
  assert process.returncode == -signal.SIGKILL, err
  for _ in range(3):  # While a checkpoint is being written.
    process = start(*args)
    wait_until(process, lambda: saved(tmp_path)[1])
    writing = saved(tmp_path)[1]
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    if writing:  # It was not over before it was seen.
      break
  assert writing
  assert stopped < saved(tmp_path)[0] < 60

  process = start(*args)
  _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  assert 'Interrupted' not in err
  found, wanted = summary_of(tmp_path), summary_of(uninterrupted)
  for name in ('fingerprint', 'test_accuracy', 'explored', 'sparsity'):
    assert found[name] == wanted[name]
  # No step is missing in the log, and none is there twice.
  assert losses(tmp_path) == losses(uninterrupted)
  network = trained.load(str(tmp_path), None)
  assert isinstance(network, trained.Network)
  assert network.alpha == 3.0  # The last power.
  accuracy = network.evaluate(network.theta, network.state)
  assert accuracy['test_accuracy'] == wanted['test_accuracy']


def test_a_finished_run_still_knows_its_speed(small_data, tmp_path):
  args = (*_TINY, '--method=static', '--checkpoint_every=4')
  _, before = train(small_data, tmp_path, *args)
  assert before['steps_per_second'] > 0
  lines = losses(tmp_path)
  assert train(small_data, tmp_path, *args)[1] == before
  assert losses(tmp_path) == lines
  with pytest.raises(FileNotFoundError, match='with --evaluate_every have one'):
    trained.load(str(tmp_path), None, best=True)


@pytest.mark.parametrize('content', ['[]\n7\n"a"\n{"step": "x"}\n{}\n', '{'])
def test_strange_lines_of_metrics_are_left_out(small_data, tmp_path, content):
  (tmp_path / 'metrics.jsonl').write_text(content)
  train(small_data, tmp_path, *_TINY, '--method=static')
  assert [step for step, _ in losses(tmp_path)] == [12]


def test_a_file_in_the_place_of_the_checkpoints(small_data, tmp_path):
  (tmp_path / 'checkpoints').write_text('')
  with pytest.raises(OSError, match='checkpoints'):
    train(small_data, tmp_path, *_TINY, '--method=static')


def test_a_folder_that_vanishes_ends_the_run(small_data, tmp_path):
  settings, problem = prepare(small_data, *_TINY, '--method=static')
  feed = problem.make_feed()

  def advance(*args):
    shutil.rmtree(tmp_path / 'a')
    return feed.advance(*args)

  vanishing = problem._replace(make_feed=lambda: feed._replace(advance=advance))
  with pytest.raises(OSError, match=r'metrics\.jsonl'):
    run(vanishing, settings, tmp_path / 'a')


def test_a_signal_before_the_first_step_is_heeded(small_data, tmp_path):
  settings, problem = prepare(small_data, *_TINY, '--method=static')
  handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

  def init():
    os.kill(os.getpid(), signal.SIGTERM)
    return problem.init()

  assert run(problem._replace(init=init), settings, tmp_path / 'a') is None
  found = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  assert found == handlers
  assert saved(tmp_path / 'a') == (0, False)
  resumed, whole = (run(problem, settings, tmp_path / name) for name in 'ab')
  assert resumed is not None
  assert whole is not None
  jax.tree.map(
    np.testing.assert_array_equal, resumed[0].state.phi, whole[0].state.phi
  )


# --- evaluation ---------------------------------------------------------------

_WATCHED = (
  *_TINY,
  '--method=rigl',
  '--sparsity=0.5',
  '--learning_rate=0.3',
  '--norms',
  '--evaluate_every=2',
  '--histograms',
  '--checkpoint_every=5',
)


def _events(out_dir):
  return list(events.read(pathlib.Path(out_dir) / 'events'))


def _measured(line):
  """An evaluation without the metrics that a clock has measured."""
  return {k: v for k, v in line.items() if 'per_second' not in k}


def test_evaluations_tell_what_the_network_is(small_data, tmp_path):
  progress, _ = train(small_data, tmp_path / 'watched', *_WATCHED)
  found = [x for x in lines_of(tmp_path / 'watched') if 'sparsity' in x]
  assert [x['step'] for x in found] == [2, 4, 6, 8, 10, 12]
  last, state = found[-1], progress.state
  _, problem = prepare(small_data, *_WATCHED)
  feed = problem.make_feed()
  theta = training.masked_theta(state, problem.transform)
  measured = feed.accuracy(theta, state.model_state)
  assert last['valid_accuracy'] == measured['valid_accuracy']
  assert 0 < last['valid_loss'] < 10
  assert 'valid_top5' not in last
  report = report_lib.sparsity_report(state.masks.forward, state.phi)
  assert last['sparsity'] == {
    'total': 0.5,
    **{row['path']: 1 - row['density'] for row in report['layers']},
  }
  # By hand, these are the weights in use whose sign is not that at the start.
  rows = leaves.weight_rows(
    state.phi,
    leaves.is_weight,
    state.masks.forward,
    progress.ever,
    problem.init().phi,
  )
  used = sum(m.sum() for _, _, m, _, _ in rows)
  changed = sum((m & (x * first < 0)).sum() for _, x, m, _, first in rows)
  assert changed > 0
  np.testing.assert_allclose(last['sign_changes'], changed / used, rtol=1e-6)
  explored = sum(e.sum() for _, _, _, e, _ in rows) / 1476
  np.testing.assert_allclose(last['explored'], explored, rtol=1e-6)
  assert last['learning_rate'] == pytest.approx(0.3)
  assert last['images_per_second'] == pytest.approx(
    8 * last['steps_per_second']
  )
  # Watching changes nothing, and the norms are those of an update.
  quiet, _ = train(small_data, tmp_path / 'quiet', *_WATCHED[:-4])
  jax.tree.map(np.testing.assert_array_equal, quiet.state.phi, state.phi)
  steps = [x for x in lines_of(tmp_path / 'watched') if 'loss' in x]
  for line in steps:
    # The optimiser is plain SGD, and the Jacobian of the power is small.
    assert 0 < line['update_norm'] < 0.3 * line['gradient_norm'] * 2
  # Events hold the numbers of the lines.
  for line in (steps[-1], last):
    assert {
      tag for step, tag, _ in _events(tmp_path / 'watched') if step == 12
    } >= {events.tag(k) for k in line if k not in ('step', 'sparsity')}
  values = {t: x for s, t, x in _events(tmp_path / 'watched') if s == 12}
  assert values['sparsity/total'] == pytest.approx(0.5)


def test_a_run_that_goes_on_writes_nothing_twice(small_data, tmp_path):
  whole, _ = train(small_data, tmp_path / 'whole', *_WATCHED)
  settings, problem = prepare(small_data, *_WATCHED)
  feed, calls = problem.make_feed(), 0

  def advance(*args):
    nonlocal calls
    calls += 1
    if calls == 5:
      raise KeyboardInterrupt
    return feed.advance(*args)

  killed = problem._replace(make_feed=lambda: feed._replace(advance=advance))
  with pytest.raises(KeyboardInterrupt):
    run(killed, settings, tmp_path / 'killed')
  # It was evaluated at a step whose checkpoint is gone.
  newest = (
    tmp_path / 'killed' / 'checkpoints' / str(saved(tmp_path / 'killed')[0])
  )
  shutil.rmtree(newest)
  result = run(problem, settings, tmp_path / 'killed')
  assert result is not None
  jax.tree.map(
    np.testing.assert_array_equal, result[0].state.phi, whole.state.phi
  )
  found, wanted = (
    [_measured(x) for x in lines_of(tmp_path / name)]
    for name in ('killed', 'whole')
  )
  assert found == wanted
  found, wanted = (
    [x for x in _events(tmp_path / name) if 'per_second' not in x[1]]
    for name in ('killed', 'whole')
  )
  assert sorted(found) == sorted(wanted)
  assert len(wanted) == len({x[:2] for x in wanted})


def test_the_best_checkpoint_stays(small_data, tmp_path):
  settings, problem = prepare(
    small_data, *_TINY, '--method=static', '--evaluate_every=1'
  )
  feed, path = problem.make_feed(), tmp_path / 'run'

  def evaluate(theta, model_state, split, seen):
    return {'accuracy': accuracies.pop(0)}

  def advance(*args):
    if not accuracies:
      raise KeyboardInterrupt
    return feed.advance(*args)

  watched = problem._replace(
    make_feed=lambda: feed._replace(evaluate=evaluate, advance=advance)
  )

  def kept():
    there = {int(x.name) for x in (path / 'checkpoints').glob('[0-9]*')}
    best = checkpoint.load(path / 'checkpoints', evaluation.BEST).step
    return there, best

  accuracies = [0.1, 0.7, 0.7, 0.2, 0.3, 0.4, 0.5]
  with pytest.raises(KeyboardInterrupt):
    run(watched, settings, path)
  assert kept() == ({3, 5, 6, 7}, 3)  # The newest of the best.
  accuracies = [0.6, 0.6, 0.6, 0.6, 0.6]
  assert run(watched, settings, path) is not None
  assert kept() == ({3, 10, 11, 12}, 3)
  with pytest.raises(FileNotFoundError, match="with the metric 'loss'"):
    checkpoint.load(path / 'checkpoints', 'loss')


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (
      ('--evaluate_every=1', '--validation_images=0'),
      'needs validation images',
    ),
    (('--histograms',), 'are written by evaluations. Give --evaluate_every'),
  ],
)
def test_evaluations_that_cannot_be(args, message):
  with pytest.raises(ValueError, match=message):
    settings_of(*args)


# --- devices ------------------------------------------------------------------


@pytest.mark.slow
def test_any_number_of_devices_trains_alike(start, uninterrupted, tmp_path):
  eight, two = tmp_path / 'eight', tmp_path / 'two'
  with socket.socket() as s:
    s.bind(('localhost', 0))
    host = f'--coordinator=localhost:{s.getsockname()[1]}'
  args = (*_RESTARTED, '--num_processes=2', f'--out_dir={two}', host)
  processes = [
    start(*_RESTARTED, f'--out_dir={eight}', count=8),
    start(*args, '--process_index=0', count=2),
    start(*args, '--process_index=1', count=2),
  ]
  for process in processes:
    _, err = process.communicate(timeout=600)
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
        # Sums over devices round differently, and phi of 20 is among them.
        np.testing.assert_allclose(x, wanted[path], rtol=3e-6, atol=1e-5)
      else:
        np.testing.assert_array_equal(x, wanted[path], path)

"""Tests of `export_model`, which writes trained networks to small files."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys

import chex
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import export_model
from experiments.support import config
from experiments.support import problem
from experiments.support import runs
from experiments.support import sequence
from experiments.support import tasks
from experiments.support import trained as trained_lib
from powerprop_jax import export
from powerprop_jax import leaves
from powerprop_jax.data import in_memory
from powerprop_jax.models import networks
from powerprop_jax.training import checkpoint

_ROOT = pathlib.Path(__file__).parents[2]
_SHAPES = {
  'initial_linear': (784, 300),
  'linear_1': (300, 100),
  'logits': (100, 10),
}


def _features(theta, images):
  x = images.reshape(len(images), -1) / np.float32(255)
  for name in ('initial_linear', 'linear_1'):
    x = np.maximum(x @ theta[f'{name}/w'] + theta[f'{name}/b'], 0)
  return x


def _accuracy(theta, split):
  """The accuracy of the network of `mnist_pruning`, computed by numpy."""
  logits = _features(theta, split.images) @ theta['logits/w']
  return np.mean(np.argmax(logits + theta['logits/b'], 1) == split.labels)


@pytest.fixture(scope='module')
def data():
  return in_memory.load('mnist_5k')


@pytest.fixture(scope='module')
def run(tmp_path_factory, data):
  """A run like one of mnist_pruning, whose last layer numpy has fitted."""
  rng = np.random.default_rng(0)
  theta = {}
  for name, shape in _SHAPES.items():
    w = rng.normal(size=shape) / np.sqrt(shape[0])
    theta[f'{name}/w'] = w.astype(np.float32)
    theta[f'{name}/b'] = np.zeros(shape[1], np.float32)
  targets = np.eye(10)[data.train.labels]
  fit = np.linalg.lstsq(_features(theta, data.train.images), targets)[0]
  theta['logits/w'] = fit.astype(np.float32)
  folder = tmp_path_factory.mktemp('mnist_pruning')
  path = folder / 'runs' / 'one.safetensors'
  path.parent.mkdir()
  export.save_compressed(path, theta, {}, alpha=2.0)
  settings = {'dataset': 'mnist_5k', 'data': in_memory.fingerprint(data)}
  (folder / 'config.json').write_text(json.dumps({'settings': settings}))
  return path, theta


def _settings(path, *arguments):
  return config.parse(
    export_model.Settings, [f'--checkpoint={path}', *arguments]
  )


def _masks(network, *arguments):
  return export_model.choose_masks(network, _settings('network', *arguments))


@pytest.mark.slow
def test_a_pruned_run_is_small_and_as_accurate(run, data, tmp_path):
  path, theta = run
  out = tmp_path / 'new' / 'model.safetensors'
  process = subprocess.run(
    [
      *(sys.executable, '-W', 'error', '-m', 'experiments.export_model'),
      *(f'--checkpoint={path}', f'--out={out}'),
      *('--density=0.1', '--density_scale=logits=2'),
    ],
    cwd=_ROOT,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  first, *lines = process.stdout.splitlines()
  assert first.startswith('export_model on ')
  assert lines[0].split() == ['dense', '1,066,440', 'bytes']
  assert f'{out.stat().st_size:,} bytes' in lines[1]
  model = export.load_compressed(out)
  assert model.alpha == 2.0
  kept = {'initial_linear/w': 23_520, 'linear_1/w': 3_000, 'logits/w': 200}
  pruned = {}
  for name, x in theta.items():
    mask = model.masks[f'theta/{name}']
    pruned[name] = model.theta[f'theta/{name}']
    np.testing.assert_array_equal(pruned[name], np.where(mask, x, 0))
    if name in kept:  # The largest are kept, as many as there should be.
      assert mask.sum() == kept[name]
      assert np.abs(x[mask]).min() >= np.abs(x[~mask]).max()
  accuracies = [_accuracy(t, data.test) for t in (theta, pruned, pruned)]
  assert accuracies[0] > 0.7
  assert accuracies[0] != accuracies[1]
  names = ('trained', 'pruned', 'reloaded')
  for line, name, accuracy in zip(lines[3:6], names, accuracies):
    assert line.startswith(name)
    assert line.endswith(f'test_accuracy {100 * accuracy:.2f} %')


def test_runs_of_other_networks(tmp_path, data):
  settings = {'dataset': 'mnist_5k', 'data': in_memory.fingerprint(data)}
  for name in ('lenet_5', 'wrn_10_1'):
    path = tmp_path / name / 'runs' / 'one.safetensors'
    path.parent.mkdir(parents=True)
    config_file = json.dumps({'settings': settings | {'network': name}})
    (tmp_path / name / 'config.json').write_text(config_file)
    init = functools.partial(networks.build(name, 10).init, is_training=True)
    images = jnp.zeros((1, 28, 28, 1))
    shapes, _ = jax.eval_shape(init, jax.random.key(0), images)
    theta = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    export.save_compressed(path, theta, {}, alpha=2.0)
    if name == 'lenet_5':
      found = trained_lib.load(str(path), None)
      chex.assert_trees_all_equal(found.theta, theta)
    else:
      with pytest.raises(ValueError, match='statistics of normalisation'):
        trained_lib.load(str(path), None)
  with pytest.raises(FileNotFoundError, match='no file or folder .*none'):
    trained_lib.load(str(tmp_path / 'none'), None)


def test_statistics_are_written_and_used(tmp_path):
  network = trained_lib.Network(
    alpha=3.0,
    theta={'w': jnp.array([1.0, 2.0, 3.0])},
    masks={},
    state={'norm': {'mean': jnp.array([0.5]), 'counter': jnp.array(7)}},
    evaluate=lambda theta, state: {
      'accuracy': float(jnp.sum(theta['w']) * state['norm']['mean'][0])
    },
  )
  mask = _masks(network, '--density=0.5', '--scope=global')
  path = tmp_path / 'model'
  sizes, accuracies = export_model.write_network(network, mask, path, 'float16')
  assert {k: v['accuracy'] for k, v in accuracies.items()} == {
    'trained': 3.0,
    'pruned': 1.5,
    'reloaded': 1.5,
  }
  # There are a weight of two bytes and two bits, and two numbers of four bytes.
  assert (sizes.dense, sizes.bound) == (20, 11)
  found = export.load_compressed(path).theta
  assert {k: x.tolist() for k, x in found.items()} == {
    'theta/w': [0.0, 0.0, 3.0],
    'state/norm/mean': [0.5],
    'state/norm/counter': 7,
  }


@pytest.fixture(scope='module')
def sparse_run(tmp_path_factory, data):
  """A checkpoint of sparse_training, with masks."""
  folder = tmp_path_factory.mktemp('sparse_training')
  arguments = ['--method=static', '--alpha=3']
  settings = config.parse(problem.Settings, arguments)
  state = problem.make(settings, data).init()
  rng = np.random.default_rng(0)

  def mask(path, x):
    return rng.random(x.shape) < (0.2 if leaves.is_weight(path, x) else 2.0)

  forward = leaves.map_with_path(mask, state.phi)
  masks = state.masks._replace(forward=forward)
  state = state._replace(masks=masks)
  written = {
    'binary': 'sparse_training',
    'data': problem.fingerprint(data),
    **config.deciding(settings),
  }
  manager = checkpoint.open_manager(folder / 'checkpoints', written)
  checkpoint.save(manager, 7, {'state': state, 'ever': forward})
  checkpoint.close(manager)
  return folder, state


def test_a_sparse_checkpoint_keeps_its_masks(sparse_run, data, tmp_path):
  folder, state = sparse_run
  network = trained_lib.load(str(folder), None)
  masks = _masks(network)
  path = tmp_path / 'model'
  sizes, accuracies = export_model.write_network(network, masks, path, None)
  assert sizes.bound < sizes.file < 1.05 * sizes.bound
  model = export.load_compressed(path)
  assert model.alpha == 3.0
  phi = export.to_dict(state.phi, state.masks.forward)
  theta = {name: model.theta[f'theta/{name}'] for name in phi}
  for name, x in phi.items():
    x = x**3 if name.endswith('w') else x
    np.testing.assert_allclose(theta[name], x, rtol=1e-5, atol=1e-12)
  for found in accuracies.values():
    assert found['test_accuracy'] == pytest.approx(_accuracy(theta, data.test))


def test_a_density_prunes_within_the_masks(sparse_run):
  folder, state = sparse_run
  network = trained_lib.load(str(folder / 'checkpoints'), None)
  forward = export.to_dict(state.masks.forward)
  there = sum(int(m.sum()) for p, m in forward.items() if p.endswith('w'))
  for density, kept in ((0.05, 13_310), (0.5, there)):
    chosen = export.to_dict(
      _masks(network, f'--density={density}', '--scope=global')
    )
    assert not any((m & ~forward[p]).any() for p, m in chosen.items())
    assert kept == sum(
      int(m.sum()) for p, m in chosen.items() if p.endswith('w')
    )


@pytest.fixture(scope='module')
def tasks_run(tmp_path_factory):
  """A run of continual_learning: its folder and its result."""
  folder = tmp_path_factory.mktemp('continual_learning')
  settings = config.parse(
    tasks.Settings,
    [
      '--tasks=2',
      '--steps_per_task=60',
      '--retrain_steps=20',
      '--batch_size=50',
      '--densities=0.05,0.2,1',
      '--gamma=0.9',
      '--phi_decay=0',
    ],
  )
  data = in_memory.load('mnist_5k')
  job = tasks.Job('epn', 2.0, 0)
  result = sequence.learn_all(
    job,
    tasks.make_problem(settings, 'epn', 2.0, (28, 28, 1), 10),
    settings,
    config.deciding(settings) | {'data': in_memory.fingerprint(data)},
    data,
    epath.Path(folder),
    (data.train, data.valid, data.test),
    runs.Watch(lambda *line: None, lambda: False),
  )
  return folder / 'checkpoints' / job.name, result


def test_tasks_are_written_once_and_read_alone(tasks_run, tmp_path):
  folder, result = tasks_run
  trained = trained_lib.load(str(folder), None)
  path = tmp_path / 'tasks'
  sizes, accuracies = export_model.write_tasks(trained, path, None)
  expected = result['accuracy_matrix'][-1]
  assert list(accuracies) == ['task 1', 'task 2']
  for found, accuracy in zip(accuracies.values(), expected):
    assert found['trained'] == found['reloaded'] == pytest.approx(accuracy)
  assert sizes.file == path.stat().st_size < sizes.dense
  assert expected[0] != expected[1]
  for t, kept in enumerate(result['density']):
    model = export.load_task(path, t)
    assert model.alpha == 2.0
    used = [
      m
      for p, m in model.masks.items()
      if trained.masks[t]['theta'].get(p[6:]) is not None
    ]
    assert sum(m.sum() for m in used) == kept * sum(m.size for m in used)


def test_tasks_are_not_pruned_again(tasks_run):
  folder, _ = tasks_run
  with pytest.raises(ValueError, match='--density=0.1 is not for continual'):
    export_model.prepare(_settings(folder, '--density=0.1'))


def test_what_is_no_network_is_refused(run, tmp_path):
  path, _ = run
  with pytest.raises(FileNotFoundError):
    trained_lib.load(str(tmp_path / 'absent'), None)
  with pytest.raises(ValueError, match='no best ones. Leave --which out'):
    trained_lib.load(str(path), None, best=True)
  manager = checkpoint.open_manager(tmp_path / 'a', {'binary': 'cooking'})
  checkpoint.save(manager, 1, {'x': np.ones(2)})
  checkpoint.close(manager)
  with pytest.raises(ValueError, match='no checkpoint of .* one of cooking'):
    trained_lib.load(str(tmp_path / 'a'), None)
  foreign = path.with_name('foreign')
  foreign.write_text(json.dumps({}))
  with pytest.raises(ValueError, match='foreign'):
    trained_lib.load(str(foreign), None)
  export.save_compressed(foreign, {'w': np.ones(2)}, {})
  with pytest.raises(ValueError, match='does not tell the alpha'):
    trained_lib.load(str(foreign), None)


@pytest.mark.parametrize('content', ['', '[]', 'null', '{}', '{"settings": 1}'])
def test_a_run_without_its_settings_is_refused(run, tmp_path, content):
  path, _ = run
  folder = tmp_path / 'runs'
  folder.mkdir()
  copy = shutil.copy(path, folder)
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(ValueError, match=r'config\.json'):
    trained_lib.load(str(copy), None)


def test_other_data_than_those_of_the_training_are_refused(run, tmp_path):
  path, _ = run
  folder = tmp_path / 'runs'
  folder.mkdir()
  copy = shutil.copy(path, folder)
  settings = {'dataset': 'mnist_5k', 'data': 'other'}
  (tmp_path / 'config.json').write_text(json.dumps({'settings': settings}))
  with pytest.raises(ValueError, match='trained on other data'):
    trained_lib.load(str(copy), None)


def test_what_was_trained_is_never_overwritten(run, sparse_run, tmp_path):
  path, _ = run
  folder, _ = sparse_run
  link = tmp_path / 'link'
  link.symlink_to(path)
  before = path.read_bytes()
  for place, out in (
    (path, path),
    (path, link),
    (path, path.with_name('another')),
    (folder, folder / 'checkpoints' / 'model'),
    (folder / 'checkpoints', folder / 'checkpoints' / '7' / 'model'),
    (path, tmp_path),
  ):
    with pytest.raises(ValueError, match='Name a file elsewhere'):
      export_model.prepare(_settings(place, f'--out={out}'))
  assert path.read_bytes() == before


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--checkpoint='], '--checkpoint must be given'),
    (['--checkpoint=none'], 'There is no file or folder none. Give a file'),
    (['--checkpoint=.'], 'There is no whole checkpoint in'),
    (['--density=1.5'], r'density must be in \(0, 1\], got 1.5'),
    (['--density=nan'], '--density=nan'),
    (['--scope='], '--scope=.*layer.*global'),
    (['--density_scale=w=2'], '--density_scale=w=2 needs the --density'),
    (['--density=0.5', '--density_scale=w'], 'must be pattern=factor'),
    (['--density=0.5', '--scope=global', '--density_scale=w=2'], 'scope='),
  ],
)
def test_bad_flags_stop_before_anything_is_written(
  run, args, message, tmp_path, monkeypatch
):
  path, _ = run
  monkeypatch.chdir(tmp_path)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    export_model.prepare(_settings(path, *args))


def test_a_checkpoint_must_be_named():
  with pytest.raises(ValueError, match='--checkpoint must be given'):
    config.parse(export_model.Settings, [])

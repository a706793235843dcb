"""`--preset=imagenet` at small size, from a folder of JPEGs to exported files.

`_train` runs in two processes with two devices each.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import haiku as hk
import jax
import numpy as np
from PIL import Image
import pytest

from experiments import export_model
from experiments import sparse_training
from experiments.presets import sparse_training as presets
from experiments.support import config
from experiments.support import evaluation
from experiments.support import events
from experiments.support import output
from experiments.support import trained
from powerprop_jax.models import networks
from powerprop_jax.training import checkpoint

# Of the others `sparse_training_test` trains a network of its own.
_METHODS = ('rigl',)
_KILLED_AT = 12  # By an evaluation that is written, and no checkpoint.


def _tiny(images, is_training, num_classes, cross_replica_axis=None):
  x = hk.Conv2D(4, 3, 4, with_bias=False, name='initial_conv')(images)
  norm = hk.BatchNorm(True, True, 0.9, cross_replica_axis=cross_replica_axis)
  x = hk.Flatten()(jax.nn.relu(norm(x, is_training)))
  return hk.Linear(num_classes, name='logits')(x)


def _write_images(root):
  """Images of two classes, of which one is darker than the other."""
  rng = np.random.default_rng(0)
  for split, count in (('train', 18), ('val', 6)):
    for label in (0, 1):
      place = root / split / f'class_{label}'
      place.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(128, size=[24, 20 + i, 3], dtype=np.uint8)
        image = Image.fromarray(pixels + np.uint8(20 * label))
        image.save(place / f'{i}.jpeg')


def _settings(root, method, out_dir):
  return config.parse(
    sparse_training.Settings,
    [
      '--preset=imagenet',
      f'--method={method}',
      '--sparsity=0.8',
      '--dataset=folder',
      f'--data_dir={root / "data"}',
      f'--out_dir={root / out_dir}',
      '--network=tiny',
      '--image_size=16',
      '--batch_size=8',
      '--learning_rate=0.1',
      '--steps=16',
      '--warmup_steps=2',
      '--update_every=4',
      '--evaluate_every=4',
      '--checkpoint_every=5',
      '--validation_images=8',
      '--num_workers=0',
      '--histograms',
    ],
    presets.PRESETS,
  )


def _train(root, address, index, killed):
  """Trains by all methods; the first run is killed in the middle."""
  jax.distributed.initialize(address, 2, index)
  networks.NETWORKS['tiny'] = _tiny
  assert (jax.local_device_count(), jax.device_count()) == (2, 4)
  if killed:

    class Killing(output.Metrics):
      def __call__(self, metrics, histograms=None):
        super().__call__(metrics, histograms)
        if metrics['step'] == _KILLED_AT and 'sparsity' in metrics:
          os.kill(os.getpid(), signal.SIGKILL)

    output.Metrics = Killing
  for method in _METHODS:
    sparse_training.main(_settings(root, method, method))
  sparse_training.main(_settings(root, _METHODS[0], 'whole'))


def _start(root, killed):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(root / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': os.fspath(pathlib.Path(__file__).parents[2]),
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2'
    ' --xla_backend_optimization_level=0',
  }
  command = (sys.executable, '-W', 'error', __file__)
  processes = []
  for i in range(2):
    with (root / f'errors_{i}').open('w') as errors:
      processes.append(
        subprocess.Popen(
          [*command, root, address, str(i), killed],
          env=environment,
          stdout=subprocess.DEVNULL,
          stderr=errors,
        )
      )
  return processes


def _end(root, processes):
  """Waits for both: one that has failed leaves the other waiting for it."""
  try:
    for process in processes:
      process.wait(timeout=300)
  finally:
    for process in processes:
      process.kill()
  return [(root / f'errors_{i}').read_text() for i in range(2)]


def _lines(path):
  text = (path / 'metrics.jsonl').read_text()
  return [
    # What no clock has measured.
    {k: v for k, v in json.loads(line).items() if 'per_second' not in k}
    for line in text.splitlines()
  ]


def _events(path):
  found = events.read(path / 'events')
  return sorted(x for x in found if 'per_second' not in x[1])


@pytest.mark.slow
def test_runs_are_killed_go_on_and_are_exported(tmp_path, monkeypatch):
  _write_images(tmp_path / 'data')
  first, other = _start(tmp_path, 'killed')
  errors = _end(tmp_path, [first])
  assert first.returncode == -signal.SIGKILL, errors
  other.kill()
  other.wait()
  steps = [x['step'] for x in _lines(tmp_path / 'rigl') if 'sparsity' in x]
  assert steps == [4, 8, _KILLED_AT]
  processes = _start(tmp_path, '')
  errors = _end(tmp_path, processes)
  assert [process.returncode for process in processes] == [0, 0], errors

  summaries = {
    name: json.loads((tmp_path / name / 'summary.json').read_text())
    for name in (*_METHODS, 'whole')
  }
  assert summaries['rigl']['fingerprint'] == summaries['whole']['fingerprint']
  assert len({x['fingerprint'] for x in summaries.values()}) == len(_METHODS)
  assert _lines(tmp_path / 'rigl') == _lines(tmp_path / 'whole')
  assert _events(tmp_path / 'rigl') == _events(tmp_path / 'whole')

  monkeypatch.setitem(networks.NETWORKS, 'tiny', _tiny)
  for method in _METHODS:
    path = tmp_path / method
    measured = {x['step']: x for x in _lines(path) if 'sparsity' in x}
    assert [*measured] == [4, 8, 12, 16]
    assert summaries[method]['sparsity']['total'] == pytest.approx(
      0.8, abs=0.01
    )
    assert {tag for _, tag, _ in _events(path)} >= {
      'loss',
      'gradient_norm',
      'update_norm',
      'learning_rate',
      'sign_changes',
      'sparsity/logits/w',
      'valid_accuracy',
    }
    best = max(measured, key=lambda t: (measured[t][evaluation.BEST], t))
    assert checkpoint.load(path / 'checkpoints', evaluation.BEST).step == best
    network = trained.load(str(path), str(tmp_path / 'data'), best=True)
    assert isinstance(network, trained.Network)
    assert network.alpha == 1.375
    _, found = export_model.write_network(
      network, network.masks, tmp_path / f'{method}.safetensors', None
    )
    assert found['trained'] == found['pruned'] == found['reloaded']
    # On one device as on four.
    assert found['trained'][evaluation.BEST] == pytest.approx(
      measured[best][evaluation.BEST], abs=1 / 8
    )


if __name__ == '__main__':
  _train(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])

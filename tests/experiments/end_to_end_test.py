"""Tests `--preset=imagenet` at small size, from JPEGs to exported files.

`_train` runs in two processes with two devices each. Half of the methods read
the JPEGs from a folder, and half from a TFDS set that has the name, the
features and the format of that of ImageNet.
"""

import gc
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import haiku as hk
import jax
from jax.experimental import multihost_utils
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

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

# The data sets of the methods. In the middle of a run the second host is asked
# to stop, and then both do; another run is killed, which ends the program.
_DATASETS = {
  'top_kast': 'imagenet2012',
  'magnitude': 'folder',
  'acdc': 'imagenet2012',
  'rigl': 'folder',
}
_STOPPED, _KILLED = 'top_kast', 'rigl'
_COUNTS = {'train': 36, 'validation': 12}
_ENDED_AT = 12  # An evaluation is written then, its checkpoint is not.


def _tiny(images, is_training, num_classes, cross_replica_axis=None):
  x = hk.Conv2D(4, 3, 4, with_bias=False, name='initial_conv')(images)
  norm = hk.BatchNorm(True, True, 0.9, cross_replica_axis=cross_replica_axis)
  x = hk.Flatten()(jax.nn.relu(norm(x, is_training)))
  return hk.Linear(num_classes, name='logits')(x)


def _images(split):
  """JPEGs with their labels, where one of the two classes is darker."""
  rng = np.random.default_rng(0)
  for i in range(_COUNTS[split]):
    label = i % 2
    pixels = rng.integers(128, size=[24, 20 + i // 2, 3], dtype=np.uint8)
    image = Image.fromarray(pixels + np.uint8(20 * label))
    image.save(file := io.BytesIO(), 'jpeg')
    yield label, file.getvalue()


def _write_folder(root):
  for split, folder in (('train', 'train'), ('validation', 'val')):
    for i, (label, data) in enumerate(_images(split)):
      place = root / folder / f'class_{label}'
      place.mkdir(parents=True, exist_ok=True)
      (place / f'{i}.jpeg').write_bytes(data)


class _ImageNet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A set that TFDS writes in the format of ImageNet, without TensorFlow."""

  name = 'imagenet2012'
  VERSION = tfds.core.Version('5.1.0')

  def _info(self):
    features = {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(names=['dark', 'light']),
      'file_name': tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in _COUNTS}

  def _generate_examples(self, split):
    for i, (label, data) in enumerate(_images(split)):
      name = f'{split}_{i}.JPEG'
      image = io.BytesIO(data)
      yield name, {'image': image, 'label': label, 'file_name': name}


def _data_dir(root, method):
  return root / _DATASETS[method]


def _settings(root, method, out_dir):
  return config.parse(
    sparse_training.Settings,
    [
      '--preset=imagenet',
      f'--method={method}',
      '--sparsity=0.8',
      f'--dataset={_DATASETS[method]}',
      f'--data_dir={_data_dir(root, method)}',
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


class _Ending(output.Metrics):
  """Metrics that end a run in the middle. Only the first host writes any."""

  process, signal = os.getpid(), signal.SIGKILL

  def __call__(self, metrics, histograms=None):
    super().__call__(metrics, histograms)
    if metrics['step'] == _ENDED_AT and 'sparsity' in metrics:
      os.kill(self.process, self.signal)


def _train_one(root, method, out_dir):
  # Streams collect garbage, and need not look at what is imported or compiled.
  gc.freeze()
  sparse_training.main(_settings(root, method, out_dir))


def _train(root, address, index, ended):
  """Trains by all methods, up to the middle or from there on."""
  jax.distributed.initialize(address, 2, index)
  networks.NETWORKS['tiny'] = _tiny
  assert (jax.local_device_count(), jax.device_count()) == (2, 4)
  if ended:
    output.Metrics = _Ending
    processes = multihost_utils.process_allgather(np.array(os.getpid()))
    _Ending.process, _Ending.signal = int(processes[1]), signal.SIGTERM
    with pytest.raises(SystemExit, match='130'):
      _train_one(root, _STOPPED, _STOPPED)
    _Ending.process, _Ending.signal = os.getpid(), signal.SIGKILL
    _train_one(root, _KILLED, _KILLED)
  for method in _DATASETS:
    _train_one(root, method, method)
  _train_one(root, _KILLED, 'whole')


def _start(root, ended):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(root / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': os.fspath(pathlib.Path(__file__).parents[2]),
    'XLA_FLAGS': os.environ['XLA_FLAGS']
    + ' --xla_force_host_platform_device_count=2'
    ' --xla_backend_optimization_level=0',
  }
  command = (sys.executable, '-W', 'error', __file__)
  processes = []
  for i in range(2):
    with (root / f'errors_{i}').open('w') as errors:
      processes.append(
        subprocess.Popen(
          [*command, root, address, str(i), ended],
          env=environment,
          stdout=subprocess.DEVNULL,
          stderr=errors,
        )
      )
  return processes


def _end(root, processes):
  """Waits for both, and kills them: if one fails, the other waits for it."""
  try:
    for process in processes:
      process.wait(timeout=600)
  finally:
    for process in processes:
      process.kill()
  return [(root / f'errors_{i}').read_text() for i in range(2)]


def _lines(path):
  text = (path / 'metrics.jsonl').read_text()
  return [
    # Metrics that no clock has measured are compared.
    {k: v for k, v in json.loads(line).items() if 'per_second' not in k}
    for line in text.splitlines()
  ]


def _events(path):
  found = events.read(path / 'events')
  return sorted(x for x in found if 'per_second' not in x[1])


@pytest.mark.slow
def test_runs_are_ended_go_on_and_are_exported(tmp_path, monkeypatch):
  _write_folder(tmp_path / 'folder')
  _ImageNet(
    data_dir=tmp_path / 'imagenet2012', file_format='array_record'
  ).download_and_prepare()
  first, other = _start(tmp_path, 'ended')
  errors = _end(tmp_path, [first])
  assert first.returncode == -signal.SIGKILL, errors
  other.kill()
  other.wait()
  for method in (_STOPPED, _KILLED):
    steps = [x['step'] for x in _lines(tmp_path / method) if 'sparsity' in x]
    assert steps == [4, 8, _ENDED_AT]
  processes = _start(tmp_path, '')
  errors = _end(tmp_path, processes)
  assert [process.returncode for process in processes] == [0, 0], errors

  monkeypatch.setitem(networks.NETWORKS, 'tiny', _tiny)
  summaries = {
    name: json.loads((tmp_path / name / 'summary.json').read_text())
    for name in (*_DATASETS, 'whole')
  }
  fingerprints = {name: x['fingerprint'] for name, x in summaries.items()}
  assert fingerprints[_KILLED] == fingerprints['whole']
  assert len({*fingerprints.values()}) == len(_DATASETS)
  assert _lines(tmp_path / _KILLED) == _lines(tmp_path / 'whole')
  assert _events(tmp_path / _KILLED) == _events(tmp_path / 'whole')

  for method in _DATASETS:
    path = tmp_path / method
    measured = {x['step']: x for x in _lines(path) if 'sparsity' in x}
    assert [*measured] == [4, 8, 12, 16]
    assert summaries[method]['sparsity']['total'] == pytest.approx(
      0.8, abs=0.01
    )
    assert {tag for _, tag, _ in _events(path)} >= {
      'train/loss',
      'optimiser/gradient_norm',
      'optimiser/update_norm',
      'optimiser/learning_rate',
      'masks/sign_changes',
      'sparsity/logits/w',
      'valid/accuracy',
    }
    best = max(measured, key=lambda t: (measured[t][evaluation.BEST], t))
    assert checkpoint.load(path / 'checkpoints', evaluation.BEST).step == best
    network = trained.load(
      str(path), str(_data_dir(tmp_path, method)), best=True
    )
    assert isinstance(network, trained.Network)
    assert network.alpha == 1.375
    _, found = export_model.write_network(
      network, network.masks, tmp_path / f'{method}.safetensors', None
    )
    assert found['trained'] == found['pruned'] == found['reloaded']
    # One device gives the same as four.
    assert found['trained'][evaluation.BEST] == pytest.approx(
      measured[best][evaluation.BEST], abs=1 / 8
    )


if __name__ == '__main__':
  _train(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])

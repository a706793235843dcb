"""Tests of runs that read from buckets and write to them."""

import functools
import json
import os
import signal
import sys

from etils.epath import testing
import haiku as hk
import numpy as np
from PIL import Image
import pytest

from experiments import sparse_training
from experiments.support import config
from experiments.support import output
from powerprop_jax.models import networks
from powerprop_jax.training import checkpoint

_CALLS = ('copy', 'exists', 'glob', 'isdir', 'listdir', 'makedirs', 'mkdir')
_CALLS += ('open', 'remove', 'rename', 'replace', 'rmtree', 'stat', 'walk')


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  """The local folder in which the files of gs://bucket lie."""
  root = tmp_path / 'buckets'

  def local(path):
    return os.fspath(path).replace('gs://', f'{root}/', 1)

  def remote(path):
    return os.fspath(path).replace(f'{root}/', 'gs://', 1)

  def call(name, function, *args, **options):
    found = function(*map(local, args), **options)
    if name == 'glob':
      return [remote(x) for x in found]
    if name == 'walk':
      return [(remote(x), *rest) for x, *rest in found]
    return found

  def no_appending(function, path, mode):
    # gcsfs overwrites a file to which it is asked to append.
    return function(local(path), mode.replace('a', 'w'))

  calls = {name: functools.partial(call, name) for name in _CALLS}
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(
    'orbax.checkpoint._src.path.gcs_utils.get_kvstore_for_gcs',
    lambda path: {'driver': 'file', 'path': local(path) + '/'},
  )
  monkeypatch.setattr(
    'orbax.checkpoint._src.path.gcs_utils.is_hierarchical_namespace_enabled',
    lambda path: False,
  )
  with testing.mock_epath(**calls | {'open': no_appending}):
    yield root / 'bucket'


def _tiny(images, is_training, num_classes, cross_replica_axis=None):
  return hk.Linear(num_classes, name='logits')(hk.Flatten()(images))


def _settings(**flags):
  flags = {
    'dataset': 'folder',
    'method': 'static',
    'image_size': 8,
    'batch_size': 4,
    'validation_images': 4,
    'steps': 4,
    'evaluate_every': 2,
    'num_workers': 0,
  } | flags
  args = [f'--{name}={value}' for name, value in flags.items()]
  return config.parse(sparse_training.Settings, args, {})


class _Stopping(output.Metrics):
  """Metrics that ask the run to stop after its evaluation at step 2."""

  def __call__(self, metrics, histograms=None):
    super().__call__(metrics, histograms)
    if metrics['step'] == 2 and 'sparsity' in metrics:
      os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_in_a_bucket_stops_and_goes_on(bucket, monkeypatch):
  rng = np.random.default_rng(0)
  for split in ('train', 'val'):
    place = bucket / 'data' / split / 'class'
    place.mkdir(parents=True)
    for i in range(8):
      pixels = rng.integers(256, size=[9, 9, 3], dtype=np.uint8)
      Image.fromarray(pixels).save(place / f'{i}.png')
  monkeypatch.setitem(networks.NETWORKS, 'tiny', _tiny)
  settings = _settings(
    network='tiny', data_dir='gs://bucket/data', out_dir='gs://bucket/run'
  )
  with monkeypatch.context() as patch:
    patch.setattr(output, 'Metrics', _Stopping)
    with pytest.raises(SystemExit, match='130'):
      sparse_training.main(settings)
  run = bucket / 'run'
  assert sorted(os.listdir(run / 'checkpoints')) == ['2']
  assert not (run / 'summary.json').exists()
  sparse_training.main(settings)
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  steps = [x['step'] for x in map(json.loads, lines) if 'sparsity' in x]
  assert steps == [2, 4]
  assert {'config.json', 'summary.json'} <= {*os.listdir(run)}
  assert checkpoint.load('gs://bucket/run/checkpoints').step == 4
  assert os.listdir() == ['buckets']


@pytest.mark.parametrize(
  ('flags', 'package'),
  [
    ({'out_dir': 'gs://bucket/run'}, 'gcsfs'),
    ({'data_dir': 'gs://bucket/data'}, 'gcsfs'),
    ({'data_dir': 's3://bucket/data'}, 's3fs'),
  ],
)
def test_a_missing_package_is_named(monkeypatch, tmp_path, flags, package):
  monkeypatch.setitem(sys.modules, package, None)
  monkeypatch.chdir(tmp_path)
  (address,) = flags.values()
  (flag,) = flags
  with pytest.raises(ValueError, match=f'--{flag}={address}.*nstall {package}'):
    settings = _settings(**flags)
    with output.opened(settings.out_dir, 'sparse_training', {}):
      pass
  assert not os.listdir()


def test_results_in_buckets_of_another_kind_are_refused():
  with (
    pytest.raises(
      config.Refused, match='--out_dir=s3://bucket.*start with gs:'
    ),
    output.opened('s3://bucket', 'sparse_training', {}),
  ):
    pass


def test_checkpoints_that_orbax_cannot_write_are_refused(bucket):
  with pytest.raises(ValueError, match='s3://bucket: checkpoints can be .*gs:'):
    checkpoint.open_manager('s3://bucket', {})

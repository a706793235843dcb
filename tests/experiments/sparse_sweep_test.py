"""Tests of the sweep over sparse training methods."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sparse_sweep
from experiments.presets import sparse_sweep as presets
from experiments.support import config
from experiments.support import runs
from experiments.support import sweep_report
from powerprop_jax.data import in_memory
from powerprop_jax.sparse import masks as masks_lib

_ROOT = pathlib.Path(__file__).parents[2]


def _parse(*args):
  return config.parse(sparse_sweep.Settings, args, presets.PRESETS)


@pytest.fixture(scope='module')
def settings():
  return _parse('--steps=30', '--batch_size=20', '--update_every=10')


@pytest.fixture(scope='module')
def data():
  """Classes that a single pixel tells apart."""
  labels = np.arange(60, dtype=np.int32) % 4
  images = np.zeros((60, 4, 4, 1), np.uint8)
  images[np.arange(60), labels, 0] = 255
  split = in_memory.Split(images, labels)
  return in_memory.Dataset('pixels', split, split, split, 4)


@pytest.fixture(scope='module')
def make(settings, data):
  return sparse_sweep.make_functions(settings, data)


_RECIPE = sparse_sweep.Recipe(2.0, 0.1, 0.0, 1.0)
_SIZE = 16 * 300 + 300 * 100 + 100 * 4


# The other methods differ in what `make_plan` returns; sparse_training_test has
# all of them.
@pytest.mark.parametrize('method', ['dense', 'snip', 'rigl', 'top_kast'])
def test_run_ends_at_its_sparsity(method, make, settings, data):
  job = sparse_sweep.Job(method, 'uniform', 0.9, _RECIPE, 2)
  steps = []
  watch = runs.Watch(lambda step, metrics: steps.append(step), lambda: False)
  splits = (data.train, data.valid, data.test)
  splits = jax.tree.map(jnp.asarray, splits)
  result = sparse_sweep.run(job, make, settings, splits, watch)
  assert steps == [10, 20, 30, 40, 50, 60]
  assert result['method'] == method
  assert result['recipe'] == _RECIPE._asdict()
  kept = 1.0 if method == 'dense' else round(0.1 * _SIZE) / _SIZE
  np.testing.assert_allclose(result['inference_flops'], kept, rtol=1e-5)
  assert len(result['test_accuracy']) == 2
  assert 0 <= result['sign_changes'] < 0.5
  if method == 'dense':
    assert result['test_accuracy'] == result['valid_accuracy'] == [1.0, 1.0]


def test_operations_are_those_of_the_masks(settings):
  theta = {name: {'w': jnp.zeros([10, 10])} for name in 'ab'}
  job = sparse_sweep.Job('snip', 'uniform', 0.5, _RECIPE, 1)
  method = sparse_sweep.make_plan(job, settings, theta, lambda key: theta)
  kept = {
    name: {'w': jnp.arange(100).reshape(10, 10) < n}
    for name, n in (('a', 20), ('b', 80))
  }
  costs = sparse_sweep.relative_flops(
    method, {'a/w': 900.0, 'b/w': 100.0}, masks_lib.Masks(kept, kept)
  )
  # 0.2 * 900 + 0.8 * 100 of 1000, where each layer was asked to keep half.
  np.testing.assert_allclose(costs, [0.26, 0.26], rtol=1e-6)


def test_equal_recipes_share_what_is_compiled(make):
  jobs = [
    sparse_sweep.Job(method, 'erk', 0.9, _RECIPE, 1)
    for method in ('rigl', 'set', 'top_kast')
  ]
  first, other, penalised = map(make, jobs)
  assert first.run_steps is other.run_steps
  assert first.run_steps is not penalised.run_steps


def test_jobs_of_the_flags():
  settings = _parse(
    '--methods=dense,snip,rigl',
    '--alphas=1,2',
    '--learning_rates=0.1,0.2',
    '--phi_decay=1e-5',
    '--clip_norms=0,1',
    '--sparsities=0.8,0.9',
    '--distributions=uniform,erk',
    '--seeds=2',
  )
  recipes = sparse_sweep.make_recipes(settings)
  assert [tuple(r) for r in recipes] == [
    (1.0, 0.1, 1e-5, 0.0),
    (2.0, 0.2, 1e-5, 1.0),
  ]
  jobs = sparse_sweep.make_jobs(settings)
  # Dense: 2 recipes. SNIP: 2 sparsities too. RigL: 2 distributions as well.
  assert len(jobs) == len(set(jobs)) == 2 + 4 + 8
  assert len({job.name for job in jobs}) == len(jobs)


def test_close_numbers_are_different_jobs():
  settings = _parse('--methods=set', '--sparsities=0.9,0.9000001', '--alphas=2')
  names = [job.name for job in sparse_sweep.make_jobs(settings)]
  ending = '-alpha=2-lr=0.2-decay=0.0002-clip=1-seeds=1'
  assert names == [f'set-erk-0.9{ending}', f'set-erk-0.9000001{ending}']


@pytest.mark.parametrize('name', presets.PRESETS)
def test_presets_set_flags_that_exist(name):
  settings, preset = _parse(f'--preset={name}'), presets.PRESETS[name]
  for flag, value in preset.items():
    assert getattr(settings, flag) == value, flag
  alphas = [r.alpha for r in sparse_sweep.make_recipes(settings)]
  assert alphas == list(preset['alphas'])
  assert sparse_sweep.make_jobs(settings)


@pytest.mark.parametrize(
  'args, message',
  [
    (('--methods=rigl,unknown',), '--methods=rigl,unknown: must be one of'),
    (('--methods=',), '--methods=: must not be empty'),
    (('--sparsities=0.9,much',), '--sparsities=0.9,much: must be a number'),
    (('--sparsities=1.5',), '--sparsities=1.5: must be between 0 and 1'),
    (('--distributions=',), '--distributions=: must not be empty'),
    (('--distributions=even',), '--distributions=even: must be one of'),
    (('--alphas=0.5',), 'alpha must be a finite number >= 1, got 0.5'),
    (('--alphas=a',), '--alphas=a: must be a number'),
    (('--learning_rates=0.1',), 'has 1 values for 2 alphas'),
    (('--learning_rates=nan,1',), '--learning_rates=nan,1: must be a finite'),
    (('--clip_norms=1,-1',), '--clip_norms=1,-1: must be at least 0'),
    (('--seeds=1000000000000',), '--seeds=1000000000000: must be between'),
  ],
)
def test_bad_flags(args, message):
  with pytest.raises(ValueError, match=message):
    _parse(*args)


@pytest.mark.parametrize('sparsity', [-0.1, 1.0, 1.5])
def test_impossible_sparsity(make, sparsity):
  with pytest.raises(ValueError, match='sparsity'):
    make(sparse_sweep.Job('rigl', 'uniform', sparsity, _RECIPE, 0))


def _result(method, sparsity, alpha, test, distribution='erk'):
  return {
    'method': method,
    'distribution': distribution,
    'sparsity': sparsity,
    'recipe': {'alpha': alpha, 'learning_rate': 0.1},
    'seeds': len(test),
    'test_accuracy': test,
    'valid_accuracy': test,
    'sign_changes': sparsity / 2,
    'inference_flops': 1 - sparsity,
    'training_flops': (1 - sparsity) / 2,
  }


_RESULTS = [
  _result('dense', 0.0, 1.0, [0.99]),
  _result('rigl', 0.9, 1.0, [0.90, 0.92]),
  _result('rigl', 0.9, 2.0, [0.95]),
  _result('rigl', 0.5, 1.0, [0.97]),
  _result('set', 0.9, 1.0, [0.80], 'uniform'),
]


def test_summary_by_hand():
  rows = sweep_report.summarise(_RESULTS)
  np.testing.assert_allclose(rows[1]['mean'], 0.91)
  np.testing.assert_allclose(rows[1]['std'], 0.01 * np.sqrt(2))
  assert rows[0]['std'] == 0


def test_validation_data_choose_among_the_recipes_of_an_alpha():
  first = _result('rigl', 0.9, 1.0, [0.9, 0.9])
  # It is better on test data, and on validation data in one seed, but not on
  # average.
  other = first | {'test_accuracy': [1.0, 1.0], 'valid_accuracy': [0.8, 0.95]}
  rows = sweep_report.summarise([*_RESULTS[:1], other, first, _RESULTS[2]])
  assert [r['chosen'] for r in rows] == [True, False, True, True]


def test_tables_by_hand():
  rows = sweep_report.summarise(_RESULTS)
  lines = [
    line.split() for line in sweep_report.accuracy_table(rows).split('\n')
  ]
  assert lines[2:] == [
    ['dense', '1', '99.00', '99.00'],
    ['rigl', 'erk', '1', '97.00', '91.00', '±', '1.41'],
    ['rigl', 'erk', '2', '95.00'],
    ['set', 'uniform', '1', '80.00'],
  ]
  assert '0.100 / 0.050' in sweep_report.flops_table(rows)
  lines = [line.split() for line in sweep_report.sign_table(rows).split('\n')]
  assert lines[3] == ['rigl', 'erk', '1', '25.0', '45.0']


def test_curves_of_a_distribution():
  curves = sweep_report.curves(sweep_report.summarise(_RESULTS), 'erk')
  assert list(curves) == ['1.0 dense', '1.0 RigL', '2.0 RigL']
  assert curves['1.0 RigL']['sparsity'] == [0.5, 0.9]
  np.testing.assert_allclose(curves['1.0 RigL']['mean'], [0.97, 0.91])


@pytest.mark.slow
def test_sweep_as_a_user_runs_it(tmp_path):
  # Two recipes of the same power: one line, of the better one.
  done = subprocess.run(
    [
      *(sys.executable, '-W', 'error', '-m', 'experiments.sparse_sweep'),
      '--methods=dense,static',
      '--alphas=2,2',
      '--learning_rates=0.1,1e-6',
      '--sparsities=0.9',
      '--steps=20',
      f'--out_dir={tmp_path}',
    ],
    cwd=_ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / 'summary.json').read_text())['results']
  assert [(r['method'], r['chosen']) for r in rows] == [
    ('dense', True),
    ('dense', False),
    ('static', True),
    ('static', False),
  ]
  assert 'by the recipe that validation data choose' in done.stdout
  accuracies, _ = done.stdout.split('Weights in use', 1)
  for row in rows[::2]:
    lines = [x for x in accuracies.split('\n') if row['method'] in x]
    assert len(lines) == 1
    assert f'{100 * row["mean"]:.2f}' in lines[0]
  assert (tmp_path / 'accuracy_erk.png').read_bytes()[1:4] == b'PNG'
  assert len(list((tmp_path / 'runs').iterdir())) == 4

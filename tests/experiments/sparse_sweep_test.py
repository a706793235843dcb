"""Tests of the sweep over sparse training methods."""

import json
import pathlib
import subprocess
import sys

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import common
from experiments import methods
from experiments import runner
from experiments import sparse_report
from experiments import sparse_runs
from experiments import sparse_sweep
from experiments.presets import sparse_sweep as presets
from powerprop_jax.data import in_memory
from powerprop_jax.sparse import masks as masks_lib

_ROOT = pathlib.Path(__file__).parents[2]


def _values(*args):
  values = flags.FlagValues()
  sparse_sweep.define_flags(values)
  values(['sparse_sweep', *args])
  return values


@pytest.fixture(scope='module')
def settings():
  values = _values('--steps=30', '--batch_size=20', '--update_every=10')
  return {name: values[name].value for name in sparse_sweep.RUN_FLAGS}


@pytest.fixture(scope='module')
def data():
  """Classes that a single pixel tells apart."""
  labels = jnp.arange(60) % 4
  images = jnp.zeros((60, 4, 4, 1), jnp.uint8)
  images = images.at[jnp.arange(60), labels, 0].set(255)
  return (in_memory.Split(images, labels),) * 3


@pytest.fixture(scope='module')
def make(settings):
  return sparse_runs.make_functions(settings, (4, 4, 1), 4)


_RECIPE = sparse_runs.Recipe(2.0, 0.1, 0.0, 1.0)
_SIZE = 16 * 300 + 300 * 100 + 100 * 4


@pytest.mark.parametrize('method', methods.METHODS)
def test_run_ends_at_its_sparsity(method, make, settings, data):
  job = sparse_runs.Job(method, 'uniform', 0.9, _RECIPE, 2)
  steps = []
  result = sparse_runs.run(
    job, make, settings, data, lambda step, metrics: steps.append(step)
  )
  assert steps == [10, 20, 30, 40, 50, 60]
  assert result['method'] == method
  assert result['recipe'] == _RECIPE._asdict()
  kept = 1.0 if method == 'dense' else round(0.1 * _SIZE) / _SIZE
  np.testing.assert_allclose(result['inference_flops'], kept, rtol=1e-5)
  assert len(result['test_accuracy']) == 2
  if method == 'dense':
    assert result['test_accuracy'] == result['valid_accuracy'] == [1.0, 1.0]


def test_operations_are_those_of_the_masks(settings):
  theta = {name: {'w': jnp.zeros([10, 10])} for name in 'ab'}
  job = sparse_runs.Job('snip', 'uniform', 0.5, _RECIPE, 1)
  method = sparse_runs._make_method(job, settings, theta, lambda key: theta)
  kept = {
    name: {'w': jnp.arange(100).reshape(10, 10) < n}
    for name, n in (('a', 20), ('b', 80))
  }
  costs = sparse_runs._relative_flops(
    method, {'a/w': 900.0, 'b/w': 100.0}, masks_lib.Masks(kept, kept)
  )
  # 0.2 * 900 + 0.8 * 100 of 1000, where each layer was asked to keep half.
  np.testing.assert_allclose(costs, [0.26, 0.26], rtol=1e-6)


def test_masks_are_updated_between_chunks():
  """The state before a chunk is what `before` returns, and only then."""
  taken = []

  def run_steps(state, data, indices):
    return state + len(indices), {'loss': np.zeros(len(indices))}

  def before(step, state):
    taken.append((step, state))
    return state + 100

  state = runner.train(
    0,
    run_steps,
    (None, np.zeros(5)),
    jax.random.key(0),
    steps=25,
    batch_size=2,
    report=lambda step, metrics: None,
    chunk=10,
    before=before,
  )
  assert taken == [(0, 0), (10, 110), (20, 220)]
  assert state == 325


def test_equal_recipes_share_what_is_compiled(make):
  jobs = [
    sparse_runs.Job(method, 'erk', 0.9, _RECIPE, 1)
    for method in ('rigl', 'set', 'top_kast')
  ]
  first, other, penalised = map(make, jobs)
  assert first.run_steps is other.run_steps
  assert first.run_steps is not penalised.run_steps


def test_jobs_of_the_flags():
  values = _values(
    '--methods=dense,snip,rigl',
    '--alphas=1,2',
    '--learning_rates=0.1,0.2',
    '--phi_decay=1e-5',
    '--clip_norms=0,1',
    '--sparsities=0.8,0.9',
    '--distributions=uniform,erk',
    '--seeds=2',
  )
  recipes = sparse_sweep.parse_recipes(values)
  assert [tuple(r) for r in recipes] == [
    (1.0, 0.1, 1e-5, 0.0),
    (2.0, 0.2, 1e-5, 1.0),
  ]
  jobs = sparse_sweep.parse_jobs(values)
  # Dense: 2 recipes. SNIP: 2 sparsities too. RigL: 2 distributions as well.
  assert len(jobs) == len(set(jobs)) == 2 + 4 + 8
  assert len({sparse_sweep.name(job) for job in jobs}) == len(jobs)


@pytest.mark.parametrize('name', presets.PRESETS)
def test_presets_set_flags_that_exist(name):
  values, preset = _values(), presets.PRESETS[name]
  common.apply_preset(values, preset)
  for flag, value in preset.items():
    assert values[flag].value == value, flag
  alphas = [r.alpha for r in sparse_sweep.parse_recipes(values)]
  assert alphas == [float(a) for a in preset['alphas']]
  assert sparse_sweep.parse_jobs(values)


@pytest.mark.parametrize(
  'args, message',
  [
    (('--methods=rigl,unknown',), "--methods must be among .*, got 'unknown'"),
    (('--sparsities=0.9,much',), '--sparsities=0.9,much: could not'),
    (('--alphas=0.5',), 'alpha must be a finite number >= 1, got 0.5'),
    (('--alphas=a',), '--alphas=a: could not'),
    (('--learning_rates=0.1',), 'has 1 values for 2 alphas'),
    (('--clip_norms=1,-1',), '--clip_norms=1,-1: must be finite and not neg'),
  ],
)
def test_bad_flags(args, message):
  with pytest.raises(ValueError, match=message):
    sparse_sweep.parse_jobs(_values(*args))


@pytest.mark.parametrize('sparsity', [-0.1, 1.0, 1.5])
def test_impossible_sparsity(make, sparsity):
  with pytest.raises(ValueError, match='sparsity'):
    make(sparse_runs.Job('rigl', 'uniform', sparsity, _RECIPE, 0))


def _result(method, sparsity, alpha, test, distribution='erk'):
  return {
    'method': method,
    'distribution': distribution,
    'sparsity': sparsity,
    'recipe': {'alpha': alpha, 'learning_rate': 0.1},
    'seeds': len(test),
    'test_accuracy': test,
    'valid_accuracy': test,
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
  rows = sparse_report.summarise(_RESULTS)
  np.testing.assert_allclose(rows[1]['mean'], 0.91)
  np.testing.assert_allclose(rows[1]['std'], 0.01 * np.sqrt(2))
  assert rows[0]['std'] == 0


def test_validation_data_choose_among_the_recipes_of_an_alpha():
  first = _result('rigl', 0.9, 1.0, [0.9, 0.9])
  # Better on test data, and on validation data in one seed, not on average.
  other = first | {'test_accuracy': [1.0, 1.0], 'valid_accuracy': [0.8, 0.95]}
  rows = sparse_report.summarise([*_RESULTS[:1], other, first, _RESULTS[2]])
  assert [r['chosen'] for r in rows] == [True, False, True, True]


def test_tables_by_hand():
  rows = sparse_report.summarise(_RESULTS)
  lines = [
    line.split() for line in sparse_report.accuracy_table(rows).split('\n')
  ]
  assert lines[1:] == [
    ['dense', '1', '99.00', '99.00'],
    ['rigl', 'erk', '1', '97.00', '91.00', '±', '1.41'],
    ['rigl', 'erk', '2', '95.00'],
    ['set', 'uniform', '1', '80.00'],
  ]
  assert '0.100 / 0.050' in sparse_report.flops_table(rows)


def test_curves_of_a_distribution():
  curves = sparse_report.curves(sparse_report.summarise(_RESULTS), 'erk')
  assert list(curves) == ['1.0 dense', '1.0 RigL', '2.0 RigL']
  assert curves['1.0 RigL']['sparsity'] == [0.5, 0.9]
  np.testing.assert_allclose(curves['1.0 RigL']['mean'], [0.97, 0.91])


def test_sweep_as_a_user_runs_it(tmp_path):
  def run(*args):
    module = 'experiments.sparse_sweep'
    return subprocess.run(
      [sys.executable, '-W', 'error', '-m', module, *args],
      cwd=_ROOT,
      capture_output=True,
      text=True,
    )

  done = run(
    '--methods=dense,static',
    '--alphas=2',
    '--sparsities=0.9',
    '--steps=20',
    f'--out_dir={tmp_path}',
  )
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / 'summary.json').read_text())['results']
  assert [r['method'] for r in rows] == ['dense', 'static']
  for r in rows:
    assert f'{100 * r["mean"]:.2f}' in done.stdout
  assert (tmp_path / 'accuracy_erk.png').read_bytes()[1:4] == b'PNG'
  assert len(list((tmp_path / 'runs').iterdir())) == 2

  # Another recipe of the same power: one line, of the better one.
  two = run(
    '--methods=static',
    '--alphas=2,2',
    '--learning_rates=0.1,1e-6',
    '--sparsities=0.9',
    '--steps=20',
    f'--out_dir={tmp_path / "two"}',
  )
  assert two.returncode == 0, two.stderr
  assert 'by the recipe that validation data choose' in two.stdout
  summary = json.loads((tmp_path / 'two/summary.json').read_text())['results']
  assert [r['chosen'] for r in summary] == [True, False]
  lines = [x for x in two.stdout.split('\n') if 'static' in x and '/' not in x]
  assert len(lines) == 1
  assert f'{100 * summary[0]["mean"]:.2f}' in lines[0]

  bad = run('--sparsities=1.5', f'--out_dir={tmp_path}')
  assert bad.returncode == 2
  assert '1.5' in bad.stderr

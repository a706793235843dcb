"""Tests of the reports on sequences of tasks, against tables worked by hand."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.continual import report as continual_report
from powerprop_jax.sparse import masks

_ROWS = [[0.9], [0.95, 0.8], [0.7, 0.85, 0.6]]
_OWNERS = {
  'a/w': np.array([[0, 1, 1], [2, 3, 1]], np.uint8),
  'b/w': np.array([1, 0, 0, 2], np.uint8),
}
# Tasks 0 and 1 use the weights that they own, and task 1 also uses two weights
# of task 0.
_MASKS = (
  {'a/w': [[0, 1, 1], [0, 0, 1]], 'b/w': [1, 0, 0, 0]},
  {'a/w': [[0, 1, 0], [1, 0, 0]], 'b/w': [1, 0, 0, 1]},
  {'a/w': [[0, 0, 0], [0, 1, 0]], 'b/w': [0, 0, 0, 0]},
)


def _packed():
  return [
    masks.pack({path: jnp.array(m, bool) for path, m in mask.items()})
    for mask in _MASKS
  ]


def test_accuracy_report_by_hand():
  report = continual_report.accuracy_report(_ROWS, [0.9, 0.9, 0.5, 0.4])
  assert report['accuracy_matrix'] == [
    [0.9, None, None],
    [0.95, 0.8, None],
    [0.7, 0.85, 0.6],
  ]
  assert report['average_accuracy'] == pytest.approx(2.15 / 3)
  assert report['worst_accuracy'] == 0.6
  # Task 0 was best after task 1; task 1 gained from task 2.
  assert report['forgetting'] == pytest.approx([0.25, -0.05, 0])
  assert report['mean_forgetting'] == pytest.approx(0.1)
  assert report['forward_transfer'] == pytest.approx([0, -0.1, 0.1])
  assert report['mean_forward_transfer'] == pytest.approx(0, abs=1e-12)
  json.dumps(report, allow_nan=False)


def test_accuracy_report_of_a_matrix_with_gaps():
  nan = float('nan')
  rows = [[0.9, nan, nan], [None, 0.8, nan], [0.7, 0.8, 0.6]]
  report = continual_report.accuracy_report(rows)
  assert report['accuracy_matrix'][1] == [None, 0.8, None]
  assert report['forgetting'] == pytest.approx([0.2, 0, 0])
  assert 'forward_transfer' not in report


def test_transfer_of_lopez_paz_and_ranzato_by_hand():
  # R[t - 1][t] is 0.3 and 0.4, where the networks began at 0.1 and 0.6.
  rows = [[0.9, 0.3], [0.95, 0.8, 0.4], [0.7, 0.85, 0.6]]
  report = continual_report.accuracy_report(rows, initial=[0.5, 0.1, 0.6, 0.2])
  assert report['backward_transfer'] == pytest.approx([-0.2, 0.05, 0])
  assert report['mean_backward_transfer'] == pytest.approx(-0.15 / 2)
  assert report['zero_shot_transfer'][0] is None
  assert report['zero_shot_transfer'][1:] == pytest.approx([0.2, -0.2])
  assert report['mean_zero_shot_transfer'] == pytest.approx(0, abs=1e-12)
  assert 'forward_transfer' not in report
  # Accuracies from before a task was learned do not count as forgotten.
  without = continual_report.accuracy_report(_ROWS)
  assert report['forgetting'] == without['forgetting']
  assert report['backward_transfer'] == without['backward_transfer']
  assert 'zero_shot_transfer' not in without
  json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
  ('rows', 'initial', 'message'),
  [
    ([[0.9, 0.1], [0.9, 0.8]], [0.1], 'initial has 1 accuracies, but 2 tasks'),
    (_ROWS, [0.1] * 3, r'Tasks \[1, 2\] must be evaluated before they'),
  ],
)
def test_transfer_before_learning_needs_its_numbers(rows, initial, message):
  with pytest.raises(ValueError, match=message):
    continual_report.accuracy_report(rows, initial=initial)


def test_what_stays_bit_for_bit_is_not_forgotten_at_all():
  rows = [[0.1 + 0.2], [0.1 + 0.2, 0.7], [0.1 + 0.2, 0.7, 0.6]]
  report = continual_report.accuracy_report(rows)
  assert report['forgetting'] == [0.0, 0.0, 0.0]
  assert report['mean_forgetting'] == 0.0


def test_accuracy_report_of_a_single_task():
  report = continual_report.accuracy_report([[0.9]], [0.8])
  assert report['average_accuracy'] == report['worst_accuracy'] == 0.9
  assert report['forgetting'] == [0.0]
  assert report['mean_forgetting'] is report['mean_forward_transfer'] is None
  assert report['mean_backward_transfer'] is None
  report = continual_report.accuracy_report([[0.9]], initial=[0.1])
  assert report['zero_shot_transfer'] == [None]
  assert report['mean_zero_shot_transfer'] is None


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([], 'No task'),
    ([[0.9], [0.9]], r'Tasks \[1\] must be evaluated after the last task'),
    ([[None], [0.9, 0.8]], r'Tasks \[0\] must be evaluated when learned'),
    ([[0.9, 0.9]], 'Row 0 .* has 2 tasks, but 1'),
  ],
)
def test_accuracy_report_needs_its_numbers(rows, message):
  with pytest.raises(ValueError, match=message):
    continual_report.accuracy_report(rows)


def test_independent_networks_for_all_tasks():
  with pytest.raises(ValueError, match='has 2 accuracies, but 3 tasks'):
    continual_report.accuracy_report(_ROWS, [0.9, 0.9])


def test_capacity_report_by_hand():
  report = continual_report.capacity_report(_OWNERS, 4)
  assert report['layers'] == {
    'a/w': {'size': 6, 'used': 5, 'free': 1, 'new_weights': [3, 1, 1, 0]},
    'b/w': {'size': 4, 'used': 2, 'free': 2, 'new_weights': [1, 1, 0, 0]},
  }
  assert report['new_weights'] == [4, 2, 1, 0]
  assert report['used'] == pytest.approx([0.4, 0.6, 0.7, 0.7])
  assert report['backward_masked'] == pytest.approx([0, 0.4, 0.6, 0.7])
  assert report['capacity_used'] == pytest.approx(0.7)
  json.dumps(report)


def test_capacity_of_a_network_that_learned_nothing():
  report = continual_report.capacity_report({'w': np.zeros(3, np.uint8)}, 0)
  assert report['capacity_used'] == 0
  assert report['used'] == report['backward_masked'] == []


def test_capacity_report_refuses_other_owners():
  with pytest.raises(ValueError, match=r"'a/w' belongs to task 2, but only 2"):
    continual_report.capacity_report(_OWNERS, 2)
  with pytest.raises(ValueError, match='no owners'):
    continual_report.capacity_report({}, 2)


def test_mask_report_by_hand():
  report = continual_report.mask_report(_packed(), _OWNERS)
  assert report['density'] == pytest.approx([0.4, 0.4, 0.1])
  assert report['layer_density']['a/w'] == pytest.approx([1 / 2, 1 / 3, 1 / 6])
  assert report['layer_density']['b/w'] == pytest.approx([1 / 4, 1 / 2, 0])
  # Tasks 0 and 1 share 2 of 6 weights; task 2 shares none.
  overlap = [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]]
  np.testing.assert_allclose(report['overlap'], overlap)
  assert report['reused'] == pytest.approx([0, 0.5, 0])
  json.dumps(report)


def test_mask_report_counts_large_masks_exactly(monkeypatch):
  rng = np.random.default_rng(0)
  bits = rng.random((3, 1001)) < 0.5
  packed = [masks.pack({'w': jnp.array(m)}) for m in bits]
  monkeypatch.setattr(continual_report, '_BLOCK', 64)
  report = continual_report.mask_report(packed, {'w': np.zeros(1001, int)})
  for i in range(3):
    for j in range(3):
      either = np.sum(bits[i] | bits[j])
      assert report['overlap'][i][j] == np.sum(bits[i] & bits[j]) / either


def test_masks_of_no_weights_are_no_error():
  packed = [masks.pack({'w': jnp.zeros(5, bool)})] * 2
  report = continual_report.mask_report(packed, {'w': np.zeros(5, np.uint8)})
  assert report['overlap'] == [[0, 0], [0, 0]]
  assert report['reused'] == report['density'] == [0, 0]


def _run(method, alpha, average, worst, capacity_used):
  return {
    'method': method,
    'alpha': alpha,
    'average_accuracy': average,
    'worst_accuracy': worst,
    'capacity_used': capacity_used,
  }


def test_table_by_hand():
  runs = [
    _run('epn', 2.0, 0.97, 0.95, 0.3),
    _run('finetune', 1.0, 0.5, 0.1, None),
    _run('epn', 2.0, 0.98, 0.97, 0.4),
  ]
  assert continual_report.table(runs).splitlines() == [
    'method      alpha       average    worst    in use',
    'epn             2  97.50 ± 0.71    96.00      35.0',
    'finetune        1         50.00    10.00         -',
  ]
  runs[0]['mean_forward_transfer'] = -0.02
  runs[2]['mean_forward_transfer'] = 0.01
  assert continual_report.table(runs).splitlines() == [
    'method      alpha       average    worst    in use    transfer',
    'epn             2  97.50 ± 0.71    96.00      35.0       -0.50',
    'finetune        1         50.00    10.00         -           -',
  ]
  headers = ['method', 'alpha', 'average', 'worst', 'in', 'use']
  assert continual_report.table([]).split() == headers

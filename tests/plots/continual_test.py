"""Tests of the figures of continual learning."""

from typing import Any

import figures
import numpy as np
import pytest

from powerprop_jax import plots


def test_accuracy_by_task_is_the_mean_over_seeds():
  figure = plots.accuracy_by_task(
    {'PackNet': [0.98, 0.97, 0.95], '2.0 EPN': [[0.98, 0.9], [0.98, 0.8]]}
  )
  (axes,) = figure.axes
  lines = figures.lines(axes)
  assert list(lines) == ['PackNet', r'$\alpha$ = 2, EPN']
  packnet, epn = lines.values()
  np.testing.assert_allclose(packnet.T, [[1, 2, 3], [98, 97, 95]])
  np.testing.assert_allclose(epn.T, [[1, 2], [98, 85]])
  expected = [85 - 10 / np.sqrt(2), 85 + 10 / np.sqrt(2)]
  np.testing.assert_allclose(figures.band(axes, 2.0), expected, rtol=1e-6)
  assert axes.get_xlabel() == 'Task'


@pytest.mark.parametrize(
  'accuracies',
  [
    [0.98, 0.975, 0.97],  # Ten tasks, with few round errors in range.
    [0.9991, 0.9993, 0.9995],
    [0.97, 0.96, 0.85],  # A hundred tasks.
    [0.98, 0.5, 0.1],
  ],
)
def test_accuracy_can_be_read_from_ticks_on_both_sides(accuracies):
  figure = plots.accuracy_by_task({'EPN': accuracies})
  figure.draw_without_rendering()
  (axes,) = figure.axes
  low, high = axes.get_ylim()
  ticks = [y for y in axes.get_yticks() if low - 1e-9 <= y <= high]
  assert len(ticks) >= 4
  assert min(ticks) <= 100 * min(accuracies)


def test_capacity_is_in_percent_of_all_weights():
  used = {'1.0 EPN': [0.3, 0.5], '2.0 EPN': np.linspace(0, 0.4, 100)}
  figure = plots.capacity(used)
  figure.draw_without_rendering()
  (axes,) = figure.axes
  first, second = axes.lines
  np.testing.assert_allclose(figures.points(first).T, [[1, 2], [30, 50]])
  np.testing.assert_allclose(
    figures.points(second)[[0, -1]], [[1, 0], [100, 40]]
  )
  assert axes.get_ylim() == (0, 103)
  assert axes.get_xticks().tolist() == [1, *range(10, 101, 10)]
  (legend,) = figure.legends
  assert figures.legend(legend) == [
    r'$\alpha$ = 1, EPN',
    r'$\alpha$ = 2, EPN',
  ]


def test_lines_over_tasks_differ_and_are_dashed_without_powerprop():
  labels = [f'{alpha} m_{i}' for i in range(7) for alpha in (1.0, 2.0)]
  figure = plots.capacity({label: [0.1, 0.2] for label in labels})
  lines = figure.axes[0].lines
  assert len({(x.get_color(), str(x.get_marker())) for x in lines}) == 14
  assert [line.get_linestyle() for line in lines] == ['--', '-'] * 7
  (legend,) = figure.legends
  assert figures.legend(legend)[:2] == [
    r'$\alpha$ = 1, m 0',
    r'$\alpha$ = 2, m 0',
  ]


def test_the_legend_of_a_few_lines_leaves_them_the_width():
  width = {}
  for count in (3, 8):
    labels = [f'{i + 1}.0 EfficientPackNet, L1 decay' for i in range(count)]
    figure = plots.accuracy_by_task({x: [0.97, 0.96] for x in labels})
    figure.draw_without_rendering()
    width[count] = figure.axes[0].get_position().width
  assert width[8] < 0.7 < 0.9 < width[3]


def _array(artist: Any) -> np.ndarray:
  return np.asarray(artist.get_array())


def _cells(axes):
  return {tuple(text.get_position()): text.get_text() for text in axes.texts}


def test_accuracy_matrix_shows_tasks_evaluated_over_tasks_learned():
  nan = float('nan')
  matrix = [[0.98, nan, nan], [0.9, 0.97, nan], [0.5, 0.8, 0.96]]
  axes, bar = plots.accuracy_matrix(matrix).axes
  (image_,) = axes.images
  np.testing.assert_allclose(_array(image_), 100 * np.array(matrix))
  assert _cells(axes) == {
    (1, 1): '98.0',
    (1, 2): '90.0',
    (2, 2): '97.0',
    (1, 3): '50.0',
    (2, 3): '80.0',
    (3, 3): '96.0',
  }
  assert axes.get_xticks().tolist() == axes.get_yticks().tolist() == [1, 2, 3]
  assert axes.get_xlabel() == 'Task evaluated'
  assert axes.get_ylabel() == 'Last task learned'
  assert axes.yaxis_inverted()
  assert bar.get_ylabel() == 'Test accuracy (%)'
  assert image_.get_clim() == pytest.approx((50, 98))


def test_accuracy_matrix_does_not_exaggerate_and_takes_many_tasks():
  matrix = np.where(np.tri(100) > 0, 0.97, np.nan)
  matrix[:, 0] = 0.98
  axes, _ = plots.accuracy_matrix(matrix).axes
  assert axes.images[0].get_clim() == pytest.approx((93, 98))
  assert not axes.texts


def test_overlap_matrix_runs_from_nothing_to_all():
  axes, _ = plots.overlap_matrix([[1.0, 0.4], [0.4, 1.0]]).axes
  (image_,) = axes.images
  np.testing.assert_allclose(_array(image_), [[100, 40], [40, 100]])
  assert image_.get_clim() == (0, 100)
  assert _cells(axes)[2, 1] == '40.0'


def test_perfect_accuracy_can_be_drawn(tmp_path):
  figure = plots.accuracy_by_task({'EPN': [1.0, 1.0, 1.0]})
  plots.save(figure, tmp_path / 'figure.png')

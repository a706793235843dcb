"""Tests that figures contain what they should, and need no display."""

import subprocess
import sys
from typing import Any

import figures
import matplotlib as mpl
from matplotlib import image
import numpy as np
import pytest

from powerprop_jax import analysis
from powerprop_jax import plots

_KEPT = [1.0, 0.1, 0.02]


def _summary():
  return analysis.summarise(
    _KEPT,
    {
      '1.0': [[0.98, 0.96], [0.9, 0.8], [0.3, 0.3]],
      '2.0 chain_rule': [[0.97], [0.95], [0.7]],
      'RigL': [[0.9, 0.9], [0.8, 0.8], [0.7, 0.7]],
    },
  )


def _overlap(overlap, **extra):
  chance = [1.0, 0.11, 0.03]
  return {'kept': _KEPT, 'overlap': overlap, 'chance': chance, **extra}


def _distribution(scale, density=0.25, initial=(-0.4, -0.1, 0.1, 0.2)):
  initial = np.array(initial)
  layer = {'linear': {'w': initial}}
  trained = {'linear': {'w': scale * initial * [1, -1, 1, 1]}}
  return analysis.weight_distribution(layer, trained, density)


def _texts(figure):
  figure.draw_without_rendering()
  texts = [axes.get_title('left') for axes in figure.axes]
  texts += [axes.get_title('right') for axes in figure.axes]
  texts += [text.get_text() for axes in figure.axes for text in axes.texts]
  return '\n'.join(texts)


def test_accuracy_lines_hold_the_means_in_percent():
  (axes,) = plots.accuracy_against_kept(_summary()).axes
  lines = figures.lines(axes)
  assert list(lines) == [
    r'$\alpha$ = 1 (baseline)',
    r'$\alpha$ = 2, chain rule',
    'RigL',
  ]
  means = [97, 85, 30], [97, 95, 70], [90, 80, 70]
  for points, mean in zip(lines.values(), means):
    np.testing.assert_allclose(points.T, [[100, 10, 2], mean])
  assert figures.legend(axes.get_legend()) == list(lines)
  assert axes.get_xlabel() == 'Weights kept after pruning (%)'
  assert axes.get_ylabel() == 'Test accuracy (%)'


def test_accuracy_band_is_one_standard_deviation():
  figure = plots.accuracy_against_kept(_summary())
  std = 10 / np.sqrt(2)  # Of 90 and 80; the seeds of other labels agree.
  expected = [85 - std, 85 + std]
  np.testing.assert_allclose(
    figures.band(figure.axes[0], 10.0), expected, rtol=1e-6
  )
  assert 'standard deviation' in _texts(figure)
  single = analysis.summarise(_KEPT, {'3.0': [[0.9], [0.8], [0.7]]})
  assert 'standard deviation' not in _texts(plots.accuracy_against_kept(single))


def test_sparsity_axis_is_logarithmic_from_dense_to_sparse():
  (axes,) = plots.accuracy_against_kept(_summary()).axes
  assert axes.get_xscale() == 'log'
  left, right = axes.get_xlim()
  assert left > 100 > 2 > right
  labels = [text.get_text() for text in axes.get_xticklabels()]
  assert {'100', '50', '20', '10', '5', '2'} <= set(labels)


@pytest.mark.parametrize('kept', [[0.9, 0.8, 0.7], [0.003, 0.002, 0.0015]])
def test_a_narrow_range_has_ticks(kept):
  summary = analysis.summarise(kept, {'1.0': [[0.9], [0.8], [0.7]]})
  figure = plots.accuracy_against_kept(summary)
  figure.draw_without_rendering()
  axis = figure.axes[0].xaxis
  low, high = sorted(axis.get_view_interval())
  assert sum(low <= x <= high for x in axis.get_ticklocs()) >= 3


def test_styles_tell_labels_apart_and_mark_the_baseline():
  labels = ['1.0', '1.375', '2.0', '3.0', '4.0', '5.0', 'RigL', '1.0 adam']
  values = {label: [[0.9], [0.8], [0.7]] for label in labels}
  figure = plots.accuracy_against_kept(analysis.summarise(_KEPT, values))
  lines = figure.axes[0].lines
  styles = {(line.get_color(), line.get_marker()) for line in lines}
  assert len(styles) == len(labels)
  black = [line.get_color() in ('#000000', '#7f7f7f') for line in lines]
  dashed = [line.get_linestyle() == '--' for line in lines]
  assert black == dashed == [x.split()[0] == '1.0' for x in labels]


def test_accuracy_against_steps_has_a_panel_for_each_title():
  def line(*mean):
    return {'steps': [1000, 5000], 'mean': mean, 'std': [0.0, 0.01]}

  labels = '1.0 with L1', '2.0'
  panels = {
    '1 % kept': dict(zip(labels, (line(0.9, 0.95), line(0.8, 0.97)))),
    '5 % kept': {labels[1]: line(0.95, 0.98)},
  }
  figure = plots.accuracy_against_steps(panels)
  figure.draw_without_rendering()
  first, second = figure.axes
  lines = [bars.lines[0] for bars in first.containers]
  for found, (steps, mean) in zip(lines, (([1000, 5000], [90, 95]),)):
    np.testing.assert_allclose(found.get_xydata().T, [steps, mean])
  assert len(lines) == 2
  assert len(second.containers) == 1
  # The lines of one label look alike in all panels.
  looks = [
    line.get_color() for line in (lines[1], second.containers[0].lines[0])
  ]
  assert looks[0] == looks[1] != lines[0].get_color()
  (legend,) = figure.legends
  assert len(figures.legend(legend)) == 2
  for axes, means in ((first, (80, 97)), (second, (95, 98))):
    low, high = axes.get_ylim()
    assert low < means[0] < means[1] < high
  assert [text.get_text() for text in first.get_xticklabels()] == [
    '1,000',
    '5,000',
  ]


def test_mask_overlap_lines_and_chance_level():
  overlaps = {1.0: _overlap([1.0, 0.4, 0.2]), 3.0: _overlap([1.0, 0.6, 0.5])}
  (axes,) = plots.mask_overlap(overlaps).axes
  lines = figures.lines(axes)
  expected = {
    r'$\alpha$ = 1 (baseline)': [100, 40, 20],
    r'$\alpha$ = 3': [100, 60, 50],
    'random masks': [100, 11, 3],
  }
  assert list(lines) == list(expected)
  for name, values in expected.items():
    np.testing.assert_allclose(lines[name].T, [[100, 10, 2], values])
  assert not axes.collections
  assert axes.get_ylabel().endswith('(%)')


def test_mask_overlap_band_of_an_average():
  average = _overlap([1.0, 0.4, 0.2], std=[0.0, 0.05, 0.1])
  (axes,) = plots.mask_overlap({'2.0': average}).axes
  np.testing.assert_allclose(figures.band(axes, 10.0), [35, 45], rtol=1e-6)


def test_weight_scatter_has_a_panel_for_each_alpha_on_the_same_axes():
  figure = plots.weight_scatter(
    {1.0: _distribution(1.0), 4.0: _distribution(3.0)}
  )
  figure.draw_without_rendering()
  mains = [axes for axes in figure.axes if axes.get_xlabel() == 'Initial value']
  assert len(mains) == 2
  assert mains[0].get_ylabel() == 'Trained value'
  for axes, scale in zip(mains, (1.0, 3.0)):
    pruned, survivors = (
      sorted(np.asarray(group.get_offsets()).tolist())
      for group in axes.collections
    )
    np.testing.assert_allclose(survivors, [[-0.4, -0.4 * scale]])
    np.testing.assert_allclose(
      pruned, [[-0.1, 0.1 * scale], [0.1, 0.1 * scale], [0.2, 0.2 * scale]]
    )
  texts = _texts(figure)
  assert '25.0 % of all weights' in texts
  assert '0.0 % of survivors' in texts
  assert r'$\alpha$ = 1 (baseline)' in texts
  assert r'$\alpha$ = 4' in texts
  (legend,) = figure.legends
  assert figures.legend(legend) == [
    'pruned',
    'survive (largest 25 %)',
    'unchanged',
  ]


def test_weight_scatter_panels_share_their_axes():
  initials = [
    (-0.4, -0.1, 0.1, 0.2),
    (-0.4, -0.1, 0.1, 0.9),
    (-0.8, -0.1, 0.1, 0.2),
    (-0.1, -0.1, 0.1, 0.1),
  ]
  figure = plots.weight_scatter(
    {
      float(i): _distribution(1.0 + i, initial=initial)
      for i, initial in enumerate(initials, 1)
    }
  )
  figure.draw_without_rendering()
  # Three panels in a row: the fourth is below the first.
  mains = [axes for axes in figure.axes if axes.get_xlabel() == 'Initial value']
  tops = [axes for axes in figure.axes if axes.get_title('left')]
  assert len(mains) == len(tops) == 4
  assert len({(*axes.get_xlim(), *axes.get_ylim()) for axes in mains}) == 1
  assert len({axes.get_ylim() for axes in tops}) == 1
  low, high = mains[0].get_xlim()
  assert all(axes.get_xlim() == (low, high) for axes in tops)
  assert low < -0.8 < 0.9 < high
  lefts = [axes.get_position().x0 for axes in mains]
  assert lefts[3] == pytest.approx(lefts[0])
  assert lefts[0] < lefts[1] < lefts[2]
  named = [axes.get_ylabel() for axes in mains]
  assert named == ['Trained value', '', '', 'Trained value']


@pytest.mark.parametrize('alphas', [(2.0,), (1.0, 2.0)])
def test_weight_scatter_has_room_for_its_legend(alphas):
  figure = plots.weight_scatter({a: _distribution(a) for a in alphas})
  figure.draw_without_rendering()
  (legend,) = figure.legends
  for text in legend.get_texts():
    box = text.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_weight_scatter_draws_the_density_curves():
  distribution = _distribution(2.0, density=0.5)
  figure = plots.weight_scatter({'2.0': distribution})
  top, _, _, right = figure.axes
  kde = distribution['kde']
  for line, name in zip(top.lines, ('pruned', 'survivors'), strict=True):
    curve = [kde[name]['x'], kde[name]['density']]
    np.testing.assert_allclose(figures.points(line).T, curve)
  curve = [kde['trained']['density'], kde['trained']['x']]
  np.testing.assert_allclose(figures.points(right.lines[0]).T, curve)


def test_weight_scatter_without_survivors(tmp_path):
  with pytest.warns(UserWarning, match='cuts the network'):
    distribution = _distribution(1.0, density=0.1)
  figure = plots.weight_scatter({'1.0': distribution})
  plots.save(figure, tmp_path / 'figure.png')
  assert 'of survivors' not in _texts(figure)


def _training(**results):
  """Results of sparse training, made from lists of percentages."""
  return {
    label.replace('_', ' ', 1): {
      'sparsity': [0.8, 0.9, 0.95, 0.98, 0.99][: len(mean)],
      'mean': [y / 100 for y in mean],
      'std': [0.01] * len(mean),
    }
    for label, mean in results.items()
  }


def _sparse_results():
  methods = ['static', 'SNIP', 'SET', 'RigL', 'Top-KAST', 'magnitude']
  falling = [98.0, 97.5, 97.0, 95.0, 80.0]
  results = {
    f'{alpha}_{method}': falling
    for alpha in ('1.0', '2.0')
    for method in methods
  }
  dense = {'sparsity': [0.0], 'mean': [0.983], 'std': [0.001]}
  return {'1.0 dense': dense, **_training(**results), '2.0 dense': dense}


def _panels(figure):
  return {axes.get_title('left'): axes for axes in figure.axes if axes.lines}


def test_sparse_accuracy_lines_hold_the_means_over_the_weights_kept():
  results = _training(**{'1.0_RigL': [98, 97, 95], '2.0_RigL': [97, 96, 94]})
  figure = plots.accuracy_against_sparsity(results)
  (axes,) = figure.axes
  for line, mean in zip(axes.lines, ([98, 97, 95], [97, 96, 94]), strict=True):
    np.testing.assert_allclose(figures.points(line).T, [[20, 10, 5], mean])
  bars: Any = axes.collections
  np.testing.assert_allclose(bars[0].get_segments()[1], [[10, 96], [10, 98]])
  assert axes.get_title('left') == 'RigL'
  texts = figure.get_supxlabel(), figure.get_supylabel()
  assert texts[0] == 'Weights removed (%)'
  assert texts[1].startswith('Test accuracy (%)')
  (legend,) = figure.legends
  assert figures.legend(legend) == [r'$\alpha$ = 1', r'$\alpha$ = 2']


def test_sparse_accuracy_has_a_panel_a_method_and_a_look_an_alpha():
  figure = plots.accuracy_against_sparsity(_sparse_results())
  panels = _panels(figure)
  assert list(panels) == [
    'static',
    'SNIP',
    'SET',
    'RigL',
    'Top-KAST',
    'magnitude',
  ]
  for axes in panels.values():
    # The levels of dense networks are in every panel.
    levels = [x for x in axes.lines if len(set(x.get_ydata())) == 1]
    lines = [x for x in axes.lines if x not in levels]
    assert [figures.points(x)[0, 1] for x in levels] == pytest.approx(
      [98.3] * 2
    )
    for pair in levels, lines:
      assert [x.get_linestyle() for x in pair] == ['--', '-']
      assert [x.get_color() for x in pair] == ['#000000', '#e69f00']
    assert [x.get_markerfacecolor() for x in lines] == ['white', '#e69f00']
    assert len({str(x.get_marker()) for x in lines}) == 2
  (legend,) = figure.legends
  assert set(figures.legend(legend)) == {
    r'$\alpha$ = 1',
    r'$\alpha$ = 2',
    r'$\alpha$ = 1, dense',
    r'$\alpha$ = 2, dense',
  }


def test_the_last_panel_of_every_column_has_labels():
  """Four panels in rows of three: two columns end in the first row."""
  names = ('static', 'SNIP', 'SET', 'RigL')
  results = _training(**{f'1.0_{name}': [98, 97, 95] for name in names})
  panels = _panels(plots.accuracy_against_sparsity(results))
  shown = [
    panels[name].xaxis.get_tick_params()['labelbottom'] for name in names
  ]
  assert shown == [False, True, True, True]


def test_sparse_accuracy_scales_are_logarithmic_in_weights_and_errors():
  figure = plots.accuracy_against_sparsity(_sparse_results())
  figure.draw_without_rendering()
  axes = _panels(figure)['magnitude']
  ticks = [text.get_text() for text in axes.get_xticklabels()]
  assert ticks == ['80', '90', '95', '98', '99']
  place = lambda x, y: axes.transData.transform((x, y))
  steps = np.diff([place(x, 98)[0] for x in (20, 10, 5)])
  assert steps[0] > 0
  assert steps[0] == pytest.approx(steps[1])
  steps = np.diff([place(10, y)[1] for y in (80, 90, 95, 97.5)])
  assert steps[0] > 0
  assert steps == pytest.approx([steps[0]] * 3)
  low, high = axes.get_ylim()
  assert 70 < low < 80 < 98.3 < high < 99.5


def test_a_method_that_breaks_down_flattens_no_other_row():
  results = _sparse_results()
  results['2.0 static'] = {**results['2.0 static'], 'mean': [0.98] * 4 + [0.4]}
  panels = _panels(plots.accuracy_against_sparsity(results))
  limits = [panel.get_ylim() for panel in panels.values()]
  # Three panels in a row have the same axes, all from 80 to 99 %.
  assert limits == [limits[0]] * 3 + [limits[3]] * 3
  assert limits[0][0] < 40
  assert 70 < limits[3][0] < 80
  assert len({panel.get_xlim() for panel in panels.values()}) == 1


def test_one_method_at_sparsity_zero_alone_can_be_drawn(tmp_path):
  dense = {'sparsity': [0.0], 'mean': [0.983], 'std': [0.001]}
  figure = plots.accuracy_against_sparsity({'1.0 dense': dense})
  plots.save(figure, tmp_path / 'figure.png')


def test_accuracy_without_errors_can_be_drawn(tmp_path):
  perfect = _training(**{'1.0_RigL': [100, 100]})
  perfect['1.0 RigL']['std'] = [0.0, 0.0]
  figure = plots.accuracy_against_sparsity(perfect)
  plots.save(figure, tmp_path / 'figure.png')


def test_save_writes_a_png(tmp_path):
  figure = plots.accuracy_against_kept(_summary())
  for path in tmp_path / 'figure.png', tmp_path / 'figure':
    plots.save(figure, path)
    assert path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  pixels = image.imread(tmp_path / 'figure.png')
  assert pixels.shape[:2] == (630, 960)  # 4.2 x 6.4 inches at 150 dpi.
  assert pixels.std() > 0.05  # Not blank.


def test_the_look_does_not_depend_on_when_a_figure_is_drawn(tmp_path):
  figure = plots.accuracy_against_kept(_summary())
  plots.save(figure, tmp_path / 'saved.png')
  figure = plots.accuracy_against_kept(_summary())
  # A notebook draws a figure like this, outside the style.
  figure.savefig(tmp_path / 'drawn.png', dpi=150)
  images = [image.imread(tmp_path / f'{x}.png') for x in ('saved', 'drawn')]
  np.testing.assert_array_equal(*images)


def test_the_style_changes_no_other_figure():
  before = dict(mpl.rcParams)
  plots.accuracy_against_kept(_summary())
  assert dict(mpl.rcParams) == before


def test_pyplot_is_not_imported():
  code = (
    'import sys; import powerprop_jax.plots;'
    'sys.exit("matplotlib.pyplot" in sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_one_weight_has_a_line_a_start_and_a_panel_an_alpha():
  paths = {1.0: [[0.0, 0.2], [0.5, 0.6]], 3.0: [[0.0, 0.2], [0.0, 0.9]]}
  figure = plots.one_weight(paths, target=1.0)
  for axes, (alpha, weights) in zip(figure.axes, paths.items(), strict=True):
    assert f'= {alpha:g}' in axes.get_title(loc='left')
    target, *lines = axes.lines
    np.testing.assert_array_equal(target.get_ydata(), [1.0, 1.0])
    found = np.transpose([line.get_ydata() for line in lines])
    np.testing.assert_array_equal(found, weights)
  # Lines of the same start have the same colour.
  colours = [[line.get_color() for line in x.lines] for x in figure.axes]
  assert colours[0] == colours[1]


def test_sign_changes_have_a_bar_for_each_method_and_alpha():
  found = {'1.0': {'RigL': 0.5, 'AC/DC': 0.25}, '1.5': {'AC/DC': 0.125}}
  (axes,) = plots.sign_changes(found).axes
  bars = axes.patches
  assert [bar.get_width() for bar in bars] == [50.0, 25.0, 12.5]
  # The bars of a method stand side by side and do not overlap.
  centres = [bar.get_y() + bar.get_height() / 2 for bar in bars]
  np.testing.assert_allclose(centres, [-0.2, 0.8, 1.2])
  assert [x.get_text() for x in axes.get_yticklabels()] == ['RigL', 'AC/DC']
  assert bars[1].get_facecolor() != bars[2].get_facecolor()

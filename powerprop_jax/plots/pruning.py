"""Figures of the results of `analysis` and of sparse training.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  Figure 1.
"""

from collections.abc import Mapping, Sequence
import itertools
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from powerprop_jax import extras
from powerprop_jax.plots import style as style_lib

with extras.needed('plots'):
  from matplotlib import ticker

Axes = style_lib.Axes
Figure = style_lib.Figure

_GROUPS = {'pruned': style_lib.GREY, 'survivors': style_lib.VERMILLION}
# The most panels in a row of which the text can be read at 700 pixels.
_COLUMNS = 3


@style_lib.styled
def save(figure: Figure, path: str | os.PathLike[str]) -> None:
  """Writes a figure as a PNG file, at 150 dots per inch.

  >>> import pathlib
  >>> import tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp(), 'one_weight.png')
  >>> save(one_weight({1.0: [[0.0], [0.5]]}, target=1.0), path)
  >>> path.read_bytes()[1:4]
  b'PNG'

  Args:
    figure: any figure of matplotlib.
    path: where to write it; an existing file is replaced.
  """
  figure.savefig(path, format='png')


def _finish(axes: Axes, title: str, ylabel: str) -> None:
  """Adds titles and a legend; the x axis runs from all weights kept to few."""
  axes.set_xscale('log')
  axes.invert_xaxis()
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel('Weights kept after pruning (%)')
  axes.set_ylabel(ylabel)
  axes.set_title(title)
  axes.legend()


@style_lib.styled
def accuracy_against_kept(summary: Mapping[str, Any]) -> Figure:
  """Accuracy of pruned networks against the weights they keep (Figure 1a).

  >>> from powerprop_jax import analysis
  >>> summary = analysis.summarise([1.0, 0.1], {'2.0': [[0.98], [0.9]]})
  >>> figure = accuracy_against_kept(summary)
  >>> figure.axes[0].lines[0].get_ydata().tolist()
  [98.0, 90.0]

  Args:
    summary: the dict returned by `analysis.summarise`.

  Returns:
    A figure with a line for each label, the mean over the seeds, in a band of
    one standard deviation.
  """
  figure, axes = style_lib.panel()
  results, kept = summary['results'], 100 * np.asarray(summary['kept'])
  for label, style in style_lib.styles(results).items():
    mean, std = results[label]['mean'], results[label]['std']
    style_lib.line(axes, kept, mean, std, label=style_lib.name(label), **style)
  _finish(axes, 'Accuracy after pruning', 'Test accuracy (%)')
  return figure


@style_lib.styled
def mask_overlap(overlaps: Mapping[Any, Mapping[str, Any]]) -> Figure:
  """How far training changes which weights survive pruning (Figure 1b).

  >>> overlap = {'kept': [0.1], 'overlap': [0.4], 'chance': [0.1]}
  >>> figure = mask_overlap({2.0: overlap})
  >>> [line.get_label() for line in figure.axes[0].lines]
  ['$\\\\alpha$ = 2', 'random masks']

  Args:
    overlaps: the dicts returned by `analysis.mask_overlap`, or over several
      seeds by `analysis.average_overlap`, by alpha or label.

  Returns:
    A figure with a line for each alpha, and one for the chance level.
  """
  figure, axes = style_lib.panel()
  named = {str(label): overlap for label, overlap in overlaps.items()}
  for label, style in style_lib.styles(named).items():
    mean, kept = named[label]['overlap'], 100 * np.array(named[label]['kept'])
    std = named[label].get('std', np.zeros(len(mean)))
    style_lib.line(axes, kept, mean, std, label=style_lib.name(label), **style)
  # The chance level depends on the architecture and not on alpha.
  first = next(iter(named.values()))
  axes.plot(
    100 * np.asarray(first['kept']),
    100 * np.asarray(first['chance']),
    color=style_lib.GREY,
    linestyle=':',
    label='random masks',
  )
  axes.set_ylim(0, 103)
  _finish(
    axes,
    'Masks before and after training',
    'Survivors that pruning at\ninitialisation would keep (%)',
  )
  return figure


def _scatter(axes: Axes, distribution: Mapping[str, Any]) -> None:
  """Draws trained against initial values, with the survivors in front."""
  initial, trained = (np.array(distribution[k]) for k in ('initial', 'trained'))
  survives = np.array(distribution['survives'], bool)
  names = 'pruned', f'survive (largest {100 * distribution["density"]:g} %)'
  for group, name, colour in zip(
    (~survives, survives), names, _GROUPS.values()
  ):
    axes.scatter(
      initial[group],
      trained[group],
      s=5,
      color=colour,
      alpha=0.5,
      linewidths=0,
      label=name,
    )
  axes.axline(
    (0, 0),
    slope=1,
    color=style_lib.BLACK,
    linewidth=1,
    linestyle=':',
    label='unchanged',
  )
  shares = distribution['sign_changes']
  lines = [
    f'{100 * shares[group]:.1f} % of {name}'
    for group, name in (('all', 'all weights'), ('survivors', 'survivors'))
    if shares[group] is not None
  ]
  axes.text(
    *(0.97, 0.03, 'sign changed:\n' + '\n'.join(lines)),
    transform=axes.transAxes,
    ha='right',
    va='bottom',
    fontsize=8.5,
  )


def _margins(top: Axes, right: Axes, kde: Mapping[str, Any]) -> None:
  """Draws the densities of initial values on top and of trained ones beside."""
  for name, colour in _GROUPS.items():
    x, y = kde[name]['x'], kde[name]['density']
    top.plot(x, y, color=colour, linewidth=1.4)
    top.fill_between(x, y, color=colour, alpha=0.25, linewidth=0)
  x, y = kde['trained']['x'], kde['trained']['density']
  right.plot(y, x, color=style_lib.BLUE, linewidth=1.4)
  right.fill_betweenx(x, y, color=style_lib.BLUE, alpha=0.25, linewidth=0)
  for axes, base in ((top, 'bottom'), (right, 'left')):
    axes.spines[:].set_visible(False)
    axes.spines[base].set_visible(True)
    axes.tick_params(length=0, labelleft=False, labelbottom=False)


@style_lib.styled
def weight_scatter(distributions: Mapping[Any, Mapping[str, Any]]) -> Figure:
  """Weights before and after training, and which survive (Figures 1c and 1d).

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import analysis
  >>> before = {'linear': {'w': jnp.array([1.0, -1.0, 2.0, 3.0])}}
  >>> found = analysis.weight_distribution(before, before, density=0.5)
  >>> figure = weight_scatter({1.0: found})
  >>> figure.legends[0].get_texts()[1].get_text()
  'survive (largest 50 %)'

  Args:
    distributions: the dicts returned by `analysis.weight_distribution`, by
      alpha or label.

  Returns:
    A figure with a panel for each alpha, three in a row, all on the same axes.
    Above each are the densities of the initial values of survivors and of
    pruned weights, each of area 1; on its right is the density of all trained
    values, each on a scale of its own.
  """
  n = len(distributions)
  columns = min(n, _COLUMNS)
  rows = -(-n // columns)
  # A single panel is too narrow for the entries of the legend side by side.
  in_legend = 3 if columns > 1 else 1
  height = 3.5 * rows + (0.4 if columns > 1 else 0.8)
  figure = Figure(figsize=(3.0 * columns + 0.6, height))
  grid = figure.subplots(
    2 * rows,
    2 * columns,
    squeeze=False,
    width_ratios=[5, 1] * columns,
    height_ratios=[1, 4] * rows,
  )
  panels = [
    grid[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel()
    for row in range(rows)
    for column in range(columns)
  ]
  for panel in panels[n:]:
    for axes in panel:
      axes.set_axis_off()
  panels = panels[:n]
  first_top, _, first, _ = panels[0]
  for i, (label, panel) in enumerate(zip(distributions, panels)):
    top, corner, main, right = panel
    if main is not first:
      main.sharex(first)
      main.sharey(first)
      top.sharey(first_top)
    top.sharex(main)
    # The densities of trained values are not on one scale: where most weights
    # end near zero, their peak would leave nothing to see of the others.
    right.sharey(main)
    corner.set_axis_off()
    _scatter(style_lib.with_grid(main), distributions[label])
    _margins(top, right, distributions[label]['kde'])
    top.set_title(style_lib.name(str(label)))
    main.set_xlabel('Initial value')
    if i % columns:
      main.tick_params(labelleft=False)
    else:
      top.set_ylabel('Density')
      main.set_ylabel('Trained value')
  figure.legend(
    *first.get_legend_handles_labels(),
    loc='outside lower center',
    ncols=in_legend,
    columnspacing=1.2,
    handletextpad=0.4,
    markerscale=3,
  )
  return figure


@style_lib.styled
def one_weight(paths: Mapping[Any, npt.ArrayLike], target: float) -> Figure:
  """Weights on their way to a target, from several starts (section 2).

  >>> paths = {1.0: [[0.0], [0.5]], 2.0: [[0.0], [0.0]]}
  >>> figure = one_weight(paths, target=1.0)
  >>> [axes.get_title('left') for axes in figure.axes]
  ['$\\\\alpha$ = 1 (baseline)', '$\\\\alpha$ = 2']

  Args:
    paths: the weights after each step, of shape [steps, starts], by alpha.
    target: the value to which they are pulled.

  Returns:
    A figure with a panel for each alpha; a start has one colour in all panels.
  """
  figure = Figure(figsize=(2.6 * len(paths) + 0.6, 3.2))
  panels = figure.subplots(1, len(paths), sharey=True, squeeze=False)[0]
  for axes, (alpha, weights) in zip(panels, paths.items()):
    style_lib.with_grid(axes)
    axes.axhline(target, color=style_lib.GREY, linestyle=':')
    colours = itertools.cycle(style_lib.COLOURS)
    for weight, colour in zip(np.asarray(weights).T, colours):
      axes.plot(weight, color=colour)
    axes.set_title(style_lib.name(str(alpha)))
    axes.set_xlabel('Step')
  panels[0].set_ylabel('Weight')
  return figure


def _sparse_line(
  axes: Axes, label: str, result: Mapping[str, Sequence[float]], **style: Any
) -> None:
  """Draws the accuracy of one method and alpha, in percent."""
  x, y, std = (100 * np.asarray(result[k]) for k in ('sparsity', 'mean', 'std'))
  name = style_lib.name(label.split()[0], baseline=False)
  if not x.any():
    # A dense network is a level line across the panel.
    axes.axhline(y[0], linewidth=1, label=f'{name}, dense', **style)
    return
  style['markerfacecolor'] = (
    'white' if style['linestyle'] == '--' else style['color']
  )
  bars = std if std.any() else None
  axes.errorbar(100 - x, y, bars, elinewidth=1, label=name, **style)


def _grid(figure: Figure, rows: int, columns: int, count: int) -> Any:
  """An array [rows, columns] of axes that share x; the first `count` are used.

  The lowest axes of each column have labels at their ticks, also where the
  column ends above the last row.
  """
  grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
  for axes in grid.flat[count:]:
    axes.set_axis_off()
  for axes in grid.flat[max(0, count - columns) : count]:
    axes.tick_params(labelbottom=True)
  return grid


@style_lib.styled
def accuracy_against_sparsity(
  results: Mapping[str, Mapping[str, Sequence[float]]],
) -> Figure:
  """Accuracy of sparse training, with a panel for each method.

  >>> rigl = {'sparsity': [0.8, 0.9], 'mean': [0.98, 0.97], 'std': [0.0, 0.0]}
  >>> figure = accuracy_against_sparsity({'1.0 RigL': rigl, '2.0 RigL': rigl})
  >>> [axes.get_title('left') for axes in figure.axes]
  ['RigL']

  Args:
    results: for each label, which has alpha and the method as in '2.0 RigL', a
      dict of lists 'sparsity', 'mean' and 'std', all in [0, 1]. A method that
      is given at sparsity 0 alone is a level line across every panel.

  Returns:
    A figure with a colour and a line style for each alpha, in all panels, and
    with bars of one standard deviation. The panels of a row have the same axes,
    so that a method that breaks down does not flatten the lines of all.
  """
  method = {label: label.split(maxsplit=1)[-1] for label in results}
  sparse = [label for label in results if any(results[label]['sparsity'])]
  alphas = sorted({style_lib.alpha_of(label) or 1.0 for label in results})
  looks = style_lib.styles(str(alpha) for alpha in alphas)
  names = list(dict.fromkeys(method[label] for label in sparse or results))
  columns = min(len(names), _COLUMNS)
  rows = -(-len(names) // columns)
  figure = Figure(figsize=(3.1 * columns + 0.8, 2.9 * rows + 0.5))
  grid = _grid(figure, rows, columns, len(names))
  for row in grid:
    for axes in row[1:]:
      axes.sharey(row[0])
      axes.tick_params(labelleft=False)
  for axes, name in zip(grid.flat, names):
    axes.set_title(name)
    style_lib.with_grid(axes)
    for label, result in results.items():
      look = looks[str(style_lib.alpha_of(label) or 1.0)]
      if label not in sparse:
        look = {k: v for k, v in look.items() if k != 'marker'}
      if label not in sparse or method[label] == name:
        _sparse_line(axes, label, result, **look)
  first = grid[0, 0]
  for i, (row, start) in enumerate(zip(grid, range(0, len(names), columns))):
    style_lib.scale_errors(row[0])
    shown = names[start : start + columns]
    # The limits follow the means: the bar of a run that collapsed would leave
    # no room for anything else.
    errors = [
      100 * (1 - y)
      for label, r in results.items()
      if label not in sparse or method[label] in shown
      for y in r['mean']
    ]
    top, bottom = (max(0.1, f(errors)) for f in (min, max))
    row[0].set_ylim(100 - 1.3 * bottom, 100 - 0.7 * top)
    if i:
      row[0].set_ylabel('')
  style_lib.scale_sparsities(
    first, {s for label in sparse for s in results[label]['sparsity']}
  )
  figure.supxlabel(first.get_xlabel(), fontsize='medium')
  each = ', a scale for each row' if rows > 1 else ''
  figure.supylabel(first.get_ylabel() + each, fontsize='medium')
  first.set(xlabel='', ylabel='')
  handles = {
    text: handle
    for axes in grid.flat
    for handle, text in zip(*axes.get_legend_handles_labels())
  }
  figure.legend(
    handles.values(), handles, loc='outside upper right', ncols=len(handles)
  )
  return figure


@style_lib.styled
def accuracy_against_steps(
  panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
) -> Figure:
  """Accuracy of pruned networks against the length of training.

  >>> line = {'steps': [1000, 2000], 'mean': [0.9, 0.95], 'std': [0.0, 0.0]}
  >>> figure = accuracy_against_steps({'1 % kept': {'1.0': line, '2.0': line}})
  >>> [axes.get_title('left') for axes in figure.axes]
  ['1 % kept']

  Args:
    panels: for each title of a panel and each label of a line a dict of lists:
      'steps', the numbers of training steps, and 'mean' and 'std' of the
      accuracy, in [0, 1].

  Returns:
    A figure with a panel for each title, in which each label has one look, and
    with bars of one standard deviation.
  """
  columns = min(len(panels), 2)
  rows = -(-len(panels) // columns)
  figure = Figure(figsize=(3.7 * columns + 0.8, 2.9 * rows + 0.5))
  grid = _grid(figure, rows, columns, len(panels))
  looks = style_lib.styles(
    dict.fromkeys(label for lines in panels.values() for label in lines)
  )
  steps = sorted(
    {n for lines in panels.values() for x in lines.values() for n in x['steps']}
  )
  handles: dict[str, Any] = {}
  for axes, (title, lines) in zip(grid.flat, panels.items()):
    axes.set_title(title)
    style_lib.with_grid(axes)
    for label, line in lines.items():
      mean, std = (100 * np.asarray(line[k]) for k in ('mean', 'std'))
      name = style_lib.name(label, baseline=False)
      handles[name] = axes.errorbar(
        line['steps'], mean, std, elinewidth=1, **looks[label]
      )
    style_lib.scale_errors(axes)
    lowest = 100 * min(y for line in lines.values() for y in line['mean'])
    highest = 100 * max(y for line in lines.values() for y in line['mean'])
    # The margin is a factor of the error, as the scale is its logarithm.
    axes.set_ylim(100 - 1.25 * (100 - lowest), 100 - 0.8 * (100 - highest))
    axes.set(xscale='log', xlabel='', ylabel='')
    axes.set_xticks(steps, [f'{n:,}' for n in steps], rotation=45)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
  figure.supxlabel('Training steps', fontsize='medium')
  figure.supylabel(
    'Test accuracy (%), log scale of the error', fontsize='medium'
  )
  figure.legend(
    handles.values(),
    handles,
    loc='outside upper center',
    ncols=min(3, len(handles)),
  )
  return figure


@style_lib.styled
def sign_changes(results: Mapping[str, Mapping[str, float]]) -> Figure:
  """Survivors whose sign is not that of the initialisation, by method.

  >>> figure = sign_changes({'1.0': {'RigL': 0.5}, '2.0': {'RigL': 0.4}})
  >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
  [50.0, 40.0]

  Args:
    results: for each label, which is an alpha as in '2.0', a share by method,
      as `analysis.sign_changes` returns it.

  Returns:
    A figure with a group of bars for each method, and a bar for each label.
  """
  methods = list(dict.fromkeys(x for found in results.values() for x in found))
  height = 0.8 / len(results)
  figure, axes = style_lib.panel(height=1.2 + 0.6 * len(methods))
  looks = style_lib.styles(results)
  for i, (label, found) in enumerate(results.items()):
    axes.barh(
      [methods.index(x) + (i - (len(results) - 1) / 2) * height for x in found],
      [100 * share for share in found.values()],
      height,
      label=style_lib.name(label),
      color=looks[label]['color'],
    )
  axes.set_yticks(range(len(methods)), methods)
  axes.invert_yaxis()
  axes.set(xlabel='Weights in use that changed their sign (%)', ylabel='')
  axes.grid(False, axis='y')
  axes.legend()
  return figure

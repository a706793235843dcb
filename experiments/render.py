"""Writes the tables of the documents from the results that are kept as JSON.

  python -m experiments.render

replaces what stands between `<!-- table: NAME -->` and `<!-- end of table -->`
in README.md, docs/ and experiments/README.md, and draws the figures of docs/
whose numbers are kept. With --check it changes nothing, and fails if a table
differs from its numbers.

A file of experiments/results/ holds the results of one command: the 'source'
(the commands, the machine, the minutes) and the numbers as the binary writes
them to its summary.json, as fractions in [0, 1] and not in percent. To publish
a new run, put its numbers there and give this command; a new table needs one
function and one line of `TABLES`. Files whose names begin with 'trials' hold
the trials by which settings were chosen; LOG.md says what they showed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import tabulate

from experiments.support import config
from experiments.support import optimisers
from experiments.support import sweep_report
from powerprop_jax import plots
from powerprop_jax.plots import style

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = pathlib.Path(__file__).parent / 'results'
DOCUMENTS = (
  'README.md',
  'docs/choosing.md',
  'docs/results.md',
  'docs/tutorial.md',
  'experiments/README.md',
)

_TABLE = re.compile(
  r'(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end of table -->)', re.S
)


def load(name: str) -> dict[str, Any]:
  """Loads the numbers of one file of experiments/results/.

  Args:
    name: the name of the file, without '.json'.

  Returns:
    The dictionary that the file holds.

  Raises:
    FileNotFoundError: if there is no such file.
  """
  return json.loads((RESULTS / f'{name}.json').read_text())


def _percent(mean: float | None, std: float | None = None, digits=2) -> str:
  """A fraction in percent as text, which is empty if there is no number."""
  if mean is None:
    return ''
  spread = '' if std is None else f' ± {100 * std:.{digits}f}'
  return f'{100 * mean:.{digits}f}{spread}'


def _markdown(
  headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1
) -> str:
  """A table in Markdown, whose first `left` columns are aligned to the left."""
  rows = list(rows)
  align = ['left'] * left + ['right'] * (len(headings) - left)
  return tabulate.tabulate(
    rows, headings, tablefmt='pipe', colalign=align, disable_numparse=True
  )


def _by_kept(columns: Mapping[str, tuple[str, str]]) -> str:
  """Accuracy of pruned networks: a line for each fraction that was kept.

  Args:
    columns: for each heading the file and the label in it.
  """
  files = {name: load(name) for name, _ in columns.values()}
  (kept,) = {tuple(content['kept']) for content in files.values()}
  results = [files[name]['results'][label] for name, label in columns.values()]
  rows = [
    [
      f'{100 * p:.2f}',
      *(
        _percent(r['mean'][i], r.get('std', [None] * len(kept))[i])
        for r in results
      ),
    ]
    for i, p in enumerate(kept)
  ]
  return _markdown(['kept (%)', *columns], rows, left=0)


def _paper() -> str:
  labels = load('mnist_pruning-paper')['results']
  return _by_kept(
    {f'alpha = {float(k):g}': ('mnist_pruning-paper', k) for k in labels}
  )


def _layer_and_global(presets: Mapping[str, tuple[str, str]]) -> str:
  """Accuracy of networks that were pruned by layer and globally.

  Args:
    presets: for each heading the preset, whose file is read, and the alpha.
  """
  return _by_kept(
    {
      f'{heading}, {scope}': (
        f'mnist_pruning-{name}',
        alpha if scope == 'by layer' else f'{alpha} global',
      )
      for heading, (name, alpha) in presets.items()
      for scope in ('by layer', 'globally')
    }
  )


def _adam() -> str:
  content = load('mnist_pruning-adam')
  rows = []
  for label, result in content['results'].items():
    alpha, _, rule = label.partition(' ')
    rows.append(
      [
        f'{float(alpha):g}',
        rule.replace('_', ' '),
        f'{result["learning_rate"]:g}',
        *map(_percent, result['mean'], result['std']),
      ]
    )
  kept = [f'{100 * p:g} %' for p in content['kept']]
  return _markdown(['alpha', 'update', 'rate', *kept], rows, left=2)


def _lengths_in(
  recipe: str, steps: int, scope: str, kept: float
) -> tuple[float, float | None]:
  """The mean accuracy of a recipe, and the deviation of more than one seed."""
  content = load('lengths')
  i = content['kept'].index(kept)
  for r in content['results']:
    if (r['recipe'], r['steps'], r['scope']) == (recipe, steps, scope):
      return r['mean'][i], r['std'][i] if r['seeds'] > 1 else None
  raise KeyError(f'{recipe} was not measured at {steps} steps')


def _lengths(scope: str) -> str:
  """Accuracy by length of training and recipe, pruned in one scope."""
  content = load('lengths')
  columns = (1.0, 0.0546, 0.01, 0.007, 0.005)
  rows = [
    [
      f'{r["steps"]:,}',
      f'alpha = {r["recipe"].removesuffix(".0").replace("1.0 ", "1 ")}',
      str(r['seeds']),
      *(
        _percent(*_lengths_in(r['recipe'], r['steps'], scope, kept))
        for kept in columns
      ),
    ]
    for r in sorted(content['results'], key=lambda r: r['steps'])
    if r['scope'] == scope
  ]
  headings = [f'{100 * kept:.3g} %' for kept in columns]
  return _markdown(['steps', 'recipe', 'seeds', *headings], rows, left=2)


_GROWING = '1.5 then 2 and 3'
_ALPHA_1 = ('1.0 with L1', '1.0 with the 2/3-norm')
_PENALTY = '1.0 with a growing penalty'
# The presets that had ten trials each, with their first power.
_GROWING_PRESETS = {
  'growing': '1.5',
  'growing-penalty': '1.0',
  'growing-p-norm': '1.0',
  'growing-l1': '1.0',
}


def _lengths_best() -> str:
  """The power that grows, against its penalty and the best fixed one."""
  shown = (0.0546, 0.01, 0.007, 0.005)
  recipes = {
    'growing': [_GROWING],
    '1, the same penalty': [_PENALTY],
    '1, the better fixed penalty': _ALPHA_1,
  }
  rows = [
    [
      f'{steps:,}',
      title,
      *(
        _percent(max(_lengths_in(r, steps, 'global', p)[0] for r in several))
        for p in shown
      ),
    ]
    for steps in sorted({r['steps'] for r in load('lengths')['results']})
    for title, several in recipes.items()
  ]
  headings = [f'{100 * p:.3g} %' for p in shown]
  return _markdown(['steps', 'alpha', *headings], rows, left=2)


def _ablations() -> str:
  """A line for each variant of the power that grows."""
  content = load('ablations')
  cells = {
    (r['variant'], r['scope']): (r['mean'], r['std'])
    for r in content['results']
  }
  shown = (
    ('global', 1.0, '100 %'),
    ('layer', 0.01, '1 %, by layer'),
    ('layer', 0.007, '0.7 %, by layer'),
    ('layer', 0.005, '0.5 %, by layer'),
    ('global', 0.01, '1 %, globally'),
    ('global', 0.005, '0.5 %, globally'),
  )
  rows = []
  for r in content['results']:
    if r['scope'] == 'global':
      row = [r['variant'], f'{r["decay"]:g}', str(r['seeds'])]
      for scope, kept, _ in shown:
        i = content['kept'].index(kept)
        row.append(_percent(*(x[i] for x in cells[r['variant'], scope])))
      rows.append(row)
  headings = ['alpha', 'decay', 'seeds', *(heading for *_, heading in shown)]
  return _markdown(headings, rows)


def _sweep(name: str) -> str:
  """Accuracy, with a line for each method and alpha."""
  headings, rows = sweep_report.by_sparsity(
    load(name)['results'],
    lambda r: (sweep_report.TITLES[r['method']], f'{r["recipe"]["alpha"]:g}'),
    lambda r: _percent(r['mean'], r.get('std')),
  )
  return _markdown(['method', 'alpha', *headings], rows)


def _sweep_flops() -> str:
  headings, rows = sweep_report.by_sparsity(
    [
      r
      for r in load('sparse_sweep-mnist')['results']
      if r['recipe']['alpha'] == 1 and r['method'] != 'dense'
    ],
    lambda r: [sweep_report.TITLES[r['method']]],
    lambda r: f'{r["inference_flops"]:.3f} / {r["training_flops"]:.3f}',
  )
  return _markdown(['method', *headings], rows)


def _one_shot(name: str) -> str:
  """A line for each recipe of `benchmarks.one_shot`."""
  content = load(name)
  rows = [
    [
      r['recipe'],
      f'{r["rate"]:g}',
      f'{r["decay"]:.2g}',
      str(r['seeds']),
      *(
        _percent(mean, std if r['seeds'] > 1 else None)
        for mean, std in zip(r['mean'], r['std'])
      ),
    ]
    for r in content['results']
  ]
  kept = [f'{100 * p:g} %' for p in content['kept']]
  return _markdown(['alpha', 'rate', 'decay', 'seeds', *kept], rows)


def _sweep_powers(name: str) -> str:
  """A line for each method and power, by the best of its recipes."""
  entries = load(name)['results']
  sparsities = sorted({r['sparsity'] for r in entries})
  lines: dict[tuple[str, ...], dict[float, list[str]]] = {}
  for r in sorted(entries, key=_in_order):
    title = sweep_report.TITLES[r['method']]
    floor = f', floor {r["floor"]:g}' if r.get('floor') else ''
    key = title, f'{r["alpha"]:g}{floor}', f'{r["rate"]:g}', f'{r["decay"]:g}'
    lines.setdefault(key, {})[r['sparsity']] = [
      _percent(r['mean'], r['std']),
      _percent(r['sign_changes'], digits=1),
    ]
  rows = [
    [*key, *(cells[s][0] for s in sparsities), cells[sparsities[-1]][1]]
    for key, cells in lines.items()
  ]
  shown = [f'{100 * s:g} %' for s in sparsities]
  headings = ['method', 'alpha', 'rate', 'decay of phi', *shown]
  return _markdown([*headings, f'signs changed, {shown[-1]}'], rows)


def _in_order(r: Mapping[str, Any]) -> tuple[int, float]:
  return list(sweep_report.TITLES).index(r['method']), r['alpha']


def _continual(name: str) -> str:
  """A line for each preset; columns without a number are left out."""
  entries = load(name)['results']
  columns = {
    'worst': ('worst', 2),
    'before retraining': ('before', 2),
    'in use': ('used', 1),
    'forgotten': ('forgotten', 2),
    'transfer': ('transfer', 2),
  }
  columns = {
    heading: (key, digits)
    for heading, (key, digits) in columns.items()
    if any(key in r for r in entries)
  }
  rows = [
    [
      f'`{r["preset"]}`',
      r['what'],
      str(r['seeds']),
      _percent(r['average'], r.get('std')),
      *(
        _percent(r.get(key), digits=digits) for key, digits in columns.values()
      ),
    ]
    for r in entries
  ]
  return _markdown(
    ['preset', 'what it is', 'seeds', 'average', *columns], rows, left=2
  )


def _continual_powers(steps: str) -> str:
  """A line for each recipe of one of the settings of `benchmarks.continual`."""
  rows = []
  for r in load('continual-powers')['results']:
    if r['steps'] == steps:
      cells = ['', 'none ended', '', '', '']
      if 'failed' not in r:
        cells = [
          str(r['seeds']),
          _percent(r['average'], r['std']),
          _percent(r['worst']),
          _percent(r['used'], digits=1),
          _percent(r['forgotten']),
        ]
      row = [r['recipe'], f'{r["rate"]:g}', f'{r["decay"]:.2g}', *cells]
      rows.append(row)
  headings = ['recipe', 'rate', 'decay', 'seeds', 'average', 'worst', 'in use']
  return _markdown([*headings, 'forgotten'], rows)


def _hundred_curves() -> dict[str, list[float]]:
  """The accuracies that the figure of a hundred tasks shows."""
  titles = {'PackNet, alpha = 1': '1.0 PackNet'}
  return {
    titles.get(r['recipe'])
    or r['recipe'].replace('alpha = ', '').replace('1, L1', '1 L1 decay,')
    + ' EfficientPackNet': r['by_task']
    for r in load('continual-powers')['results']
    if r['steps'] == 'hundred' and 'by_task' in r
  }


def _before_retraining() -> str:
  rows = [
    [
      f'{r["alpha"]:g}, {r["norm"]}',
      f'`{r["flags"]}`',
      *(_percent(r[key], digits=1) for key in ('pruned', 'worst', 'retrained')),
    ]
    for r in load('continual-before-retraining')['results']
  ]
  headings = ['alpha, decay', 'flags', 'pruned', 'worst task', 'retrained']
  return _markdown(headings, rows, left=2)


def _search() -> str:
  rows = [
    [
      f'`{r["search"]}`',
      f'{r["evaluations"]:.1f}',
      _percent(r['share'], digits=1),
      _percent(r['average']),
      _percent(r['used'], digits=1),
      str(r['tasks']),
    ]
    for r in load('continual-search')['results']
  ]
  headings = ['`--search`', 'evaluations per task', 'share of the time (%)']
  return _markdown([*headings, 'average (%)', 'in use (%)', 'of tasks'], rows)


def _inference() -> str:
  titles = {
    'entropy': 'lowest entropy',
    'entropy_halving': 'lowest entropy, halving',
    'logsumexp': 'largest log-sum-exp',
    'one_shot': 'one-shot',
    'one_shot_normalised': 'one-shot, normalised',
  }
  entries = load('continual-inference')['results']
  lines: dict[tuple[str, str], list[str]] = {}
  for r in sorted(entries, key=lambda r: r['alpha']):
    cells = lines.setdefault((str(r['tasks']), titles[r['rule']]), [])
    cells.extend(_percent(x, digits=1) for x in r['found'].values())
  alphas = dict.fromkeys(f'{r["alpha"]:g}' for r in entries)
  headings = [
    f'alpha = {alpha}: {n}' for alpha in alphas for n in entries[0]['found']
  ]
  rows = [[*key, *cells] for key, cells in lines.items()]
  return _markdown(['tasks', 'rule', *headings], rows, left=2)


def _export_model() -> str:
  rows = [
    [
      r['what'],
      f'{r["bytes"]:,}',
      f'{r["dense_bytes"]:,}',
      _percent(r['above_bound'], digits=1),
    ]
    for r in load('export_model')['results']
  ]
  headings = ['file', 'bytes', 'bytes of one dense network']
  return _markdown([*headings, 'above the bound (%)'], rows)


def _sparse_inference() -> str:
  lines: dict[tuple[str, ...], list[str]] = {}
  entries = load('benchmarks-sparse_inference')['results']
  for r in entries:
    key = r['network'], str(r['batch']), f'`{r["matrix"]}`'
    ratio = '-' if r['ratio'] is None else f'{r["ratio"]:.2f}'
    lines.setdefault(key, []).append(ratio)
  sparsities = dict.fromkeys(f'{100 * r["sparsity"]:g} %' for r in entries)
  rows = [[*key, *cells] for key, cells in lines.items()]
  return _markdown(['network', 'batch', 'matrix', *sparsities], rows, left=3)


def _speed() -> str:
  rows = [
    [f'`{r["command"]}`', r['result']]
    for r in load('benchmarks-speed')['results']
  ]
  return _markdown(['command', 'result here'], rows, left=2)


def _tutorial() -> str:
  content = load('tutorial')
  rows = [
    [f'`alpha = {float(label):g}`', *(f'{100 * x:.0f}' for x in r['mean'])]
    for label, r in content['results'].items()
  ]
  kept = [f'{100 * p:g} %' for p in content['kept']]
  return _markdown(['weights kept', *kept], rows)


def _at_kept(name: str, label: str, kept: float, spread: bool = False) -> str:
  """An accuracy in percent at the fraction that is nearest to `kept`."""
  content = load(name)
  i = min(
    range(len(content['kept'])), key=lambda i: abs(content['kept'][i] - kept)
  )
  found = content['results'][label]
  return _percent(found['mean'][i], found['std'][i] if spread else None)


def _expectations() -> str:
  """The table of the README: what to expect, by numbers of other tables."""
  paper = functools.partial(_at_kept, 'mnist_pruning-paper', spread=True)
  ablations = load('ablations')
  decayed = {
    r['variant']: _percent(r['mean'][ablations['kept'].index(0.01)])
    for r in ablations['results']
    if r['scope'] == 'global'
  }
  after = lambda recipe: _percent(*_lengths_in(recipe, 10_000, 'global', 0.01))
  tuned = lambda preset, kept: _at_kept(
    f'mnist_pruning-{preset}', f'{_GROWING_PRESETS[preset]} global', kept
  )

  def once(network, kept):
    content = load(f'one_shot-{network}')
    where = content['kept'].index(kept)
    return {r['recipe']: _percent(r['mean'][where]) for r in content['results']}

  lenet, resnet = once('lenet_5', 0.01), once('wrn_10_1', 0.1)

  def sparse(method, sparsity, file='decays'):
    found = {
      r['alpha']: _percent(r['mean'])
      for r in load(f'sparse_sweep-{file}')['results']
      if (r['method'], r['sparsity']) == (method, sparsity)
      and not r.get('floor')
    }
    return f'{found[1.5]} against {found[1.0]}'

  ten = {r['preset']: r for r in load('continual-ten')['results']}
  used = {k: f'{100 * r.get("used", 0):.0f}' for k, r in ten.items()}
  mean = {k: _percent(r['average']) for k, r in ten.items()}
  rows = [
    [
      'pruning once a network that was trained as usual (`alpha = 2`)',
      f'with 5.5 % of the weights {paper("2.0", 0.055)} against'
      f' {paper("1.0", 0.055)}',
      f'with all weights {paper("2.0", 1)} against {paper("1.0", 1)}',
      'where more than a fifth of the weights is kept',
    ],
    [
      'pruning once a network that was trained to be pruned (decay of phi, an'
      ' `alpha` that grows)',
      f'with 1 % after 10,000 steps {after(_GROWING)} against'
      f' {after(_PENALTY)} (`alpha = 1` with the same penalty on'
      f' theta) and {max(map(after, _ALPHA_1))} (a fixed one);'
      f' {decayed["1.5, then 2 and 3"]} against'
      f' {decayed["1, with p of 4/3, then 1 and 2/3"]} with the decays that'
      ' hold 0.5 % too',
      'a rate, a decay, and clipping to tune',
      'in long runs: after 50,000 steps'
      f' {tuned("growing", 0.01)} against {tuned("growing-penalty", 0.01)} with'
      f' 1 %, and {tuned("growing", 0.005)} against'
      f' {tuned("growing-penalty", 0.005)} with 0.5 %; in short runs of'
      f' LeNet-5: {lenet["1.5 then 2 and 3"]}, and {lenet["2"]} of `alpha = 2`,'
      f' against {lenet["1 with L1"]} (L1) with 1 %; of a ResNet-8'
      f' {resnet["2"]} of `alpha = 2` against {resnet["1 with L1"]} with 10 %',
    ],
    [
      'gradual pruning and AC/DC to 99 % sparsity (`alpha = 1.5`)',
      f'AC/DC {sparse("acdc", 0.99)}; gradual pruning'
      f' {sparse("magnitude", 0.99)}, within the noise, and of LeNet-5'
      f' {sparse("magnitude", 0.99, "lenet_5-powers")}',
      'a rate and a decay to tune',
      'gradual pruning at 95 and 98 %, and AC/DC in short runs of LeNet-5',
    ],
    [
      'static masks, SNIP, SET, RigL, Top-KAST',
      'none was found',
      f'RigL at 98 %: {sparse("rigl", 0.98)}; Top-KAST'
      f' {sparse("top_kast", 0.98)}',
      'use `alpha = 1`',
    ],
    [
      'ten tasks in one network (EfficientPackNet, `alpha = 1.5`) with an L2'
      ' decay',
      f'{mean["epn-1.5"]} with {used["epn-1.5"]} % of the weights in use'
      f' against {mean["epn-1"]} with {used["epn-1"]} %',
      'a rate to tune',
      f'with an L1 decay `alpha = 1` has {mean["epn-1-l1"]} with'
      f' {used["epn-1-l1"]} %',
    ],
  ]
  headings = ['use', 'gain of `alpha > 1`', 'price', 'where it does not help']
  return _markdown(headings, rows, left=4)


def _nats() -> str:
  """The decay of the power that grows, by the number of steps, in nats."""
  rows = []
  for steps in (2_500, 10_000, 25_000, 50_000, 100_000):
    decay = 1e-3 * (10_000 / steps) ** 0.5
    settings = optimisers.Settings(
      alpha_steps=('2:0.25', '3:0.5'),
      phi_decay=decay,
      phi_decay_schedule='cosine',
      phi_decay_warmup_steps=3 * steps // 10,
    )
    nats = optimisers.nats(settings, 1.5, steps)
    rows.append([f'{steps:,}', f'{decay:.2g}', f'{nats:.1f}'])
  return _markdown(['steps', 'decay of phi', 'nats'], rows, left=0)


TABLES: dict[str, Callable[[], str]] = {
  'expectations': _expectations,
  'nats': _nats,
  'mnist_pruning-paper': _paper,
  'mnist_pruning-shifted': lambda: _layer_and_global(
    {
      '`best`': ('best', '2.0'),
      '`baseline`': ('baseline', '1.0'),
      'longer `baseline`': ('baseline-longer', '1.0'),
    }
  ),
  'mnist_pruning-unshifted': lambda: _layer_and_global(
    {
      '`best-unshifted`': ('best-unshifted', '2.0'),
      '`sparsest`': ('sparsest', '2.0'),
      '`baseline-unshifted`': ('baseline-unshifted', '1.0'),
    }
  ),
  **{
    f'mnist_pruning-growing-{scope}': lambda suffix=suffix: _by_kept(
      {
        f'`{name}`': (f'mnist_pruning-{name}', f'{alpha}{suffix}')
        for name, alpha in _GROWING_PRESETS.items()
      }
    )
    for scope, suffix in (('layer', ''), ('global', ' global'))
  },
  'mnist_pruning-growing-longer': lambda: _layer_and_global(
    {
      '`growing-longer`': ('growing-longer', '1.5'),
      '`alpha = 1`, the same penalty': ('growing-longer', '1.0'),
    }
  ),
  'mnist_pruning-adam': _adam,
  'lengths-global': lambda: _lengths('global'),
  'lengths-layer': lambda: _lengths('layer'),
  'lengths-best': _lengths_best,
  'ablations': _ablations,
  **{
    name: lambda name=name: _one_shot(name)
    for name in ('one_shot-lenet_5', 'one_shot-wrn_10_1')
  },
  **{
    name: lambda name=name: _sweep_powers(name)
    for name in (
      'sparse_sweep-decays',
      'sparse_sweep-lenet_5-powers',
      'sparse_sweep-wrn_10_1-powers',
    )
  },
  'sparse_sweep-flops': _sweep_flops,
  **{
    name: lambda name=name: _sweep(name)
    for name in (
      'sparse_sweep-mnist',
      'sparse_sweep-mnist-rate-0.3',
      'sparse_sweep-mnist-unclipped',
      'sparse_sweep-mnist-uniform',
    )
  },
  **{
    name: lambda name=name: _continual(name)
    for name in (
      'continual-default',
      'continual-ten',
      'continual-hundred',
      'continual-split',
      'continual-rotated',
    )
  },
  'continual-powers-short': lambda: _continual_powers('short'),
  'continual-powers-full': lambda: _continual_powers('full'),
  'continual-powers-hundred': lambda: _continual_powers('hundred'),
  'continual-before-retraining': _before_retraining,
  'continual-search': _search,
  'continual-inference': _inference,
  'export_model': _export_model,
  'benchmarks-sparse_inference': _sparse_inference,
  'benchmarks-speed': _speed,
  'tutorial': _tutorial,
}


def _length_panels() -> dict[str, dict[str, dict[str, list[float]]]]:
  """The panels of `plots.accuracy_against_steps`, for global pruning."""
  content = load('lengths')
  panels: dict[str, dict[str, dict[str, list[float]]]] = {}
  for kept in (0.0546, 0.01, 0.007, 0.005):
    i = content['kept'].index(kept)
    lines = panels.setdefault(f'{100 * kept:.3g} % of the weights', {})
    for r in sorted(content['results'], key=lambda r: r['steps']):
      if r['scope'] == 'global':
        line = lines.setdefault(
          r['recipe'], {'steps': [], 'mean': [], 'std': []}
        )
        line['steps'].append(r['steps'])
        line['mean'].append(r['mean'][i])
        line['std'].append(r['std'][i])
  return panels


def _signs_by_method() -> dict[str, dict[str, float]]:
  """The shares of changed signs that `plots.sign_changes` draws."""
  found: dict[str, dict[str, float]] = {}
  for r in sorted(load('sparse_sweep-decays')['results'], key=_in_order):
    if r['sparsity'] == 0.99 and not r.get('floor'):
      shares = found.setdefault(str(r['alpha']), {})
      shares[sweep_report.TITLES[r['method']]] = r['sign_changes']
  return found


@style.styled
def _tuned_figure() -> style.Figure:
  """The figure of both powers with their best recipes, pruned by layer."""
  files = {
    '2.0 with decay of phi': ('mnist_pruning-best', '2.0'),
    '1.0 with an L1 decay, tuned alike': ('mnist_pruning-baseline', '1.0'),
  }
  contents = {name: load(name) for name, _ in files.values()}
  figure = plots.accuracy_against_kept(
    {
      'kept': contents['mnist_pruning-best']['kept'],
      'results': {
        heading: contents[name]['results'][label]
        for heading, (name, label) in files.items()
      },
    }
  )
  (axes,) = figure.axes
  style.scale_errors(axes)
  # Above, nothing changes any more; below, both break down.
  axes.set(xlim=(6.0, 0.65), ylim=(80.0, 98.8))
  axes.legend(loc='lower left')
  return figure


# The figures of docs/ whose numbers are kept.
FIGURES: dict[str, Callable[[], style.Figure]] = {
  'mnist_pruning': lambda: plots.accuracy_against_kept(
    load('mnist_pruning-paper')
  ),
  'trained_to_be_pruned': _tuned_figure,
  'continual_hundred': lambda: plots.accuracy_by_task(_hundred_curves()),
  'lengths': lambda: plots.accuracy_against_steps(_length_panels()),
  'sign_changes': lambda: plots.sign_changes(_signs_by_method()),
  'sparse_sweep': lambda: plots.accuracy_against_sparsity(
    sweep_report.curves(load('sparse_sweep-mnist')['results'], 'erk')
  ),
}


def render(text: str) -> str:
  """Writes the tables of a document anew from the results.

  Args:
    text: the document, in Markdown.

  Returns:
    The document, in which nothing but the tables has changed.

  Raises:
    ValueError: if the document asks for a table that does not exist.
  """

  def table(match: re.Match[str]) -> str:
    if match['name'] not in TABLES:
      raise ValueError(
        f'There is no table {match["name"]!r}. There are:'
        f' {", ".join(sorted(TABLES))}.'
      )
    return f'{match[1]}\n{TABLES[match["name"]]()}\n\n{match[3]}'

  return _TABLE.sub(table, text)


@dataclasses.dataclass(frozen=True)
class Settings(config.Settings):
  """What is done with tables that differ."""

  check: bool = config.flag(
    False,
    'Whether to change nothing, and to fail if a table differs from the'
    ' results.',
  )


def main(settings: Settings) -> None:
  """Writes tables and figures, or checks the tables."""
  found = {name: (ROOT / name).read_text() for name in DOCUMENTS}
  wanted = {name: render(text) for name, text in found.items()}
  different = [name for name in DOCUMENTS if found[name] != wanted[name]]
  if settings.check:
    if different:
      config.fail(
        f'tables of {", ".join(different)} differ from experiments/results.'
        ' Run: python -m experiments.render',
        1,
      )
    return
  for name in different:
    (ROOT / name).write_text(wanted[name])
  for name, figure in FIGURES.items():
    plots.save(figure(), ROOT / 'docs' / f'{name}.png')
  print(f'Tables that changed: {", ".join(different) or "none"}')


if __name__ == '__main__':
  config.run(main, Settings)

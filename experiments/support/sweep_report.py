"""Tables and figures of a sweep over sparse training methods."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epath
import numpy as np

from experiments.support import output
from powerprop_jax import plots

# A result of the sweep, as `summarise` takes and returns it.
Row = dict[str, Any]
# The names of the methods in tables and figures.
TITLES = {
  'dense': 'dense',
  'static': 'static',
  'snip': 'SNIP',
  'set': 'SET',
  'rigl': 'RigL',
  'top_kast': 'Top-KAST',
  'magnitude': 'magnitude',
  'acdc': 'AC/DC',
}


def _setting(r: Row) -> tuple[Any, ...]:
  """The setting for which a row has one recipe of several."""
  return r['method'], r['distribution'], r['sparsity'], r['recipe']['alpha']


def summarise(results: Sequence[Row]) -> list[Row]:
  """Adds statistics over seeds, and whether validation data choose the recipe.

  Args:
    results: one dict per setting and recipe: 'method', 'distribution',
      'sparsity', 'recipe' (a dict of 'alpha' and what else it is trained with),
      'seeds' (their number), the lists 'test_accuracy' and 'valid_accuracy'
      over seeds, 'sign_changes' (the share of the weights in use whose sign is
      not that of the initialisation), and 'inference_flops' and
      'training_flops' relative to a dense network.

  Returns:
    The same dicts with 'mean' and 'std' of the test accuracy, and 'chosen':
    whether the mean validation accuracy is the best among the recipes of this
    method, distribution, sparsity and alpha.
  """
  best: dict[tuple[Any, ...], Row] = {}
  for r in results:
    best[_setting(r)] = max(
      best.get(_setting(r), r), r, key=lambda r: np.mean(r['valid_accuracy'])
    )
  return [
    r
    | {
      'mean': float(np.mean(r['test_accuracy'])),
      'std': float(np.std(r['test_accuracy'], ddof=min(1, r['seeds'] - 1))),
      'chosen': best[_setting(r)] is r,
    }
    for r in results
  ]


def by_sparsity(
  rows: Iterable[Row],
  key: Callable[[Row], Sequence[str]],
  cell: Callable[[Row], str],
) -> tuple[list[str], list[list[str]]]:
  """The headings of all sparsities, and a line of cells for each key."""
  rows = list(rows)
  sparsities = sorted({r['sparsity'] for r in rows if r['method'] != 'dense'})
  lines: dict[tuple[str, ...], dict[float, str]] = {}
  for r in rows:
    # A dense network has no sparsity: its cell is the same in every column.
    at = sparsities if r['method'] == 'dense' else [r['sparsity']]
    lines.setdefault(tuple(key(r)), {}).update(dict.fromkeys(at, cell(r)))
  return [f'{100 * s:g} %' for s in sparsities], [
    [*name, *(cells.get(s, '') for s in sparsities)]
    for name, cells in lines.items()
  ]


def _table(
  rows: Iterable[Row], cell: Callable[[Row], str], with_alpha: bool = True
) -> str:
  """A line for each method, distribution and alpha."""
  count = 3 if with_alpha else 2

  def key(r):
    # Dense networks and SNIP have no distribution.
    found = '' if r['method'] in ('dense', 'snip') else r['distribution']
    return (r['method'], found, f'{r["recipe"]["alpha"]:g}')[:count]

  headings, lines = by_sparsity(rows, key, cell)
  first = ['method', 'distribution', 'alpha'][:count]
  return output.table(lines, [*first, *headings])


def accuracy_table(rows: Sequence[Row]) -> str:
  """Test accuracy in percent, with the deviation over several seeds.

  Args:
    rows: returned by `summarise`; one recipe for each setting.

  Returns:
    A line for each method, distribution and alpha, a column for each sparsity.
  """

  def cell(r):
    deviation = (
      f' ± {100 * r["std"]:.2f}' if len(r['test_accuracy']) > 1 else ''
    )
    return f'{100 * r["mean"]:.2f}{deviation}'

  return _table(rows, cell)


def flops_table(rows: Sequence[Row]) -> str:
  """Operations at inference / of training, relative to a dense network.

  Args:
    rows: returned by `summarise`; those of the alpha of the first are shown.

  Returns:
    A line for each method and distribution, a column for each sparsity.
  """
  alpha = rows[0]['recipe']['alpha']
  return _table(
    [r for r in rows if r['recipe']['alpha'] == alpha],
    lambda r: f'{r["inference_flops"]:.3f} / {r["training_flops"]:.3f}',
    with_alpha=False,
  )


def sign_table(rows: Sequence[Row]) -> str:
  """Weights in use whose sign is not that of the initialisation, in percent.

  Args:
    rows: returned by `summarise`; one recipe for each setting.

  Returns:
    A line for each method, distribution and alpha, a column for each sparsity.
  """
  return _table(rows, lambda r: f'{100 * r["sign_changes"]:.1f}')


def curves(
  rows: Sequence[Row], distribution: str
) -> dict[str, dict[str, list[float]]]:
  """The lines of `plots.accuracy_against_sparsity` for one distribution.

  Args:
    rows: returned by `summarise`; one recipe for each setting.
    distribution: the name of the distribution.

  Returns:
    {label: {'sparsity': list, 'mean': list, 'std': list}}, with dense networks
    and SNIP, which have no distribution.
  """
  lines: dict[str, dict[str, list[float]]] = {}
  for r in sorted(rows, key=lambda r: r['sparsity']):
    if {r['method'], r.get('distribution')} & {'dense', 'snip', distribution}:
      label = f'{r["recipe"]["alpha"]} {TITLES[r["method"]]}'
      line = lines.setdefault(label, {'sparsity': [], 'mean': [], 'std': []})
      for name, values in line.items():
        values.append(r[name])
  return lines


def write(
  results: Sequence[Row], distributions: Sequence[str], out_dir: epath.Path
) -> None:
  """Writes summary.json and the figures, and prints the tables.

  Args:
    results: the results, as `summarise` takes them.
    distributions: the distributions, each of which has a figure.
    out_dir: the folder of results.
  """
  rows = summarise(results)
  output.write_json(out_dir / 'summary.json', {'results': rows})
  rows, names = [r for r in rows if r['chosen']], []
  for distribution in distributions:
    names.append(f'accuracy_{distribution}.png')
    figure = plots.accuracy_against_sparsity(curves(rows, distribution))
    plots.save(figure, out_dir / names[-1])
  seeds = max(len(r['test_accuracy']) for r in rows)
  spread = f', mean ± standard deviation of {seeds} seeds' if seeds > 1 else ''
  if len(rows) < len(results):
    spread += ', by the recipe that validation data choose'
  print(
    f'\nTest accuracy (%) at each percentage of weights removed{spread}:'
    f'\n\n{accuracy_table(rows)}'
    '\n\nWeights in use whose sign is not that of the initialisation (%):'
    f'\n\n{sign_table(rows)}'
    '\n\nOperations at inference / of training, relative to dense:'
    f'\n\n{flops_table(rows)}'
    f'\n\nIn {out_dir}: summary.json, {", ".join(names)}'
  )

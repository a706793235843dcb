"""Compares methods of sparse training, and powers, on LeNet-300-100.

  python -m benchmarks.sparse_methods --data_dir=DIR

runs `sparse_sweep` on full MNIST for every table of docs/results.md that has
LeNet-300-100: all methods by the recipe of the preset, some at another rate,
without clipping, with uniform layers, and four methods with the decays that
trials chose (experiments/results/trials-sparse_training-decays.json). It takes
two hours on one core, and continues a run that was stopped. The results go to
--out_dir, and a summary of each table to experiments/results/, from which
`experiments.render` makes the tables.
"""

import dataclasses
import pathlib
from typing import Any

from benchmarks import comparing
from benchmarks import sparse
from experiments.support import config

_UNIFORM = '--methods=static,set,rigl,top_kast,magnitude'
# The flags of each table of accuracies.
_TABLES = {
  'mnist': '--preset=mnist',
  'mnist-rate-0.3': '--preset=mnist --methods=top_kast,magnitude --alphas=1.5'
  ' --learning_rates=0.3 --phi_decays=2e-4 --clip_norms=1',
  'mnist-unclipped': '--preset=mnist-unclipped',
  'mnist-uniform': f'--preset=mnist --distributions=uniform {_UNIFORM}',
}
_DECAYS = 'decays'
# The decays of phi at alpha = 1 and 1.5, and the floor that was best at 1.5 if
# its validation accuracy was ahead of that without a floor.
_CHOSEN = {
  'magnitude': ((0.001, 0.000667), 0.1),
  'top_kast': ((0.0002, 0.0002), 0.0),
  'rigl': ((0.002, 0.00133), 0.1),
  'acdc': ((0.002, 0.000667), 0.03),
}


@dataclasses.dataclass(frozen=True)
class Settings(comparing.Settings):
  """The tables to make, and where the results go."""

  out_dir: str = config.flag('results/sparse_methods', 'The folder of results.')
  tables: tuple[str, ...] = config.flag(
    (*_TABLES, _DECAYS), 'The tables to make.', choices=(*_TABLES, _DECAYS)
  )
  seeds: int = config.flag(
    5, f'The number of seeds of the table {_DECAYS!r}.', low=1
  )


def _compare_methods(table: str, settings: Settings) -> None:
  """Writes the accuracies of one of the tables of all methods."""
  summary = comparing.train(
    'sparse_sweep',
    [*_TABLES[table].split(), *settings.data()],
    pathlib.Path(settings.out_dir) / table,
  )
  kept = ('method', 'distribution', 'sparsity', 'recipe', 'seeds')
  rows = [
    {
      **{name: row[name] for name in kept},
      **{
        name: round(row[name], 6)
        for name in ('mean', 'std', 'inference_flops', 'training_flops')
      },
    }
    for row in (summary or {'results': []})['results']
    if row['chosen']
  ]
  commands = [
    f'python -m benchmarks.sparse_methods --tables={table} --data_dir=DIR',
    f'python -m experiments.sparse_sweep {_TABLES[table]} --data_dir=DIR',
  ]
  comparing.write(
    f'sparse_sweep-{table}', {'commands': commands}, {'results': rows}
  )


def _compare_decays(settings: Settings) -> None:
  """Writes the accuracies of the decays that were chosen."""
  common = [*comparing.COMMON, '--steps=10000', '--sparsities=0.98,0.99']
  common += [f'--seeds={settings.seeds}', *settings.data()]
  rows: list[dict[str, Any]] = []
  for method, (decays, floor) in _CHOSEN.items():
    shared = [*common, f'--methods={method}']
    if method == 'acdc':
      shared.append('--update_every=500')  # The length of its phases.
    recipes = [
      {'alpha': a, 'learning_rate': 0.2, 'phi_decay': d, 'clip_norm': 1.0}
      for a, d in zip((1.0, 1.5), decays)
    ]
    runs = {0.0: [*shared, *sparse.recipe_flags(recipes)]}
    if floor:
      raised = sparse.recipe_flags(recipes[1:])
      runs[floor] = [*shared, *raised, f'--floor={floor}']
    for height, flags in runs.items():
      folder = f'{_DECAYS}-{method}' + (f'-floor-{height}' if height else '')
      path = pathlib.Path(settings.out_dir) / folder
      summary = comparing.train('sparse_sweep', flags, path)
      for row in summary['results'] if summary else ():
        rows.append(sparse.result(row) | ({'floor': height} if height else {}))
  comparing.write(
    f'sparse_sweep-{_DECAYS}',
    {
      'commands': [
        f'python -m benchmarks.sparse_methods --tables={_DECAYS} --data_dir=DIR'
      ],
      'flags': ' '.join(comparing.COMMON),
    },
    {'results': rows},
  )


def main(settings: Settings) -> None:
  """Trains what is not finished, and writes the results."""
  for table in settings.tables:
    if table == _DECAYS:
      _compare_decays(settings)
    else:
      _compare_methods(table, settings)


if __name__ == '__main__':
  config.run(main, Settings)

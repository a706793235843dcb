"""Learns sequences of tasks by the presets of `continual_learning`.

  python -m benchmarks.tasks --data_dir=DIR

runs every preset of the tables of ten tasks: permuted, rotated and split
digits. It takes an hour on two cores, and the same command continues a run that
was stopped. The results go to --out_dir, and a summary of each table to
experiments/results/, from which `experiments.render` makes the tables.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import statistics
from typing import Any

from benchmarks import comparing
from experiments import continual_compare
from experiments.support import config

_TEN = {
  'independent': 'one network per task',
  'finetune': 'nothing against forgetting',
  'ewc': 'strength 300',
  'packnet': 'alpha = 1',
  'epn-1': 'alpha = 1, L2',
  'epn-1-l1': 'alpha = 1, L1',
  'epn-1.5': 'alpha = 1.5, L2',
  'epn-2': 'alpha = 2, L2',
  'epn-3': 'alpha = 3, L2',
  'epn-1-l1-omit': 'alpha = 1, L1, gamma 0.998, `--omit_first_layer`',
  'epn-1.5-omit': 'alpha = 1.5, L2, gamma 0.998, `--omit_first_layer`',
}
_FIVE = ('independent', 'finetune', 'packnet', 'epn-1-l1', 'epn-1.5')
# The presets of a table with what the table says of them, and further flags.
_TABLES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
  'rotated': (dict.fromkeys(_FIVE, 'rotated'), ('--benchmark=rotated',)),
  'split': (
    dict.fromkeys(_FIVE, 'split'),
    ('--benchmark=split', '--tasks=5'),
  ),
  'ten': (_TEN, ()),
}


@dataclasses.dataclass(frozen=True)
class Settings(comparing.Settings):
  """Where the data lie, and where the results go."""

  out_dir: str = config.flag('results/tasks', 'The folder of results.')
  tables: tuple[str, ...] = config.flag(
    tuple(_TABLES), 'The tables to make.', choices=tuple(_TABLES)
  )


def _row(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The line of a table: what the seeds of a preset have on average."""
  average = [run['average_accuracy'] for run in runs]
  means = {
    'worst': [run['worst_accuracy'] for run in runs],
    'before': [
      task.get('pruned_test_accuracy') for run in runs for task in run['tasks']
    ],
    'used': [run.get('capacity_used') for run in runs],
    'forgotten': [run['mean_forgetting'] for run in runs],
    'transfer': [run.get('mean_forward_transfer') for run in runs],
  }
  return {
    'seeds': len(runs),
    'average': round(statistics.mean(average), 6),
    'std': round(statistics.stdev(average), 6) if len(runs) > 1 else None,
    **{
      name: round(statistics.mean(values), 6)
      for name, values in means.items()
      if None not in values
    },
  }


def main(settings: Settings) -> None:
  """Learns what is not finished, and writes the results so far."""
  root = pathlib.Path(settings.out_dir)
  command = 'python -m experiments.continual_learning'
  for table in settings.tables:
    presets, flags = _TABLES[table]
    common = ['--infer_tasks=', *flags]
    folders = {preset: root / f'{table}-{preset}' for preset in presets}
    for preset, folder in folders.items():
      chosen = [f'--preset={preset}', *common]
      comparing.train('continual_learning', [*chosen, *settings.data()], folder)
      done = {k: x for k, x in folders.items() if (x / 'summary.json').exists()}
      runs = continual_compare.load([*map(str, done.values())])
      rows = []
      for name, place in done.items():
        row = _row([run for run in runs if run['method'] == place.name])
        if name == 'independent':  # It is what the others are compared with.
          row.pop('transfer', None)
        rows.append({'preset': name, 'what': presets[name], **row})
      comparing.write(
        f'continual-{table}',
        {
          'commands': [
            f'python -m benchmarks.tasks --tables={table} --data_dir=DIR',
            ' '.join([command, '--preset=PRESET', *common, '--data_dir=DIR']),
          ]
        },
        {'results': rows},
      )


if __name__ == '__main__':
  config.run(main, Settings)

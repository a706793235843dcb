"""Learns sequences of tasks by the presets of `continual_learning`.

  python -m benchmarks.tasks --data_dir=DIR

runs every preset of the tables of ten tasks: permuted, rotated and split
digits; those of a hundred tasks, and the inference of the task among them; and
the searches of EfficientPackNet, and what pruning costs before retraining, side
by side. It takes two hours on two cores for a hundred tasks and one for all
else, and the same command continues a run that was stopped. The results go to
--out_dir, and a summary of each table to experiments/results/, from which
`experiments.render` makes the tables.
"""

from collections.abc import Callable, Sequence
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
# With a cap of 1 % the presets of a hundred tasks leave the last ones little to
# choose from; masks that were chosen freely are those whose tasks are inferred.
_FREELY = '--cap=0.01 --seeds=1 --infer_tasks=10,50'
_HUNDRED = {
  'hundred-epn-1': 'alpha = 1, L1',
  'hundred-epn-2': 'alpha = 2, L2',
  'hundred-epn-2 --learning_rate=0.3': '`--learning_rate=0.3`',
  # As ten tasks chose it (`benchmarks.continual`), by its rule for the steps.
  # It diverged at the 13th task, so that the table has no line of it.
  'hundred-epn-2 --alpha=1.5 --alpha_steps=2:0.25,3:0.5 --learning_rate=0.15'
  ' --phi_decay=5.5e-4 --seeds=1': 'alpha = 1.5, then 2 and 3, L2',
  f'hundred-epn-1 {_FREELY}': '`--cap=0.01`',
  f'hundred-epn-2 --learning_rate=0.3 {_FREELY}': (
    '`--learning_rate=0.3 --cap=0.01`'
  ),
  'hundred-packnet --seeds=1': 'alpha = 1',
}
_FIVE = ('independent', 'finetune', 'packnet', 'epn-1-l1', 'epn-1.5')
# The presets of a table, perhaps with flags of their own, with what the table
# says of them; and further flags.
_TABLES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
  'rotated': (
    dict.fromkeys(_FIVE, 'rotated'),
    ('--infer_tasks=', '--benchmark=rotated'),
  ),
  'split': (
    dict.fromkeys(_FIVE, 'split'),
    ('--infer_tasks=', '--benchmark=split', '--tasks=5'),
  ),
  'ten': (_TEN, ('--infer_tasks=',)),
  'hundred': (_HUNDRED, ()),
}


# The flags of each run of two other tables, and what the table says of it.
_SEARCHES = {
  f'--preset=epn-1.5 --tasks=5 --seeds=1 --search={x}': {'search': x}
  for x in ('binary', 'linear', 'taylor')
}
_CAPPED = '--tasks=10 --cap=0.01 --seeds=1 --evaluate_every=10'
_PRUNED = {
  f'--preset=hundred-epn-1 --phi_decay=1e-3 --phi_decay_norm=l2 {_CAPPED}': {
    'alpha': 1.0,
    'norm': 'L2',
  },
  f'--preset=hundred-epn-1 {_CAPPED}': {'alpha': 1.0, 'norm': 'L1'},
  f'--preset=hundred-epn-2 {_CAPPED}': {'alpha': 2.0, 'norm': 'L2'},
}


@dataclasses.dataclass(frozen=True)
class Settings(comparing.Settings):
  """Where the data lie, and where the results go."""

  out_dir: str = config.flag('results/tasks', 'The folder of results.')
  tables: tuple[str, ...] = config.flag(
    (*_TABLES, 'search', 'before-retraining'),
    'The tables to make.',
    choices=(*_TABLES, 'search', 'before-retraining'),
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


def _search_row(run: dict[str, Any]) -> dict[str, Any]:
  """What a search costs from the second task on; the first one compiles."""
  tasks = run['tasks'][1:]
  seconds = {
    phase: sum(task['seconds'][phase] for task in tasks)
    for phase in ('train', 'search', 'retrain')
  }
  return {
    'evaluations': statistics.mean(task['evaluations'] for task in tasks),
    'share': round(
      seconds['search'] / (seconds['train'] + seconds['retrain']), 4
    ),
    'average': round(run['average_accuracy'], 6),
    'used': round(run['capacity_used'], 6),
    'tasks': run['num_tasks'],
  }


def _pruned_row(run: dict[str, Any]) -> dict[str, Any]:
  """Accuracies after pruning, and after retraining."""
  pruned = [task['pruned_test_accuracy'] for task in run['tasks']]
  return {
    'pruned': round(statistics.mean(pruned), 6),
    'worst': round(min(pruned), 6),
    'retrained': round(run['average_accuracy'], 6),
  }


def _inference_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
  """How often each rule found the task."""
  return [
    {
      'tasks': int(count),
      'rule': rule,
      'alpha': run['alpha'],
      'found': {images: round(x, 6) for images, x in found.items()},
    }
    for count, rules in run['task_inference'].items()
    for rule, found in rules.items()
  ]


def _write_runs(
  table: str,
  rows: dict[str, dict[str, Any]],
  measure: Callable[[dict[str, Any]], dict[str, Any]],
  settings: Settings,
) -> None:
  """Writes a table that has a line for each of several runs of one seed."""
  found = []
  for i, (flags, what) in enumerate(rows.items()):
    folder = pathlib.Path(settings.out_dir) / f'{table}-{i}'
    chosen = [*flags.split(), '--infer_tasks=', *settings.data()]
    summary = comparing.train('continual_learning', chosen, folder)
    if summary is not None:
      (run,) = summary['runs'].values()
      found.append({**what, 'flags': flags, **measure(run)})
  command = f'python -m benchmarks.tasks --tables={table} --data_dir=DIR'
  comparing.write(
    f'continual-{table}', {'commands': [command]}, {'results': found}
  )


def main(settings: Settings) -> None:
  """Learns what is not finished, and writes the results so far."""
  root = pathlib.Path(settings.out_dir)
  command = 'python -m experiments.continual_learning'
  for table in settings.tables:
    if table == 'search':
      _write_runs(table, _SEARCHES, _search_row, settings)
      continue
    if table == 'before-retraining':
      _write_runs(table, _PRUNED, _pruned_row, settings)
      continue
    presets, flags = _TABLES[table]
    # A folder is named by what is learnt in it.
    folders = {
      preset: root / f'{table}-{preset.replace(" --", "-").replace(":", "_")}'
      for preset in presets
    }
    for preset, folder in folders.items():
      chosen = [*f'--preset={preset}'.split(), *flags, *settings.data()]
      comparing.train('continual_learning', chosen, folder)
      done = {k: x for k, x in folders.items() if (x / 'summary.json').exists()}
      runs = continual_compare.load([*map(str, done.values())])
      rows, inferred = [], []
      for name, place in done.items():
        found = [run for run in runs if run['method'] == place.name]
        row = _row(found)
        if name == 'independent':  # It is what the others are compared with.
          row.pop('transfer', None)
        what = {'preset': name.split()[0], 'what': presets[name]}
        rows.append({**what, **row})
        inferred.extend(row for run in found for row in _inference_rows(run))
      source = {
        'commands': [
          f'python -m benchmarks.tasks --tables={table} --data_dir=DIR',
          ' '.join([command, '--preset=PRESET', *flags, '--data_dir=DIR']),
        ]
      }
      comparing.write(f'continual-{table}', source, {'results': rows})
      if inferred:
        comparing.write('continual-inference', source, {'results': inferred})


if __name__ == '__main__':
  config.run(main, Settings)

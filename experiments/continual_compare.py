"""Compares runs of continual learning that have different settings.

  python -m experiments.continual_compare --runs=results/epn,results/packnet

takes folders that `continual_learning` wrote, prints a table, and writes
accuracy.png and capacity.png to --out_dir. Methods that need different learning
rates can be compared in this way. The table has a row for each folder and
power, under the name of the folder; figures name the methods. A second table
has the settings in which the folders differ. Forward transfer is measured
against the runs of `independent`, if there are any.
"""

from collections.abc import Sequence
import dataclasses
import json

from etils import epath

from experiments.support import comparison
from experiments.support import config
from experiments.support import output
from experiments.support import runs as runs_lib
from experiments.support import settings as settings_lib
from powerprop_jax import paths
from powerprop_jax import plots
from powerprop_jax.continual import report as continual_report

# The entries that a run must have to be compared.
_NEEDED = ('method', 'alpha', 'seed', 'num_tasks', 'accuracy_matrix')


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Output):
  """The runs."""

  runs: tuple[str, ...] = config.flag(
    (), 'The folders that continual_learning has written; at least one.'
  )
  out_dir: str = config.flag(
    'results/continual_compare', 'The folder to which the figures are written.'
  )

  def __post_init__(self):
    super().__post_init__()
    if not self.runs:
      raise ValueError('--runs must name folders of continual_learning.')
    if len({paths.resolve(run).name for run in self.runs}) < len(self.runs):
      raise ValueError(
        f'--runs={",".join(self.runs)}: folders are told apart by their last'
        ' names, which must differ.'
      )


def load(folders: Sequence[str]) -> list[comparison.Run]:
  """The finished runs of the folders, under the names of the folders.

  Args:
    folders: paths of folders that `continual_learning` has written.

  Returns:
    The runs. Their 'method' is the name of the folder, followed by the method
    if the folder holds several, and 'learnt_by' is the method. They have the
    forward transfer if there are runs of `independent`.

  Raises:
    ValueError: if a folder holds no finished run of `continual_learning`.
  """
  found = {}
  for path in map(paths.resolve, folders):
    runs = runs_lib.finished(path).values()
    if not runs or not all(name in run for run in runs for name in _NEEDED):
      raise ValueError(f'{path} holds no finished run of continual_learning.')
    found[path.name] = list(runs)
  everything = [run for runs in found.values() for run in runs]
  renamed = []
  for name, runs in found.items():
    are_mixed = len({run['method'] for run in runs}) > 1
    for run in runs:
      method = run['method']
      label = f'{name}/{method}' if are_mixed else name
      names = {'method': label, 'learnt_by': method}
      renamed.append(comparison.with_transfer(run, everything) | names)
  return renamed


def differences(folders: Sequence[str]) -> list[list[str]]:
  """The settings that are not the same in all folders.

  Args:
    folders: paths of folders that `continual_learning` has written.

  Returns:
    A row for each such setting: its name, and its value in each folder, or '-'
    where a folder does not say.
  """
  found = []
  for path in map(paths.resolve, folders):
    file = path / 'config.json'
    kept = output.read_json(file) if file.exists() else {}
    found.append(kept.get('settings', {}))
  rows = [
    [name, *(json.dumps(one[name]) if name in one else '-' for one in found)]
    for name in sorted({name for one in found for name in one})
  ]
  return [row for row in rows if len({*row[1:]}) > 1]


def write(runs: Sequence[comparison.Run], out_dir: epath.Path) -> None:
  """Writes the figures, and prints the table.

  Args:
    runs: returned by `load`.
    out_dir: the folder of the figures, which is made if there is none.
  """
  out_dir.mkdir(parents=True, exist_ok=True)
  figures = comparison.figures(runs)
  for name, figure in figures.items():
    plots.save(figure, out_dir / name)
  print('Test accuracy after the last task, and capacity, in percent:\n')
  print(continual_report.table(runs))
  print(f'\nIn {out_dir}: {", ".join(figures)}')


def main(settings: Settings) -> None:
  """Loads the runs, prints their table, and draws their figures."""
  output.announce('continual_compare')
  with config.refusing():
    runs = load(settings.runs)
    differing = differences(settings.runs)
  write(runs, paths.resolve(settings.out_dir))
  if differing:
    names = [paths.resolve(run).name for run in settings.runs]
    print('\nSettings that differ:\n')
    print(output.table(differing, ['setting', *names]))


if __name__ == '__main__':
  config.run(main, Settings)

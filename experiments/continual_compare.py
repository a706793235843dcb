"""Runs of continual learning with other settings each, in one table.

  python -m experiments.continual_compare --runs=results/epn,results/packnet

takes folders that `continual_learning` wrote, calls the runs in each by the
name of the folder, and writes accuracy.png and capacity.png to --out_dir:
methods with a learning rate of their own are compared so. Forward transfer is
that against the folder of `independent`, where there is one.
"""

from collections.abc import Sequence
import functools
import itertools
import pathlib
from typing import Any

from absl import app
from absl import flags

from experiments import common
from experiments import continual_summary
from experiments import runner
from powerprop_jax import plots
from powerprop_jax.continual import report as continual_report


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this binary."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  flags.DEFINE_list(
    'runs', [], 'Folders of continual_learning.', flag_values=values
  )
  string('out_dir', 'results/continual_compare', 'Folder of the figures.')


def load(folders: Sequence[str]) -> list[dict[str, Any]]:
  """The finished runs of the folders, under the names of the folders.

  Raises:
    ValueError: if there are no folders, two of one name, or one without runs.
  """
  if not folders:
    raise ValueError('--runs must name folders of continual_learning.')
  paths = [pathlib.Path(folder) for folder in folders]
  if len({path.name for path in paths}) < len(paths):
    raise ValueError(
      f'--runs={",".join(folders)}: folders are told apart by their last names,'
      ' which must differ.'
    )
  by_path = {}
  for path in paths:
    found = runner.finished(path)
    if not all('accuracy_matrix' in run for run in found.values()) or not found:
      raise ValueError(f'{path} holds no finished run of continual_learning.')
    by_path[path] = found.values()
  everything = list(itertools.chain(*by_path.values()))
  return [
    continual_summary.with_transfer(run, everything) | {'method': path.name}
    for path, found in by_path.items()
    for run in found
  ]


def compare(runs: Sequence[dict[str, Any]], out_dir: pathlib.Path) -> None:
  """Writes the figures, and prints the table."""
  out_dir.mkdir(parents=True, exist_ok=True)
  figures = continual_summary.compare(runs)
  for name, figure in figures.items():
    plots.save(figure, out_dir / name)
  print('Test accuracy after the last task, and capacity, in percent:\n')
  print(continual_report.table(runs))
  print(f'\nIn {out_dir}: {", ".join(figures)}')


def main(argv: Sequence[str]) -> None:
  common.check_no_arguments(argv)
  try:
    runs = load(flags.FLAGS.runs)
  except ValueError as e:
    common.fail(e)
  compare(runs, pathlib.Path(flags.FLAGS.out_dir))


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  app.run(main)

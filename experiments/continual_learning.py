r"""Continual learning: many tasks in one network, none forgotten.

  python -m experiments.continual_learning --method=epn --alpha=1.5

learns five tasks of permuted digits with EfficientPackNet (section 4 of the
paper). Lists of methods and powers, and several seeds, make a table:

  python -m experiments.continual_learning --method=epn,packnet --alpha=1,2 \
    --seeds=3

The default data set, mnist_5k, comes with an installed package. --out_dir gets
config.json, metrics.jsonl, one file per run in runs/, summary.json, figures,
and the network with the masks of its tasks in checkpoints/. The program may be
killed at any moment: the same command goes on with the task that was being
learnt, and ends with the same result. Every choice is made on validation data;
accuracies on test data are only reported.
"""

import dataclasses
import functools

from etils import epath
import numpy as np

from experiments.presets import continual as presets
from experiments.support import comparison
from experiments.support import config
from experiments.support import output
from experiments.support import runs
from experiments.support import sequence
from experiments.support import settings as settings_lib
from experiments.support import tasks as tasks_lib
from powerprop_jax import plots
from powerprop_jax import power
from powerprop_jax.continual import report as continual_report
from powerprop_jax.data import in_memory


@dataclasses.dataclass(frozen=True)
class Settings(tasks_lib.Settings, settings_lib.Output):
  """The runs."""

  method: tuple[str, ...] = config.flag(
    ('epn',),
    'The methods: epn is EfficientPackNet, packnet is PackNet, ewc is elastic'
    ' weight consolidation, finetune does nothing against forgetting, and'
    ' independent trains a network for each task.',
    choices=tasks_lib.METHODS,
    decides=False,
  )
  alpha: tuple[float, ...] = config.flag(
    (1.5,),
    'The powers alpha, each at least 1; 1 is the baseline without'
    ' Powerpropagation.',
    check=power.check_alpha,
    decides=False,
  )
  seeds: int = config.flag(
    1,
    'The number of runs of each method and power.',
    low=1,
    high=settings_lib.MAX_RUNS,
    decides=False,
  )
  out_dir: str = config.like(
    settings_lib.Output, 'out_dir', 'results/continual_learning', own=True
  )


def make_jobs(settings: Settings) -> list[tasks_lib.Job]:
  """The runs of the settings, all methods and powers of a seed together.

  Args:
    settings: those of the binary.

  Returns:
    The runs, each of them once.
  """
  return [
    tasks_lib.Job(method, alpha, seed)
    for seed in range(settings.seeds)
    for method in dict.fromkeys(settings.method)
    for alpha in dict.fromkeys(settings.alpha)
  ]


def _details(run: comparison.Run) -> str:
  """The details of one run for which the table has no room."""
  seconds = {k: round(v, 1) for k, v in run['seconds'].items() if v >= 0.05}
  lines = [
    f'forgotten (%): {100 * max([0.0, *run["forgetting"]]):.2f} at most',
    f'bytes per task: {run["bytes_per_task"]}',
    'seconds: ' + ', '.join(f'{k} {v}' for k, v in seconds.items()),
  ]
  if 'capacity_used' in run:
    density = ', '.join(f'{100 * p:.1f}' for p in run['density'][:10])
    new = ', '.join(map(str, run['new_weights'][:10]))
    more = ', ...' if run['num_tasks'] > 10 else ''
    lines.insert(1, f'density of the mask of each task (%): {density}{more}')
    lines.insert(2, f'new weights of each task: {new}{more}')
  if run['num_tasks'] > 1:
    lines.append(
      'transfer (%) of Lopez-Paz and Ranzato: backward'
      f' {100 * run["mean_backward_transfer"]:.2f}, forward'
      f' {100 * run["mean_zero_shot_transfer"]:.2f}'
    )
  pruned = [task.get('pruned_test_accuracy') for task in run['tasks']]
  if pruned[0] is not None:
    lines.append(f'pruned, before retraining (%): {100 * np.mean(pruned):.2f}')
  for count, rules in run['task_inference'].items():
    for rule, row in rules.items():
      cells = (f'{100 * x:.1f} (batches of {n})' for n, x in row.items())
      lines.append(f'task of {count} found by {rule} (%): ' + ', '.join(cells))
  return '\n'.join(lines)


def summarise(results: dict[str, comparison.Run], out_dir: epath.Path) -> None:
  """Writes summary.json and the figures, and prints the table.

  Args:
    results: what `sequence.learn_all` returned of each finished run, by the
      name of the run.
    out_dir: the folder of results.
  """
  everything = results.values()
  results = {
    name: comparison.with_transfer(run, everything)
    for name, run in results.items()
  }
  output.write_json(out_dir / 'summary.json', {'runs': results})
  found = list(results.values())
  figures = comparison.figures(found)
  for label, (run, *_) in comparison.by_label(found).items():
    name = label.replace(' ', '-')
    figures[f'matrix-{name}.png'] = plots.accuracy_matrix(
      np.array(run['accuracy_matrix'], float)
    )
    if 'overlap' in run:
      figures[f'overlap-{name}.png'] = plots.overlap_matrix(run['overlap'])
  for name, figure in figures.items():
    plots.save(figure, out_dir / name)
  print(
    '\nTest accuracy after the last task, and weights in use, in percent:\n'
  )
  print(continual_report.table(found))
  first = found[0]
  others = '; summary.json has the others' if found[1:] else ''
  print(
    f'\n{first["method"]}, alpha = {first["alpha"]:g}, seed'
    f' {first["seed"]}{others}:'
  )
  print(_details(first))
  print(f'\nIn {out_dir}: summary.json, {", ".join(figures)}')


def main(settings: Settings) -> None:
  """Makes the runs that are not finished yet, and summarises finished ones."""
  jobs = make_jobs(settings)
  if not settings.data_parallel:
    runs.use_cores(len(jobs))
  output.announce(sequence.BINARY)
  with config.refusing():
    data = in_memory.load(settings.dataset, settings.data_dir)
    benchmark = tasks_lib.make_benchmark(settings, data, 0)
    problems = {
      kind: tasks_lib.make_problem(
        settings, *kind, benchmark.input_shape, benchmark.num_classes
      )
      for kind in dict.fromkeys((job.method, job.alpha) for job in jobs)
    }
  deciding = config.deciding(settings) | {'data': in_memory.fingerprint(data)}
  with output.opened(settings.out_dir, sequence.BINARY, deciding) as out_dir:
    todo = {
      job.name: functools.partial(
        sequence.learn_all,
        job,
        problems[job.method, job.alpha],
        settings,
        deciding,
        data,
        out_dir,
      )
      for job in jobs
    }
    messages, interrupted = runs.run_all(
      todo,
      (data.train, data.valid, data.test),
      settings.tasks * (settings.steps_per_task + settings.retrain_steps),
      out_dir,
      # Runs that use all devices together go one after another.
      workers=1 if settings.data_parallel else None,
      fields=tasks_lib.Job._fields,
    )
    results = runs.finished(out_dir, todo)
    if results:
      summarise(results, out_dir)
  messages += [
    f'{name}: {result["stopped"]}'
    for name, result in results.items()
    if result['stopped']
  ]
  runs.finish(messages, interrupted, len(results), len(todo))


if __name__ == '__main__':
  config.run(main, Settings, presets.PRESETS)

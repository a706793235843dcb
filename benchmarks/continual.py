"""Continual learning by EfficientPackNet with powers, against L1 at alpha = 1.

  python -m benchmarks.continual --data_dir=DIR

learns ten tasks of permuted MNIST with a fifth of the steps of the presets, 600
per task and 200 under its mask, by alpha = 1 with an L1 decay, by alpha = 2 and
3, and by a power that rises from 1.5 to 2 and 3 while each task is learnt.
Every recipe has six trials with one seed, of two rates and three decays. The
best is the one with the highest score: the mean validation accuracy over the
tasks after the last of them, in percent, less a point for each 50 % of the
weights in use; a run that diverges, or finds no free weights before the last
task, has none. It is learnt again with three seeds. The power that rises is
then chosen in the same way with all steps, for which the presets have recipes
of the others. At last every recipe of short runs, and PackNet by its preset,
learn a hundred tasks with a fifth of the steps. All this takes an hour and a
quarter on one core, and continues when it is given again. The results go to
--out_dir, and together to experiments/results/, as continual-powers.json.
"""

import dataclasses
import itertools
import pathlib
import statistics
from typing import Any

from benchmarks import comparing
from experiments.support import config

_COMMON = ('--dataset=mnist', '--gamma=0.995')
_TASKS = {'short': 10, 'full': 10, 'hundred': 100}
_SETTINGS = {
  'short': ('--steps_per_task=600', '--retrain_steps=200'),
  'full': ('--steps_per_task=3000', '--retrain_steps=1000'),
  # As the presets of a hundred tasks have it.
  'hundred': (
    *('--steps_per_task=400', '--retrain_steps=200'),
    *('--cap=0.008', '--omit_first_layer'),
  ),
}
_GROWING = 'alpha = 1.5, then 2 and 3'
# The flags, the rates and the decays of each recipe.
_RECIPES = {
  'alpha = 1, L1': (
    ('--alpha=1', '--phi_decay_norm=l1'),
    (0.1, 0.2),
    (2e-4, 4e-4, 8e-4),
  ),
  'alpha = 2': (('--alpha=2',), (0.2, 0.4), (1e-3, 3e-3, 8e-3)),
  'alpha = 3': (('--alpha=3',), (0.1, 0.2), (5e-4, 1.5e-3, 4e-3)),
  _GROWING: (
    ('--alpha=1.5', '--alpha_steps=2:0.25,3:0.5'),
    (0.15, 0.3),
    (1e-3, 3e-3, 8e-3),
  ),
}


@dataclasses.dataclass(frozen=True)
class Settings(comparing.Settings):
  """Where the data lie, and where the results go."""

  out_dir: str = config.flag('results/continual', 'The folder of results.')
  seeds: int = config.flag(3, 'The number of runs of the best recipes.', low=1)


def _measure(
  summary: dict[str, Any] | None, tasks: int
) -> dict[str, Any] | None:
  """Accuracies and capacity over the seeds; None of what did not end."""
  runs = list(summary['runs'].values()) if summary else []
  # A run stops early where no weight is free for the next task.
  if not runs or any(run['num_tasks'] < tasks for run in runs):
    return None
  rows = [run['accuracy_matrix'][-1] for run in runs]
  valid = statistics.mean(
    statistics.mean(run['valid_accuracy']) for run in runs
  )
  used = statistics.mean(run['capacity_used'] for run in runs)
  means = [statistics.mean(row) for row in rows]
  return {
    'seeds': len(runs),
    'score': round(100 * valid - 2 * used, 3),
    'valid': round(valid, 6),
    'average': round(statistics.mean(means), 6),
    'std': round(statistics.stdev(means), 6) if len(runs) > 1 else None,
    'worst': round(min(map(min, rows)), 6),
    'used': round(used, 6),
    'forgotten': round(max(max([0.0, *x['forgetting']]) for x in runs), 6),
    'by_task': [round(x, 4) for x in rows[0]],
  }


def main(settings: Settings) -> None:
  """Learns what is not finished, and writes all."""
  root = pathlib.Path(settings.out_dir)

  def learn(name, setting, flags, rate, decay, seeds):
    tasks = _TASKS[setting]
    flags = [
      *_COMMON,
      *settings.data(),
      *_SETTINGS[setting],
      *flags,
      f'--seeds={seeds}',
    ]
    flags += [f'--tasks={tasks}', f'--evaluate_every={tasks}']
    flags += [f'--learning_rate={rate:g}', f'--phi_decay={decay:.3g}']
    summary = comparing.train('continual_learning', flags, root / name)
    return _measure(summary, tasks)

  trials, results, chosen = [], [], {}

  def publish(label, setting, flags, rate, decay, seeds):
    name = f'{label.replace(" ", "")}-{setting}-{rate:g}-{decay:.3g}'
    found = learn(name, setting, flags, rate, decay, seeds)
    decay = float(f'{decay:.3g}')
    row = {'recipe': label, 'steps': setting, 'rate': rate, 'decay': decay}
    results.append(row | (found or {'failed': True}))
    comparing.write(
      'continual-powers',
      {
        'commands': ['python -m benchmarks.continual --data_dir=DIR'],
        'setting': ' '.join(_COMMON),
        'steps': {
          name: ' '.join(
            [f'--tasks={tasks}', f'--evaluate_every={tasks}', *_SETTINGS[name]]
          )
          for name, tasks in _TASKS.items()
        },
      },
      {'trials': trials, 'results': results},
    )

  def choose(label, setting, prefix, fewer=1.0):
    """Tries a recipe, with a factor on its decays, and publishes the best."""
    flags, rates, decays = _RECIPES[label]
    scores = {}
    for rate, decay in itertools.product(rates, decays):
      decay *= fewer
      name = f'{prefix}-{rate:g}-{decay:.3g}'
      one = learn(name, setting, flags, rate, decay, 1)
      trials.append([setting, label, rate, float(f'{decay:.3g}'), one])
      scores[rate, decay] = one['score'] if one else float('-inf')
    rate, decay = max(scores, key=lambda pair: scores[pair])
    publish(label, setting, flags, rate, decay, settings.seeds)
    return flags, rate, decay

  for i, label in enumerate(_RECIPES):
    chosen[label] = choose(label, 'short', str(i))
  # The square root is the rule of `benchmarks.lengths`.
  choose(_GROWING, 'full', 'full', 0.2**0.5)
  for label, (flags, rate, decay) in chosen.items():
    publish(label, 'hundred', flags, rate, decay, 1)
  packnet = ('--method=packnet', '--alpha=1')
  publish('PackNet, alpha = 1', 'hundred', packnet, 0.1, 3e-4 * 5**0.5, 1)


if __name__ == '__main__':
  config.run(main, Settings)

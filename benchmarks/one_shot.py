"""Compares powers on a network of convolutions that is pruned once.

  python -m benchmarks.one_shot --data_dir=DIR

trains LeNet-5 on full MNIST and prunes it by magnitude over all layers, without
retraining. Each recipe has six trials with one seed, of two rates and three
decays; the mean validation accuracy with 10, 2, 1, 0.5 and 0.2 % of the weights
chooses one, which is trained with more seeds. The decays are those that
`benchmarks.lengths` has for LeNet-300-100, by its rule for the number of steps,
times 0.1, 0.25 and 0.5, and twice as much for the power that grows. Trials of
another grid had shown that more is too much for L1, and that powers need a rate
above 0.1 here. It takes an hour on two cores, and the same command continues a
run that was stopped. The results go to --out_dir, and a summary to
experiments/results/, from which `experiments.render` makes a table.
"""

import dataclasses
import itertools
import pathlib
import shutil
import statistics
from typing import Any

from benchmarks import comparing
from experiments.support import config
from experiments.support import settings as settings_lib

_KEPT = (1.0, 0.1, 0.05, 0.02, 0.01, 0.005, 0.003, 0.002)
_CHOOSING = (0.1, 0.02, 0.01, 0.005, 0.002)  # Their mean chooses.
_RATES, _LARGER = (0.1, 0.2), (0.2, 0.4)
_FACTORS = (0.1, 0.25, 0.5)  # Of the decay.
_COMMON = (
  *comparing.COMMON,
  '--clip_norm=1',
  '--scope=global',
  f'--kept={",".join(map(str, _KEPT))}',
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What the trials of a recipe have in common.

  Attributes:
    label: the name in tables.
    rates: the learning rates of its trials.
    decay: the decay of phi per step at 10,000 steps, around which trials are.
    flags: further flags of `mnist_pruning`.
  """

  label: str
  rates: tuple[float, ...]
  decay: float
  flags: tuple[str, ...]


RECIPES = {
  'l1': Recipe(
    '1 with L1', _RATES, 6e-4, ('--alphas=1', '--phi_decay_norm=l1')
  ),
  'p-norm': Recipe(
    '1 with the 2/3-norm',
    _RATES,
    4.5e-4,
    ('--alphas=1', '--phi_decay_norm=0.666667'),
  ),
  'alpha-2': Recipe('2', _LARGER, 2e-3, ('--alphas=2',)),
  'growing': Recipe(
    '1.5 then 2 and 3',
    _LARGER,
    2e-3,
    ('--alphas=1.5', '--alpha_steps=2:0.25,3:0.5'),
  ),
}


@dataclasses.dataclass(frozen=True)
class Settings(comparing.Settings):
  """What is trained, and where the results go."""

  out_dir: str = config.flag('results/one_shot', 'The folder of results.')
  network: str = config.like(settings_lib.Network, 'network', 'lenet_5')
  steps: int = config.flag(2_000, 'The number of training steps.', low=1)
  seeds: int = config.flag(3, 'The number of seeds of each recipe.', low=1)


def main(settings: Settings) -> None:
  """Trains what is not finished, and writes the results."""
  root = pathlib.Path(settings.out_dir)
  common = [*_COMMON, f'--network={settings.network}']
  common += [f'--steps={settings.steps}', *settings.data()]
  results, trials = [], []
  for name, recipe in RECIPES.items():
    best, folder = None, root
    for rate, factor in itertools.product(recipe.rates, _FACTORS):
      decay = recipe.decay * factor * (10_000 / settings.steps) ** 0.5
      decay = float(f'{decay:.3g}')
      flags = [*common, *recipe.flags]
      flags += [f'--learning_rate={rate:g}', f'--phi_decay={decay:g}']
      path = root / f'{name}-{rate:g}-{decay:g}'
      summary = comparing.train('mnist_pruning', [*flags, '--seeds=1'], path)
      trial = {'recipe': recipe.label, 'rate': rate, 'decay': decay}
      if summary is None:
        trials.append(trial | {'valid': None})
        continue
      valid = _means(summary, 'valid_accuracy')
      score = statistics.mean(
        valid[summary['kept'].index(p)] for p in _CHOOSING
      )
      trials.append(trial | {'valid': valid, 'score': round(score, 6)})
      if best is None or score > best[0]:
        best, folder = (score, flags, trial), path
    if best is None:
      continue
    _, flags, trial = best
    final = root / f'{name}-chosen'
    if not final.exists():
      # The first seed is there already.
      ignore = shutil.ignore_patterns('flags.json', 'summary.json')
      shutil.copytree(folder, final, ignore=ignore)
    seeds = f'--seeds={settings.seeds}'
    summary = comparing.train('mnist_pruning', [*flags, seeds], final)
    if summary is not None:
      (found,) = summary['results'].values()
      results.append(
        trial
        | {
          'seeds': len(found['test_accuracy'][0]),
          'mean': [round(x, 6) for x in found['mean']],
          'std': [round(x, 6) for x in found['std']],
          'valid_mean': _means(summary, 'valid_accuracy'),
        }
      )
  command = f'python -m benchmarks.one_shot --network={settings.network}'
  comparing.write(
    f'one_shot-{settings.network}',
    {
      'commands': [f'{command} --steps={settings.steps} --data_dir=DIR'],
      'recipes': {
        r.label: ' '.join([*_COMMON, *r.flags]) for r in RECIPES.values()
      },
      'choice': 'by the mean validation accuracy of one seed with 10, 2, 1, 0.5'
      ' and 0.2 % of the weights',
    },
    {'kept': list(_KEPT), 'results': results, 'trials': trials},
  )


def _means(summary: dict[str, Any], name: str) -> list[float]:
  """The mean over seeds for each fraction in the order of `_KEPT`."""
  (found,) = summary['results'].values()
  return [round(statistics.mean(x), 6) for x in found[name]]


if __name__ == '__main__':
  config.run(main, Settings)

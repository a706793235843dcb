"""Compares powers on a network of convolutions that is pruned once.

  python -m benchmarks.one_shot --data_dir=DIR
  python -m benchmarks.one_shot --network=wrn_10_1 --steps=300 \
    --recipes=l1,alpha-2,growing --rates=0.2,0.4,0.8 --factors=0.1,0.3,1 \
    --kept=1,0.5,0.2,0.1,0.05 --choosing=0.2,0.1,0.05 --data_dir=DIR

trains a network, by default LeNet-5, on full MNIST and prunes it by magnitude
over all layers, without retraining. Each recipe has a trial with one seed of
each of --rates, which are twice as large for powers, and of each decay; the
mean validation accuracy with the fractions of --choosing chooses one, which is
trained with more seeds. The decays are those that `benchmarks.lengths` has for
LeNet-300-100, by its rule for the number of steps, times --factors, and twice
as much for the power that grows. Each of the commands, of which the second
trains a ResNet-8, takes up to an hour on one core, and continues a run that was
stopped. The results go to --out_dir, and a summary to experiments/results/,
from which `experiments.render` makes a table.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import pathlib
import shutil
import statistics
from typing import Any

from benchmarks import comparing
from experiments.support import config
from experiments.support import settings as settings_lib

_COMMON = (*comparing.COMMON, '--clip_norm=1', '--scope=global')


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What the trials of a recipe have in common.

  Attributes:
    label: the name in tables.
    decay: the decay of phi per step at 10,000 steps, around which trials are.
    flags: further flags of `mnist_pruning`.
    speed: the factor of the learning rates.
  """

  label: str
  decay: float
  flags: tuple[str, ...]
  speed: float = 1.0


RECIPES = {
  'l1': Recipe('1 with L1', 6e-4, ('--alphas=1', '--phi_decay_norm=l1')),
  'p-norm': Recipe(
    '1 with the 2/3-norm', 4.5e-4, ('--alphas=1', '--phi_decay_norm=0.666667')
  ),
  'alpha-2': Recipe('2', 2e-3, ('--alphas=2',), speed=2.0),
  'growing': Recipe(
    '1.5 then 2 and 3',
    2e-3,
    ('--alphas=1.5', '--alpha_steps=2:0.25,3:0.5'),
    speed=2.0,
  ),
}


@dataclasses.dataclass(frozen=True)
class Settings(comparing.Settings):
  """What is trained, and where the results go."""

  out_dir: str = config.flag('results/one_shot', 'The folder of results.')
  network: str = config.like(settings_lib.Network, 'network', 'lenet_5')
  steps: int = config.flag(2_000, 'The number of training steps.', low=1)
  seeds: int = config.flag(3, 'The number of seeds of each recipe.', low=1)
  recipes: tuple[str, ...] = config.flag(
    tuple(RECIPES), 'The recipes.', choices=tuple(RECIPES)
  )
  rates: tuple[float, ...] = config.flag(
    (0.1, 0.2, 0.4), 'The learning rates of the trials at alpha = 1.', low=0.0
  )
  factors: tuple[float, ...] = config.flag(
    (0.1, 0.25, 0.5, 1.0, 2.0),
    'The factors of the decay of the trials.',
    low=0.0,
  )
  kept: tuple[float, ...] = config.flag(
    (1.0, 0.1, 0.05, 0.02, 0.01, 0.005, 0.003, 0.002),
    'The fractions of the weights that are kept.',
    low=0.0,
    high=1.0,
  )
  choosing: tuple[float, ...] = config.flag(
    (0.1, 0.02, 0.01, 0.005, 0.002),
    'Those whose mean validation accuracy chooses a recipe.',
    low=0.0,
    high=1.0,
  )


def main(settings: Settings) -> None:
  """Trains what is not finished, and writes the results."""
  root = pathlib.Path(settings.out_dir)
  common = [*_COMMON, f'--network={settings.network}']
  common += [f'--kept={_listed(settings.kept)}', f'--steps={settings.steps}']
  common += settings.data()
  results, trials = [], []
  for name in settings.recipes:
    recipe, best, folder = RECIPES[name], None, root
    for rate, factor in itertools.product(settings.rates, settings.factors):
      rate *= recipe.speed
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
        valid[summary['kept'].index(p)] for p in settings.choosing
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
  asked = {
    name: getattr(settings, name)
    for name in ('recipes', 'rates', 'factors', 'kept', 'choosing')
    if getattr(settings, name) != getattr(Settings(), name)
  }
  more = ''.join(f' --{name}={_listed(x)}' for name, x in asked.items())
  comparing.write(
    f'one_shot-{settings.network}',
    {
      'commands': [
        f'python -m benchmarks.one_shot --network={settings.network}'
        f' --steps={settings.steps}{more} --data_dir=DIR'
      ],
      'recipes': {
        RECIPES[name].label: ' '.join([*_COMMON, *RECIPES[name].flags])
        for name in settings.recipes
      },
      'choice': 'by the mean validation accuracy of one seed with the fractions'
      f' {_listed(settings.choosing)} of the weights',
    },
    {'kept': list(settings.kept), 'results': results, 'trials': trials},
  )


def _listed(values: Sequence[Any]) -> str:
  return ','.join(map(str, values))


def _means(summary: dict[str, Any], name: str) -> list[float]:
  """The mean over seeds for each fraction that is kept."""
  (found,) = summary['results'].values()
  return [round(statistics.mean(x), 6) for x in found[name]]


if __name__ == '__main__':
  config.run(main, Settings)

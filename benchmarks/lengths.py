"""Measures accuracy after pruning once, against the length of training.

  python -m benchmarks.lengths --data_dir=DIR

trains LeNet-300-100 on full MNIST for 2,500 to 100,000 steps by each recipe,
and prunes it by magnitude, without retraining. It takes four or five hours on
two cores, and the same command continues a run that was stopped. The results go
to --out_dir, and a summary to experiments/results/lengths.json, from which
`experiments.render` makes a figure and tables. The stored summary has none
of alpha = 3 with 100,000 steps, of which three seeds were begun and diverged.

The recipes were chosen at 10,000 steps by the validation accuracy of one seed,
after seventeen trials each (experiments/results/trials-lengths.json), and the
penalty that grows after six, of the decay alone, of which ablations.json has a
repetition. At other lengths the rate is the same, and the decay per step is
that at 10,000 steps times the square root of 10,000 / steps. The square root
was chosen because it leads from the recipe of alpha = 2 at 10,000 steps to that
which trials of their own had found at 100,000 steps.
"""

import dataclasses
import itertools
import json
import pathlib
import statistics
from typing import Any

from benchmarks import comparing
from experiments.support import config

_LENGTHS = (2_500, 5_000, 10_000, 25_000, 50_000, 100_000)
_KEPT = (1.0, 0.1, 0.0546, 0.0207, 0.01, 0.007, 0.005)
_COMMON = (
  *comparing.COMMON,
  '--scope=layer,global',
  f'--kept={",".join(map(str, _KEPT))}',
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The settings that were chosen at 10,000 steps.

  Attributes:
    label: the name in tables.
    alpha: the power, or the first of several.
    rate: the learning rate.
    decay: the decay of phi per step at 10,000 steps.
    factors: the factors of the decay by layer.
    more: further flags.
  """

  label: str
  alpha: float
  rate: float
  decay: float
  factors: str
  more: tuple[str, ...] = ()

  def flags(self, steps: int) -> list[str]:
    """The flags of `mnist_pruning` at a number of steps."""
    decay = self.decay * (10_000 / steps) ** 0.5
    return [
      f'--steps={steps}',
      f'--alphas={self.alpha:g}',
      f'--learning_rate={self.rate:g}',
      f'--phi_decay={decay:.3g}',
      f'--phi_decay_warmup_steps={3 * steps // 10}',
      f'--phi_decay_scale={self.factors}',
      *self.more,
    ]


_FACTORS, _MORE_FACTORS = 'logits=5,linear_1=2', 'logits=8,linear_1=3'
# Each is the best trial of its kind. For the power that grows it is one within
# 0.1 points of the best, at a smaller rate: at 0.2 longer runs may diverge.
RECIPES = {
  # The same penalty on theta as that of the power that grows.
  'growing-penalty': Recipe(
    '1.0 with a growing penalty',
    1.0,
    0.16,
    3.5e-4,
    _FACTORS,
    ('--phi_decay_norm=1.333333,1:0.25,0.666667:0.5', '--clip_norm=3'),
  ),
  'l1': Recipe(
    '1.0 with L1', 1.0, 0.1, 6e-4, _FACTORS, ('--phi_decay_norm=l1',)
  ),
  'p-norm': Recipe(
    '1.0 with the 2/3-norm',
    1.0,
    0.2,
    4.5e-4,
    _MORE_FACTORS,
    ('--phi_decay_norm=0.666667',),
  ),
  'alpha-2': Recipe('2.0', 2.0, 0.2, 2e-3, _FACTORS),
  'alpha-3': Recipe('3.0', 3.0, 0.2, 6e-4, _MORE_FACTORS, ('--clip_norm=1',)),
  'growing': Recipe(
    '1.5 then 2 and 3',
    1.5,
    0.16,
    1e-3,
    _FACTORS,
    ('--alpha_steps=2:0.25,3:0.5', '--clip_norm=3'),
  ),
}


@dataclasses.dataclass(frozen=True)
class Settings(comparing.Settings):
  """The lengths and seeds to train, and where the results go."""

  out_dir: str = config.flag('results/lengths', 'The folder of results.')
  seeds: int = config.flag(5, 'The number of seeds of each recipe.', low=1)
  lengths: tuple[int, ...] = config.flag(
    _LENGTHS,
    'The numbers of training steps. Only those of the default are written to'
    ' the summary.',
    low=1,
  )


def main(settings: Settings) -> None:
  """Trains what is not finished, and writes the results so far."""
  root = pathlib.Path(settings.out_dir)
  for steps in settings.lengths:
    for name, recipe in RECIPES.items():
      flags = [*_COMMON, *recipe.flags(steps), *settings.data()]
      flags.append(f'--seeds={settings.seeds}')
      # Where a run diverges the others count.
      comparing.train('mnist_pruning', flags, root / f'{name}-{steps}')
      write(root)


def write(root: pathlib.Path) -> None:
  """Writes the results of all recipes and lengths that are finished.

  Those that the summary has and the folder has not stay in it.
  """
  kept = {_key(r): r for r in comparing.read('lengths').get('results', ())}
  results = []
  for name, steps in itertools.product(RECIPES, _LENGTHS):
    path = root / f'{name}-{steps}' / 'summary.json'
    if not path.exists():
      continue
    for label, found in json.loads(path.read_text())['results'].items():
      valid = [statistics.mean(x) for x in found['valid_accuracy']]
      results.append(
        {
          'recipe': RECIPES[name].label,
          'steps': steps,
          'scope': 'global' if label.endswith('global') else 'layer',
          'seeds': len(found['test_accuracy'][0]),
          'mean': [round(x, 6) for x in found['mean']],
          'std': [round(x, 6) for x in found['std']],
          'valid_mean': [round(x, 6) for x in valid],
        }
      )
  kept |= {_key(r): r for r in results}
  labels = [recipe.label for recipe in RECIPES.values()]
  order = sorted(
    kept, key=lambda key: (labels.index(key[0]), key[1], key[2] != 'layer')
  )
  comparing.write(
    'lengths',
    {
      'commands': ['python -m benchmarks.lengths --data_dir=DIR'],
      'recipes': {
        recipe.label: ' '.join([*_COMMON, *recipe.flags(10_000)])
        for recipe in RECIPES.values()
      },
    },
    {'kept': list(_KEPT), 'results': [kept[key] for key in order]},
  )


def _key(row: dict[str, Any]) -> tuple[str, int, str]:
  return row['recipe'], row['steps'], row['scope']


if __name__ == '__main__':
  config.run(main, Settings)

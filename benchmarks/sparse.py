"""Compares powers in sparse training of a network of convolutions.

  python -m benchmarks.sparse --data_dir=DIR

trains LeNet-5 on full MNIST by gradual pruning, Top-KAST, RigL and AC/DC, with
alpha = 1 and 1.5. For each method and power there are three trials with one
seed at the first of --sparsities, of decays of 0.1, 1 and 3 nats at one rate;
the validation accuracy chooses one recipe, which is trained at all of them with
more seeds. It takes an hour on one core, and the same command continues a run
that was stopped. The results go to --out_dir, and a summary to
experiments/results/, from which `experiments.render` makes a table.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import pathlib
from typing import Any

from benchmarks import comparing
from experiments.support import config
from experiments.support import settings as settings_lib

_METHODS = ('magnitude', 'top_kast', 'rigl', 'acdc')
_ALPHAS = (1.0, 1.5)
_RATE = 0.2
_NATS = (0.1, 1.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Settings(comparing.Settings):
  """What is trained, and where the results go."""

  out_dir: str = config.flag('results/sparse', 'The folder of results.')
  network: str = config.like(settings_lib.Network, 'network', 'lenet_5')
  steps: int = config.flag(600, 'The number of training steps.', low=100)
  seeds: int = config.flag(3, 'The number of seeds of each recipe.', low=1)
  sparsities: tuple[float, ...] = config.flag(
    (0.98, 0.99),
    'The sparsities. Recipes are chosen at the first.',
    low=0.0,
    high=1.0,
  )


def _recipes(recipes: Sequence[dict[str, float]]) -> list[str]:
  """The flags of `sparse_sweep` for a recipe for each of several powers."""
  names = {
    'alpha': 'alphas',
    'learning_rate': 'learning_rates',
    'phi_decay': 'phi_decays',
    'clip_norm': 'clip_norms',
  }
  return [
    f'--{flag}=' + ','.join(f'{recipe[name]:g}' for recipe in recipes)
    for name, flag in names.items()
  ]


def main(settings: Settings) -> None:
  """Trains what is not finished, and writes the results."""
  root, steps = pathlib.Path(settings.out_dir), settings.steps
  common = [*comparing.COMMON, f'--network={settings.network}']
  common += [f'--steps={steps}', *settings.data()]
  grid = [
    {
      'alpha': alpha,
      'learning_rate': _RATE,
      # A cosine has half of its first value on average.
      'phi_decay': float(f'{2 * nats / (alpha * steps):.3g}'),
      'clip_norm': 1.0,
    }
    for alpha, nats in itertools.product(_ALPHAS, _NATS)
  ]
  trials: list[dict[str, Any]] = []
  results: list[dict[str, Any]] = []
  for method in _METHODS:
    # Of AC/DC these are the phases, of which there are twenty.
    every = steps // (20 if method == 'acdc' else 12)
    of_method = [*common, f'--methods={method}', f'--update_every={every}']
    first = f'--sparsities={settings.sparsities[0]:g}'
    summary = comparing.train(
      'sparse_sweep',
      [*of_method, first, '--seeds=1', *_recipes(grid)],
      root / f'{method}-trials',
    )
    if summary is None:
      continue
    trials += map(_row, summary['results'])
    chosen = [row['recipe'] for row in summary['results'] if row['chosen']]
    sparsities = ','.join(f'{s:g}' for s in settings.sparsities)
    flags = [f'--sparsities={sparsities}', f'--seeds={settings.seeds}']
    summary = comparing.train(
      'sparse_sweep',
      [*of_method, *flags, *_recipes(chosen)],
      root / f'{method}-chosen',
    )
    if summary is not None:
      results += map(_row, summary['results'])
  command = f'python -m benchmarks.sparse --network={settings.network}'
  comparing.write(
    f'sparse_sweep-{settings.network}-powers',
    {
      'commands': [f'{command} --steps={steps} --data_dir=DIR'],
      'flags': ' '.join(comparing.COMMON),
      'choice': 'by the validation accuracy of one seed at the first sparsity',
    },
    {'results': results, 'trials': trials},
  )


def _row(row: dict[str, Any]) -> dict[str, Any]:
  """What is kept of a row of the summary of `sparse_sweep`."""
  valid = row['valid_accuracy']
  return {
    'method': row['method'],
    'alpha': row['recipe']['alpha'],
    'sparsity': row['sparsity'],
    'rate': row['recipe']['learning_rate'],
    'decay': row['recipe']['phi_decay'],
    'seeds': row['seeds'],
    'valid': round(sum(valid) / len(valid), 6),
    'mean': round(row['mean'], 6),
    'std': round(row['std'], 6),
    'sign_changes': round(row['sign_changes'], 4),
  }


if __name__ == '__main__':
  config.run(main, Settings)

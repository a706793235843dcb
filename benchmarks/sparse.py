"""Compares powers in sparse training of networks of convolutions.

  python -m benchmarks.sparse --data_dir=DIR
  python -m benchmarks.sparse --network=wrn_10_1 --steps=300 \
    --rates=0.2,0.4,0.8 --nats=0.1 --sparsities=0.98,0.95,0.9,0.99 \
    --data_dir=DIR

trains a network, by default LeNet-5, on full MNIST by gradual pruning,
Top-KAST, RigL and AC/DC, with alpha = 1 and 1.5. For each method and power
there is a trial with one seed of each of --rates and of --nats at the first of
--sparsities; the validation accuracy chooses one recipe, which is trained at
all of them with more seeds. Each of the commands, of which the second trains a
ResNet-8, takes one and a half hours on one core, and continues a run that was
stopped. The results go to --out_dir, and a summary to experiments/results/,
from which `experiments.render` makes a table.
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


@dataclasses.dataclass(frozen=True)
class Settings(comparing.Settings):
  """What is trained, and where the results go."""

  out_dir: str = config.flag('results/sparse', 'The folder of results.')
  network: str = config.like(settings_lib.Network, 'network', 'lenet_5')
  steps: int = config.flag(600, 'The number of training steps.', low=100)
  seeds: int = config.flag(3, 'The number of seeds of each recipe.', low=1)
  rates: tuple[float, ...] = config.flag(
    (0.2, 0.4), 'The learning rates of the trials.', low=0.0
  )
  nats: tuple[float, ...] = config.flag(
    (0.1, 1.0, 3.0), 'The decays of the trials, in nats.', low=0.0
  )
  sparsities: tuple[float, ...] = config.flag(
    (0.98, 0.99, 0.9, 0.95),
    'The sparsities. Recipes are chosen at the first.',
    low=0.0,
    high=1.0,
  )


def recipe_flags(recipes: Sequence[dict[str, float]]) -> list[str]:
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


def _grid(settings: Settings, rate: float) -> list[dict[str, float]]:
  """The trials of a method at one rate."""
  return [
    {
      'alpha': alpha,
      'learning_rate': rate,
      # A cosine has half of its first value on average.
      'phi_decay': float(f'{2 * nats / (alpha * settings.steps):.3g}'),
      'clip_norm': 1.0,
    }
    for alpha, nats in itertools.product(_ALPHAS, settings.nats)
  ]


def main(settings: Settings) -> None:
  """Trains what is not finished, and writes the results so far."""
  root, steps = pathlib.Path(settings.out_dir), settings.steps
  common = [*comparing.COMMON, f'--network={settings.network}']
  common += [f'--steps={steps}', *settings.data()]
  # Of AC/DC this is the length of its phases, of which there are twenty.
  every = {m: steps // (20 if m == 'acdc' else 12) for m in _METHODS}

  def sweep(method, sparsity, seeds, recipes, name):
    flags = [f'--methods={method}', f'--update_every={every[method]}']
    flags += [f'--sparsities={sparsity:g}', f'--seeds={seeds}']
    summary = comparing.train(
      'sparse_sweep', [*common, *flags, *recipe_flags(recipes)], root / name
    )
    return summary['results'] if summary else []

  trials, results = [], []
  chosen: dict[str, dict[float, tuple[float, dict[str, float]]]] = {}
  for method, rate in itertools.product(_METHODS, settings.rates):
    grid = _grid(settings, rate)
    name = f'{method}-trials-{rate:g}'
    for row in sweep(method, settings.sparsities[0], 1, grid, name):
      trials.append(result(row))
      score, alpha = trials[-1]['valid'], trials[-1]['alpha']
      best = chosen.setdefault(method, {})
      if alpha not in best or score > best[alpha][0]:
        best[alpha] = score, row['recipe']
  for sparsity, method in itertools.product(settings.sparsities, chosen):
    recipes = [recipe for _, recipe in chosen[method].values()]
    name = f'{method}-{sparsity:g}'
    rows = sweep(method, sparsity, settings.seeds, recipes, name)
    results += map(result, rows)
    _write(settings, results, trials)


def _write(
  settings: Settings,
  results: list[dict[str, Any]],
  trials: list[dict[str, Any]],
) -> None:
  listed = lambda values: ','.join(map('{:g}'.format, values))
  comparing.write(
    f'sparse_sweep-{settings.network}-powers',
    {
      'commands': [
        f'python -m benchmarks.sparse --network={settings.network}'
        f' --steps={settings.steps} --rates={listed(settings.rates)}'
        f' --nats={listed(settings.nats)}'
        f' --sparsities={listed(settings.sparsities)} --data_dir=DIR'
      ],
      'flags': ' '.join(comparing.COMMON),
      'choice': 'by the validation accuracy of one seed at the first sparsity',
    },
    {'results': results, 'trials': trials},
  )


def result(row: dict[str, Any]) -> dict[str, Any]:
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

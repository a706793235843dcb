"""What the gain of a power that grows is made of.

  python -m benchmarks.ablations --data_dir=DIR

trains LeNet-300-100 on full MNIST for 10,000 steps with the power 1.5, then 2
and 3, with parts of that taken away, and with alpha = 1 under the penalties on
theta that these powers have (p = 2 / alpha = 4/3, 1 and 2/3 in turn). Each has
four trials of the decay with one seed; the best of them, by the mean
validation accuracy at 5.5, 2.1, 1.0 and 0.7 % kept by layer and 1.0 and 0.5 %
globally, is trained again with three seeds. It takes half an hour on one core,
and continues when it is given again. The results go to --out_dir, and together
to experiments/results/ablations.json.
"""

import dataclasses
from importlib import metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

from experiments.support import config

_KEPT = (1.0, 0.0546, 0.0207, 0.01, 0.007, 0.005)
_JUDGED = {'layer': (0.0546, 0.0207, 0.01, 0.007), 'global': (0.01, 0.005)}
_COMMON = (
  '--dataset=mnist',
  '--steps=10000',
  '--batch_size=60',
  '--momentum=0.9',
  '--clip_norm=3',
  '--schedule=cosine',
  '--phi_decay_schedule=cosine',
  '--phi_decay_warmup_steps=3000',
  '--phi_decay_scale=logits=5,linear_1=2',
  '--scope=layer,global',
  f'--kept={",".join(map(str, _KEPT))}',
)
_RATES = (0.16,)
_DECAYS = (7e-4, 1e-3, 1.4e-3, 2e-3)
# A step of the p-norm takes p times the decay away, and L2 on phi twice the
# decay times alpha / 2 on theta: half the decay is the same penalty.
_VARIANTS = {
  '1.5, then 2 and 3': (
    ('--alphas=1.5', '--alpha_steps=2:0.25,3:0.5'),
    _DECAYS,
  ),
  '1, then 2 and 3': (('--alphas=1', '--alpha_steps=2:0.25,3:0.5'), _DECAYS),
  '2, then 3': (('--alphas=2', '--alpha_steps=3:0.5'), _DECAYS),
  '1.5, then 2': (('--alphas=1.5', '--alpha_steps=2:0.25'), _DECAYS),
  '1.5': (('--alphas=1.5',), _DECAYS),
  '1, with p of 4/3, then 1 and 2/3': (
    ('--alphas=1', '--phi_decay_norm=1.333333,1:0.25,0.666667:0.5'),
    tuple(x / 2 for x in _DECAYS),
  ),
}
_RESULTS = pathlib.Path(__file__).parent.parent / 'experiments' / 'results'


@dataclasses.dataclass(frozen=True)
class Settings(config.Settings):
  """Where the data lie, and where the results go."""

  data_dir: str = config.flag('', 'The folder in which the TFDS sets lie.')
  out_dir: str = config.flag('results/ablations', 'The folder of results.')
  seeds: int = config.flag(3, 'The number of runs of each kind.', low=1)


def _train(place: pathlib.Path, flags: list[str]) -> dict | None:
  """The results by scope, or None of a run that diverged."""
  path = place / 'summary.json'
  if not path.exists():
    command = ['-m', 'experiments.mnist_pruning', *flags, f'--out_dir={place}']
    subprocess.run([sys.executable, *command], check=False)
  if not path.exists():
    return None
  found = json.loads(path.read_text())['results']
  return {
    'global' if label.endswith('global') else 'layer': x
    for label, x in found.items()
  }


def _judge(results: dict | None) -> float:
  """The mean validation accuracy in percent at what is judged by."""
  if results is None:
    return 0.0
  return statistics.mean(
    100 * statistics.mean(results[scope]['valid_accuracy'][_KEPT.index(kept)])
    for scope, judged in _JUDGED.items()
    for kept in judged
  )


def main(settings: Settings) -> None:
  """Trains what is not finished, and writes all."""
  root = pathlib.Path(settings.out_dir)
  data = [f'--data_dir={settings.data_dir}'] if settings.data_dir else []
  trials, results = [], []
  for i, (label, (flags, decays)) in enumerate(_VARIANTS.items()):

    def make_flags(rate, decay, seeds, flags=flags):
      return [
        *(*_COMMON, *flags, *data, f'--seeds={seeds}'),
        *(f'--learning_rate={rate:g}', f'--phi_decay={decay:g}'),
      ]

    grid = {}
    for rate, decay in itertools.product(_RATES, decays):
      place = root / f'{i}-{rate:g}-{decay:g}'
      found = _train(place, make_flags(rate, decay, 1))
      grid[rate, decay] = round(_judge(found), 2)
      trials.append([label, rate, decay, grid[rate, decay]])
    rate, decay = max(grid, key=lambda pair: grid[pair])
    found = _train(root / f'{i}-best', make_flags(rate, decay, settings.seeds))
    for scope, x in (found or {}).items():
      results.append(
        {
          'variant': label,
          'rate': rate,
          'decay': decay,
          'scope': scope,
          'seeds': len(x['test_accuracy'][0]),
          'valid': round(_judge(found), 2),
          'mean': [round(y, 6) for y in x['mean']],
          'std': [round(y, 6) for y in x['std']],
        }
      )
  content = {
    'source': {
      'commands': ['python -m benchmarks.ablations --data_dir=DIR'],
      'machine': (
        f'{os.cpu_count()} CPU cores, Python {platform.python_version()}, jax'
        f' {metadata.version("jax")}'
      ),
      'setting': ' '.join(_COMMON),
    },
    'kept': list(_KEPT),
    'trials': trials,
    'results': results,
  }
  path = _RESULTS / 'ablations.json'
  path.write_text(json.dumps(content, indent=1) + '\n')


if __name__ == '__main__':
  config.run(main, Settings)

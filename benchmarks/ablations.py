"""What the gain of a power that grows is made of.

  python -m benchmarks.ablations --data_dir=DIR

trains LeNet-300-100 on full MNIST for 10,000 steps with the power 1.5, then 2
and 3, with parts of that taken away, and with alpha = 1 under the penalties on
theta that these powers have (p = 2 / alpha = 4/3, 1 and 2/3 in turn). Each has
six trials of the decay with one seed; the best of them, by the mean
validation accuracy at 5.5, 2.1, 1.0 and 0.7 % kept by layer and 1.0 and 0.5 %
globally, is trained again with five seeds. It takes half an hour on one core,
and continues when it is given again. The results go to --out_dir, and together
to experiments/results/ablations.json.
"""

import dataclasses
import pathlib
import statistics

from benchmarks import comparing
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
_RATE = 0.16
_DECAYS = (5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3)
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


@dataclasses.dataclass(frozen=True)
class Settings(comparing.Settings):
  """Where the data lie, and where the results go."""

  out_dir: str = config.flag('results/ablations', 'The folder of results.')
  seeds: int = config.flag(5, 'The number of runs of each kind.', low=1)


def _by_scope(summary: dict | None) -> dict | None:
  """The results by 'layer' and 'global'; None of a run that diverged."""
  return summary and {
    'global' if label.endswith('global') else 'layer': x
    for label, x in summary['results'].items()
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

  def train(name, flags, decay, seeds):
    flags = [*_COMMON, *flags, *settings.data(), f'--seeds={seeds}']
    flags += [f'--learning_rate={_RATE:g}', f'--phi_decay={decay:g}']
    return _by_scope(comparing.train('mnist_pruning', flags, root / name))

  trials, results = [], []
  for i, (label, (flags, decays)) in enumerate(_VARIANTS.items()):
    found = {}
    for decay in decays:
      one = train(f'{i}-{_RATE:g}-{decay:g}', flags, decay, 1)
      found[decay] = round(_judge(one), 2)
      trials.append([label, _RATE, decay, found[decay]])
    decay = max(found, key=lambda x: found[x])
    best = train(f'{i}-{decay:g}-best', flags, decay, settings.seeds)
    results += [
      {
        'variant': label,
        'decay': decay,
        'scope': scope,
        'seeds': len(x['test_accuracy'][0]),
        'valid': round(_judge(best), 2),
        'mean': [round(y, 6) for y in x['mean']],
        'std': [round(y, 6) for y in x['std']],
      }
      for scope, x in (best or {}).items()
    ]
    comparing.write(
      'ablations',
      {
        'commands': ['python -m benchmarks.ablations --data_dir=DIR'],
        'setting': ' '.join([*_COMMON, f'--learning_rate={_RATE:g}']),
      },
      {'kept': list(_KEPT), 'trials': trials, 'results': results},
    )


if __name__ == '__main__':
  config.run(main, Settings)

r"""Presets of `continual_learning`: ten and a hundred tasks in one network.

The tasks are those of permuted MNIST; the network is one LeNet-300-100 with a
head for each task. A preset holds the learning rate, the decay and gamma of a
method, which were chosen on validation data (LOG.md). Figures are test
accuracies in percent after the last task: the average over the tasks with its
standard deviation over the seeds, the worst task, and the share of the
weights that are in use. They were measured with jax 0.10.2 on two cores of an
AMD EPYC; all columns are in experiments/results/continual-*.json. EPN and
PackNet forget nothing, to the last bit.

Ten tasks take 3,000 steps of 100 images each and 1,000 more under the mask, or
4,000 in all where nothing is pruned: six to nine minutes per preset of five
seeds on one core.

  python -m experiments.continual_learning --preset=epn-1.5 --data_dir=DIR \
    --out_dir=results/epn-1.5
  python -m experiments.continual_compare \
    --runs=results/epn-1.5,results/packnet

  independent    98.35 +- 0.01, worst 98.27; one network for each task
  finetune       83.07 +- 1.06, worst 65.37; 16.49 are forgotten
  ewc            96.37 +- 0.11, worst 95.58; strength 300, 1.25 are forgotten
  packnet        97.69 +- 0.05, worst 96.46, 100.0 in use
  epn-1          97.45 +- 0.08, worst 95.93, 95.7 in use; L2 decay
  epn-1-l1       97.79 +- 0.03, worst 97.50, 39.2 in use; L1 decay
  epn-1.5        97.72 +- 0.05, worst 97.18, 58.5 in use
  epn-2          97.18 +- 0.01, worst 96.52, 37.2 in use
  epn-3          95.88 +- 0.00, worst 94.89, 73.7 in use; 3 of 5 seeds diverged
  epn-1-l1-omit  98.05 +- 0.02, worst 97.77, 77.5 in use; gamma 0.998
  epn-1.5-omit   97.99 +- 0.03, worst 97.70, 68.4 in use; gamma 0.998

The presets with `omit` leave the weights of earlier tasks in the first layer
out, which Algorithm 1 does not.

A hundred tasks take 2,000 and 1,000 steps each. No task of EPN may be the first
to use more than 0.8 % of the weights (`cap`), nor see the first layer of
earlier ones. They take nine minutes per seed on one core.

  python -m experiments.continual_learning --preset=hundred-epn-2 \
    --data_dir=DIR --out_dir=results/hundred-epn-2

  hundred-packnet  93.76, worst 82.95, 100.0 in use; one seed
  hundred-epn-1    96.99 +- 0.01, worst 96.59, 80.0 in use; alpha = 1, L1 decay
  hundred-epn-2    96.16 +- 0.02, worst 95.59, 80.0 in use

Split and rotated MNIST take the same presets with `--benchmark=split --tasks=5
--infer_tasks=` and `--benchmark=rotated --infer_tasks=`: two to eight minutes
per preset of five seeds on one core.

  split    independent 99.78 +- 0.02, packnet 99.78 +- 0.03,
           epn-1-l1 99.74 +- 0.03 with 2.3 in use,
           epn-1.5 99.73 +- 0.05 with 8.0 in use
  rotated  independent 98.37 +- 0.02, packnet 97.97 +- 0.02,
           epn-1-l1 97.57 +- 0.03 with 13.9 in use,
           epn-1.5 97.87 +- 0.03 with 31.6 in use

The defaults of the binary, five tasks of permuted digits from mnist_5k with
2,000 and 500 steps, have the recipe of epn-1.5: 93.8 on average, 92.8 for the
worst task, 37 in use, nothing forgotten, in 34 seconds.
"""

from typing import Any

# Ten tasks of permuted digits. The rate and the decay of every method were
# chosen on validation data; LOG.md has the trials.
_TEN_TASKS = {
  'dataset': 'mnist',
  'tasks': 10,
  'seeds': 5,
  'steps_per_task': 3_000,
  'retrain_steps': 1_000,
  'evaluate_every': 10,
}


def _baseline(method: str, rate: float, **others: Any) -> dict[str, Any]:
  own = {'method': (method,), 'alpha': (1.0,), 'learning_rate': rate}
  return {**_TEN_TASKS, 'phi_decay': 0.0, **own, **others}


def _epn(
  alpha: float, rate: float, decay: float, **others: Any
) -> dict[str, Any]:
  own = {'method': ('epn',), 'alpha': (alpha,), 'learning_rate': rate}
  own |= {'phi_decay': decay, 'gamma': 0.995, 'infer_tasks': (10,)}
  return {**_TEN_TASKS, **own, **others}


_L1 = {'phi_decay_norm': 'l1'}
_ACCURATE = {'gamma': 0.998, 'omit_first_layer': True}
# A hundred tasks, of which each may take 0.8 % of the weights: at 1 % the last
# ones have too few to choose from.
_HUNDRED = {
  'tasks': 100,
  'seeds': 3,
  'steps_per_task': 2_000,
  'evaluate_every': 25,
  'infer_tasks': (),
}
_CAPPED = {**_HUNDRED, 'cap': 0.008, 'omit_first_layer': True}
PRESETS = {
  'finetune': _baseline('finetune', 0.03),
  'ewc': _baseline('ewc', 0.1, ewc_strength=300.0),
  'independent': _baseline('independent', 0.1),
  'packnet': _baseline('packnet', 0.1, phi_decay=3e-4),
  'epn-1': _epn(1.0, 0.1, 1e-3),
  'epn-1-l1': _epn(1.0, 0.1, 1.2e-4, **_L1),
  'epn-1.5': _epn(1.5, 0.3, 7e-4),
  'epn-2': _epn(2.0, 0.3, 7e-4),
  'epn-3': _epn(3.0, 0.1, 3e-4),
  'epn-1-l1-omit': _epn(1.0, 0.1, 6e-5, **_L1, **_ACCURATE),
  'epn-1.5-omit': _epn(1.5, 0.3, 7e-4, **_ACCURATE),
  'hundred-packnet': _baseline('packnet', 0.1, phi_decay=3e-4, **_HUNDRED),
  'hundred-epn-1': _epn(1.0, 0.1, 1.8e-4, **_L1, **_CAPPED),
  'hundred-epn-2': _epn(2.0, 0.2, 1.05e-3, **_CAPPED),
}

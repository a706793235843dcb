"""What pruning does to a trained network, as plain dicts.

Section 3 of the paper removes the weights of least magnitude after training and
measures three things (Figure 1): the accuracy that is left, how far the
surviving weights are those that were large at initialisation already, and how
weights moved. Each is a function here, of parameters theta (never phi: across
layers of different alpha only |theta| compares), and its results go straight
into a JSON file. `plotting` draws them.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021.
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any

import jax
import numpy as np

from powerprop_jax import leaves
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import pruning

Params = Any  # A pytree of arrays.
Mask = Any  # A pytree of boolean arrays.


@functools.partial(jax.jit, static_argnums=3)
def _overlap(before, after, counts, is_weight):
  return masks.overlap(
    pruning.largest(after, counts, is_weight),
    pruning.largest(before, counts, is_weight),
    leaves.weight_mask(after, is_weight),
  )


def mask_overlap(
  theta_before: Params, theta_after: Params, kept: Sequence[float], **options
) -> dict[str, list[float]]:
  """How far training changes which weights pruning keeps (Figure 1b).

  The overlap is the share of the weights kept by pruning theta_after that
  pruning theta_before to the same density keeps too. The chance level is its
  expectation for two independent random masks with as many weights in each
  layer: sum_l k_l^2 / n_l over sum_l k_l, if k_l of the n_l weights of layer l
  are kept. For the scope 'global' all weights are one layer.

  Args:
    theta_before: the parameters at initialisation.
    theta_after: the parameters after training.
    kept: the fractions of weights to keep, each in (0, 1].
    **options: as of `prune`.

  Returns:
    A dict of lists: 'kept', as given, 'overlap' and 'chance', in [0, 1].

  Raises:
    ValueError: if theta is not finite, a fraction keeps no weight at all, or an
      option is impossible.
  """
  pruning.check_finite((theta_before, theta_after))
  is_weight = options.get('is_weight', leaves.is_weight)
  sizes = [x.size for _, x in leaves.weight_rows(theta_after, is_weight)]
  overlaps, chance = [], []
  for p in kept:
    counts = pruning.kept_counts(theta_after, p, **options)
    numbers = jax.tree.leaves(counts)
    if not any(numbers):
      raise ValueError(f'kept = {p} keeps none of {sum(sizes)} weights.')
    layers = [sum(sizes)] if isinstance(counts, int) else sizes
    overlaps.append(_overlap(theta_before, theta_after, counts, is_weight))
    expected = sum(k * k / n for k, n in zip(numbers, layers))
    chance.append(expected / sum(numbers))
  kept = [float(p) for p in kept]
  return {'kept': kept, 'overlap': pruning.floats(overlaps), 'chance': chance}


def _mean_and_std(values: np.ndarray) -> dict[str, list[float]]:
  """Over the last axis, seeds: sample standard deviation, 0 for one seed."""
  several = values.shape[-1] > 1
  std = values.std(axis=-1, ddof=1) if several else 0 * values[:, 0]
  return {'mean': values.mean(axis=-1).tolist(), 'std': std.tolist()}


def average_overlap(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Averages dicts of `mask_overlap`, one a seed; 'std' is of the overlap."""
  statistics = _mean_and_std(np.array([run['overlap'] for run in runs]).T)
  mean, std = statistics['mean'], statistics['std']
  return {**runs[0], 'overlap': mean, 'std': std}


def kernel_density(values: np.ndarray, points: np.ndarray) -> np.ndarray:
  """A Gaussian kernel density estimate, with Silverman's bandwidth.

  The bandwidth is 0.9 min(std, IQR / 1.34) n^(-1/5). The interquartile range
  matters: for alpha > 1 trained weights have heavy tails, and by the standard
  deviation alone their peak would be smoothed away.

  Args:
    values: n observations, at least two of them different.
    points: where to evaluate the density.

  Returns:
    The density at each of the points.

  References:
    Silverman, Density estimation for statistics and data analysis, 1986,
    section 3.4.
  """
  std = np.std(values, ddof=1)
  low, high = np.quantile(values, [0.25, 0.75])
  # The quartiles coincide if half of the values are equal.
  spread = min(std, (high - low) / 1.34) or std
  bandwidth = 0.9 * spread * len(values) ** -0.2
  # One point at a time, for all pairs at once may not fit in memory.
  sums = [np.exp(-(((x - values) / bandwidth) ** 2) / 2).sum() for x in points]
  return np.array(sums) / (len(values) * bandwidth * math.sqrt(2 * math.pi))


def _density_curve(values: np.ndarray) -> dict[str, list[float]]:
  """A kernel density estimate on a grid that is finer where the values are."""
  if len(np.unique(values)) < 2:
    return {'x': [], 'density': []}
  margin = 0.1 * np.ptp(values)
  even = np.linspace(values.min() - margin, values.max() + margin, 200)
  x = np.union1d(even, np.quantile(values, np.linspace(0, 1, 200)))
  return {'x': x.tolist(), 'density': kernel_density(values, x).tolist()}


def weight_distribution(
  theta_before: Params,
  theta_after: Params,
  density: float,
  *,
  num_samples: int = 10_000,
  seed: int = 0,
  **options: Any,
) -> dict[str, Any]:
  """Weights before and after training, and which survive (Figures 1c, 1d).

  Args:
    theta_before: the parameters at initialisation.
    theta_after: the parameters after training, which are pruned.
    density: the fraction of weights to keep, in (0, 1].
    num_samples: how many weights to choose at random from the network; the same
      for a seed in every network of one architecture.
    seed: seeds the choice.
    **options: as of `prune`.

  Returns:
    A dict of 'density'; of 'initial', 'trained' and 'survives', lists over the
    chosen weights; of 'sign_changes', the shares of 'all' weights of the
    network, of the 'survivors' and of the 'pruned', that changed sign (None of
    no weights); and of 'kde', kernel density estimates of the initial values of
    chosen 'survivors' and 'pruned' weights and of all 'trained' values, dicts
    of lists 'x' and 'density' (empty for less than two different values).

  Raises:
    ValueError: if theta is not finite, or the density, the number of samples or
      an option is impossible.
  """
  if num_samples < 1:
    raise ValueError(f'num_samples must be at least 1, got {num_samples}.')
  pruning.check_finite((theta_before, theta_after))
  is_weight = options.get('is_weight', leaves.is_weight)
  mask = pruning.prune(theta_after, density, **options)
  _, *columns = zip(
    *leaves.weight_rows(theta_after, is_weight, theta_before, mask)
  )
  after, before, survives = (
    np.concatenate([np.ravel(x) for x in jax.device_get(column)])
    for column in columns
  )
  flipped = np.sign(before) * np.sign(after) < 0
  groups = {'all': survives | True, 'survivors': survives, 'pruned': ~survives}
  size = min(num_samples, before.size)
  sample = np.random.default_rng(seed).choice(before.size, size, replace=False)
  before, after = before[sample].astype(float), after[sample].astype(float)
  survives = survives[sample]
  return {
    'density': float(density),
    'initial': before.tolist(),
    'trained': after.tolist(),
    'survives': survives.tolist(),
    'sign_changes': {
      name: float(flipped[group].mean()) if group.any() else None
      for name, group in groups.items()
    },
    'kde': {
      'survivors': _density_curve(before[survives]),
      'pruned': _density_curve(before[~survives]),
      'trained': _density_curve(after),
    },
  }


def summarise(
  kept: Sequence[float],
  test_accuracy: Mapping[str, Any],
  valid_accuracy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The summary of a pruning experiment, with statistics over seeds.

  Args:
    kept: the n fractions of weights that were kept.
    test_accuracy: for each label, such as '3.0' (alpha) or '2.0 chain_rule',
      the accuracies in [0, 1], an array of shape [n, seeds].
    valid_accuracy: the same on validation data.

  Returns:
    {'kept': [...], 'results': {label: {'test_accuracy': [[...], ...], 'mean':
    [...], 'std': [...], 'valid_accuracy': [[...], ...]}}}. 'mean' and 'std' are
    of the test accuracy; 'std' is the sample standard deviation, or 0 for one
    seed.

  Raises:
    ValueError: if an array has another shape.
  """
  results = {}
  for label, values in test_accuracy.items():
    arrays = {'test_accuracy': np.asarray(values, float)}
    if valid_accuracy is not None:
      arrays['valid_accuracy'] = np.asarray(valid_accuracy[label], float)
    for name, x in arrays.items():
      if x.ndim != 2 or len(x) != len(kept):
        raise ValueError(
          f'{name} of {label!r} must be of shape [{len(kept)}, seeds], got'
          f' {list(x.shape)}.'
        )
    results[label] = {name: x.tolist() for name, x in arrays.items()}
    results[label] |= _mean_and_std(arrays['test_accuracy'])
  return {'kept': [float(p) for p in kept], 'results': results}


def accuracy_table(summary: Mapping[str, Any]) -> str:
  """The test accuracies of a summary as text.

  Args:
    summary: a dict of `summarise`.

  Returns:
    A table in percent, with a line for each fraction kept and a column for each
    label: 'mean ± standard deviation', or the accuracy alone for one seed.
  """
  columns = [['kept (%)', *(f'{100 * p:.2f}' for p in summary['kept'])]]
  for label, result in summary['results'].items():
    several = len(result['test_accuracy'][0]) > 1
    cells = [
      f'{100 * mean:.2f}' + (f' ± {100 * std:.2f}' if several else '')
      for mean, std in zip(result['mean'], result['std'])
    ]
    heading = f'alpha = {label}' if label[:1].isdigit() else label
    columns.append([heading, *cells])
  widths = [max(map(len, column)) for column in columns]
  return '\n'.join(
    '  '.join(cell.rjust(width) for cell, width in zip(line, widths))
    for line in zip(*columns)
  )

"""What pruning does to a trained network, as plain dictionaries.

Section 3 of the paper removes the weights of least magnitude after training and
measures three things (Figure 1): the accuracy that is left, how far the
surviving weights are those that were large at initialisation already, and how
the weights moved. `sparse.pruning.make_prune_sweep` measures the first, which
`summarise` collects; `mask_overlap` and `weight_distribution` measure the
others. Parameters are always theta and never phi, because across layers of
different alpha only |theta| can be compared. The results go straight into a
JSON file, and `powerprop_jax.plots` draws them.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  section 3.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import tabulate

from powerprop_jax import extras
from powerprop_jax import leaves
from powerprop_jax import types
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import pruning


@functools.partial(jax.jit, static_argnums=3)
def _overlap(before, after, counts, is_weight):
  return masks.overlap(
    pruning.largest(after, counts, is_weight),
    pruning.largest(before, counts, is_weight),
    leaves.weight_mask(after, is_weight),
  )


def mask_overlap(
  theta_before: types.Params,
  theta_after: types.Params,
  kept: Sequence[float],
  **options: Any,
) -> dict[str, list[float]]:
  """How far training changes which weights pruning keeps (Figure 1b).

  The overlap is the share of the weights that pruning theta_after keeps which
  pruning theta_before to the same density keeps too. The chance level is its
  expectation for two independent random masks with as many weights in each
  layer: sum_l k_l^2 / n_l over sum_l k_l, if k_l of the n_l weights of layer l
  are kept. For the scope 'global' all weights are one layer, and for the scope
  'output' each output unit is.

  >>> import jax.numpy as jnp
  >>> before = {'linear': {'w': jnp.array([4.0, 3.0, 2.0, 1.0])}}
  >>> after = {'linear': {'w': jnp.array([4.0, 1.0, 2.0, 3.0])}}
  >>> mask_overlap(before, after, kept=[0.5])
  {'kept': [0.5], 'overlap': [0.5], 'chance': [0.5]}

  Args:
    theta_before: the parameters at initialisation.
    theta_after: the parameters after training, of the same shapes.
    kept: the fractions of the weights to keep, each in (0, 1].
    **options: `scope`, `density_scale`, `is_weight` and `axes` of
      `pruning.prune`.

  Returns:
    A dict of three lists with an entry for each fraction: 'kept' holds the
    fractions themselves, 'overlap' and 'chance' are in [0, 1].

  Raises:
    ValueError: if theta is not finite, no leaf is a weight, a fraction keeps no
      weight at all, or an option is impossible.
  """
  kept = [masks.check_density(p) for p in kept]
  pruning.check_finite((theta_before, theta_after))
  is_weight = options.get('is_weight', leaves.is_weight)
  sizes = [x.size for _, x in leaves.weight_rows(theta_after, is_weight)]
  overlaps, chance = [], []
  for p in kept:
    counts = pruning.kept_counts(theta_after, p, **options)
    # A layer whose output units or stacked layers are ranked apart has several.
    numbers = [np.asarray(k) for k in jax.tree.leaves(counts)]
    total = sum(int(k.sum()) for k in numbers)
    if not total:
      raise ValueError(
        f'kept = {p} keeps none of {sum(sizes)} weights. Use a larger fraction.'
      )
    layers = [sum(sizes)] if isinstance(counts, int) else sizes
    overlaps.append(_overlap(theta_before, theta_after, counts, is_weight))
    expected = sum(
      float((k * k).sum()) * k.size / n for k, n in zip(numbers, layers)
    )
    chance.append(expected / total)
  return {'kept': kept, 'overlap': pruning.floats(overlaps), 'chance': chance}


def _mean_and_std(values: np.ndarray) -> dict[str, list[float]]:
  """The mean and the sample standard deviation over the last axis, the seeds.

  The deviation of one seed is 0.
  """
  several = values.shape[-1] > 1
  std = values.std(axis=-1, ddof=1) if several else 0 * values[:, 0]
  return {'mean': values.mean(axis=-1).tolist(), 'std': std.tolist()}


def average_overlap(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Averages the overlaps of several seeds.

  >>> first = {'kept': [0.1], 'overlap': [0.2], 'chance': [0.1]}
  >>> second = {'kept': [0.1], 'overlap': [0.4], 'chance': [0.1]}
  >>> average = average_overlap([first, second])
  >>> round(average['overlap'][0], 3), round(average['std'][0], 3)
  (0.3, 0.141)

  Args:
    runs: the dicts returned by `mask_overlap`, one per seed, for the same
      fractions.

  Returns:
    A dict of the same form, in which 'overlap' is the mean over the seeds and
    'std' the sample standard deviation of the overlap, which is 0 for one seed.

  Raises:
    ValueError: if there are no runs, or they have different fractions.
  """
  kept = {tuple(run['kept']) for run in runs}
  if len(kept) != 1:
    raise ValueError(
      'The runs must have the same fractions, and there must be one or more of'
      f' them; got the fractions {sorted(kept)}.'
    )
  statistics = _mean_and_std(np.array([run['overlap'] for run in runs]).T)
  mean, std = statistics['mean'], statistics['std']
  return {**runs[0], 'overlap': mean, 'std': std}


def _density_curve(values: np.ndarray) -> dict[str, list[float]]:
  """A Gaussian kernel density estimate, on a grid that is finer where there
  are many values.

  The bandwidth is Silverman's, 0.9 min(std, IQR / 1.34) n^(-1/5) (Density
  estimation for statistics and data analysis, 1986, section 3.4). The
  interquartile range matters: for alpha > 1 trained weights have heavy tails,
  and the rules of scipy, which use the standard deviation alone, would smooth
  their peak away.
  """
  with extras.needed('plots'):
    from scipy import stats  # It takes a second to import.

  if len(np.unique(values)) < 2:
    return {'x': [], 'density': []}
  std, range_ = np.std(values, ddof=1), stats.iqr(values)
  # The quartiles coincide if half of the values are equal.
  spread = min(std, range_ / 1.34) or std
  # scipy's factor multiplies the standard deviation.
  factor = 0.9 * spread / std * len(values) ** -0.2
  estimate = stats.gaussian_kde(values, bw_method=factor)
  margin = 0.1 * np.ptp(values)
  even = np.linspace(values.min() - margin, values.max() + margin, 200)
  x = np.union1d(even, np.quantile(values, np.linspace(0, 1, 200)))
  return {'x': x.tolist(), 'density': estimate(x).tolist()}


def weight_distribution(
  theta_before: types.Params,
  theta_after: types.Params,
  density: float,
  *,
  num_samples: int = 10_000,
  seed: int = 0,
  **options: Any,
) -> dict[str, Any]:
  """Weights before and after training, and which survive (Figures 1c and 1d).

  >>> import jax.numpy as jnp
  >>> before = {'linear': {'w': jnp.array([1.0, -1.0, 2.0, 3.0])}}
  >>> after = {'linear': {'w': jnp.array([1.0, 1.0, 2.0, -4.0])}}
  >>> found = weight_distribution(before, after, density=0.5)
  >>> found['sign_changes']
  {'all': 0.5, 'survivors': 0.5, 'pruned': 0.5}

  Args:
    theta_before: the parameters at initialisation.
    theta_after: the parameters after training, which are pruned.
    density: the fraction of the weights to keep, in (0, 1].
    num_samples: how many weights are chosen at random from the network. With
      the same seed they are the same in every network of one architecture.
    seed: the seed of that choice.
    **options: the keyword arguments of `pruning.prune`.

  Returns:
    A dict with these entries. 'density' is the density that was asked for.
    'initial', 'trained' and 'survives' are lists over the chosen weights.
    'sign_changes' holds the shares of 'all' weights of the network, of the
    'survivors' and of the 'pruned' that changed their sign, or None where there
    are no such weights. 'kde' holds kernel density estimates of the initial
    values of the chosen 'survivors' and 'pruned' weights, and of all chosen
    'trained' values; each is a dict of the lists 'x' and 'density', which are
    empty where there are fewer than two different values.

  Raises:
    ValueError: if theta is not finite, no leaf is a weight, or the density, the
      number of samples or an option is impossible.
    ModuleNotFoundError: if scipy is not installed.
  """
  if num_samples < 1:
    raise ValueError(f'num_samples must be at least 1, got {num_samples}.')
  density = masks.check_density(density)
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
    'density': density,
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


def sign_changes(
  theta_before: types.Params,
  theta_after: types.Params,
  mask: types.Mask,
  is_weight: types.IsWeight = leaves.is_weight,
) -> float:
  """The share of the surviving weights that have changed their sign.

  A power keeps signs, since zero is a fixed point of its updates (section 2 of
  the paper); a network without a power changes many. The share shows what
  methods of sparse training may lose with a power.

  >>> import jax.numpy as jnp
  >>> before = {'linear': {'w': jnp.array([1.0, -1.0, 2.0, 3.0])}}
  >>> after = {'linear': {'w': jnp.array([1.0, 1.0, -2.0, 0.1])}}
  >>> mask = {'linear': {'w': jnp.array([True, True, False, False])}}
  >>> sign_changes(before, after, mask)
  0.5

  Args:
    theta_before: the parameters at initialisation.
    theta_after: the parameters after training, of the same shapes.
    mask: which weights survive, a pytree of boolean arrays of these shapes, as
      `pruning.prune` returns it, or the forward masks of a method of sparse
      training.
    is_weight: a function of (path, leaf) that tells which leaves are weights;
      the others do not count.

  Returns:
    The share, in [0, 1]. Weights that are zero before or after have not changed
    their sign. The share is 0 if nothing survives.

  Raises:
    ValueError: if no leaf is a weight, or the trees differ in how many leaves
      they have.
  """
  changed = survivors = 0
  rows = leaves.weight_rows(theta_after, is_weight, theta_before, mask)
  for _, after, before, m in rows:
    crossed = np.sign(after) * np.sign(before) < 0
    changed += np.count_nonzero(crossed & np.asarray(m))
    survivors += np.count_nonzero(m)
  return float(changed / max(survivors, 1))


def summarise(
  kept: Sequence[float],
  test_accuracy: Mapping[str, npt.ArrayLike],
  valid_accuracy: Mapping[str, npt.ArrayLike] | None = None,
) -> dict[str, Any]:
  """The summary of a pruning experiment, with statistics over the seeds.

  >>> summary = summarise([1.0, 0.1], {'2.0': [[0.98, 0.97], [0.9, 0.8]]})
  >>> [round(x, 3) for x in summary['results']['2.0']['mean']]
  [0.975, 0.85]

  Args:
    kept: the n fractions of the weights that were kept.
    test_accuracy: for each label, such as '3.0' (the alpha) or '2.0
      chain_rule', the accuracies in [0, 1], an array of shape [n, seeds].
    valid_accuracy: the same on validation data, or None.

  Returns:
    A dict {'kept': [...], 'results': {label: {'test_accuracy': [[...], ...],
    'valid_accuracy': [[...], ...], 'mean': [...], 'std': [...]}}}, without
    'valid_accuracy' if none is given. 'mean' and 'std' are those of the test
    accuracy; 'std' is the sample standard deviation, or 0 for one seed.

  Raises:
    ValueError: if an array has another shape.
  """
  results = {}
  for label, values in test_accuracy.items():
    arrays = {'test_accuracy': np.asarray(values, float)}
    if valid_accuracy is not None:
      arrays['valid_accuracy'] = np.asarray(valid_accuracy[label], float)
    for name, x in arrays.items():
      if x.ndim != 2 or len(x) != len(kept) or not x.shape[1]:
        raise ValueError(
          f'{name} of {label!r} must be of shape [{len(kept)}, seeds], got'
          f' {list(x.shape)}.'
        )
    results[label] = {name: x.tolist() for name, x in arrays.items()}
    results[label] |= _mean_and_std(arrays['test_accuracy'])
  return {'kept': [float(p) for p in kept], 'results': results}


def accuracy_table(summary: Mapping[str, Any]) -> str:
  """The test accuracies of a summary as text.

  >>> summary = summarise([1.0, 0.1], {'2.0': [[0.98, 0.97], [0.9, 0.8]]})
  >>> print(accuracy_table(summary))
    kept (%)    alpha = 2.0
      100.00   97.50 ± 0.71
       10.00   85.00 ± 7.07

  Args:
    summary: the dict returned by `summarise`.

  Returns:
    A table in percent, with a line for each fraction kept and a column for each
    label. A cell is 'mean ± standard deviation', or the accuracy alone for one
    seed.
  """
  columns = {'kept (%)': [f'{100 * p:.2f}' for p in summary['kept']]}
  for label, result in summary['results'].items():
    several = len(result['test_accuracy'][0]) > 1
    heading = f'alpha = {label}' if label[:1].isdigit() else label
    columns[heading] = [
      f'{100 * mean:.2f}' + (f' ± {100 * std:.2f}' if several else '')
      for mean, std in zip(result['mean'], result['std'])
    ]
  return tabulate.tabulate(
    columns,
    headers='keys',
    tablefmt='plain',
    stralign='right',
    disable_numparse=True,
  )

"""Searches for the density to which a network may be pruned.

EfficientPackNet (section 4 of the paper, lines 6 to 11 of Algorithm 1) prunes a
trained network to the lowest density at which its performance is still at least
a target, gamma times that of the dense network. Candidates come from a sorted
grid. The linear scan tries them from the largest down and stops at the first
that misses the target; the binary search halves the grid; and the Taylor
estimate predicts the loss of every candidate from one set of gradients, and
evaluates the one it picks. The magnitudes are sorted once: the mask of a
candidate is then a comparison of positions.

The estimate is the expansion of section 3 of the paper. Pruning moves theta by
-theta where the mask is False, so that the loss rises by

  -sum g theta + 1/2 sum h theta^2

over pruned weights. The gradient g of a trained network nearly vanishes, hence
the second term, in which the Fisher information stands for the diagonal of the
Hessian: h theta^2 = E[(g_x theta)^2], the importance of Molchanov et al.
(2019); the first term is that of their 2017 paper. E is estimated from batches
of b examples: the variance of their mean gradients is b times smaller than that
of gradients of one example, so that the squares are multiplied by b.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  sections 3 and 4.
  Molchanov et al, `Pruning convolutional neural networks for resource efficient
  inference <https://arxiv.org/abs/1611.06440>`_, ICLR 2017.
  Molchanov et al, `Importance estimation for neural network pruning
  <https://arxiv.org/abs/1906.10771>`_, CVPR 2019.
"""

from collections.abc import Callable, Collection, Sequence
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import leaves
from powerprop_jax.sparse import masks
from powerprop_jax.types import ByPath
from powerprop_jax.types import Params

_NEVER = np.iinfo(np.int32).max


class Ranking(NamedTuple):
  """The places of weights when all are sorted by magnitude, largest first.

  Attributes:
    place: the place of each weight among all weights, from 0; arrays of the
      shapes of the leaves, by their paths.
    free_place: likewise, the place among free weights; -1 for a weight that an
      earlier task owns, and beyond every limit for one that may not be chosen.
  """

  place: dict[str, jax.Array]
  free_place: dict[str, jax.Array]


def rank(
  weights: ByPath, owners: ByPath, omit: Collection[str] = ()
) -> Ranking:
  """Sorts weights by magnitude; ties go to the lower index, NaN comes last.

  Args:
    weights: theta of the leaves that are ranked together, by path.
    owners: integers of the same shapes, 0 where a weight is free.
    omit: paths of leaves of which only free weights may be chosen.

  Returns:
    A `Ranking` of int32 arrays of the shapes of the owners.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import search
  >>> weights = {'w': jnp.array([-4.0, 1.0, 3.0])}
  >>> ranking = search.rank(weights, {'w': jnp.array([1, 0, 0])})
  >>> ranking.place['w'], ranking.free_place['w']
  (Array([0, 2, 1], dtype=int32), Array([-1,  1,  0], dtype=int32))
  """
  paths = list(owners)
  scores = jnp.concatenate([jnp.abs(weights[p]).ravel() for p in paths])
  free = jnp.concatenate([(owners[p] == 0).ravel() for p in paths])
  omitted = ~free & jnp.concatenate(
    [jnp.full(owners[p].size, p in omit) for p in paths]
  )
  # NaN, which sorts as the largest, comes after every magnitude.
  scores = jnp.where(jnp.isnan(scores), -1.0, scores)
  scores = jnp.where(omitted, -jnp.inf, scores)
  order = jnp.argsort(scores, descending=True, stable=True)
  places = jnp.arange(scores.size, dtype=jnp.int32)
  place = jnp.zeros_like(places).at[order].set(places)
  sorted_free = jnp.cumsum(free[order].astype(jnp.int32)) - 1
  free_place = jnp.where(free, sorted_free[place], -1)
  free_place = jnp.where(omitted, _NEVER, free_place)
  ends = np.cumsum([owners[p].size for p in paths])[:-1]

  def split(flat):
    parts = jnp.split(flat, ends)
    return {p: x.reshape(owners[p].shape) for p, x in zip(paths, parts)}

  return Ranking(split(place), split(free_place))


def select(
  ranking: Ranking, count: int | jax.Array, max_new: int | jax.Array
) -> ByPath:
  """The mask of the largest weights.

  Args:
    ranking: the result of `rank`.
    count: how many to keep of all weights, traced or not.
    max_new: how many of them may be free ones. The largest free ones are kept,
      and no other weights are kept in place of the rest.

  Returns:
    Boolean arrays by path, of the shapes of the ranking.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import search
  >>> weights = {'w': jnp.array([-4.0, 1.0, 3.0])}
  >>> ranking = search.rank(weights, {'w': jnp.array([1, 0, 0])})
  >>> search.select(ranking, count=2, max_new=3)
  {'w': Array([ True, False,  True], dtype=bool)}
  """
  return {
    path: (place < count) & (ranking.free_place[path] < max_new)
    for path, place in ranking.place.items()
  }


def check_densities(
  densities: Sequence[float], minimum: float = 0.0, maximum: float = 1.0
) -> list[float]:
  """The candidates that lie between two bounds.

  Args:
    densities: fractions of weights to keep, in (0, 1], rising.
    minimum: the least density that a task may have.
    maximum: the largest density that a task may have.

  Returns:
    The densities from minimum to maximum, as a list of floats.

  Raises:
    ValueError: if a density is not in (0, 1], if the densities do not rise, or
      if none of them lies between the bounds.

  >>> from powerprop_jax.continual import search
  >>> search.check_densities([0.1, 0.2, 0.5, 1], minimum=0.2)
  [0.2, 0.5, 1.0]
  """
  found = [masks.check_density(p) for p in densities]
  if any(a >= b for a, b in itertools.pairwise(found)):
    raise ValueError(f'densities must rise from one to the next, got {found}.')
  kept = [p for p in found if minimum <= p <= maximum]
  if not kept:
    raise ValueError(
      f'None of the densities {found} is between {minimum} and {maximum}. Add'
      ' some, or move the bounds.'
    )
  return kept


class Found(NamedTuple):
  """The result of a search, and what it cost.

  Attributes:
    density: the lowest density that is known to meet the target; the largest
      candidate if none did.
    met: whether it meets the target.
    performance: its performance.
    evaluated: (density, performance) of every evaluation, in order.
  """

  density: float
  met: bool
  performance: float
  evaluated: list[tuple[float, float]]


#: Maps a density to the performance.
Evaluate = Callable[[float], float]


def _found(densities, target, evaluated) -> Found:
  """The lowest evaluated density that met the target, else the largest one."""
  known = dict(evaluated)
  chosen = min((p for p in known if known[p] >= target), default=None)
  if chosen is None:
    chosen = densities[-1]
  return Found(chosen, known[chosen] >= target, known[chosen], evaluated)


def linear(
  evaluate: Evaluate, densities: Sequence[float], target: float
) -> Found:
  """Tries densities from the largest down, until one misses the target.

  Args:
    evaluate: maps a density to the performance.
    densities: the candidates, rising, as `check_densities` returns them.
    target: the performance to be met; an equal performance meets it.

  Returns:
    A `Found`.

  >>> from powerprop_jax.continual import search
  >>> performance = {0.1: 0.5, 0.5: 0.8, 1.0: 0.9}
  >>> search.linear(performance.get, [0.1, 0.5, 1.0], target=0.8).density
  0.5
  """
  evaluated = []
  for density in reversed(densities):
    evaluated.append((density, evaluate(density)))
    if evaluated[-1][1] < target:
      break
  return _found(densities, target, evaluated)


def binary(
  evaluate: Evaluate,
  densities: Sequence[float],
  target: float,
  num_steps: int,
) -> Found:
  """Searches the densities by halving them a fixed number of times.

  It finds what `linear` finds if performance falls with density and 2^num_steps
  is at least the number of candidates; with fewer steps it may find a larger
  density. The largest density is evaluated last, if no other one met the
  target.

  Args:
    evaluate: maps a density to the performance.
    densities: the candidates, rising, as `check_densities` returns them.
    target: the performance to be met.
    num_steps: how many times to halve, with one evaluation each; the
      evaluation of the largest density may come on top.

  Returns:
    A `Found`.

  >>> from powerprop_jax.continual import search
  >>> performance = {0.1: 0.5, 0.5: 0.8, 0.7: 0.9, 1.0: 0.9}
  >>> search.binary(performance.get, [0.1, 0.5, 0.7, 1.0], 0.8, 2).evaluated
  [(0.5, 0.8), (0.1, 0.5)]
  """
  evaluated = []
  # All below `low` miss; `high` meets, or is the largest and not yet known.
  low, high = 0, len(densities) - 1
  for _ in range(num_steps):
    if low == high:
      break
    middle = (low + high) // 2
    evaluated.append((densities[middle], evaluate(densities[middle])))
    if evaluated[-1][1] >= target:
      high = middle
    else:
      low = middle + 1
  if high == len(densities) - 1:
    evaluated.append((densities[-1], evaluate(densities[-1])))
  return _found(densities, target, evaluated)


def taylor(
  evaluate: Evaluate,
  densities: Sequence[float],
  target: float,
  predicted: Sequence[float],
  tolerance: float,
) -> Found:
  """The lowest density whose predicted rise of the loss is tolerable.

  One evaluation confirms it. If it misses the target, the densities above it
  are tried one after another: a wrong prediction costs time, but no accuracy.

  Args:
    evaluate: maps a density to the performance.
    densities: the candidates, rising, as `check_densities` returns them.
    target: the performance to be met.
    predicted: the rise of the loss at every density but the last, as
      `predicted_rise` returns it; a rise at the last density is ignored.
    tolerance: the largest rise to accept, such as `loss_tolerance` returns.

  Returns:
    A `Found`.

  >>> from powerprop_jax.continual import search
  >>> performance = {0.1: 0.5, 0.5: 0.8, 1.0: 0.9}
  >>> rises = [3.0, 0.1, 0.0]
  >>> search.taylor(performance.get, [0.1, 0.5, 1.0], 0.8, rises, 0.2).evaluated
  [(0.5, 0.8)]
  """
  last = len(densities) - 1
  # Go down from the top: below the first intolerable rise none is trusted.
  start = last
  while start and predicted[start - 1] <= tolerance:
    start -= 1
  evaluated = []
  for density in densities[start:]:
    evaluated.append((density, evaluate(density)))
    if evaluated[-1][1] >= target:
      break
  return _found(densities, target, evaluated)


def loss_tolerance(gamma: float) -> float:
  """The rise of the cross-entropy at which gamma of the performance is left.

  exp(-loss) is the geometric mean of the probabilities of the right classes; it
  falls to gamma times itself when the loss rises by -log(gamma).

  Args:
    gamma: the share of the performance that is to be left, in [0, 1].

  Returns:
    A float, infinite for gamma = 0.

  >>> from powerprop_jax.continual import search
  >>> search.loss_tolerance(0.5)
  0.6931471805599453
  """
  return -math.log(gamma) if gamma else math.inf


def make_saliency(
  loss: Callable[..., jax.Array],
) -> Callable[[Params, Any, Any], Any]:
  """Makes a function for the rise of the loss when each weight is pruned.

  The rise is estimated to second order (see the top of this module).

  Args:
    loss: maps (theta, args, batch) to the mean loss of a batch, a tuple of
      arrays with one row per example.

  Returns:
    A pure function of (theta, args, batches) that returns a tree of the
    structure and the shapes of theta, in single precision or better. The arrays
    in batches have the shape [number of batches, examples per batch, ...], and
    args are handed to `loss`.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import search
  >>> loss = lambda theta, args, batch: jnp.mean(batch[0]) * theta['w'].sum()
  >>> saliency = search.make_saliency(loss)
  >>> saliency({'w': jnp.array([1.0, 2.0])}, None, (jnp.ones((3, 4)),))
  {'w': Array([1., 6.], dtype=float32)}
  """

  def saliency(theta, args, batches):
    def product(zero, x, y):
      return x.astype(zero.dtype) * y.astype(zero.dtype)

    def add(totals, batch):
      grads = jax.grad(loss)(theta, args, batch)
      moved = jax.tree.map(product, totals[0], grads, theta)
      squares = jax.tree.map(jnp.square, moved)
      return jax.tree.map(jnp.add, totals, (moved, squares)), None

    zeros = leaves.zeros_for_sum((theta, theta))
    totals, _ = jax.lax.scan(add, zeros, batches)
    n, size = jax.tree.leaves(batches)[0].shape[:2]
    return jax.tree.map(lambda a, b: (size * b / 2 - a) / n, *totals)

  return saliency


def predicted_rise(
  saliency: ByPath,
  ranking: Ranking,
  counts: jax.Array,
  max_new: int | jax.Array,
) -> jax.Array:
  """The rise of the loss at every candidate, without evaluating any.

  Args:
    saliency: the result of a function made by `make_saliency`, by path.
    ranking: the result of `rank`.
    counts: how many weights each candidate keeps, integers [n].
    max_new: as in `select`.

  Returns:
    The rise at each candidate, floats [n].

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import search
  >>> weights = {'w': jnp.array([-4.0, 1.0, 3.0])}
  >>> ranking = search.rank(weights, {'w': jnp.zeros(3, int)})
  >>> saliency = {'w': jnp.array([5.0, 0.5, 2.0])}
  >>> search.predicted_rise(saliency, ranking, jnp.array([1, 2, 3]), 3)
  Array([2.5, 0.5, 0. ], dtype=float32)
  """

  def rise(count):
    mask = select(ranking, count, max_new)
    pruned = [jnp.where(m, 0, saliency[p]) for p, m in mask.items()]
    return sum(jnp.sum(x) for x in pruned)

  return jax.lax.map(rise, counts)

"""How the methods of continual learning choose the mask of a task."""

from collections.abc import Callable, Collection
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import continual
from powerprop_jax import power
from powerprop_jax.continual import layouts
from powerprop_jax.continual import search
from powerprop_jax.data import in_memory
from powerprop_jax.sparse import masks

SEARCHES = ('linear', 'binary', 'taylor')
_TAYLOR_BATCH = 20  # Examples of a gradient of the Taylor estimate.

# (memory, index, valid split) -> (mask by path, a record of the choice).
Choose = Callable[
  [continual.Memory, int, in_memory.Split],
  tuple[layouts.ByPath, dict[str, Any]],
]


def _make_search(settings, candidates):
  """A search of the flags: (evaluate, target, predict) -> `search.Found`."""

  def find(evaluate, target, predict):
    if settings['search'] == 'binary':
      steps = settings['search_steps']
      return search.binary(evaluate, candidates, target, steps)
    if settings['search'] == 'linear':
      return search.linear(evaluate, candidates, target)
    tolerance = search.loss_tolerance(settings['gamma'])
    return search.taylor(evaluate, candidates, target, predict(), tolerance)

  return find


class _Compiled(NamedTuple):
  """The work of a choice, compiled once for all tasks.

  Attributes:
    rank: (phi, owners) -> (theta, ranking): the one sort.
    accuracy: (theta, model_state, ranking, count, max_new, split) -> that of
      the network with so many weights.
    predict: (theta, model_state, ranking, counts, max_new, split) -> the rise
      of the loss at each count but the last, which is that of all weights.
    select: as of `search`.
  """

  rank: Callable[..., tuple[Any, Any]]
  accuracy: Callable[..., jax.Array]
  predict: Callable[..., jax.Array]
  select: Callable[..., layouts.ByPath]


def _compile(
  accuracy: Callable[..., jax.Array],
  mean_loss: Callable[..., jax.Array],
  transform: power.PowerTransform,
  omit: Collection[str],
) -> _Compiled:
  """The arguments are those of `make_epn`."""

  def pruned(theta, mask):
    return layouts.put(
      theta, masks.apply_mask(layouts.by_path(theta, mask), mask)
    )

  def rank(phi, owners):
    theta = transform.to_theta(phi)
    weights = layouts.by_path(theta, owners)
    return theta, search.rank(weights, owners, omit)

  def evaluate(theta, model_state, ranking, count, max_new, split):
    mask = search.select(ranking, count, max_new)
    return accuracy(pruned(theta, mask), model_state, *split)

  def predict(theta, model_state, ranking, counts, max_new, split):
    size = counts[-1]
    dense = pruned(theta, search.select(ranking, size, size))
    saliency = search.make_saliency(mean_loss)
    n = max(len(split[1]) // _TAYLOR_BATCH, 1)
    batches = jax.tree.map(
      lambda x: x[: n * _TAYLOR_BATCH].reshape(n, -1, *x.shape[1:]), split
    )
    found = layouts.by_path(
      saliency(dense, model_state, batches), ranking.place
    )
    return search.predicted_rise(found, ranking, counts[:-1], max_new)

  return _Compiled(*map(jax.jit, (rank, evaluate, predict, search.select)))


def make_epn(
  settings: dict[str, Any],
  accuracy: Callable[..., jax.Array],
  mean_loss: Callable[..., jax.Array],
  transform: power.PowerTransform,
  omit: Collection[str],
) -> Choose:
  """Lines 5 to 11 of Algorithm 1, with one sort and compiled evaluations.

  Args:
    settings: the flags.
    accuracy: of (theta, model_state, images, labels).
    mean_loss: of (theta, model_state, (images, labels)).
    transform: between phi and theta.
    omit: paths of which earlier tasks' weights are left out.

  Returns:
    A `Choose`.

  Raises:
    ValueError: if the densities are impossible.
  """
  candidates = search.check_densities(
    [float(p) for p in settings['densities']],
    settings['min_density'],
    settings['max_density'],
  )
  find = _make_search(settings, candidates)
  compiled = _compile(accuracy, mean_loss, transform, omit)

  def choose(memory, index, split):
    del index
    size = sum(owner.size for owner in memory.owners.values())
    max_new = size
    if settings['cap'] is not None:
      max_new = masks.floor_multiply(settings['cap'], size)
    theta, ranking = compiled.rank(memory.phi, memory.owners)
    network = (theta, memory.model_state, ranking)

    def performance(count, limit):
      return float(compiled.accuracy(*network, count, limit, split))

    def predictions():
      counts = [masks.num_kept(p, size) for p in candidates]
      counts = jnp.asarray([*counts, size], jnp.int32)
      rise = compiled.predict(*network, counts, max_new, split)
      return np.asarray(rise).tolist()

    dense = performance(size, size)
    begin = time.time()
    found = find(
      lambda p: performance(masks.num_kept(p, size), max_new),
      settings['gamma'] * dense,
      predictions,
    )
    seconds = time.time() - begin
    count = masks.num_kept(found.density, size)
    mask = compiled.select(ranking, count, max_new)
    record = {
      'dense_valid_accuracy': dense,
      'pruned_valid_accuracy': found.performance,
      'target_met': found.met,
      'searched_density': found.density,
      'evaluated': [list(pair) for pair in found.evaluated],
      'evaluations': len(found.evaluated),
      'search_seconds': seconds,
    }
    return mask, record

  return choose


def make_packnet(
  settings: dict[str, Any], transform: power.PowerTransform
) -> Choose:
  """PackNet's mask, which asks for no validation data."""

  @jax.jit
  def mask(memory, counts):
    theta = transform.to_theta(memory.phi)
    return continual.packnet_mask(theta, memory.owners, counts)

  def choose(memory, index, split):
    del split
    sizes = {path: owner.size for path, owner in memory.owners.items()}
    counts = continual.packnet_counts(sizes, index, settings['tasks'])
    return mask(memory, jax.tree.map(jnp.int32, counts)), {}

  return choose

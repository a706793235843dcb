"""The sparse training methods, from flags to functions."""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import common
from powerprop_jax import training
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import flops
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters

METHODS = ('dense', 'static', 'snip', 'set', 'rigl', 'top_kast', 'magnitude')
_NEVER_UPDATED = ('dense', 'static', 'snip')


class Cadence(NamedTuple):
  """When masks are updated: at range(start, last + 1, every)."""

  every: int
  start: int
  last: int


class Densities(NamedTuple):
  """How dense the layers of a run are, each as `flops` takes it.

  Attributes:
    forward: of the weights in use, at the end.
    backward: of those that are updated, at the end.
    ever: of those that were ever in use. Gradual pruning begins with them.
  """

  forward: Any
  backward: Any
  ever: Any


class Method(NamedTuple):
  """A method with its settings.

  Attributes:
    updater: chooses the masks.
    due: whether masks are updated before a step.
    penalty: of the train step.
    counts: how many weights each leaf keeps in the end, a pytree of ints.
    training_flops: maps the dense layers' operations at inference, and the
      `Densities` of a run, to the operations of a training step on one example,
      on average over the run. Without the latter it takes those that the flags
      ask for: a network that was sparse before, and a global ranking, have
      others.
  """

  updater: updaters.MaskUpdater
  due: Callable[[Any], Any]
  penalty: training.Penalty | None
  counts: Any
  training_flops: Callable[..., float]


def parse_distribution(
  name: str, sparsity: float, dense_layers: Sequence[str] = ()
) -> distributions.Distribution:
  """The distribution of a flag: uniform, erk, er, or pattern=sparsity,..."""
  if name == 'uniform':
    return distributions.uniform(sparsity, dense_layers)
  if name in ('erk', 'er'):
    return distributions.erdos_renyi(sparsity, name == 'erk', dense_layers)
  if '=' not in name:
    raise ValueError(
      '--distribution must be uniform, erk, er or pattern=sparsity,..., got'
      f' {name!r}.'
    )
  return distributions.custom(
    common.parse_factors(name.split(','), 'distribution'), default=sparsity
  )


def make_cadence(
  method: str, steps: int, every: int, start: int | None, stop: int | None
) -> Cadence:
  """The cadence of the flags, with the method's defaults.

  Raises:
    ValueError: if there is no update within the run.
  """
  start = every if start is None else start
  if stop is None:
    # Top-KAST goes on; the others let the last masks settle.
    stop = steps if method == 'top_kast' else 3 * steps // 4
  if method not in _NEVER_UPDATED and not 0 <= start < stop <= steps:
    raise ValueError(
      f'masks can not be updated from step {start} to step {stop} of {steps}.'
      ' Change --update_start, --update_stop or --update_every.'
    )
  return Cadence(every, start, start + max(0, stop - start) // every * every)


def _progress(cadence: Cadence) -> Callable[[Any], Any]:
  """Gradual pruning: cubic, and done at the last update."""
  if cadence.last == cadence.start:
    return lambda step: jnp.ones([])
  # The first update prunes something already.
  return schedules.cubic(cadence.start - cadence.every, cadence.last)


def _forward_and_backward(
  method: str,
  sparsity: float,
  backward_sparsity: float | None,
  distribution: str,
  dense_layers: Sequence[str],
) -> tuple[distributions.Distribution, distributions.Distribution]:
  """The distributions of the weights in use and of those that are updated."""
  if method == 'dense':
    whole = lambda theta: jax.tree.map(lambda x: x.size, theta)
    return whole, whole
  forward = parse_distribution(distribution, sparsity, dense_layers)
  if method != 'top_kast':
    return forward, forward
  if backward_sparsity is None:
    backward_sparsity = max(0.0, sparsity - 0.1)
  if backward_sparsity > sparsity:
    raise ValueError(
      f'--backward_sparsity={backward_sparsity} must not be above'
      f' --sparsity={sparsity}: Top-KAST updates at least what it uses.'
    )
  backward = parse_distribution(distribution, backward_sparsity, dense_layers)
  return forward, backward


def _make_updater(
  method: str,
  cadence: Cadence,
  forward: distributions.Distribution,
  backward: distributions.Distribution,
  *,
  fresh: Callable[[jax.Array], Any],
  scope: str,
  drop_fraction: float,
  drop_schedule: str,
  regrow: str,
  regrow_dropped: bool,
) -> updaters.MaskUpdater:
  drop = schedules.drop_fraction(drop_fraction, cadence.last + 1, drop_schedule)
  values = {
    'init': fresh,
    'keep': None,
    'zero': lambda key: jax.tree.map(jnp.zeros_like, fresh(key)),
  }[regrow]
  return {
    'dense': updaters.dense,
    'static': lambda: updaters.random(forward),
    'snip': lambda: updaters.snip(forward, scope),
    'set': lambda: updaters.set_(forward, drop, values, regrow_dropped),
    'rigl': lambda: updaters.rigl(forward, drop, values, regrow_dropped),
    'top_kast': lambda: updaters.top_kast(forward, backward),
    'magnitude': lambda: updaters.magnitude(forward, _progress(cadence), scope),
  }[method]()


def _gradual_flops(
  cadence: Cadence,
  steps: int,
  dense: dict[str, float],
  first: dict[str, float],
  last: dict[str, float],
) -> float:
  """Operations at inference, on average over a run of gradual pruning.

  Args:
    cadence: when weights are pruned.
    steps: length of the run.
    dense: operations of each layer with all weights.
    first: with those that it begins with.
    last: with those that are left.

  Returns:
    Operations of all layers.
  """
  updates = range(cadence.start, cadence.last + 1, cadence.every)
  progress = [0.0, *(float(_progress(cadence)(t)) for t in updates)]
  # The steps before the first update, between updates, and after the last.
  spans = [cadence.every] * (len(updates) - 1)
  spans = [cadence.start, *spans, steps - cadence.last]

  def cost(p):
    # A layer that begins sparser than asked for is pruned later.
    asked = {k: n + p * (last[k] - n) for k, n in dense.items()}
    return math.fsum(min(first[k], n) for k, n in asked.items())

  return math.fsum(n / steps * cost(p) for n, p in zip(spans, progress))


def _planned(theta: Any, counts: Any, backward_counts: Any) -> Densities:
  """The densities that the flags ask for."""

  def densities(counts):
    sparsities = distributions.sparsities(theta, counts)
    return jax.tree.map(lambda s: 1.0 - s, sparsities)

  return Densities(
    forward=densities(counts),
    backward=densities(backward_counts),
    ever=jax.tree.map(lambda x: 1.0, theta),
  )


def _make_training_flops(
  method: str, cadence: Cadence, steps: int, planned: Densities
) -> Callable[..., float]:
  def training_flops(layers, densities=planned):
    forward, backward, ever = (
      flops.inference_flops(layers, d) for d in densities
    )
    dense, sparse, wide = (
      math.fsum(x.values()) for x in (layers, forward, backward)
    )
    if method == 'rigl':
      return flops.rigl_training_flops(dense, sparse, cadence.every)
    if method == 'top_kast':
      return flops.top_kast_training_flops(sparse, wide)
    if method == 'magnitude':
      sparse = _gradual_flops(cadence, steps, layers, ever, forward)
    return flops.training_flops(sparse)

  return training_flops


def make_method(
  method: str,
  theta: Any,
  *,
  alpha: float,
  steps: int,
  sparsity: float,
  backward_sparsity: float | None,
  distribution: str,
  dense_layers: Sequence[str],
  update_every: int,
  update_start: int | None,
  update_stop: int | None,
  regrow: str,
  exploration_penalty: float,
  **options: Any,
) -> Method:
  """Builds a method.

  Args:
    method: one of METHODS.
    theta: the weights, or their shapes and dtypes.
    alpha: the power.
    steps: length of the run.
    **others: the flags of the same names, which count where the method uses
      them; `fresh` draws weights theta as at initialisation, of a key.

  Returns:
    A `Method`.

  Raises:
    ValueError: if the settings are impossible.
  """
  if method in ('set', 'rigl') and regrow == 'zero' and alpha != 1.0:
    raise ValueError(
      f'--regrow=zero with alpha = {alpha:g}: a weight at zero never moves for'
      ' alpha > 1 (section 2 of the paper). Use init or keep.'
    )
  cadence = make_cadence(method, steps, update_every, update_start, update_stop)
  forward, backward = _forward_and_backward(
    method, sparsity, backward_sparsity, distribution, dense_layers
  )
  counts = forward(theta)  # What is impossible fails here.
  planned = _planned(theta, counts, backward(theta))
  due = schedules.every(cadence.every, cadence.start, cadence.last + 1)
  penalty = functools.partial(
    updaters.exploration_penalty, strength=exploration_penalty
  )
  return Method(
    updater=_make_updater(
      method, cadence, forward, backward, regrow=regrow, **options
    ),
    due=(lambda step: False) if method in _NEVER_UPDATED else due,
    penalty=penalty if method == 'top_kast' else None,
    counts=counts,
    training_flops=_make_training_flops(method, cadence, steps, planned),
  )

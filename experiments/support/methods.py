"""Builds the functions of the sparse training methods from settings."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.support import config
from experiments.support import settings as settings_lib
from powerprop_jax import training
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import flops
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters

METHODS = (
  'dense',
  'static',
  'snip',
  'set',
  'rigl',
  'top_kast',
  'magnitude',
  'acdc',
)
_NEVER_UPDATED = ('dense', 'static', 'snip')


class Densities(NamedTuple):
  """The densities of the layers of a run, each as `flops` takes them.

  Attributes:
    forward: those of the weights in use at the end.
    backward: those of the weights that are updated at the end.
    ever: those of the weights that were ever in use, with which gradual pruning
      begins.
  """

  forward: Any
  backward: Any
  ever: Any


class Plan(NamedTuple):
  """What a method does in a run.

  Attributes:
    updater: chooses the masks.
    due: whether masks are updated before a step.
    penalty: the penalty of the train step, or None.
    counts: how many weights each leaf keeps at the end, a pytree of ints.
    training_flops: maps the operations of each dense layer at inference, and
      the `Densities` of a run, to the operations of a training step on one
      example, on average over the run. Without `Densities` it takes those that
      the flags ask for, which are not those of a run that began with a sparse
      network or that ranks all weights together.
  """

  updater: updaters.MaskUpdater
  due: Callable[[int], bool]
  penalty: training.Penalty | None
  counts: Any
  training_flops: Callable[..., float]


@dataclasses.dataclass(frozen=True)
class Method(config.Settings):
  """The sparse training method."""

  method: str = config.flag(
    'rigl',
    'The sparse training method, which decides how masks are chosen.',
    choices=METHODS,
  )
  sparsity: float = config.flag(
    0.9,
    'The sparsity: the fraction of the weights to remove.',
    low=0.0,
    high=1.0,
  )
  backward_sparsity: float | None = config.flag(
    None,
    'Top-KAST: the sparsity of the set of weights that is updated. The default'
    ' is --sparsity less 0.1.',
    low=0.0,
    high=1.0,
  )
  distribution: str = config.flag(
    'erk',
    'How the sparsity is shared out among layers: uniform, erk'
    ' (Erdos-Renyi-kernel), er (Erdos-Renyi), or pattern=sparsity,... for'
    ' layers by regular expression.',
  )
  dense_layers: tuple[str, ...] = config.flag(
    (),
    'Regular expressions of the paths of layers that are to stay dense. With'
    ' sparsities by pattern, give such layers the sparsity 0 there.',
    check=config.check_pattern,
  )
  scope: str = config.flag(
    'layer',
    'Whether magnitude pruning, AC/DC and SNIP rank the weights of each layer,'
    ' or all weights together.',
    choices=('layer', 'global'),
  )
  update_every: int = config.flag(
    100,
    'The number of steps from one update of the masks to the next, and of each'
    ' phase of AC/DC.',
    low=1,
    high=settings_lib.MAX_STEPS,
  )
  update_start: int | None = config.flag(
    None,
    'The step of the first update of the masks. The default is --update_every.',
    low=0,
    high=settings_lib.MAX_STEPS,
  )
  update_stop: int | None = config.flag(
    None,
    'The step after which masks are not updated any more. The default is three'
    ' quarters of the steps, and all of them for Top-KAST.',
    low=0,
    high=settings_lib.MAX_STEPS,
  )
  drop_fraction: float = config.flag(
    0.3,
    'SET and RigL: the fraction of the weights in use that the first update'
    ' replaces by others.',
    low=0.0,
    high=1.0,
  )
  drop_schedule: str = config.flag(
    'cosine',
    'SET and RigL: how --drop_fraction falls until the last update.',
    choices=('cosine', 'constant'),
  )
  regrow: str | None = config.flag(
    None,
    'SET, RigL and AC/DC: the values of weights that come into use. init draws'
    ' them as at initialisation, keep leaves them as they were, and zero needs'
    ' alpha = 1 or --floor. The default is init, but keep for AC/DC.',
    choices=('init', 'keep', 'zero'),
  )
  regrow_dropped: bool = config.flag(
    True,
    'SET and RigL: whether a weight may come back in the update that drops it,'
    ' as in the published methods.',
  )
  exploration_penalty: float = config.flag(
    1e-4,
    'Top-KAST: the strength of the penalty that lets weights die out that are'
    ' updated but not in use.',
    low=0.0,
  )


def make_distribution(
  settings: Method, sparsity: float
) -> distributions.Distribution:
  """The distribution of a sparsity over layers.

  Args:
    settings: the method, of which the distribution and the dense layers count.
    sparsity: the fraction of the weights to remove.

  Returns:
    A function from weights to the counts of those that each layer keeps.

  Raises:
    ValueError: if there is no such distribution.
  """
  name, dense = settings.distribution, settings.dense_layers
  if name == 'uniform':
    return distributions.uniform(sparsity, dense)
  if name in ('erk', 'er'):
    return distributions.erdos_renyi(sparsity, name == 'erk', dense)
  if '=' not in name:
    raise ValueError(
      '--distribution must be uniform, erk, er or pattern=sparsity,..., got'
      f' {name!r}.'
    )
  if dense:
    raise ValueError(
      f'--dense_layers={",".join(dense)} has no effect with'
      f' --distribution={name}. Add {dense[0]}=0 to the distribution instead.'
    )
  try:
    sparsities = config.factors(name.split(','))
  except ValueError as e:
    raise ValueError(f'--distribution={name}: {e}.') from e
  return distributions.custom(sparsities, default=sparsity)


def _update_steps(settings: Method, steps: int) -> range:
  """The steps of a run at which masks are updated, by method and flags."""
  every, stop = settings.update_every, settings.update_stop
  start = every if settings.update_start is None else settings.update_start
  if stop is None:
    # Top-KAST goes on; the others let the last masks settle.
    stop = steps if settings.method == 'top_kast' else 3 * steps // 4
  if settings.method not in _NEVER_UPDATED and not 0 <= start < stop <= steps:
    raise ValueError(
      f'masks cannot be updated from step {start} to step {stop} of {steps}.'
      ' Change --update_start, --update_stop or --update_every.'
    )
  # Also methods that never update have schedules, which need one step.
  return range(start, max(start, stop) + 1, every)


def _progress(updates: range) -> Callable[[Any], Any]:
  """The schedule of gradual pruning: cubic, with its end at the last update."""
  if len(updates) == 1:
    return lambda step: jnp.ones([])
  # The first update prunes something already.
  return schedules.cubic(updates.start - updates.step, updates[-1])


def _phases(updates: range) -> list[int]:
  """The steps at which phases of AC/DC begin; the first and last are sparse."""
  return list(updates if len(updates) % 2 else updates[:-1])


def _forward_and_backward(
  settings: Method,
) -> tuple[distributions.Distribution, distributions.Distribution]:
  """The distributions of the weights in use and of those that are updated."""
  if settings.method == 'dense':
    whole = lambda theta: jax.tree.map(lambda x: x.size, theta)
    return whole, whole
  sparsity, backward = settings.sparsity, settings.backward_sparsity
  forward = make_distribution(settings, sparsity)
  if settings.method != 'top_kast':
    return forward, forward
  if backward is None:
    backward = max(0.0, sparsity - 0.1)
  if backward > sparsity:
    raise ValueError(
      f'--backward_sparsity={backward} must not be above --sparsity={sparsity}:'
      ' Top-KAST updates at least what it uses.'
    )
  return forward, make_distribution(settings, backward)


def _make_updater(
  settings: Method,
  updates: range,
  forward: distributions.Distribution,
  backward: distributions.Distribution,
  fresh: Callable[[jax.Array], Any],
) -> updaters.MaskUpdater:
  """The updater of a method; `fresh` draws weights as at initialisation."""
  scope, dropped = settings.scope, settings.regrow_dropped
  # The cosine ends one update later, so that the last one still trades weights.
  drop = schedules.drop_fraction(
    settings.drop_fraction, updates[-1] + updates.step, settings.drop_schedule
  )
  values = {
    'init': fresh,
    'keep': None,
    'zero': lambda key: jax.tree.map(jnp.zeros_like, fresh(key)),
  }[settings.regrow or ('keep' if settings.method == 'acdc' else 'init')]
  return {
    'dense': updaters.dense,
    'static': lambda: updaters.random(forward),
    'snip': lambda: updaters.snip(forward, scope),
    'set': lambda: updaters.set_(forward, drop, values, dropped),
    'rigl': lambda: updaters.rigl(forward, drop, values, dropped),
    'top_kast': lambda: updaters.top_kast(forward, backward),
    'magnitude': lambda: updaters.magnitude(forward, _progress(updates), scope),
    'acdc': lambda: updaters.acdc(
      forward, schedules.alternating(_phases(updates)), values, scope
    ),
  }[settings.method]()


def _gradual_flops(
  updates: range,
  steps: int,
  dense: dict[str, float],
  first: dict[str, float],
  last: dict[str, float],
) -> float:
  """Operations at inference, on average over a run of gradual pruning.

  Args:
    updates: when weights are pruned.
    steps: the number of steps of the run.
    dense: the operations of each layer with all weights.
    first: the same with the weights that it begins with.
    last: the same with the weights that are left at the end.

  Returns:
    The operations of all layers together.
  """
  progress = [0.0, *(float(_progress(updates)(t)) for t in updates)]
  # The steps before the first update, between updates, and after the last.
  spans = [updates.step] * (len(updates) - 1)
  spans = [updates.start, *spans, steps - updates[-1]]

  def cost(p):
    # A layer that begins sparser than asked for is not pruned until later.
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
  method: str, updates: range, steps: int, planned: Densities
) -> Callable[..., float]:
  def training_flops(layers, densities=planned):
    forward, backward, ever = (
      flops.inference_flops(layers, d) for d in densities
    )
    dense, sparse, wide = (
      math.fsum(x.values()) for x in (layers, forward, backward)
    )
    if method == 'rigl':
      return flops.rigl_training_flops(dense, sparse, updates.step)
    if method == 'top_kast':
      return flops.top_kast_training_flops(sparse, wide)
    if method == 'acdc':
      starts = _phases(updates)
      ends = [*starts[1:], steps]
      share = (sum(ends[::2]) - sum(starts[::2])) / steps
      sparse = share * sparse + (1 - share) * dense
    if method == 'magnitude':
      sparse = _gradual_flops(updates, steps, layers, ever, forward)
    return flops.training_flops(sparse)

  return training_flops


def make_plan(
  settings: Method,
  theta: Any,
  *,
  moves_zeros: bool,
  steps: int,
  fresh: Callable[[jax.Array], Any],
) -> Plan:
  """Builds the plan of a method for a run.

  Args:
    settings: the method; settings that it does not use have no effect.
    theta: the weights, or their shapes and dtypes.
    moves_zeros: whether training moves a weight at zero, as it does without a
      power or with a floor.
    steps: the number of steps of the run.
    fresh: draws weights theta as at initialisation, from a key.

  Returns:
    A `Plan`.

  Raises:
    ValueError: if the settings are impossible.
  """
  method = settings.method
  grows = method in ('set', 'rigl', 'acdc')
  if grows and settings.regrow == 'zero' and not moves_zeros:
    raise ValueError(
      '--regrow=zero: a weight at zero never moves for alpha > 1 (section 2 of'
      ' the paper). Use init or keep, or give --floor.'
    )
  updates = _update_steps(settings, steps)
  forward, backward = _forward_and_backward(settings)
  counts = forward(theta)  # Impossible distributions raise here.
  planned = _planned(theta, counts, backward(theta))
  penalty = functools.partial(
    updaters.exploration_penalty, strength=settings.exploration_penalty
  )
  return Plan(
    updater=_make_updater(settings, updates, forward, backward, fresh),
    due=lambda step: step in updates and method not in _NEVER_UPDATED,
    penalty=penalty if method == 'top_kast' else None,
    counts=counts,
    training_flops=_make_training_flops(method, updates, steps, planned),
  )

"""Builds optimisers, learning rates, decays and powers from settings."""

from collections.abc import Callable, Mapping
import dataclasses
import inspect
import itertools
import math
import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from experiments.support import config
from experiments.support import settings as settings_lib
from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import transforms
from powerprop_jax import types

T = TypeVar('T')

# Optimisers of optax whose first argument is a learning rate and which need no
# more than gradients and parameters.
OPTIMISERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'adabelief': optax.adabelief,
  'adagrad': optax.adagrad,
  'adam': optax.adam,
  'adamax': optax.adamax,
  'adamw': optax.adamw,
  'amsgrad': optax.amsgrad,
  'lamb': optax.lamb,
  'lars': optax.lars,
  'lion': optax.lion,
  'muon': optax.contrib.muon,
  'nadam': optax.nadam,
  'nadamw': optax.nadamw,
  'novograd': optax.novograd,
  'radam': optax.radam,
  'rmsprop': optax.rmsprop,
  'sgd': optax.sgd,
  'yogi': optax.yogi,
}
UPDATE_RULES = ('target_propagation', 'chain_rule')


def _check_decay_schedule(text: str) -> None:
  if text not in ('constant', 'cosine') and not 0 <= config.number(text) <= 1:
    raise ValueError('must be constant, cosine or a fraction from 0 to 1')


def _read_alpha_step(text: str) -> tuple[float, float]:
  """The power and the fraction of the steps of an item of --alpha_steps."""
  alpha, fraction = map(config.number, text.partition(':')[::2])
  if math.isnan(alpha) or not 0 <= fraction < 1:
    raise ValueError(
      'must be alpha:fraction, with a fraction of the steps from 0 to below 1'
    )
  return power.check_alpha(alpha), fraction


def _read_norm(text: str) -> Any:
  """The norm as `decay_phi` takes it."""
  if text in ('l1', 'l2'):
    return text
  if not 0 < config.number(text) < 2:
    raise ValueError('must be l1, l2 or a number between 0 and 2')
  return float(text)


def _read_norms(text: str) -> dict[float, Any]:
  """The norms by the fractions of the steps from which they hold."""
  first, *later = text.split(',')
  norms = {0.0: _read_norm(first)}
  for item in later:
    norm, _, fraction = item.partition(':')
    if not max(norms) < config.number(fraction) < 1:
      raise ValueError(
        'must be norm,norm:fraction,..., with fractions of the steps below 1'
        ' that rise from one to the next'
      )
    norms[float(fraction)] = _read_norm(norm)
  return norms


def _by_step(
  by_fraction: Mapping[float, T], steps: int, flag: str, what: str
) -> dict[int, T]:
  """Values by the first of their steps; each must have a step of its own."""
  by_step = {round(f * steps): x for f, x in by_fraction.items()}
  if len(by_step) < len(by_fraction) or max(by_step, default=0) >= steps:
    raise ValueError(
      f'--{flag}: in a run of {steps} steps one of the {what} has no step. Give'
      ' other fractions or more steps.'
    )
  return by_step


@dataclasses.dataclass(frozen=True)
class Powers(config.Settings):
  """How the power acts during a run."""

  alpha_steps: tuple[str, ...] = config.flag(
    (),
    'Powers that follow the first one, as alpha:fraction,...: each holds from'
    ' that fraction of the steps on. 2:0.25,3:0.5 goes on to alpha = 2 after a'
    ' quarter of the steps and to 3 after half of them. The weights keep their'
    ' values.',
    check=_read_alpha_step,
  )
  floor: float = config.flag(
    0.0,
    'The fraction of the step that the optimiser would take without a power,'
    ' which is added to the step with it. It lets weights change their sign.',
    low=0.0,
  )

  def __post_init__(self):
    super().__post_init__()
    starts = [_read_alpha_step(text)[1] for text in self.alpha_steps]
    if any(a >= b for a, b in itertools.pairwise(starts)):
      raise ValueError(
        f'--alpha_steps={",".join(self.alpha_steps)}: the fractions must rise'
        ' from one to the next.'
      )

  def powers(self, alpha: float, steps: int) -> dict[int, float]:
    """The powers of a run, by their first steps.

    Args:
      alpha: the first power.
      steps: the number of steps of the run.

    Returns:
      A dict from the step at which a power begins to that power.

    Raises:
      ValueError: if one of them has no step of its own.
    """
    later = {f: a for a, f in map(_read_alpha_step, self.alpha_steps)}
    flag = f'alpha_steps={",".join(self.alpha_steps)}'
    return {0: alpha} | _by_step(later, steps, flag, 'powers')


def last_alpha(settings: Powers, alpha: float) -> float:
  """The power at the end of a run.

  Args:
    settings: the powers that follow the first.
    alpha: the first power.

  Returns:
    The last power.
  """
  if not settings.alpha_steps:
    return alpha
  return _read_alpha_step(settings.alpha_steps[-1])[0]


@dataclasses.dataclass(frozen=True)
class Optimiser(Powers):
  """The optimiser and its learning rate."""

  optimizer: str = config.flag(
    'sgd', 'The optimiser, by its name in optax.', choices=OPTIMISERS
  )
  learning_rate: float = config.flag(
    0.1, 'The largest learning rate of the schedule.', low=0.0
  )
  schedule: str = config.flag(
    'constant',
    'How the learning rate falls. cosine falls along half a cosine to zero, and'
    ' steps divides it by 10 when 30, 60 and 80 % of the steps are done.',
    choices=('constant', 'cosine', 'steps'),
  )
  warmup_steps: int = config.flag(
    0,
    'The number of steps over which the learning rate rises from zero.',
    low=0,
    high=settings_lib.MAX_STEPS,
  )
  momentum: float = config.flag(
    0.0, 'The momentum of optimisers that have one.', low=0.0, high=1.0
  )
  nesterov: bool = config.flag(
    False, "Whether the momentum is Nesterov's; it needs --momentum."
  )
  clip_norm: float = config.flag(
    0.0,
    'The largest global norm of the gradient at theta; a gradient with a larger'
    ' norm is scaled down to it. 0 does not clip.',
    low=0.0,
  )
  weight_decay: float = config.flag(
    0.0,
    'The weight decay of theta. It is that of the optimiser if it has one, as'
    ' adamw does, and otherwise an L2 penalty, which is added to the gradient.',
    low=0.0,
  )

  def __post_init__(self):
    super().__post_init__()
    if self.nesterov and not self.momentum:
      raise ValueError(
        '--nesterov=True: there is no momentum to change. Give --momentum, or'
        ' leave --nesterov out.'
      )
    arguments = inspect.signature(OPTIMISERS[self.optimizer]).parameters
    for name in ('momentum', 'nesterov'):
      value = getattr(self, name)
      if value and name not in arguments:
        raise ValueError(
          f'--{name}={value}: {self.optimizer} takes no {name}. Leave it out,'
          ' or choose another --optimizer.'
        )


@dataclasses.dataclass(frozen=True)
class Decay(config.Settings):
  """The decay of phi, which makes networks sparse."""

  phi_decay: float = config.flag(
    0.0,
    'The decay of the parameters phi per step, independent of the optimiser and'
    ' of the learning rate: phi -= phi_decay * phi. With alpha above 1 it makes'
    ' weights sparse.',
    low=0.0,
  )
  phi_decay_norm: str = config.flag(
    'l2',
    'The norm of the decay. l2 decays phi in proportion to phi. l1 takes a'
    ' constant amount away, down to zero. A number p between 0 and 2 is the'
    ' penalty phi_decay |phi|^p. Other norms may follow, each from a fraction'
    ' of the steps on: 1.5,1:0.25,0.5:0.5 goes on to p = 1 after a quarter of'
    ' the steps and to 0.5 after half of them.',
    check=_read_norms,
  )
  phi_decay_schedule: str = config.flag(
    'constant',
    'How --phi_decay falls: constant, cosine, or the fraction of the steps'
    ' after which it is zero.',
    check=_check_decay_schedule,
  )
  phi_decay_warmup_steps: int = config.flag(
    0,
    'The number of steps over which --phi_decay rises from zero.',
    low=0,
    high=settings_lib.MAX_STEPS,
  )
  phi_decay_scale: tuple[str, ...] = config.flag(
    (),
    'Factors by which --phi_decay is multiplied in some layers, as'
    ' pattern=factor,...: a factor applies to the layers in whose path its'
    ' regular expression has a match, and the first that matches counts.',
    check=lambda text: config.factors([text]),
  )

  def decay_norms(self, steps: int) -> dict[int, Any]:
    """The norms of the decay, by their first steps.

    Args:
      steps: the number of steps of the run.

    Returns:
      A dict from the step at which a norm begins to the norm, which is 'l1',
      'l2' or a number p.

    Raises:
      ValueError: if one of them has no step of its own.
    """
    norms = _read_norms(self.phi_decay_norm)
    flag = f'phi_decay_norm={self.phi_decay_norm}'
    return _by_step(norms, steps, flag, 'norms')


@dataclasses.dataclass(frozen=True)
class Settings(Optimiser, Decay):
  """The optimiser and the decay of phi, for binaries to inherit from."""


def _warmed(
  rate: optax.Schedule, warmup_steps: int, steps: int, name: str
) -> optax.Schedule:
  """The schedule of the whole run, with a linear rise at its beginning."""
  if not 0 <= warmup_steps < steps:
    raise ValueError(
      f'--{name}={warmup_steps} must be below the {steps} steps.'
    )
  if not warmup_steps:
    return rate
  return lambda t: rate(t) * jnp.minimum(1.0, (t + 1) / warmup_steps)


def learning_rate(settings: Optimiser, steps: int) -> optax.Schedule:
  """The learning rate of a run.

  Args:
    settings: the optimiser.
    steps: the number of steps of the run.

  Returns:
    A function of the step.

  Raises:
    ValueError: if the warm-up is as long as the run.
  """
  peak = settings.learning_rate
  rate = {
    'constant': optax.constant_schedule(peak),
    'cosine': optax.cosine_decay_schedule(peak, steps),
    'steps': optax.piecewise_constant_schedule(
      peak, {round(f * steps): 0.1 for f in (0.3, 0.6, 0.8)}
    ),
  }[settings.schedule]
  return _warmed(rate, settings.warmup_steps, steps, 'warmup_steps')


def decay_rate(settings: Decay, steps: int) -> optax.Schedule:
  """The decay of phi at every step of a run.

  Args:
    settings: the decay.
    steps: the number of steps of the run.

  Returns:
    A function of the step.

  Raises:
    ValueError: if the warm-up is as long as the run.
  """
  decay, schedule = settings.phi_decay, settings.phi_decay_schedule
  if schedule == 'constant':
    rate = optax.constant_schedule(decay)
  elif schedule == 'cosine':
    rate = optax.cosine_decay_schedule(decay, steps)
  else:
    end = math.ceil(float(schedule) * steps)
    rate = optax.piecewise_constant_schedule(decay, {end: 0.0})
  warmup = settings.phi_decay_warmup_steps
  return _warmed(rate, warmup, steps, 'phi_decay_warmup_steps')


def _within(rate: optax.Schedule, start: int, end: int) -> optax.Schedule:
  """A schedule from one step up to another, and zero before and after."""

  def within(t):
    t = jnp.asarray(t)
    return jnp.where((start <= t) & (t < end), rate(t), 0.0)

  return within


def check_scale(settings: Decay, params: types.Params) -> None:
  """Refuses factors of the decay for layers that the network does not have.

  Args:
    settings: the decay.
    params: the parameters of the network, or their shapes.

  Raises:
    ValueError: if a pattern matches no weight.
  """
  pairs = zip(leaves.paths(params), jax.tree.leaves(params))
  weights = [path for path, x in pairs if leaves.is_weight(path, x)]
  for pattern in config.factors(settings.phi_decay_scale):
    if not any(re.search(pattern, path) for path in weights):
      raise ValueError(
        f'--phi_decay_scale={",".join(settings.phi_decay_scale)}: the pattern'
        f' {pattern!r} matches none of the weights {", ".join(weights)}.'
      )


def _make_inner(
  settings: Optimiser, rate: optax.Schedule
) -> optax.GradientTransformation:
  """The optimiser, whose weight decay is of weights alone, not of biases."""
  make, decay = OPTIMISERS[settings.optimizer], settings.weight_decay
  arguments = inspect.signature(make).parameters
  options = {'momentum': settings.momentum, 'nesterov': settings.nesterov}
  options = {name: value for name, value in options.items() if value}
  if 'weight_decay' not in arguments:
    decayed = optax.add_decayed_weights(decay, mask=leaves.weight_mask)
    return optax.chain(decayed, make(rate, **options))
  masks = {'mask', 'weight_decay_mask'} & set(arguments)
  masks = dict.fromkeys(masks, leaves.weight_mask)
  return make(rate, weight_decay=decay, **masks, **options)


def _decay_of_theta(
  settings: Settings, alpha: float, steps: int
) -> optax.Schedule:
  """alpha times the decay of phi, at every step of a run."""
  rate, powers = decay_rate(settings, steps), settings.powers(alpha, steps)
  constants = map(optax.constant_schedule, powers.values())
  now = optax.join_schedules([*constants], [*powers][1:])
  return lambda t: now(t) * rate(t)


def nats(settings: Settings, alpha: float, steps: int) -> float | None:
  """How much decay a run has, in nats: see `power.nats`.

  Args:
    settings: the optimiser and the decay.
    alpha: the power, the first one if there are several.
    steps: the number of steps of the run.

  Returns:
    The number of nats, or None if the norm of the decay is not L2.
  """
  if settings.phi_decay_norm != 'l2':
    return None
  return power.nats(1.0, _decay_of_theta(settings, alpha, steps), steps)


def _power_by_step(
  powers: Mapping[int, float], floor: float
) -> optax.GradientTransformation:
  """The last link of a chain, whose power changes at known steps.

  It does the same as `powerprop` with a schedule, but the compiler knows the
  powers and makes products and roots of them, which take a third of the time.

  Args:
    powers: by the steps from which they hold; one from step 0.
    floor: as `powerprop` takes it.

  Returns:
    A gradient transformation for parameters theta.
  """
  links = [
    transforms.powerprop(optax.identity(), alpha, floor=floor)
    for alpha in powers.values()
  ]

  def init(params):
    for link in links:
      link.init(params)
    return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

  def update(updates, state, params=None):
    now = sum(jnp.int32(state.count >= step) for step in powers) - 1
    branches = [
      lambda updates, link=link: link.update(
        updates, optax.EmptyState(), params
      )[0]
      for link in links
    ]
    count = optax.safe_increment(state.count)
    updates = jax.lax.switch(now, branches, updates)
    return updates, optax.ScaleByScheduleState(count)

  return optax.GradientTransformation(init, update)


def make_transform(settings: Powers, alpha: float) -> power.PowerTransform:
  """The map from the parameters of a run to theta.

  With `alpha_steps` the parameters are theta, which keeps its values when the
  power changes, and the map is the identity.

  Args:
    settings: the powers that follow the first.
    alpha: the first power.

  Returns:
    The map.
  """
  return power.power_transform(1.0 if settings.alpha_steps else alpha)


def make(
  settings: Settings,
  alpha: float,
  *,
  steps: int,
  update_rule: str = 'target_propagation',
) -> tuple[power.PowerTransform, optax.GradientTransformation]:
  """Makes the map from parameters to theta, and the optimiser of parameters.

  The parameters are those of `make_transform`. Where they are theta, decay of
  phi is decay of theta by alpha times as much.

  Args:
    settings: the optimiser and the decay.
    alpha: the power, the first one if there are several.
    steps: the number of steps of the run and of the schedules.
    update_rule: `target_propagation` (section 2 of the paper), or `chain_rule`,
      where the optimiser sees the gradient at phi that autodiff gives.

  Returns:
    The map from parameters to theta, and a transformation of gradients at theta
    into updates of the parameters.

  Raises:
    ValueError: if settings do not fit one another or the length of the run.
  """
  inner = _make_inner(settings, learning_rate(settings, steps))
  powers, rate = settings.powers(alpha, steps), decay_rate(settings, steps)
  norms = settings.decay_norms(steps)
  transform = make_transform(settings, alpha)
  if update_rule == 'chain_rule':
    for name, remedy in (
      ('weight_decay', 'Use --phi_decay'),
      ('floor', 'Leave it out'),
      ('alpha_steps', 'Leave it out'),
    ):
      if getattr(settings, name):
        raise ValueError(
          f'--{name} acts on theta, which an optimiser under'
          f' --update_rule=chain_rule does not see. {remedy}, or use'
          ' target_propagation.'
        )
  if settings.alpha_steps:
    if settings.phi_decay and settings.phi_decay_norm != 'l2':
      raise ValueError(
        f'--phi_decay_norm={settings.phi_decay_norm} is another penalty on'
        ' theta for every power. With --alpha_steps use l2.'
      )
    tx = optax.chain(inner, _power_by_step(powers, settings.floor))
    rate = _decay_of_theta(settings, alpha, steps)
  elif update_rule == 'target_propagation':
    tx = transforms.target_propagation(inner, transform, settings.floor)
  else:
    # The Jacobian comes first: the optimiser sees dL / d phi.
    tx = optax.chain(transforms.scale_by_power_jacobian(transform), inner)
  if settings.phi_decay:
    factors = config.factors(settings.phi_decay_scale)
    windows = itertools.pairwise([*norms, steps])
    links = [
      transforms.decay_phi(
        _within(rate, *window) if len(norms) > 1 else rate, norm, factors
      )
      for norm, window in zip(norms.values(), windows)
    ]
    tx = optax.chain(tx, *links)
  if settings.clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(settings.clip_norm), tx)
  return transform, tx


def recipe(settings: Optimiser, alpha: float) -> dict[str, Any]:
  """What the error of a run that diverged says of its settings.

  Args:
    settings: the optimiser.
    alpha: the power, the first one if there are several.

  Returns:
    Values by name, as `loop.run` takes its `recipe`.
  """
  powers: dict[str, Any] = {'alpha': alpha}
  if settings.alpha_steps:
    powers['alpha_steps'] = ','.join(settings.alpha_steps)
  return powers | {'learning_rate': settings.learning_rate}

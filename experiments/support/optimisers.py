"""From settings to the optimiser: which, its learning rate, and its decay."""

from collections.abc import Callable
import dataclasses
import inspect
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.support import config
from experiments.support import settings as settings_lib
from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import transforms
from powerprop_jax import types

# Aliases of optax whose first argument is a learning rate and which need no
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
  if text in ('constant', 'cosine'):
    return
  try:
    fraction = float(text)
  except ValueError:
    fraction = math.nan
  if not 0 <= fraction <= 1:
    raise ValueError('must be constant, cosine or a fraction from 0 to 1')


@dataclasses.dataclass(frozen=True)
class Optimiser(config.Settings):
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
    'The number of steps in which the learning rate rises from zero.',
    low=0,
    high=settings_lib.MAX_STEPS,
  )
  momentum: float = config.flag(
    0.0, 'The momentum, of optimisers that have one.', low=0.0, high=1.0
  )
  nesterov: bool = config.flag(
    False, "Whether the momentum is Nesterov's; it needs --momentum."
  )
  clip_norm: float = config.flag(
    0.0,
    'The largest global norm of the gradient at theta; larger ones are scaled'
    ' down to it. 0 does not clip.',
    low=0.0,
  )
  weight_decay: float = config.flag(
    0.0,
    'The decay of the weights theta. It is that of the optimiser where it has'
    ' one, as adamw does, and an L2 penalty on its gradient otherwise.',
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
    'The decay of the parameters phi per step, outside of the optimiser and of'
    ' the learning rate: phi -= phi_decay * phi. With alpha above 1 it makes'
    ' weights sparse.',
    low=0.0,
  )
  phi_decay_norm: str = config.flag(
    'l2',
    'l2 decays phi in proportion to phi. l1 takes a constant amount away, down'
    ' to zero.',
    choices=('l1', 'l2'),
  )
  phi_decay_schedule: str = config.flag(
    'constant',
    'How --phi_decay falls: constant, cosine, or the fraction of the steps'
    ' after which it is zero.',
    check=_check_decay_schedule,
  )
  phi_decay_warmup_steps: int = config.flag(
    0,
    'The number of steps in which --phi_decay rises from zero.',
    low=0,
    high=settings_lib.MAX_STEPS,
  )
  phi_decay_scale: tuple[str, ...] = config.flag(
    (),
    'Factors of --phi_decay by layer, as pattern=factor,...: each is for the'
    ' layers in whose path the regular expression has a match, and the first'
    ' one that matches counts.',
    check=config.check_factor,
  )


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
    steps: length of the run.

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
    steps: length of the run.

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
    end = float(schedule) * steps
    rate = lambda t: jnp.where(jnp.asarray(t) < end, decay, 0.0)
  warmup = settings.phi_decay_warmup_steps
  return _warmed(rate, warmup, steps, 'phi_decay_warmup_steps')


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
  """The optimiser, with decay of the weights alone."""
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


def make_tx(
  transform: power.PowerTransform,
  optimiser: Optimiser,
  decay: Decay,
  *,
  steps: int,
  update_rule: str = 'target_propagation',
) -> optax.GradientTransformation:
  """The transformation of gradients at theta into updates of phi.

  Args:
    transform: a `power.power_transform`.
    optimiser: the settings of the optimiser.
    decay: the settings of the decay, which may be the same object.
    steps: length of the schedules.
    update_rule: `target_propagation` (section 2 of the paper), or `chain_rule`:
      the optimiser sees the gradient at phi, as plain autodiff would give it.

  Returns:
    A gradient transformation with parameters phi.

  Raises:
    ValueError: if settings do not fit one another or the length of the run.
  """
  inner = _make_inner(optimiser, learning_rate(optimiser, steps))
  if optimiser.weight_decay and update_rule == 'chain_rule':
    raise ValueError(
      f'--weight_decay={optimiser.weight_decay:g} acts on theta, which an'
      ' optimiser under --update_rule=chain_rule does not see. Use --phi_decay,'
      ' or target_propagation.'
    )
  if update_rule == 'target_propagation':
    tx = transforms.target_propagation(inner, transform)
  else:
    # The Jacobian comes first: the optimiser sees dL / d phi.
    tx = optax.chain(transforms.scale_by_power_jacobian(transform), inner)
  rate = decay_rate(decay, steps)
  if decay.phi_decay:
    factors = config.factors(decay.phi_decay_scale)
    norm: Any = decay.phi_decay_norm
    tx = optax.chain(tx, transforms.decay_phi(rate, norm, factors))
  if optimiser.clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(optimiser.clip_norm), tx)
  return tx

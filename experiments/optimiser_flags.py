"""From flags to the optimiser: which, its learning rate, and its decay."""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
import math
import re

from absl import flags
import jax.numpy as jnp
import optax

from experiments import common
from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import transforms

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

NAMES = (
  'optimizer',
  'learning_rate',
  'schedule',
  'warmup_steps',
  'momentum',
  'nesterov',
  'clip_norm',
  'weight_decay',
  'phi_decay',
  'phi_decay_norm',
  'phi_decay_schedule',
  'phi_decay_warmup_steps',
  'phi_decay_scale',
)


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that `make_tx` takes by keyword."""
  real = functools.partial(flags.DEFINE_float, flag_values=values)
  enum = functools.partial(flags.DEFINE_enum, flag_values=values)
  enum('optimizer', 'sgd', sorted(OPTIMISERS), 'By its name in optax.')
  real('learning_rate', 0.1, 'Peak learning rate.', 0.0)
  enum(
    'schedule',
    'constant',
    ['constant', 'cosine', 'steps'],
    'Of the learning rate; steps divides it by 10 at 30, 60 and 80 %.',
  )
  flags.DEFINE_integer(
    'warmup_steps',
    0,
    'Steps in which the learning rate rises from 0.',
    0,
    flag_values=values,
  )
  real('momentum', 0.0, 'Momentum, for optimisers that have it.', 0.0, 1.0)
  flags.DEFINE_bool(
    'nesterov', False, "Nesterov's momentum.", flag_values=values
  )
  real(
    'clip_norm',
    0.0,
    'Largest global norm of the gradient at theta; 0 does not clip.',
    0.0,
  )
  real(
    'weight_decay',
    0.0,
    'Decay of the weights theta: of the optimiser where it has one (adamw), an'
    ' L2 penalty on its gradient otherwise.',
    0.0,
  )
  real(
    'phi_decay',
    0.0,
    'Decay of the parameters phi, a step, outside of the optimiser and of the'
    ' learning rate: phi -= phi_decay * phi. Sparsifies strongly if alpha > 1.',
    0.0,
  )
  enum(
    'phi_decay_norm',
    'l2',
    ['l1', 'l2'],
    'l2 decays phi in proportion; l1 by a constant amount, down to zero.',
  )
  flags.DEFINE_string(
    'phi_decay_schedule',
    'constant',
    'constant, cosine, or the fraction of the steps after which it is off.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'phi_decay_warmup_steps',
    0,
    'Steps in which phi_decay rises from 0.',
    0,
    flag_values=values,
  )
  flags.DEFINE_list(
    'phi_decay_scale',
    [],
    'pattern=factor,...: factors of phi_decay for the layers whose path has a'
    ' match; the first that matches counts.',
    flag_values=values,
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


def _learning_rate(peak: float, schedule: str, steps: int) -> optax.Schedule:
  """The learning rate at a step."""
  return {
    'constant': optax.constant_schedule(peak),
    'cosine': optax.cosine_decay_schedule(peak, steps),
    'steps': optax.piecewise_constant_schedule(
      peak, {round(f * steps): 0.1 for f in (0.3, 0.6, 0.8)}
    ),
  }[schedule]


def _decay_rate(decay: float, schedule: str, steps: int) -> optax.Schedule:
  """The decay of phi at a step."""
  if schedule == 'constant':
    return optax.constant_schedule(decay)
  if schedule == 'cosine':
    return optax.cosine_decay_schedule(decay, steps)
  try:
    fraction = float(schedule)
  except ValueError:
    fraction = math.nan
  if not 0 <= fraction <= 1:
    raise ValueError(
      f'--phi_decay_schedule must be constant, cosine or a fraction in [0, 1],'
      f' got {schedule!r}.'
    )
  return lambda t: jnp.where(jnp.asarray(t) < fraction * steps, decay, 0.0)


def _decay_phi(
  rate: optax.Schedule, norm: str, factors: Mapping[str, float]
) -> optax.GradientTransformation:
  """Decay of the weights' phi, to follow the optimiser in a chain."""

  def init_fn(params):
    del params
    return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None):
    decay = rate(state.count)

    def leaf(path, u, p):
      if not leaves.is_weight(path, p):
        return u
      factor = next((f for k, f in factors.items() if re.search(k, path)), 1.0)
      r = factor * decay
      # L1 takes at most |phi|: the soft threshold, which stops at zero.
      return u - (r * p if norm == 'l2' else jnp.clip(p, -r, r))

    updates = leaves.map_with_path(leaf, updates, params)
    return updates, state._replace(count=optax.safe_increment(state.count))

  return optax.GradientTransformation(init_fn, update_fn)


def _make_inner(
  optimizer: str,
  rate: optax.Schedule,
  momentum: float,
  nesterov: bool,
  weight_decay: float,
) -> optax.GradientTransformation:
  """The optimiser of the flags, with decay of the weights alone."""
  make = OPTIMISERS[optimizer]
  arguments = inspect.signature(make).parameters
  options = {'momentum': momentum, 'nesterov': nesterov}
  options = {name: value for name, value in options.items() if value}
  for name, value in options.items():
    if name not in arguments:
      raise ValueError(f'{optimizer} takes no {name}, got {value}.')
  if 'weight_decay' not in arguments:
    decay = optax.add_decayed_weights(weight_decay, mask=leaves.weight_mask)
    return optax.chain(decay, make(rate, **options))
  masks = {'mask', 'weight_decay_mask'} & set(arguments)
  masks = dict.fromkeys(masks, leaves.weight_mask)
  return make(rate, weight_decay=weight_decay, **masks, **options)


def make_tx(
  transform: power.PowerTransform,
  *,
  steps: int,
  update_rule: str,
  optimizer: str,
  learning_rate: float,
  schedule: str,
  warmup_steps: int,
  momentum: float,
  nesterov: bool,
  clip_norm: float,
  weight_decay: float,
  phi_decay: float,
  phi_decay_norm: str,
  phi_decay_schedule: str,
  phi_decay_warmup_steps: int,
  phi_decay_scale: Sequence[str],
) -> optax.GradientTransformation:
  """The transformation of gradients at theta into updates of phi.

  Args:
    transform: a `power.power_transform`.
    steps: length of the schedules.
    update_rule: `target_propagation` (section 2 of the paper), or `chain_rule`:
      the optimiser sees the gradient at phi, as plain autodiff would give it.
    **others: the flags of `define_flags`.

  Returns:
    A gradient transformation with parameters phi.

  Raises:
    ValueError: if an argument does not fit the optimiser.
  """
  rate = _learning_rate(learning_rate, schedule, steps)
  rate = _warmed(rate, warmup_steps, steps, 'warmup_steps')
  inner = _make_inner(optimizer, rate, momentum, nesterov, weight_decay)
  if weight_decay and update_rule == 'chain_rule':
    raise ValueError(
      'weight_decay acts on theta, which an optimiser under chain_rule does not'
      ' see. Use phi_decay, or target_propagation.'
    )
  if update_rule == 'target_propagation':
    tx = transforms.target_propagation(inner, transform)
  else:
    # The Jacobian comes first: the optimiser sees dL / d phi.
    tx = optax.chain(transforms.scale_by_power_jacobian(transform), inner)
  if phi_decay:
    decay = _decay_rate(phi_decay, phi_decay_schedule, steps)
    warmup = 'phi_decay_warmup_steps'
    decay = _decay_phi(
      _warmed(decay, phi_decay_warmup_steps, steps, warmup),
      phi_decay_norm,
      common.parse_factors(phi_decay_scale, 'phi_decay_scale'),
    )
    tx = optax.chain(tx, decay)
  if clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
  return tx

r"""Optax transforms for parameters theta = psi(phi).

An adaptive optimiser that sees the gradient at phi divides it by a running
estimate of its own size, which contains the factor alpha |phi|^(alpha - 1), and
so undoes the effect of the reparameterisation. Section 2 of the paper borrows a
remedy from target propagation: let the optimiser act on theta as if theta were
the parameters, take where it wants to go as a virtual target, and descend on
phi towards it. The update is

  delta phi = optim(dL / d theta) * alpha |phi|^(alpha - 1),

which for plain SGD is gradient descent on phi. It descends for every optimiser
whose steps have the sign of the descent in each coordinate, as the Jacobian is
positive and diagonal. (Descent on theta as a whole is not enough: a step that
trades one weight against another may ascend on phi. A test has the example.)

The update comes in three forms:

  * `target_propagation(inner, transform)` wraps an optimiser; the parameters
    are phi, the gradients are taken at theta, and `inner` sees theta. Weight
    decay inside `inner` is a penalty on theta; like every update it is scaled
    by the Jacobian, and small weights hardly feel it. Decay added outside, as
    in `optax.chain(target_propagation(...), decay_phi(1e-4))`, acts on phi: it
    multiplies phi by 1 - 1e-4 and theta by (1 - 1e-4)^alpha per step, while the
    gradient that holds small weights up vanishes; for alpha > 1 it is a strong
    sparsifier, with the effect of a penalty |theta|^(2 / alpha).
  * `scale_by_power_jacobian(transform)` is the factor alone, the last link of a
    chain whose earlier links see phi as parameters.
  * `powerprop(inner, alpha)` keeps theta as the parameters of the caller. As
    these do not depend on the power, the power may change from step to step.

Zero is a fixed point of all three for alpha > 1, and weights do not change
their sign. A `floor` > 0 lets them: it adds that share of the step that the
optimiser would take on theta without any power, which moves a weight at zero
too.

The update of the inner optimiser is scaled by the Jacobian before it is
applied. Wrappers of optax that count on their update being applied as it is
therefore have to go outside, around `powerprop` or `target_propagation`. Inside
they are refused where their state tells of them:

  * `optax.lookahead(powerprop(adam, alpha), ...)`, and likewise
    `contrib.schedule_free`, `contrib.mechanize` and `contrib.sam` (in its
    transparent mode);
  * `optax.chain(powerprop(adam, alpha), optax.keep_params_nonnegative())`;
  * line searches that hand on the value and the gradient at the next point for
    `optax.value_and_grad_from_state`, that of `optax.lbfgs` among them:
    `optax.chain(powerprop(optax.lbfgs(linesearch=None), alpha),
    optax.scale_by_zoom_linesearch(20))`.

Wrappers that pass updates on, hold them back or choose among parameters
(`chain`, `masked`, `partition`, `MultiSteps`, `apply_if_finite`,
`inject_hyperparams`) work inside and outside. Two differences remain. Around a
power `masked` leaves the parameters that it does not choose without one, and
inside the power still scales their updates. A schedule of alpha counts the
steps of `MultiSteps` that is outside, and its small batches if it is inside.

A few optimisers that are not wrappers cannot be inside either, and are not
refused, because nothing tells them from others. `contrib.cocob` and
`contrib.madgrad` compute where the parameters are to be from the start and from
all gradients, and `contrib.dowg` and `contrib.dog` take their rate from how far
the parameters have come; scaled by the Jacobian, the step is not the one that
they count on. Inside `powerprop` COCOB and DoWG give NaN in an example of four
weights that they solve without it. Choose an optimiser that takes a step from
wherever the parameters are.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  section 2.
"""

from collections.abc import Callable, Mapping
import functools
import math
import numbers
import re
from typing import Any, Literal, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import optax
from optax import contrib

from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import types


def _required(params: Any) -> Any:
  """Returns the parameters; raises ValueError if they are not given."""
  if params is None:
    raise ValueError(
      'This update depends on the current values of the parameters. Call'
      ' `update(grads, state, params)`.'
    )
  return params


def _check_rate(name: str, value: Any) -> None:
  """Raises ValueError unless value is finite, not negative, or traced."""
  if power.is_traced(value):
    return
  if not (math.isfinite(value) and value >= 0):
    raise ValueError(f'{name} must be a finite number >= 0, got {value}.')


def _is_zero(value: Any) -> bool:
  return not power.is_traced(value) and value == 0


def _is_one(value: Any) -> bool:
  return not power.is_traced(value) and value == 1


# The states by which wrappers are recognised, each with a function that tells
# whether the update of the wrapper must be applied as it is.
_OUTSIDE: dict[type, Callable[[Any], bool]] = {
  optax.LookaheadState: lambda state: True,
  contrib.ScheduleFreeState: lambda state: True,
  contrib.MechanicState: lambda state: True,
  # The opaque mode takes the step there and back by itself.
  contrib.SAMState: lambda state: state.cache is not None,
  optax.ScaleByZoomLinesearchState: lambda state: True,
  optax.ScaleByBacktrackingLinesearchState: (
    lambda state: state.grad is not None
  ),
}


def _check_start(
  params: types.Params, powers: types.Powers, state: Any, floor: chex.Numeric
) -> None:
  """Refuses weights that are all zero, and wrappers that have to go outside."""
  if _is_zero(floor):
    power.check_not_zero(params, powers)
  if all(_is_one(a) for a in jax.tree.leaves(powers)):
    return
  kinds = tuple(_OUTSIDE)
  for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds)):
    if isinstance(node, kinds) and _OUTSIDE[type(node)](node):
      raise ValueError(
        f'The wrapper with the state {type(node).__name__} counts on its update'
        ' being applied as it is, but the update of the inner optimiser is'
        ' scaled by the Jacobian. Put it outside: wrapper(powerprop(optimiser,'
        ' alpha)), or a line search behind it in optax.chain(powerprop('
        'optimiser, alpha), line_search).'
      )


def check_optimiser(inner: Any) -> optax.GradientTransformationExtraArgs:
  """Returns an optimiser, which may be given further arguments.

  Args:
    inner: a transformation of optax, or what has an `init` and an `update`.

  Returns:
    The same, whose update ignores arguments that it does not know.

  Raises:
    ValueError: if it has no update.

  >>> import optax
  >>> from powerprop_jax import transforms
  >>> transforms.check_optimiser(optax.sgd(0.1)).init({})
  (EmptyState(), EmptyState())
  """
  if not callable(getattr(inner, 'update', None)):
    raise ValueError(
      f'inner must be an optimiser, such as optax.sgd(0.1), got {inner!r}.'
    )
  return optax.with_extra_args_support(inner)


def target_propagation(
  inner: optax.GradientTransformation,
  transform: power.PowerTransform,
  floor: chex.Numeric = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """The update of `inner` at theta, carried over to phi.

  Args:
    inner: an optimiser, with its learning rate. Its state, and the parameters
      that it is given, are those of theta. Its updates are scaled: the
      documentation of this module lists the wrappers that have to go outside.
    transform: a `power.power_transform`.
    floor: the share of the update of `inner` that is added to theta as well,
      which lets a weight leave zero and change its sign; see `powerprop`.
      Leaves whose power is 1 are not affected.

  Returns:
    A gradient transformation for parameters phi and gradients taken at theta
    (not at phi: use `jax.grad` of a function of theta). Gradients may be None
    where they may be for `inner`. Its init raises ValueError if nothing is a
    weight (see `power.exponents`), if all values of a weight are zero and so is
    the floor, or if `inner` is a wrapper that has to go outside.

  Raises:
    ValueError: if floor is negative or not finite, or transform is not a
      `power.PowerTransform`.

  References:
    Schwarz et al, `Powerpropagation`, NeurIPS 2021, section 2.

  >>> import jax.numpy as jnp
  >>> import optax
  >>> from powerprop_jax import power
  >>> from powerprop_jax import transforms
  >>> transform = power.power_transform(2.0)
  >>> tx = transforms.target_propagation(optax.sgd(0.5), transform)
  >>> phi = {'linear': {'w': jnp.array([[3.0, -1.0]])}}
  >>> grads = {'linear': {'w': jnp.array([[1.0, 1.0]])}}
  >>> updates, state = tx.update(grads, tx.init(phi), phi)
  >>> print(updates['linear']['w'])
  [[-3. -1.]]
  """
  _check_rate('floor', floor)
  if not isinstance(transform, power.PowerTransform):
    raise ValueError(
      'transform must be that of the parameters, such as'
      f' `power.power_transform(2.0)`, got {transform!r}.'
    )
  inner = check_optimiser(inner)

  def init_fn(params):
    powers = transform.powers(params)
    state = inner.init(transform.to_theta(params))
    _check_start(params, powers, state, floor)
    return state

  def with_floor(a, update, scaled, phi):
    if update is None or a == 1.0:
      return scaled
    wide = jnp.promote_types(phi.dtype, jnp.float32)
    update, start = update.astype(wide), phi.astype(wide)
    target = power.psi(start + scaled.astype(wide), a) + floor * update
    moved = power.psi_inverse(target, a) - start
    return jnp.where(update == 0, 0, moved).astype(scaled.dtype)

  def update_fn(updates, state, params=None, **extra_args):
    params = _required(params)
    theta = transform.to_theta(params)
    updates, state = inner.update(updates, state, theta, **extra_args)
    scaled = transform.scale_by_jacobian(cast(types.Updates, updates), params)
    if not _is_zero(floor):
      powers = transform.powers(params)
      scaled = jax.tree.map(with_floor, powers, updates, scaled, params)
    return scaled, state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_power_jacobian(
  transform: power.PowerTransform,
) -> optax.GradientTransformation:
  """Multiplies updates by alpha |phi|^(alpha - 1); the parameters are phi.

  As the last link of a chain it does what `target_propagation` does, except
  that the other links see phi where they read the parameters, as the decay of
  AdamW and the trust ratio of LARS do.

  Args:
    transform: a `power.power_transform`.

  Returns:
    A gradient transformation without state. Its init raises ValueError if
    nothing is a weight, or if all values of a weight are zero.

  References:
    Schwarz et al, `Powerpropagation`, NeurIPS 2021, section 2.

  >>> import jax.numpy as jnp
  >>> import optax
  >>> from powerprop_jax import power
  >>> from powerprop_jax import transforms
  >>> link = transforms.scale_by_power_jacobian(power.power_transform(2.0))
  >>> tx = optax.chain(optax.sgd(0.5), link)
  >>> phi = {'linear': {'w': jnp.array([[3.0, -1.0]])}}
  >>> grads = {'linear': {'w': jnp.array([[1.0, 1.0]])}}
  >>> print(tx.update(grads, tx.init(phi), phi)[0]['linear']['w'])
  [[-3. -1.]]
  """

  def init_fn(params):
    state = optax.EmptyState()
    _check_start(params, transform.powers(params), state, 0.0)
    return state

  def update_fn(updates, state, params=None):
    params = _required(params)
    return transform.scale_by_jacobian(updates, params), state

  return optax.GradientTransformation(init_fn, update_fn)


class PowerpropState(NamedTuple):
  """The state of `powerprop` with a schedule for alpha.

  Attributes:
    count: the number of updates, an int32 scalar, at which the schedule gives
      alpha.
    inner_state: the state of the inner optimiser.
  """

  count: jax.typing.ArrayLike
  inner_state: Any


def _step(theta: jax.Array, update: jax.Array, alpha: float) -> jax.Array:
  """The change of theta by the update, carried over to phi, for a known alpha.

  Args:
    theta: an array of floats, single precision or better.
    update: the update of the inner optimiser.
    alpha: the power.
  """
  phi = power.psi_inverse(theta, alpha)
  delta = update * power.psi_derivative(phi, alpha)
  # Theta is not what is subtracted: psi(psi^-1(theta)) differs from it by a
  # rounding, which is biased and would add up over the steps. A weight whose
  # update is zero does not move at all, whichever way the compiler rounds.
  moved = power.psi(phi + delta, alpha) - power.psi(phi, alpha)
  return jnp.where(delta == 0, 0, moved)


def _traced_step(
  theta: jax.Array, update: jax.Array, alpha: jax.Array
) -> jax.Array:
  """`_step` for an alpha that is known only when the program runs.

  Powers by exp2 and log2 are wrong by some units in the last place of theta,
  which may be more than a whole update. The step is therefore written in the
  relative change r of phi, of which small values lose no digits:

    theta ((1 + r)^alpha - 1),
    r = alpha update |theta|^(2 - 2 / alpha) / theta.

  Large values, which may change the sign, do not need this care.
  """
  # A power below 1 has no meaning.
  alpha = jnp.where(alpha >= 1, alpha, jnp.nan).astype(theta.dtype)
  sign, log = jnp.sign(theta), jnp.log2(jnp.abs(theta))
  slope = sign * alpha * update.astype(theta.dtype)
  ratio = slope * jnp.exp2((1 - 2 / alpha) * log)
  is_small = jnp.abs(ratio) < 0.5
  small = jnp.where(is_small, ratio, 0.0)
  small = theta * jnp.expm1(alpha * jnp.log1p(small))
  phi = jnp.exp2(log / alpha) + slope * jnp.exp2((1 - 1 / alpha) * log)
  large = jnp.sign(phi) * jnp.exp2(alpha * jnp.log2(jnp.abs(phi)))
  moved = jnp.where(is_small, small, sign * large - theta)
  return jnp.where((theta == 0) | (update == 0), 0.0, moved)


def powerprop(
  inner: optax.GradientTransformation,
  alpha: types.Alpha | optax.Schedule,
  is_weight: types.IsWeight = leaves.is_weight,
  floor: chex.Numeric = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """Powerpropagation as a drop-in: the parameters stay theta.

  Wrap the optimiser of an existing training loop and change nothing else. Each
  update maps theta to phi, takes the step of `target_propagation` there, and
  returns the difference that it makes to theta. The trajectory is that of the
  phi form up to rounding, with the same fixed point: a weight that is exactly
  zero stays zero for alpha > 1, unless there is a floor.

  Args:
    inner: an optimiser, with its learning rate. Its updates are scaled: the
      documentation of this module lists the wrappers that have to go outside.
    alpha: the power; or a function of (path, leaf), as in
      `power.power_transform`; or a schedule of optax, a function of the number
      of updates before this one. (A function that can be called with two
      arguments is taken for one of (path, leaf).) The weights keep their values
      when alpha changes, and so does the state of `inner`, which belongs to
      theta. A schedule that falls below 1 gives NaN. Under
      `optax.inject_hyperparams(powerprop, static_args='is_weight')` alpha is
      among the hyperparameters; with `static_args=('alpha', 'is_weight')` it is
      fixed.
    is_weight: a function of (path, leaf): which leaves are reparameterised.
    floor: the share of the update of `inner` that is added to the update of the
      power: theta moves by (alpha^2 |theta|^(2 - 2 / alpha) + floor) times the
      update, to first order. A pure power cannot cross zero, so that signs stay
      as they were initialised; with a floor they can change. For alpha = 2 this
      is the gradient flow of Hyperbolic Aware Minimisation. Leaves whose power
      is 1 are not affected.

  Returns:
    A gradient transformation for parameters and gradients of theta. Gradients
    may be None where they may be for `inner`. Its state is that of `inner`, or
    a `PowerpropState` if alpha is a schedule. Its init raises ValueError if
    nothing is a weight (see `power.exponents`), if all values of a weight are
    zero and so is the floor, or if `inner` is a wrapper that has to go outside.

  Raises:
    ValueError: if alpha is below 1 or not finite, or if floor is negative or
      not finite.

  References:
    Schwarz et al, `Powerpropagation`, NeurIPS 2021, section 2. The floor:
    Jacobs et al, `Hyperbolic Aware Minimization: Implicit Bias for Sparsity
    <https://arxiv.org/abs/2506.02630>`_, 2025.

  >>> import jax.numpy as jnp
  >>> import optax
  >>> from powerprop_jax import transforms
  >>> tx = transforms.powerprop(optax.sgd(0.5), alpha=2.0)
  >>> theta = {'linear': {'w': jnp.array([[4.0, -1.0]])}}
  >>> grads = {'linear': {'w': jnp.array([[0.5, 0.5]])}}
  >>> updates, state = tx.update(grads, tx.init(theta), theta)
  >>> print(optax.apply_updates(theta, updates)['linear']['w'])
  [[ 1.   -2.25]]
  """
  schedule: Any = alpha if power.is_schedule(alpha) else None
  fixed: Any = alpha
  if not (callable(alpha) or power.is_traced(alpha)):
    fixed = power.check_alpha(alpha)
  _check_rate('floor', floor)
  inner = check_optimiser(inner)

  def powers_at(count, params):
    if schedule is None:
      return power.exponents(params, fixed, is_weight)
    now = schedule(count)
    return power.exponents(params, lambda path, leaf: now, is_weight)

  def init_fn(params):
    count = jnp.zeros([], jnp.int32)
    state = inner.init(params)
    _check_start(params, powers_at(count, params), state, floor)
    return state if schedule is None else PowerpropState(count, state)

  def difference(a, update, theta):
    # Optax lets None stand for the gradient of a frozen leaf. Where psi is the
    # identity, the update is kept as it is.
    if update is None or _is_one(a):
      return update
    traced = power.is_traced(a)
    wide = theta.astype(jnp.promote_types(theta.dtype, jnp.float32))
    moved = (_traced_step if traced else _step)(wide, update, a)
    if not _is_zero(floor):
      moved = moved + floor * update
    if traced:
      moved = jnp.where(a == 1, update, moved)
    return moved.astype(update.dtype)

  def update_fn(updates, state, params=None, **extra_args):
    params = _required(params)
    count = jnp.zeros([], jnp.int32)
    if schedule is not None:
      count, state = state
    updates, state = inner.update(updates, state, params, **extra_args)
    powers = powers_at(count, params)
    updates = jax.tree.map(difference, powers, updates, params)
    if schedule is not None:
      state = PowerpropState(optax.safe_increment(count), state)
    return updates, state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class DecayPhiState(NamedTuple):
  """The state of `decay_phi` with a schedule.

  Attributes:
    count: the number of updates, an int32 scalar.
  """

  count: jax.typing.ArrayLike


def decay_phi(
  rate: chex.Numeric | optax.Schedule,
  norm: Literal['l1', 'l2'] | float = 'l2',
  scale: Mapping[str, float] | None = None,
  is_weight: types.IsWeight = leaves.is_weight,
) -> optax.GradientTransformation:
  """Decay of the parameters phi, the sparsifier that a power calls for.

  Use it outside of the optimiser, whose learning rate does not scale it:

    optax.chain(target_propagation(inner, transform), decay_phi(1e-4))

  With norm 'l2' a step takes `rate * phi` away from phi, which is a penalty
  rate / 2 |phi|^2. On theta it is the penalty rate / 2 |theta|^(2 / alpha),
  which is concave for alpha > 2 and drives weights to zero that the loss does
  not hold up: without a gradient theta shrinks by (1 - rate)^alpha per step and
  by e^-nats in all (`power.nats`). With norm 'l1' a step takes `rate` away from
  |phi| and stops at zero (the soft threshold), a penalty rate |theta|^(1 /
  alpha). A number p in (0, 2) stands for the penalty rate |phi|^p by the step

    phi <- phi X / (X + p rate),    X = |phi|^(2 - p),

  which keeps signs, and is the soft threshold for p = 1 and 'l2' of twice the
  rate for p = 2, to first order in the rate. For parameters without a power,
  p = 2 / alpha at half the rate is the penalty that 'l2' puts on the weights of
  a network with the power alpha; compare the two with these settings.

  Keep the parameters in single precision: bfloat16 has no numbers between 1 and
  1 - 1 / 256, so that a decay of less than a fifth of a percent is lost.

  Args:
    rate: how much a step takes away, >= 0; a number or a schedule.
    norm: 'l2', 'l1' or a number in (0, 2).
    scale: factors of the rate for the weights whose paths have a match of a
      regular expression; the first expression that matches counts, and weights
      without a match have the factor 1.
    is_weight: a function of (path, leaf): which leaves decay. The updates of
      the others pass unchanged.

  Returns:
    A gradient transformation for parameters phi. Its init raises ValueError if
    an expression of scale matches no weight, or nothing is a weight (see
    `power.exponents`).

  Raises:
    ValueError: if rate or a factor is negative or not finite, if rate times a
      factor is so large that 'l2' would change signs, or if norm or an
      expression is invalid.

  References:
    Schwarz et al, `Powerpropagation`, NeurIPS 2021, section 2, for the map. The
    step for |phi|^p: Outmezguine and Levi, `Decoupled Weight Decay for Any p
    Norm <https://arxiv.org/abs/2404.10824>`_, 2024.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import transforms
  >>> tx = transforms.decay_phi(0.25, scale={'^output': 2.0})
  >>> phi = {name: {'w': jnp.ones((1, 2))} for name in ('hidden', 'output')}
  >>> zeros = {name: {'w': jnp.zeros((1, 2))} for name in phi}
  >>> updates, state = tx.update(zeros, tx.init(phi), phi)
  >>> print(updates['hidden']['w'], updates['output']['w'])
  [[-0.25 -0.25]] [[-0.5 -0.5]]
  """
  scale = dict(scale or {})
  for pattern, factor in scale.items():
    _check_rate(f'The factor of {pattern!r} in scale', factor)
    try:
      re.compile(pattern)
    except re.error as e:
      raise ValueError(
        f'scale takes regular expressions, got {pattern!r}: {e}.'
      ) from e
  if norm not in ('l1', 'l2') and not (
    isinstance(norm, numbers.Real) and 0 < norm < 2
  ):
    raise ValueError(
      f"norm must be 'l1', 'l2' or in (0, 2), got {norm!r}."
      ' `optax.inject_hyperparams` takes it as one of static_args.'
    )
  if not callable(rate):
    _check_rate('rate', rate)
    largest = max([1.0, *scale.values()])
    known = not power.is_traced(rate)
    if norm == 'l2' and known and rate * largest > 1:
      raise ValueError(
        f'rate must be at most 1 with its largest factor {largest}, got {rate}:'
        ' phi would change its sign. Rates are of the size of 1e-4.'
      )

  def init_fn(params):
    power.exponents(params, 2.0, is_weight)  # Raises if nothing is a weight.
    rows = zip(leaves.paths(params), jax.tree.leaves(params))
    weights = [path for path, x in rows if is_weight(path, x)]
    unused = [k for k in scale if not any(re.search(k, p) for p in weights)]
    # Optax looks into states with a placeholder that has no leaves.
    if unused and jax.tree.leaves(params):
      raise ValueError(
        f'The expressions {unused} of scale match no weight. The weights are'
        f' {[str(path) for path in weights]}.'
      )
    if callable(rate):
      return DecayPhiState(jnp.zeros([], jnp.int32))
    return optax.EmptyState()

  def decayed(path, x, update, now):
    if update is None or not is_weight(path, x):
      return update
    factor = next((f for k, f in scale.items() if re.search(k, path)), 1.0)
    r = factor * now
    if norm == 'l2':
      step = r * x
    elif norm == 'l1':
      step = jnp.clip(x, -r, r)
    else:
      size = power.abs_power(x, 2 - norm)
      # Zero stays zero, even at a rate of zero, where it would be 0 / 0.
      step = x * jnp.where(size > 0, norm * r / (size + norm * r), 0.0)
    return (update - step).astype(update.dtype)

  def update_fn(updates, state, params=None):
    params = _required(params)
    now = rate(state.count) if callable(rate) else rate
    updates = leaves.map_with_path(
      functools.partial(decayed, now=now), params, updates
    )
    if callable(rate):
      state = DecayPhiState(optax.safe_increment(state.count))
    return updates, state

  return optax.GradientTransformation(init_fn, update_fn)

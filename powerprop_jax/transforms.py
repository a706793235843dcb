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

Three forms of the one update:

  * `target_propagation(inner, transform)` wraps an optimiser; the parameters
    are phi, the gradients are taken at theta, and `inner` sees theta. Weight
    decay inside `inner` is a penalty on theta; as every update it is scaled by
    the Jacobian, and small weights hardly feel it. Decay added outside, as in
    `optax.chain(target_propagation(...), optax.add_decayed_weights(-1e-4,
    mask=leaves.weight_mask))`, acts on phi: it multiplies phi by 1 - 1e-4 and
    theta by (1 - 1e-4)^alpha per step, while the gradient that holds small
    weights up vanishes; for alpha > 1 it is a strong sparsifier, with the
    effect of a penalty |theta|^(2 / alpha).
  * `scale_by_power_jacobian(transform)` is the factor alone, the last link of a
    chain whose earlier links see phi as parameters.
  * `powerprop(inner, alpha)` keeps theta as the parameters of the caller.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax._src import base

from powerprop_jax import leaves
from powerprop_jax import power


def _require_params(params: Any) -> None:
  if params is None:
    raise ValueError(base.NO_PARAMS_MSG)


def target_propagation(
  inner: optax.GradientTransformation, transform: power.PowerTransform
) -> optax.GradientTransformationExtraArgs:
  """The update of `inner` at theta, carried over to phi.

  Args:
    inner: an optimiser, with its learning rate. Its state, and the parameters
      it is given, are those of theta. Its updates are scaled and not applied as
      they are: wrappers that count on that (schedule_free, lookahead,
      keep_params_nonnegative) go outside.
    transform: a `power.power_transform`.

  Returns:
    A gradient transformation for parameters phi and gradients taken at theta
    (not at phi: use `jax.grad` of a function of theta).

  References:
    Schwarz et al, `Powerpropagation`, NeurIPS 2021, section 2.
  """
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    return inner.init(transform.to_theta(params))

  def update_fn(updates, state, params=None, **extra_args):
    _require_params(params)
    theta = transform.to_theta(params)
    updates, state = inner.update(updates, state, theta, **extra_args)
    return transform.scale_by_jacobian(updates, params), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_power_jacobian(
  transform: power.PowerTransform,
) -> optax.GradientTransformation:
  """Multiplies updates by alpha |phi|^(alpha - 1); the parameters are phi.

  As the last link of a chain it is `target_propagation`, except that the other
  links see phi where they read the parameters: the decay of AdamW, the trust
  ratio of LARS.

  Args:
    transform: a `power.power_transform`.

  Returns:
    A gradient transformation without state.
  """

  def update_fn(updates, state, params=None):
    _require_params(params)
    return transform.scale_by_jacobian(updates, params), state

  return optax.GradientTransformation(optax.init_empty_state, update_fn)


def powerprop(
  inner: optax.GradientTransformation,
  alpha: power.Alpha,
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> optax.GradientTransformationExtraArgs:
  """Powerpropagation as a drop-in: the parameters stay theta.

  Wrap the optimiser of an existing training loop and change nothing else. Each
  update maps theta to phi, takes the step of `target_propagation` there, and
  returns the difference of the thetas. The trajectory is that of the phi form
  to rounding, and so is its fixed point: a weight that is exactly zero stays
  zero for alpha > 1.

  Args:
    inner: an optimiser, with its learning rate.
    alpha: the power, or a function of (path, leaf), as in
      `power.power_transform`.
    is_weight: which leaves are reparameterised.

  Returns:
    A gradient transformation for parameters and gradients of theta. Its init
    raises ValueError if none of the parameters is a weight by its name.
  """
  if not callable(alpha):
    alpha = power.check_alpha(alpha)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    power.exponents(params, alpha, is_weight)  # Raises on a bad alpha.
    if jax.tree.leaves(params):  # Optax looks into states with a placeholder.
      leaves.weight_rows(params, is_weight)
    return inner.init(params)

  def difference(a, update, theta):
    if a == 1.0:  # Where psi is the identity the update is kept as it is.
      return update
    wide = jnp.promote_types(theta.dtype, jnp.float32)
    phi = power.psi_inverse(theta.astype(wide), a)
    delta = update * power.psi_derivative(phi, a)
    # Not minus theta: psi(psi^-1(theta)) is theta but for a rounding, which is
    # biased and would add up over the steps. A weight whose update is zero does
    # not move at all, whichever way the compiler rounds.
    moved = power.psi(phi + delta, a) - power.psi(phi, a)
    return jnp.where(delta == 0, 0, moved).astype(update.dtype)

  def update_fn(updates, state, params=None, **extra_args):
    _require_params(params)
    updates, state = inner.update(updates, state, params, **extra_args)
    powers = power.exponents(params, alpha, is_weight)
    return jax.tree.map(difference, powers, updates, params), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)

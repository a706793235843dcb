r"""The power map between parameters phi and weights theta.

Powerpropagation (section 2 of the paper) replaces every weight of a network by

  theta = psi(phi) = phi |phi|^(alpha - 1),    alpha >= 1,

an odd, invertible map of the real line with psi'(phi) = alpha |phi|^(alpha - 1)
and psi^-1(theta) = sign(theta) |theta|^(1 / alpha). By the chain rule (equation
1) gradient descent on phi moves each weight in proportion to a power of its own
magnitude, so that small weights stay small: the network can be pruned harder.
For alpha = 1 the map is the identity and everything here returns its argument,
bit for bit.

The map is applied to a pytree of parameters, outside the network, by a
`PowerTransform`. Only weights are mapped; biases, scales and embeddings are
left untouched. Which leaf is a weight is decided by its name (see `leaves`):
`describe` prints the decision for every leaf.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  section 2.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import leaves

Params = Any  # A pytree of arrays.
Updates = Any


Alpha = float | Callable[[leaves.Path, Any], float]


class PowerTransform(NamedTuple):
  """A pair of inverse maps of pytrees, and the Jacobian of the first.

  Attributes:
    to_theta: maps phi to the weights theta that the network uses.
    to_phi: the inverse of `to_theta`.
    scale_by_jacobian: maps (u, phi) to alpha |phi|^(alpha - 1) u.
  """

  to_theta: Callable[[Params], Params]
  to_phi: Callable[[Params], Params]
  scale_by_jacobian: Callable[[Updates, Params], Updates]


def check_alpha(alpha: float) -> float:
  """Returns alpha as a float, or raises ValueError if it is not in [1, inf)."""
  try:
    value = float(alpha)
  except jax.errors.ConcretizationTypeError as e:
    raise ValueError(
      'alpha must be a number when the program is traced, got a traced value.'
      " Give optax.inject_hyperparams static_args=('alpha',)."
    ) from e
  if not (math.isfinite(value) and value >= 1.0):
    raise ValueError(
      f'alpha must be a finite number >= 1, got {alpha}. alpha = 1 is the'
      ' network without reparameterisation; the paper suggests (1, 3].'
    )
  return value


def _in_float32(f):
  """Evaluates f(x, ...) in float32 for half-precision x, and rounds once."""

  @functools.wraps(f)
  def wrapped(x, *args):
    x = jnp.asarray(x)
    if x.dtype in (jnp.bfloat16, jnp.float16):
      return f(x.astype(jnp.float32), *args).astype(x.dtype)
    return f(x, *args)

  return wrapped


def _products_and_roots(magnitude: jax.Array, exponent: float) -> jax.Array:
  """x^exponent for x >= 0 and an exponent that is a multiple of 1/8."""
  whole, eighths = divmod(round(8 * exponent), 8)
  # Horner's scheme over the binary digits, as 3/8: sqrt(sqrt(x sqrt(x))). No
  # root is used twice, so that XLA computes them all in one pass.
  root = None
  for bit in (1, 2, 4):
    if eighths & bit:
      root = magnitude if root is None else magnitude * root
    if root is not None:
      root = jnp.sqrt(root)
  power = jax.lax.integer_pow(magnitude, whole)
  return power if root is None else power * root


# XLA's pow costs more than the whole training step of LeNet-300-100 on a CPU,
# so products and square roots take its place where they can; exp2 and log2,
# which are a quarter of its price, where they cannot (LOG.md has the numbers).
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _abs_power(x: jax.Array, exponent: float) -> jax.Array:
  """|x|^exponent."""
  magnitude = jnp.abs(x)
  if exponent >= 0 and (8 * exponent).is_integer():
    return _products_and_roots(magnitude, exponent)
  return jnp.exp2(exponent * jnp.log2(magnitude))


@_abs_power.defjvp
def _abs_power_jvp(exponent, primals, tangents):
  (x,), (dx,) = primals, tangents
  slope = exponent * jnp.sign(x) * _abs_power(x, exponent - 1.0)
  return _abs_power(x, exponent), slope * dx


@_in_float32
def psi_derivative(x: jax.Array, alpha: float) -> jax.Array:
  """psi'(x) = alpha |x|^(alpha - 1), of the shape and dtype of x.

  Args:
    x: an array of floats.
    alpha: the power, >= 1.

  Returns:
    The derivative: 0 at x = 0 for alpha > 1, and 1 everywhere for alpha = 1.

  Raises:
    ValueError: if alpha is below 1 or not finite.
  """
  alpha = check_alpha(alpha)
  if alpha == 1.0:
    return jnp.ones_like(x)
  return alpha * _abs_power(x, alpha - 1.0)


# Differentiating x |x|^(alpha - 1) by the product rule gives 0 * inf = NaN at
# x = 0 for alpha < 2, hence a rule of its own.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@_in_float32
def _psi(x, alpha):
  return x * _abs_power(x, alpha - 1.0)


@_psi.defjvp
def _psi_jvp(alpha, primals, tangents):
  (x,), (dx,) = primals, tangents
  return _psi(x, alpha), psi_derivative(x, alpha) * dx


def psi(x: jax.Array, alpha: float) -> jax.Array:
  """psi(x) = x |x|^(alpha - 1): the weight theta of a parameter phi.

  The first derivative is finite and exact everywhere, zero included, for every
  alpha >= 1; the second is finite away from zero (at zero it is infinite for
  1 < alpha < 2). Half-precision arrays are mapped in float32 and rounded once.

  Args:
    x: an array of floats, phi.
    alpha: the power, >= 1. For alpha = 1, x itself is returned.

  Returns:
    theta, of the shape and dtype of x.

  Raises:
    ValueError: if alpha is below 1 or not finite.
  """
  alpha = check_alpha(alpha)
  return x if alpha == 1.0 else _psi(x, alpha)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@_in_float32
def _psi_inverse(x, alpha):
  return jnp.sign(x) * _abs_power(x, 1.0 / alpha)


@_psi_inverse.defjvp
def _psi_inverse_jvp(alpha, primals, tangents):
  (x,), (dx,) = primals, tangents
  phi = _psi_inverse(x, alpha)
  return phi, dx / psi_derivative(phi, alpha)


def psi_inverse(x: jax.Array, alpha: float) -> jax.Array:
  """psi^-1(x) = sign(x) |x|^(1 / alpha): the parameter phi of a weight theta.

  Its derivative is 1 / psi'(phi). It is infinite at zero for alpha > 1, as is
  the derivative of every root.

  Args:
    x: an array of floats, theta.
    alpha: the power, >= 1. For alpha = 1, x itself is returned.

  Returns:
    phi, of the shape and dtype of x.

  Raises:
    ValueError: if alpha is below 1 or not finite.
  """
  alpha = check_alpha(alpha)
  return x if alpha == 1.0 else _psi_inverse(x, alpha)


def _exponent(
  alpha: Alpha, is_weight: leaves.IsWeight, path: leaves.Path, leaf: Any
) -> float:
  # Trees may hold leaves that are no arrays, which are never weights.
  if not (hasattr(leaf, 'dtype') and is_weight(path, leaf)):
    return 1.0
  return check_alpha(alpha(path, leaf) if callable(alpha) else alpha)


def exponents(
  params: Params, alpha: Alpha, is_weight: leaves.IsWeight = leaves.is_weight
) -> Any:
  """The power of every leaf: alpha at weights, 1.0 elsewhere.

  Looked up by path at every call: a tree of powers, closed over, would fit no
  subtree of the parameters, such as an optimiser inside `optax.masked` sees.

  Args:
    params: a pytree of arrays.
    alpha: a float, or a function of (path, leaf).
    is_weight: a function of (path, leaf).

  Returns:
    A pytree of floats of the structure of params.
  """
  return leaves.map_with_path(
    functools.partial(_exponent, alpha, is_weight), params
  )


def power_transform(
  alpha: Alpha, is_weight: leaves.IsWeight = leaves.is_weight
) -> PowerTransform:
  """The maps between phi and theta for trees of parameters.

  Args:
    alpha: the power of every weight, or a function of (path, leaf) that gives
      each weight its own, where path is '/'-joined (`'mlp/linear_1/w'`).
      `alpha = 1` is the baseline; it takes the same code path.
    is_weight: a function of (path, leaf): which leaves are mapped. The others
      pass through untouched.

  Returns:
    A `PowerTransform`.

  Raises:
    ValueError: if alpha is below 1 or not finite; at the first use of the
      transform if alpha is a function.
  """
  if not callable(alpha):
    alpha = check_alpha(alpha)

  def powers(params):
    return exponents(params, alpha, is_weight)

  def to_theta(phi):
    return jax.tree.map(lambda a, x: psi(x, a), powers(phi), phi)

  def to_phi(theta):
    return jax.tree.map(lambda a, x: psi_inverse(x, a), powers(theta), theta)

  def scale(a, u, x):
    return u if a == 1.0 else (u * psi_derivative(x, a)).astype(u.dtype)

  def scale_by_jacobian(updates, phi):
    return jax.tree.map(scale, powers(phi), updates, phi)

  return PowerTransform(to_theta, to_phi, scale_by_jacobian)


def change_alpha(
  phi: Params, old: PowerTransform, new: PowerTransform
) -> Params:
  """The parameters under `new` of the function that phi is under `old`."""
  return new.to_phi(old.to_theta(phi))


class Description(NamedTuple):
  """One row of the table of `describe`."""

  path: str
  shape: tuple[int, ...]
  weight: bool
  why: str
  alpha: float


def describe(
  params: Params,
  alpha: Alpha = 1.0,
  is_weight: leaves.IsWeight = leaves.is_weight,
) -> list[Description]:
  """Prints and returns what a transform would do with every leaf.

  Args:
    params: a pytree of arrays.
    alpha: as in `power_transform`.
    is_weight: as in `power_transform`.

  Returns:
    One `Description` a leaf, in the order of the tree.
  """

  def row(path, leaf):
    chosen = bool(is_weight(path, leaf))
    default, why = leaves.decide(path, leaf)
    why = why if chosen == default else f'{why}, but is_weight chose otherwise'
    a = alpha(path, leaf) if callable(alpha) and chosen else alpha
    a = check_alpha(a) if chosen else 1.0  # pyright: ignore[reportArgumentType]
    return Description(str(path), tuple(np.shape(leaf)), chosen, why, a)

  rows = jax.tree.leaves(
    leaves.map_with_path(row, params),
    is_leaf=lambda x: isinstance(x, Description),
  )
  width = max([len(r.path) for r in rows] + [4])
  print(f'{"leaf":<{width}}  {"shape":<18} weight  alpha  why')
  for r in rows:
    print(
      f'{r.path:<{width}}  {r.shape!s:<18} {"yes" if r.weight else "no":<6}'
      f'  {r.alpha:<5g}  {r.why}'
    )
  return rows

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
`describe` tells the decision for every leaf.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  section 2.
"""

from collections.abc import Callable
import functools
import inspect
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
import tabulate

from powerprop_jax import leaves
from powerprop_jax import types


class PowerTransform(NamedTuple):
  """A pair of inverse maps of pytrees, with the Jacobian of the first.

  Attributes:
    to_theta: maps phi to the weights theta that the network uses.
    to_phi: the inverse of `to_theta`.
    scale_by_jacobian: maps (u, phi) to alpha |phi|^(alpha - 1) u.
    powers: maps phi, or theta, to the tree of the powers of its leaves, which
      is 1.0 at every leaf that is not a weight.
  """

  to_theta: Callable[[types.Params], types.Params]
  to_phi: Callable[[types.Params], types.Params]
  scale_by_jacobian: Callable[[types.Updates, types.Params], types.Updates]
  powers: Callable[[types.Params], types.Powers]


def check_alpha(alpha: chex.Numeric) -> float:
  """Returns alpha as a float if it is a possible power.

  Args:
    alpha: a number.

  Returns:
    The same number as a Python float.

  Raises:
    ValueError: if alpha is not in [1, inf), or is a traced value.

  >>> from powerprop_jax import power
  >>> power.check_alpha(2)
  2.0
  """
  if isinstance(alpha, str):
    raise ValueError(f'alpha must be a number, got {alpha!r}.')
  try:
    value = float(alpha)
  except jax.errors.ConcretizationTypeError as e:
    raise ValueError(
      'alpha must be a number when the program is traced, got a traced value.'
      ' With optax.inject_hyperparams, name alpha among the static_args, beside'
      " each argument that is a function: static_args=('alpha', 'is_weight')."
      ' A power that changes from step to step is for `powerprop`, whose alpha'
      ' may be a schedule.'
    ) from e
  if not (math.isfinite(value) and value >= 1.0):
    raise ValueError(
      f'alpha must be a finite number >= 1, got {alpha}. alpha = 1 is the'
      ' network without reparameterisation; the paper suggests (1, 3].'
    )
  return value


# Outside of traced functions a map compiles once for a shape, and not once for
# each operation; inside of them this adds nothing to the program.
_compiled = functools.partial(jax.jit, static_argnums=1, inline=True)


def _in_float32(f):
  """Evaluates f(x, ...) in float32 for half-precision x, and rounds once."""

  @functools.wraps(f)
  def wrapped(x, alpha):
    x = jnp.asarray(x)
    if x.dtype in (jnp.bfloat16, jnp.float16):
      return f(x.astype(jnp.float32), alpha).astype(x.dtype)
    return f(x, alpha)

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
# so products and square roots take its place where they can. Where they cannot,
# exp2 and log2 do, which cost a quarter of it (LOG.md has the numbers).
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def abs_power(x: jax.Array, exponent: float) -> jax.Array:
  """|x|^exponent, by products and square roots where these give it.

  Args:
    x: an array of floats.
    exponent: a number.

  Returns:
    An array of the shape and dtype of x.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import power
  >>> print(power.abs_power(jnp.array([-4.0, 9.0]), 1.5))
  [ 8. 27.]
  """
  magnitude, exponent = jnp.abs(x), float(exponent)
  if exponent >= 0 and (8 * exponent).is_integer():
    return _products_and_roots(magnitude, exponent)
  return jnp.exp2(exponent * jnp.log2(magnitude))


@abs_power.defjvp
def _abs_power_jvp(exponent, primals, tangents):
  (x,), (dx,) = primals, tangents
  slope = exponent * jnp.sign(x) * abs_power(x, exponent - 1.0)
  return abs_power(x, exponent), slope * dx


@_compiled
@_in_float32
def _psi_derivative(x, alpha):
  return alpha * abs_power(x, alpha - 1.0)


def psi_derivative(x: jax.Array, alpha: float) -> jax.Array:
  """psi'(x) = alpha |x|^(alpha - 1), of the shape and dtype of x.

  Args:
    x: an array of floats.
    alpha: the power, >= 1.

  Returns:
    The derivative: 0 at x = 0 for alpha > 1, and 1 everywhere for alpha = 1.

  Raises:
    ValueError: if alpha is below 1 or not finite.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import power
  >>> print(power.psi_derivative(jnp.array([-3.0, 0.0]), alpha=2.0))
  [6. 0.]
  """
  alpha = check_alpha(alpha)
  return jnp.ones_like(x) if alpha == 1.0 else _psi_derivative(x, alpha)


# Differentiating x |x|^(alpha - 1) by the product rule gives 0 * inf = NaN at
# x = 0 for alpha < 2, hence a rule of its own.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@_in_float32
def _psi(x, alpha):
  return x * abs_power(x, alpha - 1.0)


@_psi.defjvp
def _psi_jvp(alpha, primals, tangents):
  (x,), (dx,) = primals, tangents
  return _psi(x, alpha), psi_derivative(x, alpha) * dx


_compiled_psi = _compiled(_psi)


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

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import power
  >>> print(power.psi(jnp.array([-3.0, 0.5]), alpha=2.0))
  [-9.    0.25]
  """
  alpha = check_alpha(alpha)
  return x if alpha == 1.0 else _compiled_psi(x, alpha)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@_in_float32
def _psi_inverse(x, alpha):
  return jnp.sign(x) * abs_power(x, 1.0 / alpha)


@_psi_inverse.defjvp
def _psi_inverse_jvp(alpha, primals, tangents):
  (x,), (dx,) = primals, tangents
  phi = _psi_inverse(x, alpha)
  return phi, dx / psi_derivative(phi, alpha)


_compiled_psi_inverse = _compiled(_psi_inverse)


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

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import power
  >>> print(power.psi_inverse(jnp.array([-9.0, 0.25]), alpha=2.0))
  [-3.   0.5]
  """
  alpha = check_alpha(alpha)
  return x if alpha == 1.0 else _compiled_psi_inverse(x, alpha)


def is_traced(value: Any) -> bool:
  """Whether a value is known only when the compiled program runs.

  Args:
    value: anything.

  Returns:
    A bool.

  >>> import jax
  >>> from powerprop_jax import power
  >>> power.is_traced(2.0)
  False
  >>> jax.make_jaxpr(lambda x: print(power.is_traced(x)))(2.0).eqns
  True
  []
  """
  return isinstance(value, jax.core.Tracer)


def is_schedule(alpha: Any) -> bool:
  """Whether alpha is a schedule of optax and not a function of (path, leaf).

  Args:
    alpha: a number, a function of (path, leaf) or a function of the step.

  Returns:
    True if alpha can be called with one argument and not with two.

  >>> import optax
  >>> from powerprop_jax import power
  >>> power.is_schedule(optax.linear_schedule(1.0, 2.0, 1000))
  True
  >>> power.is_schedule(lambda path, leaf: 2.0), power.is_schedule(2.0)
  (False, False)
  """
  if not callable(alpha):
    return False

  def takes(*arguments):
    try:
      inspect.signature(alpha).bind(*arguments)
    except TypeError:
      return False
    return True

  return takes('step') and not takes('path', 'leaf')


def _exponent(
  alpha: types.Alpha,
  is_weight: types.IsWeight,
  path: types.Path,
  leaf: Any,
) -> chex.Numeric | None:
  """The power of a leaf, or None where it is not a weight."""
  # Trees may hold leaves that are no arrays, which are never weights.
  if not (hasattr(leaf, 'dtype') and is_weight(path, leaf)):
    return None
  value = alpha(path, leaf) if callable(alpha) else alpha
  return value if is_traced(value) else check_alpha(value)


def exponents(
  params: types.Params,
  alpha: types.Alpha,
  is_weight: types.IsWeight = leaves.is_weight,
) -> types.Powers:
  """The power of every leaf: alpha at weights, 1.0 elsewhere.

  The powers are looked up by path at every call: a tree of powers that is
  closed over would not fit a subtree of the parameters, such as an optimiser
  inside `optax.masked` sees. This function also makes the one check that there
  is something to reparameterise.

  Args:
    params: a pytree of arrays.
    alpha: a number, or a function of (path, leaf). Traced values pass as they
      are.
    is_weight: a function of (path, leaf).

  Returns:
    A pytree of the structure of params, of floats or of traced powers.

  Raises:
    ValueError: if a power is below 1 or not finite, or if no leaf is a weight
      although alpha is not 1 and some leaf has two dimensions or more, or the
      tree is one array. (The biases of a network by themselves, as a group of
      `optax.partition` sees them, pass.)

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import power
  >>> params = {'linear': {'w': jnp.ones((2, 2)), 'b': jnp.ones(2)}}
  >>> power.exponents(params, 3.0)
  {'linear': {'b': 1.0, 'w': 3.0}}
  """
  found = []

  def power(path, leaf):
    exponent = _exponent(alpha, is_weight, path, leaf)
    found.append(exponent is not None)
    return 1.0 if exponent is None else exponent

  powers = leaves.map_with_path(power, params)
  baseline = not (callable(alpha) or is_traced(alpha)) and alpha == 1.0
  if baseline or any(found):
    return powers
  flat = leaves.paths(params) == ['']  # As `optax.flatten` makes of any tree.
  if flat or any(np.ndim(x) >= 2 for x in jax.tree.leaves(params)):
    raise ValueError(
      'There is no weight among the leaves, so that alpha would do nothing.'
      ' Pass is_weight to say which leaves are weights, or alpha = 1'
      + (', or put `optax.flatten` inside of this' if flat else '')
      + '.\n'
      + describe(params, 1.0, is_weight)
    )
  return powers


def _is_zero(x: Any) -> bool:
  """Whether all elements of an array are known to be zero."""
  if is_traced(x) or not isinstance(x, jax.Array | np.ndarray):
    return False
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return False  # Random keys, which the state of a model may hold.
  # Known values stay known while a function that holds them is traced.
  with jax.ensure_compile_time_eval():
    on_cpu = jax.default_backend() == 'cpu'
    if on_cpu and getattr(x, 'is_fully_addressable', True):
      x = np.asarray(x)  # Numpy reads it in place and compiles nothing.
    return x.size > 0 and not (x != 0).any()


def check_not_zero(params: types.Params, powers: types.Powers) -> None:
  """Checks that no weight with a power starts as an array of zeros.

  Zero is a fixed point of the update for alpha > 1 (section 2 of the paper):
  such an array would never train, and nothing else would say so. Call it when
  training starts and not on sparse networks that are restored.

  Args:
    params: a pytree of arrays, phi or theta. Values that are traced pass.
    powers: the power of every leaf, from `exponents` or from the `powers` of a
      `PowerTransform`.

  Raises:
    ValueError: if all values of a leaf are zero and its power is not 1. The
      message names the leaves and the remedies.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import power
  >>> params = {'linear': {'w': jnp.zeros((2, 2)), 'b': jnp.zeros(2)}}
  >>> power.check_not_zero(params, power.exponents(params, 1.0))
  >>> power.check_not_zero(params, power.exponents(params, 2.0))
  Traceback (most recent call last):
    ...
  ValueError: All values of ['linear/w'] are zero, ...
  """
  zero = []

  def check(path, x, a):
    if (is_traced(a) or a != 1.0) and _is_zero(x):
      zero.append(str(path))

  leaves.map_with_path(check, params, powers)
  if zero:
    raise ValueError(
      f'All values of {zero} are zero, which is a fixed point for alpha > 1:'
      ' these weights would never train. Give them another initialiser, take'
      ' them out by is_weight, give them alpha = 1 by a function of (path,'
      ' leaf), or pass a floor > 0 to the optimiser (`powerprop` or'
      ' `target_propagation`).'
    )


def power_transform(
  alpha: types.Alpha, is_weight: types.IsWeight = leaves.is_weight
) -> PowerTransform:
  """The maps between phi and theta for trees of parameters.

  Args:
    alpha: the power of every weight, or a function of (path, leaf) that gives
      each weight its own, where path is '/'-joined (`'mlp/linear_1/w'`).
      `alpha = 1` is the baseline; it takes the same code path.
    is_weight: a function of (path, leaf): which leaves are mapped. The others
      pass through untouched.

  Returns:
    A `PowerTransform`. Its maps raise ValueError where nothing is a weight,
    unless alpha is 1 or no leaf has two dimensions or more.

  Raises:
    ValueError: if alpha is a schedule, or is below 1 or not finite. The values
      of a function are checked at each use of the transform.

  References:
    Schwarz et al, `Powerpropagation`, NeurIPS 2021, section 2.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import power
  >>> transform = power.power_transform(2.0)
  >>> phi = {'linear': {'w': jnp.array([[3.0, -0.5]]), 'b': jnp.ones(2)}}
  >>> print(transform.to_theta(phi)['linear']['w'])
  [[ 9.   -0.25]]
  """
  if is_schedule(alpha):
    raise ValueError(
      'alpha is a function of one argument, as a schedule is. The parameters'
      ' phi belong to one power: use `change_alpha` where it changes, or'
      ' `powerprop`, whose parameters are theta and whose alpha may be a'
      ' schedule.'
    )
  if not callable(alpha):
    alpha = check_alpha(alpha)

  def powers(params):
    return exponents(params, alpha, is_weight)

  def to_theta(phi):
    return jax.tree.map(lambda a, x: psi(x, a), powers(phi), phi)

  def to_phi(theta):
    return jax.tree.map(lambda a, x: psi_inverse(x, a), powers(theta), theta)

  def scale(a, u, x):
    # Optax lets None stand for the gradient of a frozen leaf.
    if u is None or a == 1.0:
      return u
    return (u * psi_derivative(x, a)).astype(u.dtype)

  def scale_by_jacobian(updates, phi):
    return jax.tree.map(scale, powers(phi), updates, phi)

  return PowerTransform(to_theta, to_phi, scale_by_jacobian, powers)


def change_alpha(
  phi: types.Params, old: PowerTransform, new: PowerTransform
) -> types.Params:
  """Converts parameters phi from one power to another, at the same theta.

  The state of an optimiser inside `target_propagation` belongs to theta and
  stays as it is.

  Args:
    phi: a pytree of arrays.
    old: the transform to which phi belongs.
    new: the transform to which the result belongs.

  Returns:
    A pytree of the structure and the shapes of phi.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import power
  >>> phi = {'linear': {'w': jnp.array([[4.0, -1.0]])}}
  >>> one, two = power.power_transform(1.0), power.power_transform(2.0)
  >>> print(power.change_alpha(phi, one, two)['linear']['w'])
  [[ 2. -1.]]
  """
  return new.to_phi(old.to_theta(phi))


def nats(
  alpha: float | optax.Schedule,
  decay: float | optax.Schedule,
  steps: int,
) -> float:
  """The nats of decay: alpha times the sum of the decay of phi over all steps.

  A weight that feels no gradient shrinks to e^-nats of its value. Compare nats
  of runs of one optimiser and one length: good recipes for one-shot pruning by
  SGD have 4 in 2,500 steps, 7 in 10,000 and 17 in 50,000, and with 1 or 2 a
  power hardly acts.

  Args:
    alpha: the power, a number or a schedule. It is 1 for a decay that is
      chained after `transforms.powerprop`, whose parameters are theta.
    decay: the fraction of phi that a step takes away, a number or a schedule,
      like the `rate` of `transforms.decay_phi`.
    steps: the number of steps.

  Returns:
    The number of nats.

  Raises:
    ValueError: if alpha is below 1 or not finite.

  >>> from powerprop_jax import power
  >>> power.nats(2.0, 1e-4, 50_000)
  10.0
  """

  def over_steps(x):
    values = jax.vmap(x)(jnp.arange(steps)) if callable(x) else x
    return np.broadcast_to(np.asarray(values, np.float64), (steps,))

  if not callable(alpha):
    alpha = check_alpha(alpha)
    if not callable(decay):
      return alpha * float(decay) * steps
  powers = over_steps(alpha)
  check_alpha(powers.min(initial=1.0))
  return float(np.sum(powers * over_steps(decay)))


class Description(NamedTuple):
  """One row of the table of `describe`.

  Attributes:
    path: the '/'-joined path of the leaf.
    shape: the shape of the leaf.
    weight: whether the leaf is a weight.
    alpha: its power, which is 1.0 if it is not a weight.
    zero: whether all of its values are known to be zero.
    why: the reason why the leaf is a weight or not.
  """

  path: str
  shape: tuple[int, ...]
  weight: bool
  alpha: float
  zero: bool
  why: str


def descriptions(
  params: types.Params,
  alpha: types.Alpha = 1.0,
  is_weight: types.IsWeight = leaves.is_weight,
) -> list[Description]:
  """What a transform would do with every leaf, as data.

  Args:
    params: a pytree of arrays, or of anything with a shape and a dtype.
    alpha: as in `power_transform`.
    is_weight: as in `power_transform`.

  Returns:
    One `Description` per leaf, in the order of the tree.

  Raises:
    ValueError: if alpha is below 1 or not finite.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import power
  >>> power.descriptions({'linear': {'b': jnp.zeros(3)}})[0].weight
  False
  """

  def row(path, leaf):
    power = _exponent(alpha, is_weight, path, leaf)
    chosen = power is not None
    default, why = leaves.decide(path, leaf)
    why = why if chosen == default else f'{why}, but is_weight chose otherwise'
    power = check_alpha(power) if chosen else 1.0
    shape = tuple(np.shape(leaf))
    return Description(str(path), shape, chosen, power, _is_zero(leaf), why)

  return jax.tree.leaves(
    leaves.map_with_path(row, params),
    is_leaf=lambda x: isinstance(x, Description),
  )


def describe(
  params: types.Params,
  alpha: types.Alpha = 1.0,
  is_weight: types.IsWeight = leaves.is_weight,
) -> str:
  """What a transform would do with every leaf, as a table to be printed.

  Args:
    params: a pytree of arrays, or of anything with a shape and a dtype.
    alpha: as in `power_transform`.
    is_weight: as in `power_transform`.

  Returns:
    The text of the table: the path and the shape of every leaf, whether it is a
    weight, its power, whether all of its values are zero (from where no weight
    moves for alpha > 1), and the reason why it is a weight or not.

  Raises:
    ValueError: if alpha is below 1 or not finite.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import power
  >>> params = {'linear': {'w': jnp.ones((2, 3)), 'b': jnp.zeros(3)}}
  >>> print(power.describe(params, alpha=2.0))
  leaf      shape    weight      alpha  all zero    why
  --------  -------  --------  -------  ----------  -----------------...
  linear/b  (3,)     no              1  yes         'b' is not the na...
  linear/w  (2, 3)   yes             2  no          Haiku weight
  """

  def yes(value):
    return 'yes' if value else 'no'

  rows = [
    (r.path, str(r.shape), yes(r.weight), r.alpha, yes(r.zero), r.why)
    for r in descriptions(params, alpha, is_weight)
  ]
  headers = ('leaf', 'shape', 'weight', 'alpha', 'all zero', 'why')
  return tabulate.tabulate(rows, headers)

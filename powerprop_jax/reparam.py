"""Haiku functions of the weights theta, turned into functions of phi.

Section 2 of the paper raises the parameters of a network to a power in the
forward pass. Here the power is taken of the whole tree of parameters before the
network sees it, rather than by a getter inside: the network, its initialisers
and its statistics stay as they are, and the gradient at theta is at hand for
`target_propagation` and for scoring masks. (A getter yields the gradient at phi
only, from which the one at theta follows by a division by zero at every pruned
weight.)
"""

from typing import Any, TypeVar

import haiku as hk

from powerprop_jax import power

_Transformed = TypeVar('_Transformed', hk.Transformed, hk.TransformedWithState)


def reparameterise(
  f: _Transformed, transform: power.PowerTransform
) -> _Transformed:
  """Turns a Haiku function of theta into the same function of phi.

  `init` draws theta as before and returns phi = psi^-1(theta), so that the
  network computes the same function at initialisation and the reasoning behind
  its initialisers holds (section 2). `apply` takes phi.

  Args:
    f: a pair made by `hk.transform` or `hk.transform_with_state`.
    transform: a `power.power_transform`.

  Returns:
    A pair of the same type as f. Its init raises ValueError if nothing is a
    weight (see `power.exponents`), or if all values of a weight are zero and
    its power is not 1.

  Raises:
    ValueError: if f is anything else.

  References:
    Schwarz et al, `Powerpropagation`, NeurIPS 2021, section 2.

  >>> import haiku as hk
  >>> import jax
  >>> from powerprop_jax import power
  >>> from powerprop_jax import reparam
  >>> f = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2)(x)))
  >>> g = reparam.reparameterise(f, power.power_transform(2.0))
  >>> x = jax.numpy.ones((1, 3))
  >>> theta, phi = f.init(jax.random.key(0), x), g.init(jax.random.key(0), x)
  >>> bool(jax.numpy.allclose(g.apply(phi, x), f.apply(theta, x)))
  True
  """

  def start(theta) -> Any:
    power.check_not_zero(theta, transform.powers(theta))
    return transform.to_phi(theta)

  if isinstance(f, hk.TransformedWithState):

    def init_with_state(*args, **kwargs):
      theta, state = f.init(*args, **kwargs)
      return start(theta), state

    def apply_with_state(phi, state, *args, **kwargs):
      return f.apply(transform.to_theta(phi), state, *args, **kwargs)

    return hk.TransformedWithState(init_with_state, apply_with_state)

  if not isinstance(f, hk.Transformed):
    raise ValueError(
      'f must be the result of hk.transform or hk.transform_with_state, got'
      f' {type(f).__name__}.'
    )

  def init(*args, **kwargs):
    return start(f.init(*args, **kwargs))

  def apply(phi, *args, **kwargs):
    return f.apply(transform.to_theta(phi), *args, **kwargs)

  return hk.Transformed(init, apply)

r"""Floating point operations of sparse networks, at inference and in training.

The field compares sparse methods by the operations that an ideal sparse
implementation would need. A matrix product or a convolution of density d costs
d times its dense operations, a multiplication and an addition counting as two;
padding is counted as if it were data; biases, normalisation and activations
are left out. A backward pass costs twice a forward pass: one product for the
gradient of the activations and one for that of the weights.

The dense cost of each layer is read off the program that JAX traces, so that it
is found for any function of a tree of parameters, from any library: each
product is attributed to the leaf from which its weights are derived.

References:
  Evci et al, `Rigging the lottery <https://arxiv.org/abs/1911.11134>`_, 2020,
  table 1 and the appendix on the calculation of FLOPs.
  Jayakumar et al, `Top-KAST <https://arxiv.org/abs/2106.03517>`_, 2020.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.extend import core
import numpy as np

from powerprop_jax import leaves

Params = Any  # A pytree of arrays, or of anything with shape and dtype.

#: The key of products in which no operand is a parameter, as in attention.
ACTIVATIONS = '(activations)'

# Every value in a traced program has a label (size, path): the largest
# parameter that it is derived from, if it depends on parameters alone. That of
# constants is lower and that of anything that depends on data is higher, so
# that the label of a result is the maximum of those of its arguments.
_Label = tuple[float, str]
_CONSTANT: _Label = (-1.0, '')
_DATA: _Label = (math.inf, '')

# Primitives that call the program they hold with their own arguments.
_CALLS = (
  *('jit', 'pjit', 'closed_call', 'core_call', 'remat', 'remat2', 'checkpoint'),
  *('custom_jvp_call', 'custom_vjp_call'),
)
_PRODUCTS = ('dot_general', 'conv_general_dilated')
_NOT_COUNTED = ('ragged_dot_general', 'scaled_dot', 'scaled_matmul')


def _shape(var: Any) -> tuple[int, ...]:
  return var.aval.shape


def _product_flops(eqn: core.JaxprEqn) -> float:
  """Twice the multiply-adds of a matrix product or a convolution."""
  left, right, out = (_shape(v) for v in (*eqn.invars, *eqn.outvars))
  size = math.prod(out)
  if eqn.primitive.name == 'dot_general':
    (contracting, _), _ = eqn.params['dimension_numbers']
    return 2.0 * size * math.prod(left[i] for i in contracting)
  # The kernel holds the inputs of one group only, so that groups come out
  # right. Zeros between the inputs of a transposed convolution cost nothing.
  output_dim = eqn.params['dimension_numbers'].rhs_spec[0]
  taps = math.prod(right) // right[output_dim]
  return 2.0 * size * taps / math.prod(eqn.params['lhs_dilation'])


def _walk_loop(jaxpr: core.Jaxpr, labels: list[_Label], carry: slice):
  """Walks a loop's body once its carry's labels no longer change."""
  while True:
    flops, outs = _walk(jaxpr, labels)
    before = labels[carry]
    after = [max(a, b) for a, b in zip(before, outs)]
    if after == before:
      return flops, after + outs[len(after) :]
    labels[carry] = after


def _scan_carry(eqn: core.JaxprEqn, body: core.Jaxpr) -> slice:
  """Where the carry of a scan is, between its constants and its slices.

  Only slices have another shape inside of the body than outside. The parameters
  `num_consts` and `num_carry`, which would tell, are gone since JAX 0.11.
  """

  def num_whole(outside, inside):
    return sum(_shape(a) == _shape(b) for a, b in zip(outside, inside))

  num_carry = num_whole(eqn.outvars, body.outvars)
  stop = num_whole(eqn.invars, body.invars)
  return slice(stop - num_carry, stop)


def _walk_eqn(eqn: core.JaxprEqn, labels: list[_Label]):
  """Operations by path of one equation, and the labels of its results."""
  name, params = eqn.primitive.name, eqn.params
  if name in _PRODUCTS:
    weights = [x for x in labels if x not in (_DATA, _CONSTANT)]
    path = max(weights)[1] if weights else ACTIVATIONS
    return {path: _product_flops(eqn)}, [max(labels)]
  if name in _CALLS:
    return _walk(params.get('jaxpr', params.get('call_jaxpr')), labels)
  if name == 'scan':
    body = params['jaxpr'].jaxpr
    flops, outs = _walk_loop(body, labels, _scan_carry(eqn, body))
    return {k: params['length'] * v for k, v in flops.items()}, outs
  if name == 'cond':
    # The most expensive branch is taken. No label of a result can exceed the
    # maximum of those of the arguments.
    branches = [_walk(b, labels[1:])[0] for b in params['branches']]
    flops = max(branches, key=lambda b: sum(b.values()))
    return flops, [max(labels)] * len(eqn.outvars)
  if name in _NOT_COUNTED or any(
    map(_has_product, core.jaxprs_in_params(params))
  ):
    raise ValueError(
      f'The products in a {name!r} cannot be counted: the number of times it'
      ' runs, or its arguments, are not known before it runs. Count the'
      ' function without it.'
    )
  return {}, [max(labels, default=_CONSTANT)] * len(eqn.outvars)


def _has_product(jaxpr: core.Jaxpr) -> bool:
  return any(
    e.primitive.name in _PRODUCTS + _NOT_COUNTED
    or any(map(_has_product, core.jaxprs_in_params(e.params)))
    for e in jaxpr.eqns
  )


def _walk(jaxpr: Any, labels: list[_Label]):
  """Operations by path of a program, and the labels of its results."""
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)  # Closed or not.
  known = dict(zip(jaxpr.invars, labels))

  def label(var):
    if isinstance(var, core.Literal):
      return _CONSTANT
    return known.get(var, _CONSTANT)

  total: dict[str, float] = {}
  for eqn in jaxpr.eqns:
    part, outs = _walk_eqn(eqn, [label(v) for v in eqn.invars])
    known.update(zip(eqn.outvars, outs))
    for path, flops in part.items():
      total[path] = total.get(path, 0.0) + flops
  return total, [label(v) for v in jaxpr.outvars]


def layer_flops(
  function: Callable[..., Any], params: Params, *args: Any
) -> dict[str, float]:
  """Dense operations of one call, by the path of the weights.

  Nothing is computed: `jax.ShapeDtypeStruct`s will do for params and args. Give
  a batch of one image for the operations per example. Products inside calls,
  loops of known length and the most expensive branch of a `jax.lax.cond` are
  counted.

  Args:
    function: a function of (params, *args), such as
      `lambda p, s, x: net.apply(p, s, None, x, False)`. It must close over
      masks and the like, where it applies any: a weight that depends on args is
      no longer recognised as one.
    params: a pytree of arrays.
    *args: pytrees of arrays: state, inputs. Values are told apart from weights
      by depending on these, so inputs must not be closed over.

  Returns:
    A dict of operations by '/'-joined path, in the order of first use, so that
    the first layer comes first. Products of activations among themselves are
    under `ACTIVATIONS`.

  Raises:
    ValueError: if there are no args, or products whose number is not known
      before they run, as in a `jax.lax.while_loop`.

  >>> def apply(params, images):
  ...   return images @ params['w'] + params['b']
  >>> params = {'w': np.zeros((784, 10)), 'b': np.zeros(10)}
  >>> layer_flops(apply, params, np.zeros((1, 784)))
  {'w': 15680.0}
  """
  if not jax.tree.leaves(args):
    raise ValueError(
      'There are no inputs: pass them as arguments after params, not by a'
      ' closure.'
    )
  jaxpr = jax.make_jaxpr(function)(params, *args)
  paths = jax.tree.leaves(leaves.map_with_path(lambda path, _: path, params))
  labels = [
    (float(math.prod(np.shape(x))), str(path))
    for path, x in zip(paths, jax.tree.leaves(params))
  ]
  data = [_DATA] * (len(jaxpr.jaxpr.invars) - len(labels))
  return _walk(jaxpr, labels + data)[0]


def inference_flops(
  layers: dict[str, float], densities: Any
) -> dict[str, float]:
  """Operations of each layer of a masked network, whose sum is the network's.

  Args:
    layers: dense operations by path, from `layer_flops`.
    densities: the fraction of the weights that is kept in each layer: a pytree
      of floats of the structure of the parameters, or a dict by path. Products
      of activations stay dense, unless there is an entry for `ACTIVATIONS`.

  Returns:
    A dict of operations by path.

  Raises:
    ValueError: if a layer's density is missing or outside [0, 1].

  >>> layers = {'conv': 1000.0, '(activations)': 10.0}
  >>> inference_flops(layers, {'conv': 0.1})
  {'conv': 100.0, '(activations)': 10.0}
  """
  paths = jax.tree.leaves(leaves.map_with_path(lambda path, _: path, densities))
  by_path = {
    str(p): float(d) for p, d in zip(paths, jax.tree.leaves(densities))
  }
  by_path.setdefault(ACTIVATIONS, 1.0)
  if missing := [path for path in layers if path not in by_path]:
    raise ValueError(f'densities has no {missing}; it has {list(by_path)}.')
  for path in layers:
    if not 0.0 <= by_path[path] <= 1.0:
      raise ValueError(
        f'The density of {path!r} is {by_path[path]}, not in [0, 1].'
      )
  return {path: by_path[path] * flops for path, flops in layers.items()}


def training_flops(inference: float) -> float:
  """Operations of a training step on one example: 3 f.

  This holds for a dense network, with f its operations at inference, and for a
  sparse one whose gradients are needed at its own weights only, by static
  masks, SNIP and SET. What these compute besides is left out: the scores of
  SNIP, which are computed once, and random growth.

  Args:
    inference: f, the operations of a forward pass on one example.

  Returns:
    The operations, where a multiply-add counts as two.

  >>> training_flops(100.0)
  300.0
  """
  return 3.0 * inference


def rigl_training_flops(
  dense: float, sparse: float, update_every: int
) -> float:
  """Operations of a step of RigL: (3 f_S n + 2 f_S + f_D) / (n + 1).

  Every n steps an update needs the gradient of all weights, which takes the
  sparse network twice (forward, and back through the activations) and the dense
  one once.

  Args:
    dense: f_D, the operations of a dense forward pass on one example.
    sparse: f_S, the operations of a sparse one.
    update_every: n, the number of steps between updates.

  Returns:
    The operations, as the average over steps with and without an update.

  Raises:
    ValueError: if update_every is below 1.

  >>> rigl_training_flops(dense=1000.0, sparse=100.0, update_every=99)
  309.0
  """
  if update_every < 1:
    raise ValueError(f'update_every must be at least 1, got {update_every}.')
  n = update_every
  return (3.0 * sparse * n + 2.0 * sparse + dense) / (n + 1)


def top_kast_training_flops(forward: float, backward: float) -> float:
  """Operations of a step of Top-KAST: 2 f_A + f_B.

  The forward pass and the gradient of the activations go through the weights of
  the forward set A; the gradient of the weights is taken in the backward set B.
  The choice of the sets is left out.

  Args:
    forward: f_A, the operations of a forward pass on one example with A.
    backward: f_B, the operations of one with B.

  Returns:
    The operations, where a multiply-add counts as two.

  >>> top_kast_training_flops(forward=100.0, backward=500.0)
  700.0
  """
  return 2.0 * forward + backward

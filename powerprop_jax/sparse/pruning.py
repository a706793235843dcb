"""One-shot pruning, and the accuracy it leaves.

Section 3 of the paper removes the weights of least magnitude once, after
training. Weights are always theta, never phi: across layers of different alpha
only |theta| can be compared. Other scores than the magnitude are functions here
too: the magnitude times the norm of the inputs (Wanda), and the magnitude of
theta times its gradient, which is to first order the change of the loss when a
weight is pruned.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  section 3.
  Sun et al, `A simple and effective pruning approach for large language models
  <https://arxiv.org/abs/2306.11695>`_, 2024 (Wanda).
  Molchanov et al, `Pruning convolutional neural networks for resource efficient
  inference <https://arxiv.org/abs/1611.06440>`_, ICLR 2017.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import math
import re
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import leaves
from powerprop_jax import types
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import masks

_SCOPES = ('layer', 'output', 'global')


@jax.jit
def _num_not_finite(params: types.Params) -> Any:
  return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x)), params)


def check_finite(params: types.Params) -> None:
  """Checks that no parameter is NaN or infinite.

  Args:
    params: a pytree of arrays, not traced.

  Raises:
    ValueError: if one is; the message names the leaf.

  >>> check_finite({'w': jnp.ones(2)})
  """
  found = jax.tree.leaves(jax.device_get(_num_not_finite(params)))
  for path, number in zip(leaves.paths(params), found):
    if number:
      raise ValueError(
        f'{number} entries of {str(path)!r} are NaN or infinite. If training'
        ' diverged, lower the learning rate or clip the gradients.'
      )


def magnitude_scores(
  theta: types.Params, is_weight: types.IsWeight = leaves.is_weight
) -> types.Params:
  """The scores |theta|, by which section 3 of the paper prunes.

  Args:
    theta: the parameters.
    is_weight: a function of (path, leaf); other leaves are returned as they
      are, and may be of any dtype.

  Returns:
    A pytree of arrays of the structure and the shapes of theta.

  >>> magnitude_scores({'w': jnp.array([-2.0, 1.0])})
  {'w': Array([2., 1.], dtype=float32)}
  """
  return leaves.map_with_path(
    lambda path, x: jnp.abs(x) if is_weight(path, x) else x, theta
  )


def _wide(x: jax.typing.ArrayLike) -> jax.Array:
  """An array in float32, or in float64 if it is that already."""
  return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def taylor_scores(
  theta: types.Params,
  grads: types.Updates,
  is_weight: types.IsWeight = leaves.is_weight,
) -> types.Params:
  """|theta dL/dtheta|, to first order the change of the loss without a weight.

  Args:
    theta: the parameters.
    grads: the gradient of the loss at theta, of the same structure and shapes.
    is_weight: a function of (path, leaf); other leaves are returned as they
      are.

  Returns:
    A pytree of arrays of the structure and the shapes of theta.

  >>> theta, grads = {'w': jnp.array([-2.0, 1.0])}, {'w': jnp.array([1.0, 3.0])}
  >>> taylor_scores(theta, grads)
  {'w': Array([2., 3.], dtype=float32)}
  """

  def score(path, x, g):
    if not is_weight(path, x):
      return x
    # In half precision the product of two small numbers is zero.
    return jnp.abs(_wide(x) * _wide(g))

  return leaves.map_with_path(score, theta, grads)


def wanda_scores(
  theta: types.Params,
  activations: Mapping[str, jax.Array],
  is_weight: types.IsWeight = leaves.is_weight,
  axes: types.AxesOf = leaves.axes,
) -> types.Params:
  """The scores of Wanda: |theta| times the norm of the input of the weight.

  A weight matters less where its input is small. As published, the weights of
  each output unit are ranked by themselves: `prune(..., scope='output')`.

  Args:
    theta: the parameters.
    activations: the inputs of each layer by the path of its weight: arrays
      [..., inputs], whose last dimensions are those of the weight's inputs, and
      whose others (examples, positions) are summed over. Where layers are
      stacked, the first dimensions are those of the stack. The activations of a
      convolution are its images [..., channels]; grouped convolutions have no
      score of this kind.
    is_weight: a function of (path, leaf); other leaves are returned as they
      are.
    axes: a function of (path, leaf) that tells which dimensions are inputs.

  Returns:
    A pytree of arrays of the structure and the shapes of theta.

  Raises:
    ValueError: if the activations of a weight are missing or do not fit it.

  >>> theta = {'linear': {'w': jnp.array([[1.0, -2.0], [3.0, 0.5]])}}
  >>> inputs = jnp.array([[3.0, 0.0], [4.0, 1.0]])  # Of two examples.
  >>> wanda_scores(theta, {'linear/w': inputs})['linear']['w']
  Array([[ 5. , 10. ],
         [ 3. ,  0.5]], dtype=float32)
  """

  def score(path, x):
    if not is_weight(path, x):
      return x
    if path not in activations:
      raise ValueError(
        f'activations has no {str(path)!r}; it has {list(activations)}.'
      )
    stack, inputs, _ = axes(path, x)
    given = activations[path]
    first, last = len(stack), given.ndim - len(inputs)
    expected = tuple(x.shape[i] for i in (*stack, *inputs))
    if last < first or given.shape[:first] + given.shape[last:] != expected:
      raise ValueError(
        f'The activations of {str(path)!r} have the shape {given.shape}, which'
        f' must begin with {expected[:first]} (the stack) and end with'
        f' {expected[first:]} (the inputs).'
      )
    others = tuple(range(first, last))
    # The squares of bytes, or of half precision, may be beyond their range.
    norm = jnp.sqrt(jnp.sum(jnp.square(_wide(given)), axis=others))
    # The norms have the dimensions of the stack and the inputs, in that order.
    norm = jnp.transpose(norm, np.argsort((*stack, *inputs)).tolist())
    missing = [i for i in range(x.ndim) if i not in (*stack, *inputs)]
    return jnp.abs(x) * jnp.expand_dims(norm, missing)

  return leaves.map_with_path(score, theta)


def _check_options(
  scope: str = 'layer',
  density_scale: Mapping[str, float] | None = None,
  is_weight: types.IsWeight = leaves.is_weight,
  axes: types.AxesOf = leaves.axes,
) -> None:
  """Raises ValueError if `prune` would refuse its options for any theta."""
  del is_weight, axes
  masks.check_scope(scope, _SCOPES)
  if scope == 'global' and density_scale:
    raise ValueError(
      f"density_scale = {density_scale} needs scope='layer' or 'output': under"
      " 'global' a layer has no density of its own."
    )
  for pattern, factor in (density_scale or {}).items():
    if not 0 < factor < math.inf:
      raise ValueError(
        'density_scale must be positive and finite, got'
        f' {{{pattern!r}: {factor}}}.'
      )


def _by_distribution(
  theta: types.Params,
  distribution: distributions.Distribution,
  scope: str,
  density_scale: Mapping[str, float] | None,
  is_weight: types.IsWeight,
) -> types.Counts | int:
  if density_scale or scope == 'output':
    raise ValueError(
      'A distribution says itself how many weights each layer keeps. To use'
      " density_scale or scope='output', give a density."
    )
  counts = distribution(theta)
  if scope == 'layer':
    return counts
  return total(counts, theta, is_weight)


def check_counts(
  counts: types.Counts, theta: types.Params, is_weight: types.IsWeight
) -> None:
  """Raises ValueError where counts cut what is not a weight.

  Args:
    counts: a `masks.Count` for each leaf.
    theta: the parameters, or their shapes.
    is_weight: a function of (path, leaf).

  >>> theta = {'w': jnp.ones((2, 3)), 'b': jnp.ones(2)}
  >>> check_counts({'w': 3, 'b': 2}, theta, leaves.is_weight)
  >>> check_counts({'w': 3, 'b': 1}, theta, leaves.is_weight)
  Traceback (most recent call last):
  ...
  ValueError: 1 of the 2 entries of 'b' are to be kept, but it is no...
  """
  flat = jax.tree.leaves(counts, is_leaf=masks.is_count)
  for path, x, n in zip(leaves.paths(theta), jax.tree.leaves(theta), flat):
    if isinstance(n, jax.Array) or is_weight(path, x):
      continue
    if (number := masks.num_entries(n, x.shape)) < x.size:
      raise ValueError(
        f'{number} of the {x.size} entries of {str(path)!r} are to be kept, but'
        ' it is not a weight. Give the distribution and the method the same'
        ' is_weight.'
      )


def total(
  counts: types.Counts,
  theta: types.Params,
  is_weight: types.IsWeight = leaves.is_weight,
) -> int:
  """How many weights are kept in all, for a global ranking.

  Args:
    counts: a `masks.Count` for each leaf.
    theta: the parameters, or their shapes.
    is_weight: a function of (path, leaf).

  Returns:
    The sum of the counts of the weights.

  Raises:
    ValueError: if a leaf keeps n of every m weights, which a global ranking
      cannot ensure, or as `check_counts`.

  >>> total({'w': 3, 'b': 2}, {'w': jnp.ones(5), 'b': jnp.ones(2)})
  3
  """
  check_counts(counts, theta, is_weight)
  flat = jax.tree.leaves(counts, is_leaf=masks.is_count)
  rows = zip(leaves.paths(theta), jax.tree.leaves(theta), flat)
  chosen = [(str(p), x.shape, n) for p, x, n in rows if is_weight(p, x)]
  for path, _, n in chosen:
    if isinstance(n, masks.NOfM):
      raise ValueError(
        f'{path!r} keeps {n.n} of every {n.m} weights, which a global ranking'
        " cannot ensure. Use scope='layer'."
      )
  return sum(masks.num_entries(n, shape) for _, shape, n in chosen)


def kept_counts(
  theta: types.Params,
  density: float | jax.Array | distributions.Distribution,
  scope: str = 'layer',
  density_scale: Mapping[str, float] | None = None,
  is_weight: types.IsWeight = leaves.is_weight,
  axes: types.AxesOf = leaves.axes,
) -> types.Counts | int:
  """How many weights `prune` keeps.

  Args:
    theta: the parameters, or their shapes.
    density: as in `prune`.
    scope: as in `prune`.
    density_scale: as in `prune`.
    is_weight: a function of (path, leaf).
    axes: as in `prune`.

  Returns:
    A tree of counts for `masks.layerwise_topk`, which has None at leaves that
    are not weights, or their size if a distribution tells the counts. If the
    scope is global, the number of all weights that are kept.

  Raises:
    ValueError: as `prune`.

  Warns:
    UserWarning: as `prune`.

  >>> theta = {'linear': {'w': jnp.ones([4, 5]), 'b': jnp.ones(5)}}
  >>> kept_counts(theta, 0.3), kept_counts(theta, 0.3, scope='global')
  ({'linear': {'b': None, 'w': 6}}, 6)
  """
  _check_options(scope, density_scale)
  if callable(density):
    return _by_distribution(theta, density, scope, density_scale, is_weight)
  static = not isinstance(density, jax.Array)
  if static:
    density = masks.check_density(density)
  rows, scale = leaves.weight_rows(theta, is_weight), density_scale or {}
  if scope == 'global':
    size = masks.check_rankable(sum(x.size for _, x in rows))
    kept = masks.num_kept(density, size)
    if static and not kept and size:
      warnings.warn(
        f'A density of {density:g} keeps none of the {size} weights.',
        stacklevel=3,
      )
    return kept
  for pattern in scale:
    if not any(re.search(pattern, path) for path, _ in rows):
      raise ValueError(
        f'The pattern {pattern!r} of density_scale matches none of the weights'
        f' {[str(path) for path, _ in rows]}.'
      )

  empty = []

  def number(path, leaf):
    if not is_weight(path, leaf):
      return None
    factor = next((f for p, f in scale.items() if re.search(p, path)), 1.0)
    least = min if static else jnp.minimum
    # Each layer of a stack is ranked by itself, or each of its units.
    stack, _, outputs = axes(path, leaf)
    apart = (*stack, *(outputs if scope == 'output' else ()))
    shape = tuple(n if i in apart else 1 for i, n in enumerate(leaf.shape))
    size = masks.check_rankable(leaf.size) // max(math.prod(shape), 1)
    kept = masks.num_kept(least(factor * density, 1.0), size)
    if static and not kept and size:
      empty.append(
        f'a density of {factor * density:g} keeps none of the {size} weights of'
        f' {"a unit" if scope == "output" else "a layer"} of {str(path)!r}'
      )
    if not apart:
      return kept
    return np.full(shape, kept) if static else jnp.full(shape, kept)

  counts = leaves.map_with_path(number, theta)
  if empty:
    warnings.warn(
      f'Pruning cuts the network: {"; ".join(empty)}. Raise their density by'
      ' density_scale.',
      stacklevel=3,
    )
  return counts


def _select(
  scores: types.Params, counts: Any, is_weight: types.IsWeight
) -> types.Mask:
  if jax.tree_util.treedef_is_leaf(jax.tree.structure(counts)):
    chosen = leaves.weight_mask(scores, is_weight)
    return masks.global_topk(scores, counts, chosen)
  return masks.layerwise_topk(scores, counts)


_select_compiled = jax.jit(_select, static_argnums=2)


@functools.partial(jax.jit, static_argnums=2)
def largest(
  theta: types.Params, counts: Any, is_weight: types.IsWeight
) -> types.Mask:
  """The mask of the largest |theta|.

  Args:
    theta: the parameters.
    counts: how many to keep, as `kept_counts` returns them, static or traced.
    is_weight: a function of (path, leaf).

  Returns:
    A pytree of boolean arrays of the structure of theta.

  >>> largest({'w': jnp.array([-2.0, 1.0])}, {'w': 1}, leaves.is_weight)
  {'w': Array([ True, False], dtype=bool)}
  """
  return _select(magnitude_scores(theta, is_weight), counts, is_weight)


def prune(
  theta: types.Params,
  density: float | jax.Array | distributions.Distribution,
  *,
  scope: str = 'layer',
  density_scale: Mapping[str, float] | None = None,
  scores: types.Params | None = None,
  is_weight: types.IsWeight = leaves.is_weight,
  axes: types.AxesOf = leaves.axes,
) -> types.Mask:
  """One-shot pruning (section 3): the mask of the weights of largest scores.

  Args:
    theta: the parameters. NaN is pruned first: see `check_finite`.
    density: the fraction of the weights to keep, in (0, 1], static or traced;
      decimal fractions count exactly, as in `masks.num_kept`. It may also be a
      distribution, such as `distributions.erdos_renyi(0.9)` or
      `distributions.n_of_m(2, 4)`, which tells how many weights each layer
      keeps.
    scope: 'layer' keeps floor(density * size) weights of every layer, 'output'
      of every output unit of every layer, and 'global' floor(density * total
      size) of all weights, wherever they are, which may leave a layer without
      any.
    density_scale: factors of the density by regular expression, searched for in
      the '/'-joined path; the first that matches counts. The layer then keeps
      the fraction min(1, factor * density). `{'logits': 2.0}` is the output
      layer of the paper's MNIST experiment.
    scores: a tree of the structure of theta, by which weights are ranked, such
      as `wanda_scores(theta, activations)` or `taylor_scores(theta, grads)`.
      None ranks by |theta|.
    is_weight: a function of (path, leaf); other leaves are kept whole.
    axes: a function of (path, leaf) that tells which layers are stacked in a
      leaf, each of which is ranked by itself, and which dimensions are outputs.

  Returns:
    A pytree of boolean arrays of the structure and the shapes of theta, sharded
    as it is. The counts are exact, and ties go to the lower index.

  Raises:
    ValueError: if the scope, a factor or a static density is impossible, two
      options exclude each other, a pattern matches no weight, there is no
      weight, 2^31 weights or more are ranked together, or scores have another
      structure or other shapes than theta.

  Warns:
    UserWarning: if a static density keeps no weight of a layer or of a unit, or
      none at all.

  >>> theta = {'linear': {'w': jnp.array([[3.0, -1.0], [0.5, -2.0]])}}
  >>> prune(theta, 0.5)['linear']['w']
  Array([[ True, False],
         [False,  True]], dtype=bool)
  """
  counts = kept_counts(theta, density, scope, density_scale, is_weight, axes)
  if scores is None:
    return largest(theta, counts, is_weight)
  if jax.tree.structure(scores) != jax.tree.structure(theta):
    raise ValueError(
      f'scores have the structure {jax.tree.structure(scores)}, but theta has'
      f' {jax.tree.structure(theta)}.'
    )
  rows = zip(leaves.paths(theta), *map(jax.tree.leaves, (theta, scores)))
  for path, x, score in rows:
    if jnp.shape(score) != jnp.shape(x):
      raise ValueError(
        f'The scores of {str(path)!r} have the shape {jnp.shape(score)}, but'
        f' the leaf has {jnp.shape(x)}.'
      )
  return _select_compiled(scores, counts, is_weight)


def floats(scalars: Iterable[Any]) -> list[float]:
  """Makes floats of scalars, and waits for the device once for all of them.

  Args:
    scalars: arrays of one entry.

  Returns:
    A list of floats.

  >>> floats([jnp.float32(0.5), jnp.int32(2)])
  [0.5, 2.0]
  """
  return [float(x) for x in jax.device_get(list(scalars))]


def make_prune_sweep(
  evaluate: Callable[..., Any], kept: Sequence[float], **options: Any
) -> Callable[..., list[float]]:
  """A function that evaluates a network pruned to each of several densities.

  It is compiled once for all densities and all networks of one architecture.

  Args:
    evaluate: a function of (theta, *args) to a scalar, such as the accuracy, to
      be compiled. Pass data as args: where they are closed over, they become
      constants.
    kept: the fractions of weights to keep, each in (0, 1].
    **options: `scope`, `density_scale`, `is_weight` and `axes` of `prune`.

  Returns:
    A function of (theta, *args) that returns one float for each fraction, and
    raises ValueError if theta is not finite.

  Raises:
    ValueError: if a fraction or an option is impossible.

  >>> sweep = make_prune_sweep(lambda theta: jnp.sum(theta['w']), [0.5, 1.0])
  >>> sweep({'w': jnp.array([1.0, 2.0, 3.0, 4.0])})
  [7.0, 10.0]
  """
  _check_options(**options)
  fractions = [masks.check_density(p) for p in kept]
  is_weight = options.get('is_weight', leaves.is_weight)

  # Counts are traced and not densities, so that they are those of `prune`: an
  # array holds a density to six decimals only.
  @jax.jit
  def evaluate_pruned(theta, counts, args):
    mask = largest(theta, counts, is_weight)
    return evaluate(masks.apply_mask(theta, mask), *args)

  def sweep(theta: types.Params, *args: Any) -> list[float]:
    check_finite(theta)
    counts = [kept_counts(theta, p, **options) for p in fractions]
    return floats(evaluate_pruned(theta, n, args) for n in counts)

  return sweep

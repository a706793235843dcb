"""Which leaves of a tree of parameters are weights.

Section 2 of the paper applies the reparameterisation to the weights of a
network only, leaving other parameters untouched, and sparsity counts weights
only. A leaf is told apart by its name, the last part of its path, in the trees
of Haiku, Flax and Equinox. To choose otherwise, pass your own function of
(path, leaf) wherever `is_weight` is an argument.

Names also tell which dimensions of a weight are the inputs and the units of a
layer, and which are layers of a stack (`axes`). Where they do not, pass your
own function wherever `axes` is an argument.
"""

from collections.abc import Callable, Collection, Mapping
import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import types

_Tree = TypeVar('_Tree')

# Leaves are weights if the last part of their path is one of these names ...
_WEIGHT_NAMES = {
  'w': 'Haiku weight',
  'w_i': 'Haiku GRU weight',
  'w_h': 'Haiku GRU weight',
  'kernel': 'Flax kernel',
}
# ... or one of these, held by an Equinox module of one of these classes.
_OWNED_NAMES = ('weight', 'weight_ih', 'weight_hh')
_OWNERS = ('Linear', 'Conv', 'ConvTranspose', 'GRUCell', 'LSTMCell')
_EMBEDDING_NAMES = ('embeddings', 'embedding')


def decide(path: str, leaf: Any, embeddings: bool = False) -> tuple[bool, str]:
  """Whether a leaf is a weight, and why.

  Args:
    path: the '/'-joined path of the leaf.
    leaf: the array, or anything with a dtype.
    embeddings: whether embedding tables count as weights.

  Returns:
    The decision of `is_weight`, and the reason for it as text.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import leaves
  >>> leaves.decide('linear/w', jnp.ones((2, 3)))
  (True, 'Haiku weight')
  """
  name = path.rsplit('/', 1)[-1]
  owner = getattr(path, 'owner', None)
  classes = [c.__name__ for c in owner.__mro__] if owner else []
  if name in _EMBEDDING_NAMES or (name == 'weight' and 'Embedding' in classes):
    decision = embeddings, 'embedding'
  elif name in _WEIGHT_NAMES:
    decision = True, _WEIGHT_NAMES[name]
  elif name in _OWNED_NAMES and owner is not None:
    known = not set(_OWNERS).isdisjoint(classes)
    decision = known, f'{name} of {owner.__name__}'
  else:
    decision = False, f'{name!r} is not the name of a weight'
  if decision[0] and not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
    return False, f'{jnp.result_type(leaf)} is not real floating point'
  return decision


def is_weight(path: str, leaf: Any, *, embeddings: bool = False) -> bool:
  """Whether a leaf is a weight, by its name; the default everywhere.

  Weights are `w` (and the GRU's `w_i`, `w_h`) in Haiku, `kernel` in Flax, and
  in Equinox the `weight` of linear layers and convolutions, and `weight_ih` and
  `weight_hh` of recurrent cells. Biases are never weights, nor are the scales
  and offsets of normalisation layers, nor arrays of a dtype that is not a real
  floating point one. Names are used and not ranks, since Haiku's BatchNorm
  scales have four dimensions.

  Args:
    path: the '/'-joined path of the leaf.
    leaf: the array.
    embeddings: whether embedding tables count as weights. Ask for it with
      `functools.partial(is_weight, embeddings=True)`.

  Returns:
    True if the leaf is a weight.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import leaves
  >>> leaves.is_weight('linear/w', jnp.ones((2, 3)))
  True
  >>> leaves.is_weight('linear/b', jnp.ones(3))
  False
  """
  return decide(path, leaf, embeddings)[0]


# The layers whose kernels have a fixed number of dimensions, so that any others
# in front of these belong to a stack: the classes of Flax and Equinox ...
_RANKS = {'Dense': 2, 'Linear': 2, 'GRUCell': 2, 'LSTMCell': 2, 'Embedding': 2}
_RANKS |= {f'Conv{n}d': n + 2 for n in (1, 2, 3)}
_RANKS |= {f'ConvTranspose{n}d': n + 2 for n in (1, 2, 3)}
# ... and the modules of Haiku, by the names that they give themselves.
_HAIKU_LINEAR = re.compile(r'(linear|query|key|value)(_\d+)?')
_HAIKU_CONV = re.compile(r'(depthwise_)?conv([123])_d(_transpose)?(_\d+)?')
# Flax names a lifted module after its transformations: `ScanCheckpointBlock_0`.
_LIFTED = re.compile(r'(Scan|Vmap|Remat_scan|Checkpoint|Jit)(?=_?[A-Z])')


def _stacks(path: str) -> tuple[int, str]:
  """The number of stack axes that the path tells of; the path without lifts."""
  count, modules = 0, []
  for module in path.split('/'):
    count += module.startswith('__layer_stack')
    while lifted := _LIFTED.match(module):
      count += lifted[1] in ('Scan', 'Vmap')
      module = module[lifted.end() :]
    modules.append(module)
  return count, '/'.join(modules)


def _rank(path: str, classes: list[str], rank: int) -> int | None:
  """The dimensions of one layer's kernel, if its name or its class tells.

  Args:
    path: the path, without the names of lifted transformations.
    classes: the classes of the module that holds the leaf.
    rank: the dimensions that are left without the stack axes in the path.
  """
  parent, module, name = ['', '', *path.split('/')][-3:]
  if name in ('w_i', 'w_h', *_EMBEDDING_NAMES):
    return 2
  if name == 'w':
    conv = _HAIKU_CONV.fullmatch(module)
    if conv:
      return int(conv[2]) + 2
    return 2 if _HAIKU_LINEAR.fullmatch(module) else None
  if name == 'kernel' and module in ('query', 'key', 'value', 'out'):
    attention = re.search('att|mha', parent, re.IGNORECASE)
    return 3 if rank == 3 or (rank > 3 and attention) else None
  classes = [*classes, re.sub(r'_\d+$', '', module)]
  return next((_RANKS[c] for c in classes if c in _RANKS), None)


def axes(
  path: types.Path | str, leaf: Any, *, stacked: str | None = None
) -> types.Axes:
  """Which dimensions of a weight are layers of a stack, inputs and outputs.

  The number of dimensions does not tell: linear layers stacked by a scan, the
  kernels of an attention with heads, and convolutions look alike. Names and
  classes tell more, and this function knows

  * Haiku: linear layers, convolutions [taps, inputs, outputs] (grouped and
    depthwise ones have the inputs of one group), transposed convolutions
    [taps, outputs, inputs] as long as 'transpose' is in the module's name, and
    recurrent cores; `layer_stack`.
  * Flax, linen and nnx: `Dense`, `Conv`, `ConvTranspose`, `DenseGeneral` of one
    input dimension, recurrent cells; in an attention the `query`, `key` and
    `value` [inputs, heads, size] and `out` [heads, size, outputs]; modules
    lifted by `nn.scan` and `nn.vmap`, under the names that Flax gives them.
  * Equinox: `Linear` [outputs, inputs], convolutions of both kinds [outputs,
    inputs, taps], recurrent cells; the kernels of `filter_vmap` where the class
    has a fixed number of dimensions (not the general `Conv`).

  It cannot see that layers are stacked under a name of the user's
  (`nn.scan(...)(name='layers')`, `nnx.vmap`, `layer_stack(name='blocks')`),
  unless they are `Dense_0` or `linear`, and takes the stack for the taps of a
  convolution. Say so by `functools.partial(axes, stacked='^layers/')`. In other
  cases that it does not know (`transpose_kernel=True` in Flax,
  `variable_axes={'params': 1}`, `Einsum`, `DenseGeneral` of several input
  dimensions, `remat_scan` of convolutions) pass a function of your own.

  Args:
    path: the '/'-joined path of the leaf.
    leaf: the array, or anything with a shape.
    stacked: a regular expression for paths of leaves with one leading stack
      dimension. It takes precedence over what the names say.

  Returns:
    The `Axes`, as non-negative numbers. The dimension of a leaf that has only
    one is an output.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import leaves
  >>> leaves.axes('conv2_d_transpose/w', jnp.ones((2, 2, 8, 3)))
  Axes(stack=(), inputs=(3,), outputs=(2,))
  >>> kernel = jnp.ones((6, 32, 4, 8))
  >>> leaves.axes('ScanBlock_0/Attention_0/query/kernel', kernel)
  Axes(stack=(0,), inputs=(1,), outputs=(2, 3))
  """
  ndim = len(np.shape(leaf))
  count, plain = _stacks(path)
  owner = getattr(path, 'owner', None)
  classes = [c.__name__ for c in owner.__mro__] if owner else []
  if stacked is not None and re.search(stacked, path):
    count = 1
  else:
    rank = _rank(plain, classes, ndim - count)
    count = count if rank is None else ndim - rank
  first = min(max(count, 0), ndim)
  rest = range(first, ndim)

  module, name = ['', *plain.split('/')][-2:]
  # PyTorch names and stores its weights as Equinox does, without a class here.
  outputs_first = name in _OWNED_NAMES and 'Embedding' not in classes
  projects = name == 'kernel' and module in ('query', 'key', 'value')
  general = module.startswith('DenseGeneral') or 'LinearGeneral' in classes
  if len(rest) < 2:
    inputs, outputs = rest[:0], rest
  elif outputs_first:
    inputs, outputs = rest[1:2], rest[:1]
  elif name == 'w' and 'transpose' in module:
    inputs, outputs = rest[-1:], rest[-2:-1]
  elif name == 'kernel' and module == 'out' and len(rest) == 3:
    inputs, outputs = rest[:2], rest[2:]
  elif general or (projects and len(rest) == 3):
    inputs, outputs = rest[:1], rest[1:]
  else:
    inputs, outputs = rest[-2:-1], rest[-1:]
  return types.Axes(tuple(range(first)), tuple(inputs), tuple(outputs))


def _owner(tree: Any, key_path: tuple[Any, ...]) -> type | None:
  """The class of the node in which a leaf is, or None if it is unknown."""
  node = tree
  for key in key_path[:-1]:
    if isinstance(key, jax.tree_util.GetAttrKey):
      node = getattr(node, key.name)
    elif isinstance(key, jax.tree_util.SequenceKey):
      node = node[key.idx]
    elif isinstance(key, jax.tree_util.DictKey):
      node = node[key.key]
    else:
      return None
  return type(node)


def _path(tree: Any, key_path: tuple[Any, ...]) -> types.Path:
  if key_path and key_path[-1] == jax.tree_util.GetAttrKey('value'):
    # Flax nnx hides each array in the `value` of a variable.
    owner = _owner(tree, key_path)
    classes = () if owner is None else owner.__mro__
    if not classes or any(x.__module__.startswith('flax.') for x in classes):
      key_path = key_path[:-1]
  path = types.Path(jax.tree_util.keystr(key_path, simple=True, separator='/'))
  if key_path and isinstance(key_path[-1], jax.tree_util.GetAttrKey):
    path.owner = _owner(tree, key_path)
  return path


def zeros_for_sum(tree: Any) -> Any:
  """Zeros to which trees like this one are added, many times over.

  A sum of half precision stops growing after a few hundred terms, so that these
  are of single precision or better.

  Args:
    tree: a pytree of arrays of floats.

  Returns:
    A pytree of the structure, the shapes and the shardings of tree.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import leaves
  >>> leaves.zeros_for_sum({'w': jnp.ones(2, jnp.bfloat16)})
  {'w': Array([0., 0.], dtype=float32)}
  """
  return jax.tree.map(
    lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)), tree
  )


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """`jax.tree.map` with the `Path` of the leaf as the first argument of f.

  Args:
    f: a function of a path and one leaf of every tree.
    tree: a pytree, which gives the paths.
    *rest: pytrees of the structure of tree, or with subtrees at its leaves.

  Returns:
    A pytree of the structure of tree.

  >>> from powerprop_jax import leaves
  >>> tree = {'linear': {'w': 1.0, 'b': 0.0}}
  >>> leaves.map_with_path(lambda path, x: f'{path} is {x}', tree)
  {'linear': {'b': 'linear/b is 0.0', 'w': 'linear/w is 1.0'}}
  """
  return jax.tree_util.tree_map_with_path(
    lambda key_path, *leaves: f(_path(tree, key_path), *leaves), tree, *rest
  )


def paths(tree: Any) -> list[types.Path]:
  """The paths of the leaves, in the order of the tree.

  Args:
    tree: a pytree.

  Returns:
    One `types.Path` per leaf.

  >>> from powerprop_jax import leaves
  >>> leaves.paths({'linear': {'w': 1.0, 'b': 0.0}})
  ['linear/b', 'linear/w']
  """
  return jax.tree.leaves(map_with_path(lambda path, _: path, tree))


def by_path(tree: Any, only: Collection[str] | None = None) -> dict[str, Any]:
  """The leaves of a tree by their paths, in the order of the tree.

  Args:
    tree: a pytree.
    only: the paths of the leaves to return; None returns all.

  Returns:
    A dict of leaves.

  Raises:
    ValueError: if two leaves have the same path.

  >>> from powerprop_jax import leaves
  >>> tree = {'linear': {'w': 1.0, 'b': 0.0}}
  >>> leaves.by_path(tree)
  {'linear/b': 0.0, 'linear/w': 1.0}
  >>> leaves.by_path(tree, only=['linear/w'])
  {'linear/w': 1.0}
  """
  found = list(zip(map(str, paths(tree)), jax.tree.leaves(tree)))
  named = dict(found)
  if len(named) < len(found):
    raise ValueError(
      f'Two leaves of the tree have the same path. Rename one: {sorted(named)}.'
    )
  return {p: x for p, x in found if only is None or p in only}


def put(tree: _Tree, found: Mapping[str, Any]) -> _Tree:
  """Replaces some leaves of a tree, which are given by their paths.

  Args:
    tree: a pytree.
    found: the new leaves by path; paths that the tree does not have are
      ignored.

  Returns:
    A pytree of the structure of tree.

  >>> from powerprop_jax import leaves
  >>> leaves.put({'linear': {'w': 1.0, 'b': 0.0}}, {'linear/w': 7.0})
  {'linear': {'b': 0.0, 'w': 7.0}}
  """
  return map_with_path(lambda path, x: found.get(path, x), tree)


def weight_mask(params: Any, is_weight: types.IsWeight = is_weight) -> Any:
  """The tree of params with True at weights and False elsewhere.

  It fits the `mask` argument of optax transforms, such as
  `optax.add_decayed_weights(1e-4, mask=leaves.weight_mask)`.

  Args:
    params: a pytree of arrays.
    is_weight: a function of (path, leaf).

  Returns:
    A pytree of bools of the structure of params.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import leaves
  >>> leaves.weight_mask({'linear': {'w': jnp.ones((2, 3)), 'b': jnp.ones(3)}})
  {'linear': {'b': False, 'w': True}}
  """
  return map_with_path(lambda p, x: bool(is_weight(p, x)), params)


def weight_rows(
  params: Any, is_weight: types.IsWeight, *rest: Any
) -> list[tuple[Any, ...]]:
  """The weights of a tree, with their paths and their leaves in other trees.

  Args:
    params: a pytree of arrays.
    is_weight: a function of (path, leaf).
    *rest: pytrees of the structure of params.

  Returns:
    A tuple (path, leaf, *leaves of rest) for each weight, in the order of the
    tree.

  Raises:
    ValueError: if no leaf is a weight, or the trees differ in how many leaves
      they have.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import leaves
  >>> params = {'linear': {'w': jnp.ones((2, 3)), 'b': jnp.ones(3)}}
  >>> [path for path, _ in leaves.weight_rows(params, leaves.is_weight)]
  ['linear/w']
  """
  found = paths(params)
  columns = [found, *map(jax.tree.leaves, (params, *rest))]
  if len(set(map(len, columns))) > 1:
    raise ValueError(
      f'The trees must have the same leaves, {", ".join(found) or "none"}; they'
      f' have {", ".join(str(len(column)) for column in columns[1:])} leaves.'
    )
  chosen = [row for row in zip(*columns) if is_weight(row[0], row[1])]
  if not chosen:
    reasons = [
      f'{path} ({decide(path, leaf)[1]})'
      for path, leaf in zip(found, jax.tree.leaves(params))
    ]
    raise ValueError(
      f'There is no weight among the leaves: {", ".join(reasons) or "none"}.'
      ' Pass is_weight to say which are weights.'
    )
  return chosen

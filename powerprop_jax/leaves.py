"""Which leaves of a tree of parameters are weights.

Section 2 of the paper applies the reparameterisation to the weights of a
network only, leaving other parameters untouched, and sparsity counts weights
only. A leaf is told apart by its name, the last part of its path, in the trees
of Haiku, Flax and Equinox. Pass a function of (path, leaf) of your own wherever
`is_weight` is an argument to choose otherwise.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp


class Path(str):
  """The '/'-joined path of a leaf; `owner` is the class that holds it, if any.

  Haiku and Flax name their leaves by what they are (`w`, `kernel`, `scale`).
  Equinox calls the weight of a `Linear` and of a `LayerNorm` alike, so the name
  alone cannot tell them apart and the class has to.
  """

  owner: type | None = None


IsWeight = Callable[[Path, Any], bool]

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
  """Whether a leaf is a weight, and why."""
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
  in Equinox the `weight` of linear layers, convolutions and recurrent cells.
  Never biases, nor the scales and offsets of normalisation layers. Names are
  used and not ranks, since Haiku's BatchNorm scales have four dimensions.

  Args:
    path: the '/'-joined path of the leaf.
    leaf: the array.
    embeddings: whether embedding tables count as weights. Ask for it with
      `functools.partial(is_weight, embeddings=True)`.

  Returns:
    A bool.
  """
  return decide(path, leaf, embeddings)[0]


def _path(tree: Any, key_path: tuple[Any, ...]) -> Path:
  # Flax nnx hides each array in the `value` of a variable.
  if key_path and key_path[-1] == jax.tree_util.GetAttrKey('value'):
    key_path = key_path[:-1]
  path = Path(jax.tree_util.keystr(key_path, simple=True, separator='/'))
  if key_path and isinstance(key_path[-1], jax.tree_util.GetAttrKey):
    node = tree
    for key in key_path[:-1]:
      if isinstance(key, jax.tree_util.GetAttrKey):
        node = getattr(node, key.name)
      elif isinstance(key, jax.tree_util.SequenceKey):
        node = node[key.idx]
      elif isinstance(key, jax.tree_util.DictKey):
        node = node[key.key]
      else:
        return path
    path.owner = type(node)
  return path


def by_path(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by their paths.

  Raises:
    ValueError: if two leaves have the same path.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
  named = {name(path): leaf for path, leaf in leaves}
  if len(named) < len(leaves):
    raise ValueError(
      f'Two leaves of the tree have the same path. Rename one: {sorted(named)}.'
    )
  return named


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """`jax.tree.map` with the leaf's `Path` as the first argument of f."""
  return jax.tree_util.tree_map_with_path(
    lambda key_path, *leaves: f(_path(tree, key_path), *leaves), tree, *rest
  )


def weight_mask(params: Any, is_weight: IsWeight = is_weight) -> Any:
  """The tree of params with True at weights and False elsewhere.

  Fits the `mask` argument of optax transforms, such as
  `optax.add_decayed_weights(1e-4, mask=leaves.weight_mask)`.

  Args:
    params: a pytree of arrays.
    is_weight: a function of (path, leaf).

  Returns:
    A pytree of bools of the structure of params.
  """
  return map_with_path(lambda p, x: bool(is_weight(p, x)), params)


def weight_rows(
  params: Any, is_weight: IsWeight, *rest: Any
) -> list[tuple[Any, ...]]:
  """(path, leaf, leaves of rest) of every weight, in the order of the tree."""
  paths = jax.tree.leaves(map_with_path(lambda p, _: p, params))
  rows = zip(paths, jax.tree.leaves(params), *map(jax.tree.leaves, rest))
  chosen = [row for row in rows if is_weight(row[0], row[1])]
  if not chosen:
    raise ValueError(
      f'There is no weight among the leaves {[str(p) for p in paths]}. Pass'
      ' is_weight to say which are weights.'
    )
  return chosen

"""How the leaves of a network are kept from task to task.

In continual learning (section 4 of the paper) a task is more than a mask of
weights. The biases, the parameters and the statistics of normalisation, and the
last layer belong to tasks too, and each leaf is of one of four kinds:

  * `masked`: a weight has one owner, and a task has one bit per weight;
  * `private`: starts afresh with every task, and each task stores its own;
  * `frozen`: learnt with the first task, and fixed from then on;
  * `shared`: changes with every task, by which earlier tasks are forgotten.

Leaves are named by their '/'-joined path, and groups of them are dictionaries
by path.
"""

import re
from typing import NamedTuple

from powerprop_jax import leaves
from powerprop_jax.types import IsWeight
from powerprop_jax.types import Params

_KINDS = {
  'weights': ('masked', 'private', 'shared'),
  'heads': ('private', 'shared'),
  'biases': ('private', 'frozen', 'shared'),
  'norm': ('private', 'frozen', 'shared'),
}


class Layout(NamedTuple):
  """How every leaf of a network is kept.

  Attributes:
    kinds: 'masked', 'private', 'frozen' or 'shared', by the path of the leaf.
    state: the kind of the statistics of normalisation: any but 'masked'.
  """

  kinds: dict[str, str]
  state: str


def make_layout(
  params: Params,
  *,
  weights: str = 'masked',
  heads: str = 'private',
  biases: str = 'private',
  norm: str = 'private',
  head: str = 'logits',
  is_weight: IsWeight = leaves.is_weight,
) -> Layout:
  """Says how every leaf of a network is kept.

  Args:
    params: a pytree of arrays, or of their shapes.
    weights: 'masked', 'private' or 'shared'.
    heads: 'private', by which every task has a last layer of its own, weights
      included; or 'shared', by which the one last layer is kept as the other
      layers are.
    biases: 'private', 'frozen' or 'shared': the kind of the other leaves of
      layers that have a weight.
    norm: likewise, for the leaves of layers without a weight, and for the
      statistics. With 'frozen', `learn_task` puts the statistics of the first
      task back after the training of each later one.
    head: a regular expression, searched in the '/'-joined path, that identifies
      the last layer.
    is_weight: a function of (path, leaf) that says whether the leaf is a
      weight.

  Returns:
    A `Layout`.

  Raises:
    ValueError: if a kind is impossible, if tasks would be forgotten through
      shared leaves although their weights are masked, or if heads are private
      and no layer matches `head`.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> layer = {'b': jnp.zeros(2), 'w': jnp.ones((2, 2))}
  >>> params = {'linear': layer, 'logits': layer}
  >>> layout = continual.make_layout(params, biases='frozen')
  >>> for path, kind in layout.kinds.items():
  ...   print(path, kind)
  linear/b frozen
  linear/w masked
  logits/b private
  logits/w private
  """
  chosen = {'weights': weights, 'heads': heads, 'biases': biases, 'norm': norm}
  for name, value in chosen.items():
    if value not in _KINDS[name]:
      raise ValueError(f'{name} must be among {_KINDS[name]}, got {value!r}.')
  if weights == 'masked' and 'shared' in (biases, norm):
    raise ValueError(
      f'biases={biases!r} and norm={norm!r} do not fit masked weights:'
      ' earlier tasks would be forgotten through what is shared. Use'
      " 'private' or 'frozen'."
    )
  rows = leaves.weight_rows(params, is_weight)
  weight_paths = {str(path) for path, _ in rows}
  layers = {path.rpartition('/')[0] for path in weight_paths}

  def kind(path):
    if heads == 'private' and re.search(head, path):
      return 'private'
    if path in weight_paths:
      return weights
    return biases if path.rpartition('/')[0] in layers else norm

  paths = [str(path) for path in leaves.paths(params)]
  if heads == 'private' and not any(re.search(head, path) for path in paths):
    raise ValueError(
      f'No layer matches head={head!r}, of {sorted(layers)}. Name the last one,'
      " or use heads='shared'."
    )
  return Layout({path: kind(path) for path in paths}, norm)


def paths_of(layout: Layout, kind: str) -> list[str]:
  """The paths of the leaves of a kind.

  Args:
    layout: a `Layout`.
    kind: 'masked', 'private', 'frozen' or 'shared'.

  Returns:
    A list of paths, in the order of the tree.

  >>> from powerprop_jax import continual
  >>> layout = continual.Layout({'a/w': 'masked', 'a/b': 'private'}, 'private')
  >>> continual.layouts.paths_of(layout, 'masked')
  ['a/w']
  """
  return [path for path, k in layout.kinds.items() if k == kind]

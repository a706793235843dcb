"""The types that cross the boundaries of the package.

Parameters, gradients and masks are pytrees: any nesting of dictionaries, lists,
tuples and modules whose leaves are arrays. All functions take the trees of
Haiku, Flax and Equinox alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import numpy as np


class Path(str):
  """The '/'-joined path of a leaf; `owner` is the class that holds it, if any.

  Haiku and Flax name their leaves by what they are (`w`, `kernel`, `scale`).
  Equinox calls the weight of a `Linear` and of a `LayerNorm` alike, so the name
  alone cannot tell them apart and the class has to.

  >>> Path('linear/w').owner is None
  True
  """

  owner: type | None = None


#: A tree of arrays: the parameters phi, or the weights theta.
Params: TypeAlias = chex.ArrayTree
#: A tree of arrays of the structure and the shapes of the parameters.
Updates: TypeAlias = chex.ArrayTree
#: Boolean arrays, of the structure and the shapes of the parameters.
Mask: TypeAlias = chex.ArrayTree
#: How many entries each leaf keeps: a `sparse.masks.Count` or None for each
#: leaf, of the structure of the parameters.
Counts: TypeAlias = Any
#: The statistics of a network; {} if it has none.
ModelState: TypeAlias = chex.ArrayTree
#: Some leaves of a tree, by their '/'-joined paths.
ByPath: TypeAlias = dict[str, jax.Array]
#: Whether the leaf at a path is a weight.
IsWeight: TypeAlias = Callable[[Path, Any], bool]
#: The power of all weights, or a function that gives each weight its own.
Alpha: TypeAlias = float | Callable[[Path, Any], chex.Numeric]
#: The power of each leaf, of the structure of the parameters; 1.0 at leaves
#: that are not weights.
Powers: TypeAlias = Any
#: Maps the number of the step to a number, as in optax.
Schedule: TypeAlias = Callable[[chex.Numeric], chex.Numeric]


class Axes(NamedTuple):
  """What the dimensions of a weight mean; those not named are kernel taps.

  A unit of the layer is one index of all `outputs` together, and each layer of
  a stack stands by itself.

  Attributes:
    stack: the dimensions along which whole layers are stacked.
    inputs: the dimensions of the inputs of one unit. In a grouped or depthwise
      convolution these are the inputs of one group.
    outputs: the dimensions of the units.

  >>> kernel = Axes(stack=(), inputs=(2,), outputs=(3,))  # Of a convolution.
  >>> shape = (3, 3, 64, 32)
  >>> [shape[axis] for axis in kernel.inputs]
  [64]
  """

  stack: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


#: Maps the path and the leaf to what the dimensions of the leaf mean.
AxesOf: TypeAlias = Callable[[Path, Any], Axes]


class Split(NamedTuple):
  """Some examples of a data set.

  Attributes:
    images: uint8 [n, height, width, channels].
    labels: int32 [n].

  >>> part = Split(np.zeros((2, 28, 28, 1), np.uint8), np.array([3, 7]))
  >>> part.labels.tolist()
  [3, 7]
  """

  images: np.ndarray
  labels: np.ndarray

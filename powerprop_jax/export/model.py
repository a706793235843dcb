"""Export of pruned networks to files, dictionaries and sparse matrices.

Powerpropagation makes networks that can be pruned hard (section 3 of the
paper); a file of the pruned network should then be as small as what is left.
`save_compressed` writes the values of kept weights only, the positions of the
kept weights in a code that is close to their entropy (`codes`), and every other
leaf as it is. `save_tasks` writes the networks of a sequence of tasks (section
4), which share their weights: it writes the weights once, one mask per task,
and what each task has for itself.

A file is a safetensors container (`format`): reading it executes nothing.

Other libraries take weights as dictionaries of numpy arrays by path: `to_dict`
makes these from trees, and `from_dict` makes trees from them. `to_sparse` makes
matrices that compute with the kept weights only.
"""

from collections.abc import Mapping, Sequence
import os
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.experimental import sparse
import jax.numpy as jnp
import numpy as np

from powerprop_jax import extras
from powerprop_jax import leaves
from powerprop_jax import types
from powerprop_jax.export import format as export_format

Params = types.Params
Mask = types.Mask
#: The power of all weights, or that of each by its path.
Alpha: TypeAlias = float | Mapping[str, float]
#: numpy arrays by path.
Arrays: TypeAlias = dict[str, np.ndarray]

_LIMIT = 2**32


class Model(NamedTuple):
  """A network that was read from a file; `from_dict` makes trees of its dicts.

  Attributes:
    theta: the leaves by path; pruned weights are zero.
    masks: the masks by path, ones for every leaf that is not pruned.
    alpha: the power it was trained with, or a dict of powers by path; None if
      it was not given.
  """

  theta: Arrays
  masks: Arrays
  alpha: float | dict[str, float] | None


def _paths(tree: Any) -> list[str]:
  paths = jax.tree.leaves(leaves.map_with_path(lambda p, _: str(p), tree))
  if len(set(paths)) < len(paths):
    raise ValueError(f'Two leaves have the same path. Rename one of {paths}.')
  return paths


def to_dict(tree: Params, mask: Mask | None = None) -> Arrays:
  """The leaves of a tree by their path.

  Args:
    tree: a pytree of arrays: parameters, masks, or the state of BatchNorm.
    mask: a pytree of boolean arrays with the same paths, or some of them; the
      entries that it cuts are zero in the result. None cuts none.

  Returns:
    numpy arrays by '/'-joined path, in the order of the tree.

  Raises:
    ValueError: if a leaf is no array, two have the same path, or the masks do
      not fit.

  >>> import numpy as np
  >>> tree = {'linear': {'w': np.array([1.0, 2.0]), 'b': np.array([3.0])}}
  >>> to_dict(tree, {'linear': {'w': np.array([True, False])}})
  {'linear/b': array([3.]), 'linear/w': array([1., 0.])}
  """
  found = map(np.asarray, jax.device_get(jax.tree.leaves(tree)))
  arrays = dict(zip(_paths(tree), found))
  for path, x in arrays.items():
    if x.dtype.kind in 'OSU':
      raise ValueError(
        f'{path!r} is no array. Filter the tree first, as with'
        ' eqx.filter(model, eqx.is_array).'
      )
  if mask is None:
    return arrays
  masks = _masks_by_path(mask, arrays)
  return {p: np.where(masks[p], x, x.dtype.type(0)) for p, x in arrays.items()}


def from_dict(arrays: Mapping[str, Any], like: Params) -> Params:
  """The tree from which `to_dict` made a dictionary.

  Args:
    arrays: arrays by path.
    like: a tree of that structure, of arrays or of their shapes.

  Returns:
    A tree of jax arrays of the structure of like.

  Raises:
    ValueError: if the paths or the shapes are not those of like, or if integers
      do not fit into those of JAX.

  >>> import numpy as np
  >>> tree = from_dict({'linear/w': np.ones(2)}, {'linear': {'w': np.zeros(2)}})
  >>> tree['linear']['w'].tolist()
  [1.0, 1.0]
  """
  wanted = dict(zip(_paths(like), map(np.shape, jax.tree.leaves(like))))
  shapes = {path: np.shape(x) for path, x in arrays.items()}
  if shapes != wanted:
    differing = [
      f'{p}: {shapes.get(p, "absent")} in the dictionary,'
      f' {wanted.get(p, "absent")} in the tree'
      for p in sorted(shapes.keys() | wanted.keys())
      if shapes.get(p) != wanted.get(p)
    ]
    raise ValueError('The leaves differ. ' + '; '.join(differing))

  def to_jax(path, _):
    x = np.asarray(arrays[path])
    array = jnp.array(x)
    is_narrow = x.dtype.kind in 'iu' and x.itemsize > array.itemsize
    if is_narrow and np.any(np.asarray(array) != x):
      raise ValueError(
        f'{path!r} has integers that do not fit into {array.dtype}. Set'
        ' jax_enable_x64.'
      )
    return array

  return leaves.map_with_path(to_jax, like)


def _masks_by_path(masks: Mask, arrays: Arrays) -> Arrays:
  """A mask for each leaf, checked."""
  found = to_dict(masks)
  for path, mask in found.items():
    fits = path in arrays and mask.shape == arrays[path].shape
    if not fits or mask.dtype != bool:
      shapes = [f'{p} {x.shape}' for p, x in arrays.items()]
      raise ValueError(
        f'The mask {path!r} does not fit the parameters: it must be an array of'
        f' bools of the path and the shape of one of the leaves, {shapes}. Of'
        ' masks.Masks, give the forward ones.'
      )
  ones = {p: np.ones(x.shape, bool) for p, x in arrays.items()}
  return ones | found


def _unless_whole(mask: np.ndarray) -> np.ndarray | None:
  return None if mask.all() else mask


def save_compressed(
  path: str | os.PathLike[str],
  theta: Params,
  masks: Mask,
  *,
  alpha: Alpha | None = None,
  values: jax.typing.DTypeLike | None = None,
) -> export_format.Sizes:
  """Writes a pruned network to a file.

  Args:
    path: the file; one that exists is replaced.
    theta: the weights, not phi; a pytree of arrays of any dtype. A network with
      statistics is given as {'theta': theta, 'state': state}.
    masks: a pytree of boolean arrays with the same paths, or some of them, such
      as `pruning.prune` returns. Leaves without a mask, or with a mask of ones,
      are kept whole.
    alpha: the power the network was trained with, or powers by path; it is
      written into the metadata.
    values: float16 or bfloat16, to which the values of pruned leaves are
      rounded. None keeps every bit.

  Returns:
    The `format.Sizes` of the file.

  Raises:
    ValueError: if the masks do not fit, alpha or values are impossible, a dtype
      cannot be stored, a value is too large for float16, or the path is not
      local.
    OSError: if the file cannot be written.

  >>> import tempfile
  >>> import numpy as np
  >>> theta = {'w': np.arange(1000.0)}
  >>> masks = {'w': np.arange(1000) < 10}
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = os.path.join(folder, 'model')
  ...   sizes = save_compressed(path, theta, masks)
  >>> sizes.dense, sizes.file < 1000
  (8000, True)
  """
  alpha = export_format.check_alpha(alpha)
  values = export_format.check_values(values)
  arrays = to_dict(theta)
  found = _masks_by_path(masks, arrays)
  section = export_format.section(
    [(p, x, _unless_whole(found[p])) for p, x in arrays.items()],
    values,
  )
  dense = sum(x.nbytes for x in arrays.values())
  return export_format.write(
    path, {'': section}, alpha=alpha, values=values, dense=dense
  )


def save_tasks(
  path: str | os.PathLike[str],
  theta: Params,
  masks: Sequence[Mask],
  private: Sequence[Params],
  *,
  alpha: Alpha | None = None,
  values: jax.typing.DTypeLike | None = None,
) -> export_format.Sizes:
  """Writes the networks of a sequence of tasks, which share their weights.

  Weights that any task uses are written once, with their positions; then follow
  for each task which of those it uses, and its own leaves.

  Args:
    path: the file; one that exists is replaced.
    theta: the weights after the last task.
    masks: for each task the masks of the weights it uses, of all leaves or of
      some by path, as `masks.unpack` returns them.
    private: for each task a pytree of the leaves that are its own: head,
      biases, normalisation and its state. A leaf whose path is one of theta's
      takes the place of that leaf in the task, and takes over its mask.
    alpha: as in `save_compressed`.
    values: as in `save_compressed`.

  Returns:
    The `format.Sizes` of the file; `dense` counts theta once, and all private
    leaves.

  Raises:
    ValueError: as `save_compressed`, or if there is no task, or if there are
      not as many trees of private leaves as masks.
    OSError: if the file cannot be written.

  >>> import tempfile
  >>> import numpy as np
  >>> theta = {'w': np.array([1.0, 2.0, 3.0])}
  >>> masks = [{'w': np.array(m, bool)} for m in ([1, 0, 0], [1, 0, 1])]
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = os.path.join(folder, 'tasks')
  ...   sizes = save_tasks(path, theta, masks, [{}, {}])
  ...   [load_task(path, t).theta['w'].tolist() for t in (0, 1)]
  [[1.0, 0.0, 0.0], [1.0, 0.0, 3.0]]
  """
  if not 0 < len(masks) == len(private):
    raise ValueError(
      'One mask and one tree of private leaves per task are needed, got'
      f' {len(masks)} masks and {len(private)} trees. A task without any has'
      ' {}.'
    )
  alpha = export_format.check_alpha(alpha)
  values = export_format.check_values(values)
  arrays = to_dict(theta)
  found = [_masks_by_path(mask, arrays) for mask in masks]
  own = [to_dict(tree) for tree in private]
  union = {
    p: np.logical_or.reduce([m[p] for m, o in zip(found, own) if p not in o])
    for p in arrays
    if any(p not in o for o in own)
  }
  shared = [(p, arrays[p], _unless_whole(m)) for p, m in union.items()]
  sections = {'': export_format.section(shared, values)}
  for t, (mask, alone) in enumerate(zip(found, own)):
    entries = [
      (p, x, _unless_whole(mask[p]) if p in mask else None)
      for p, x in alone.items()
    ]
    for p, x, m in entries:
      if m is not None and m.shape != x.shape:
        raise ValueError(
          f'The leaf {p!r} of task {t} has the shape {x.shape}, and its mask'
          f' {m.shape}. Give leaves that are not pruned a mask of ones or none.'
        )
    # Positions among the weights that some task uses.
    used = {p: mask[p][union[p]] for p in union if p not in alone}
    entries += [(p, None, m) for p, m in used.items() if not m.all()]
    sections[f'tasks/{t}/'] = export_format.section(entries, values)
  dense = sum(x.nbytes for tree in (arrays, *own) for x in tree.values())
  return export_format.write(
    path, sections, alpha=alpha, values=values, dense=dense
  )


def _model(
  alpha: float | dict[str, float] | None, found: dict[str, export_format.Found]
) -> Model:
  theta, masks = {}, {}
  for path, (leaf, values, mask) in found.items():
    x = np.zeros(mask.size, values.dtype)
    x[mask] = values
    theta[path], masks[path] = x.reshape(leaf.shape), mask.reshape(leaf.shape)
  return Model(theta, masks, alpha)


def load_compressed(path: str | os.PathLike[str], limit: int = _LIMIT) -> Model:
  """Reads a network that `save_compressed` wrote.

  Args:
    path: the file.
    limit: how many bytes of memory the network may take. Nearly nothing is
      stored of what is pruned, so that a small file can announce a network that
      no machine can hold.

  Returns:
    A `Model`, equal to what was saved bit for bit where a mask keeps it, unless
    its values were rounded.

  Raises:
    ValueError: if the file is damaged, cut off, larger than the limit or of
      another kind.
    OSError: if the file cannot be opened.

  >>> import tempfile
  >>> import numpy as np
  >>> theta = {'w': np.array([1.0, 2.0, 3.0])}
  >>> masks = {'w': np.array([True, False, True])}
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = os.path.join(folder, 'model')
  ...   sizes = save_compressed(path, theta, masks, alpha=2.0)
  ...   model = load_compressed(path)
  >>> model.theta['w'].tolist(), model.alpha
  ([1.0, 0.0, 3.0], 2.0)
  """
  alpha, found, _ = export_format.read(path, None, limit)
  return _model(alpha, found)


def load_task(
  path: str | os.PathLike[str], task: int, limit: int = _LIMIT
) -> Model:
  """Reads the network of one task that `save_tasks` wrote, and no other.

  Args:
    path: the file.
    task: which task, from 0.
    limit: how many bytes of memory the network may take, as for
      `load_compressed`.

  Returns:
    A `Model` of the shared and the task's own leaves.

  Raises:
    ValueError: if the file is damaged, cut off, larger than the limit or of
      another kind, or if there is no such task.
    OSError: if the file cannot be opened.

  >>> import tempfile
  >>> import numpy as np
  >>> theta = {'w': np.array([1.0, 2.0, 3.0])}
  >>> used = {'w': np.array([True, False, True])}
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = os.path.join(folder, 'tasks')
  ...   sizes = save_tasks(path, theta, [used], [{'b': np.ones(1)}])
  ...   load_task(path, 0).theta
  {'w': array([1., 0., 3.]), 'b': array([1.])}
  """
  alpha, found, own = export_format.read(path, task, limit)
  for name, (leaf, _, used) in own.items():
    if leaf.dtype is not None:
      found[name] = own[name]
      continue
    shared = found.get(name)
    if shared is None or shared.values.size != used.size:
      raise ValueError(
        f'{os.fspath(path)!r} is damaged: task {task} uses positions of'
        f' {name!r} that the shared leaves do not have.'
      )
    mask = shared.mask.copy()
    mask[shared.mask] = used
    found[name] = export_format.Found(shared.leaf, shared.values[used], mask)
  return _model(alpha, found)


def _csr(x: np.ndarray, mask: np.ndarray) -> Any:
  with extras.needed('experiments'):
    from scipy import sparse as scipy_sparse

  # Scipy cannot compute with bfloat16.
  if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4:
    x = x.astype(np.float32)
  starts = np.cumsum([0, *mask.sum(axis=1)])
  return scipy_sparse.csr_array((x[mask], mask.nonzero()[1], starts), x.shape)


def _bcoo(x: np.ndarray, mask: np.ndarray) -> sparse.BCOO:
  data, indices = jnp.asarray(x[mask]), jnp.asarray(np.argwhere(mask))
  return sparse.BCOO(
    (data, indices), shape=x.shape, indices_sorted=True, unique_indices=True
  )


def to_sparse(theta: Params, masks: Mask, kind: str = 'csr') -> Params:
  """The network with a sparse matrix in place of every pruned matrix.

  `x @ w + b` still works. The matrices store all weights that the mask keeps,
  also those that are zero by chance.

  Args:
    theta: a pytree of arrays.
    masks: a pytree of boolean arrays with the same paths, or some of them.
    kind: 'csr' for scipy's `csr_array`, to compute on a CPU (scipy has to be
      installed, and half precision becomes float32); 'bcoo' for
      `jax.experimental.sparse.BCOO`, on the default device and under jit.

  Returns:
    A tree of the structure of theta. Leaves that are not pruned, or that do not
    have two dimensions, such as the kernels of convolutions, are arrays with
    zeros where they are pruned: of numpy for 'csr', and of jax for 'bcoo'.

  Raises:
    ValueError: if there is no such kind, or the masks do not fit.

  >>> import numpy as np
  >>> theta = {'w': np.arange(4.0).reshape(2, 2)}
  >>> sparse = to_sparse(theta, {'w': np.eye(2, dtype=bool)})
  >>> (np.ones(2) @ sparse['w']).tolist(), sparse['w'].nnz
  ([0.0, 3.0], 2)
  """
  if kind not in ('csr', 'bcoo'):
    raise ValueError(f"kind must be 'csr' or 'bcoo', got {kind!r}.")
  to_array, to_matrix = {
    'csr': (np.asarray, _csr),
    'bcoo': (jnp.asarray, _bcoo),
  }[kind]
  arrays = to_dict(theta, masks)
  found = _masks_by_path(masks, arrays)

  def convert(path, _):
    x, mask = arrays[path], found[path]
    matrix = x.ndim == 2 and not mask.all()
    return to_matrix(x, mask) if matrix else to_array(x)

  return leaves.map_with_path(convert, theta)

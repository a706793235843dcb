"""One compiled step for one device, for many, and for many hosts.

Steps are pure functions that average over the axis they are told of and know
nothing else of devices. This module alone says how they are compiled: by `jit`
for one device, by `pmap` for several, over all hosts of `jax.distributed`.
State and data sets are replicated, batches are sharded.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

#: The name of the axis of the devices.
AXIS = 'devices'


def axis_name(num_devices: int | None = None) -> str | None:
  """The axis to average over: None on a single device, AXIS on several.

  Args:
    num_devices: how many devices there are (default: those of all hosts).

  Returns:
    The name of the axis, or None.

  >>> axis_name(8)
  'devices'
  """
  count = jax.device_count() if num_devices is None else num_devices
  return AXIS if count > 1 else None


def on_devices(
  step: Callable[..., Any], axis: str | None, donate: tuple[int, ...] = (0,)
) -> Callable[..., Any]:
  """Compiles a step for all devices.

  Args:
    step: a pure function, made with the same axis name.
    axis: the name of the axis, as `axis_name` returns it. None compiles for one
      device; otherwise every argument has a leading axis of local devices.
    donate: the positions of the arguments that may be overwritten.

  Returns:
    The compiled function.

  >>> import jax.numpy as jnp
  >>> on_devices(lambda state: state + 1, axis=None)(jnp.zeros(2)).tolist()
  [1.0, 1.0]
  """
  if axis is None:
    return jax.jit(step, donate_argnums=donate)
  return jax.pmap(step, axis_name=axis, donate_argnums=donate)


def replicate(tree: Any, axis: str | None) -> Any:
  """A copy of a tree on every local device.

  Args:
    tree: a pytree of arrays.
    axis: the name of the axis, as for `on_devices`.

  Returns:
    Arrays with a leading axis of local devices; without one if axis is None.

  >>> import jax
  >>> replicate({'w': 1.0}, 'devices')['w'].shape == (jax.local_device_count(),)
  True
  """
  if axis is None:
    return jax.tree.map(jnp.asarray, tree)
  # The copy is compiled, so that each device holds its own and none holds all:
  # what lies on another device is moved by every call, and cannot be donated.
  copy = jax.pmap(lambda _, x: x, axis_name=axis, in_axes=(0, None))
  return copy(np.arange(jax.local_device_count()), tree)


def unreplicate(tree: Any, axis: str | None) -> Any:
  """The copy of a replicated tree that the first local device holds.

  Args:
    tree: a pytree of arrays with a leading axis of local devices.
    axis: the name of the axis, as for `on_devices`; None returns the tree.

  Returns:
    The arrays without that axis.

  >>> float(unreplicate(replicate(1.0, 'devices'), 'devices'))
  1.0
  """
  if axis is None:
    return tree
  # x[0] would be a program of all local devices, with an all-reduce for every
  # leaf; such programs, when nothing waited for them, made two hosts wait for
  # one another.
  return jax.tree.map(
    lambda x: x.addressable_data(0).reshape(x.shape[1:]), tree
  )


def any_host(flag: bool) -> bool:
  """Whether a flag is set on any host. All hosts have to ask together.

  Args:
    flag: the flag of this host.

  Returns:
    The same answer on every host.

  >>> any_host(True)
  True
  """
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def check_batch_size(batch_size: int) -> None:
  """Checks that a global batch can be divided among all devices.

  Args:
    batch_size: the examples in a batch of all devices together.

  Raises:
    ValueError: if it cannot; the error names the nearest sizes that can.

  >>> check_batch_size(8 * jax.device_count())
  """
  count = jax.device_count()
  if batch_size % count:
    below, above = batch_size - batch_size % count, -(-batch_size // count)
    nearest = [n for n in (below, above * count) if n]
    raise ValueError(
      f'batch_size={batch_size} does not divide among {count} devices. The'
      f' nearest that do are {" and ".join(map(str, nearest))}.'
    )


def shard(batch: Any, axis: str | None, dim: int = 0) -> Any:
  """Gives each local device its part of a host's batch.

  Args:
    batch: a pytree of arrays.
    axis: the name of the axis, as for `on_devices`; None returns the batch.
    dim: the axis of the arrays that counts examples.

  Returns:
    numpy arrays with a leading axis of local devices; the batch itself if axis
    is None.

  >>> import numpy as np
  >>> count = jax.local_device_count()
  >>> shard(np.zeros([3 * count, 2]), 'devices').shape == (count, 3, 2)
  True
  """
  if axis is None:
    return batch
  count = jax.local_device_count()

  def split(x):
    return np.stack(np.split(np.asarray(x), count, axis=dim))

  return jax.tree.map(split, batch)


@functools.cache
def _copy(axis: str) -> Callable[[Any], Any]:
  return jax.pmap(lambda x: x, axis_name=axis)


def put(batch: Any, axis: str | None) -> Any:
  """Moves a host's batch to its devices, each part to its own.

  It returns before the batch has arrived, so that it can be moved while the
  devices are at work.

  Args:
    batch: a pytree of arrays, of which the first axis counts examples.
    axis: the name of the axis, as for `on_devices`.

  Returns:
    Arrays on the devices, with a leading axis of local devices; without one if
    axis is None.

  >>> import numpy as np
  >>> count = jax.local_device_count()
  >>> put(np.zeros([3 * count, 2]), 'devices').shape == (count, 3, 2)
  True
  """
  if axis is None:
    return jax.device_put(batch)
  return _copy(axis)(shard(batch, axis))

"""Many tasks in one network, one after another, without forgetting.

PackNet (Mallya and Lazebnik 2018) and EfficientPackNet (section 4 of the paper,
Algorithm 1) train a network on a task, prune it, and protect the weights that
are left from all later training; what was pruned is free for the next task. A
task is stored as one bit a weight. PackNet gives each of T tasks 1/T of the
weights. EPN gives a task what it needs: it searches for the lowest density at
which the accuracy on validation data is at least gamma times that of the dense
network, and ranks *all* weights, those of earlier tasks included, so that tasks
share. The sparser the solutions are, as with Powerpropagation, the more fit.

What else a network has besides weights belongs to tasks too; a `layouts.Layout`
says how each leaf is kept. Baselines are layouts: finetuning shares everything,
a network a task is private throughout.

Decisions that Algorithm 1 leaves open, or prints otherwise:

  * TopK(phi) is of |theta|: of one alpha the order is that of |phi|, and of
    several only theta compares.
  * s_l is the fraction that is kept, tried from the largest down. The loop as
    printed ends one step after the target is missed; here the last mask that
    met it counts (see `search`). A tie with the target meets it.
  * Pruned weights are re-initialised, by the initialiser of their layer, when
    the next task begins; zero would be a fixed point for alpha > 1.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  section 4.
  Mallya and Lazebnik, `PackNet: Adding multiple tasks to a single network by
  iterative pruning <https://arxiv.org/abs/1711.05769>`_, CVPR 2018.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax.continual import layouts
from powerprop_jax.sparse import masks

Params = Any  # A pytree of arrays.
ModelState = Any
ByPath = layouts.ByPath
Layout = layouts.Layout


class Memory(NamedTuple):
  """What a network carries from task to task.

  Attributes:
    phi: the parameters.
    model_state: the statistics of normalisation.
    owners: for every masked leaf an integer a weight, uint8, or uint16 past 255
      tasks: 0 is free, t + 1 belongs to task t.
  """

  phi: Params
  model_state: ModelState
  owners: ByPath


class Task(NamedTuple):
  """What is stored of a task that was learnt.

  Attributes:
    packed: the masks of masked leaves, a bit a weight, as of `masks.pack`.
    private: the task's own leaves (phi).
    model_state: its statistics, or None if they are not private.
  """

  packed: ByPath
  private: ByPath
  model_state: ModelState


def init_memory(phi: Params, model_state: ModelState, layout: Layout) -> Memory:
  """The memory of a network that has learnt nothing: all weights are free."""
  masked = layouts.by_path(phi, layouts.paths_of(layout, 'masked'))
  owners = {p: jnp.zeros(x.shape, jnp.uint8) for p, x in masked.items()}
  return Memory(phi, model_state, owners)


def begin_task(
  memory: Memory, fresh: tuple[Params, ModelState], layout: Layout
) -> Memory:
  """Re-initialises what is free or private (line 13 of Algorithm 1).

  Args:
    memory: what earlier tasks left.
    fresh: (phi, model_state) of a network that was just initialised.
    layout: a `Layout`.

  Returns:
    The memory with which to train.
  """
  phi, model_state = fresh
  masked = layouts.by_path(memory.phi, memory.owners)
  renewed = layouts.by_path(phi, memory.owners)
  found = layouts.by_path(phi, layouts.paths_of(layout, 'private'))
  for path, owner in memory.owners.items():
    found[path] = jnp.where(owner == 0, renewed[path], masked[path])
  if layout.state != 'private':
    model_state = memory.model_state
  return memory._replace(
    phi=layouts.put(memory.phi, found), model_state=model_state
  )


def _backward(memory: Memory, layout: Layout, owner: int, first: bool) -> Any:
  """What training may move: weights of an owner, and what is not kept."""

  def mask(path, x):
    if path in memory.owners:
      return memory.owners[path] == owner
    return jnp.full(x.shape, layout.kinds[path] != 'frozen' or first)

  return leaves.map_with_path(mask, memory.phi)


def training_masks(
  memory: Memory, layout: Layout, index: int, omit: Collection[str] = ()
) -> masks.Masks:
  """Masks with which task `index` is trained: all forward, free ones backward.

  Args:
    memory: as of `begin_task`.
    layout: a `Layout`.
    index: the task, from 0.
    omit: paths of masked leaves whose weights of earlier tasks are left out of
      the forward pass. Not in Algorithm 1.

  Returns:
    `masks.Masks`.
  """
  forward = leaves.map_with_path(
    lambda p, x: (
      memory.owners[p] == 0 if p in omit else jnp.ones(x.shape, bool)
    ),
    memory.phi,
  )
  return masks.Masks(forward, _backward(memory, layout, 0, index == 0))


def retraining_masks(
  memory: Memory, layout: Layout, index: int, mask: ByPath
) -> masks.Masks:
  """Masks with which the new weights of task `index` are trained once more.

  Args:
    memory: the memory in which the task owns its new weights.
    layout: a `Layout`.
    index: the task, from 0.
    mask: its mask by path.

  Returns:
    `masks.Masks`.
  """
  forward = leaves.map_with_path(
    lambda p, x: mask.get(p, jnp.ones(x.shape, bool)), memory.phi
  )
  return masks.Masks(forward, _backward(memory, layout, index + 1, index == 0))


def claim(owners: ByPath, mask: ByPath, index: int) -> ByPath:
  """Gives task `index` the free weights of its mask (line 12)."""
  if index + 1 > jnp.iinfo(jnp.uint16).max:
    raise ValueError(f'There is no owner for task {index}: 65,535 at most.')

  def give(path, owner):
    if index + 1 > jnp.iinfo(owner.dtype).max:
      owner = owner.astype(jnp.uint16)
    new = mask[path] & (owner == 0)
    return jnp.where(new, jnp.asarray(index + 1, owner.dtype), owner)

  return {path: give(path, owner) for path, owner in owners.items()}


def free_count(owners: ByPath) -> int:
  """How many weights belong to no task."""
  return sum(int(jnp.sum(o == 0)) for o in owners.values())


def store(memory: Memory, mask: ByPath, layout: Layout) -> Task:
  """What is kept of the task that the memory has just learnt."""
  private = layouts.by_path(memory.phi, layouts.paths_of(layout, 'private'))
  state = memory.model_state if layout.state == 'private' else None
  return Task(masks.pack(mask), private, state)


def recall(
  memory: Memory, task: Task, transform: power.PowerTransform
) -> tuple[Params, ModelState]:
  """The network of a task: (theta, model_state), from its stored mask alone.

  Can be jit-compiled: all tasks of a network have the same structure.

  Args:
    memory: the memory after this or any later task.
    task: as of `store`.
    transform: the `power.power_transform` of the network.

  Returns:
    The weights, zero outside of the mask, and the statistics.
  """
  theta = transform.to_theta(layouts.put(memory.phi, task.private))
  mask = masks.unpack(task.packed, memory.owners)
  used = masks.apply_mask(layouts.by_path(theta, memory.owners), mask)
  state = memory.model_state if task.model_state is None else task.model_state
  return layouts.put(theta, used), state


def num_bytes(task: Task) -> int:
  """The memory that a task takes for itself, in bytes."""
  return sum(x.nbytes for x in jax.tree.leaves(task))


# (memory, masks) -> the memory with what was trained.
Train = Callable[[Memory, masks.Masks], Memory]


def learn_task(
  memory: Memory,
  index: int,
  fresh: tuple[Params, ModelState],
  layout: Layout,
  *,
  train: Train,
  choose: Callable[[Memory], ByPath],
  retrain: Train | None = None,
  omit: Collection[str] = (),
) -> tuple[Memory, Task]:
  """Learns a task: lines 4 to 14 of Algorithm 1, and the same for baselines.

  Args:
    memory: what earlier tasks left, or `init_memory`.
    index: the task, from 0; how many will come is not asked.
    fresh: (phi, model_state) of a network that was just initialised.
    layout: a `Layout`.
    train: trains under masks.
    choose: the mask of the task, by the path of masked leaves, chosen after
      training: `packnet_mask`, or one that `search` finds.
    retrain: trains the new weights under the mask; None leaves it out.
    omit: as in `training_masks`.

  Returns:
    The memory, and the task to be stored.
  """
  memory = begin_task(memory, fresh, layout)
  memory = train(memory, training_masks(memory, layout, index, omit))
  mask = choose(memory)
  memory = memory._replace(owners=claim(memory.owners, mask, index))
  if retrain is not None:
    memory = retrain(memory, retraining_masks(memory, layout, index, mask))
  return memory, store(memory, mask, layout)

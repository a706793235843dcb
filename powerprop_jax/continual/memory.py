"""Many tasks in one network, one after another, without forgetting.

PackNet (Mallya and Lazebnik 2018) and EfficientPackNet (section 4 of the paper,
Algorithm 1) train a network on a task, prune it, and protect the weights that
are left from all later training; what was pruned is free for the next task. A
task is stored as one bit per weight. The two differ only in how they choose the
mask of a task: `packnet` gives each of T tasks 1/T of the weights, and
`efficient_packnet` gives a task what it needs. `learn_task` is the frame of
both: it takes a task through training, the choice of its mask, and retraining,
and leaves the training itself to its caller.

Whatever a network has besides weights belongs to tasks too; a `layouts.Layout`
says how each leaf is kept. Baselines are layouts: finetuning shares everything,
and networks that learn one task each are private throughout.

Pruned weights are re-initialised, by the initialiser of their layer, when the
next task begins (line 13 of Algorithm 1): zero would be a fixed point for
alpha > 1.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  section 4.
  Mallya and Lazebnik, `PackNet: Adding multiple tasks to a single network by
  iterative pruning <https://arxiv.org/abs/1711.05769>`_, CVPR 2018.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax.continual import layouts
from powerprop_jax.sparse import masks
from powerprop_jax.types import ByPath
from powerprop_jax.types import ModelState
from powerprop_jax.types import Params

Layout = layouts.Layout


class Memory(NamedTuple):
  """What a network carries from task to task.

  Attributes:
    phi: the parameters.
    model_state: the statistics of normalisation; {} if there are none.
    owners: by the path of every masked leaf, an array of its shape with one
      integer per weight: 0 if it is free, and t + 1 if it belongs to task t.
      The integers are uint8, and uint16 beyond 255 tasks.
  """

  # They are Any to a type checker, so that leaves can be reached by name.
  phi: Any
  model_state: Any
  owners: ByPath


class Task(NamedTuple):
  """What is stored of a task that was learnt.

  Attributes:
    packed: the masks of masked leaves by path, one bit per weight, as
      `masks.pack` returns them.
    private: the task's own leaves (phi) by path.
    model_state: its statistics, or None if they are not private.
  """

  packed: ByPath
  private: ByPath
  model_state: Any


#: Maps (memory, masks) to the memory with what was trained under the masks.
Train: TypeAlias = Callable[[Memory, masks.Masks], Memory]
#: Maps (memory, index of the task, *validation data) to the mask of the task by
#: path, and a record of the choice, which `learn_task` hands on.
Choose: TypeAlias = Callable[..., tuple[ByPath, Any]]


def init_memory(phi: Params, model_state: ModelState, layout: Layout) -> Memory:
  """The memory of a network that has learnt nothing: all weights are free.

  Args:
    phi: the parameters of a network that was just initialised.
    model_state: its statistics.
    layout: how each leaf is kept, made by `make_layout`.

  Returns:
    A `Memory`.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> phi = {'linear': {'w': jnp.ones((2, 3))}, 'logits': {'w': jnp.ones(3)}}
  >>> layout = continual.make_layout(phi)
  >>> continual.init_memory(phi, {}, layout).owners
  {'linear/w': Array([[0, 0, 0],
         [0, 0, 0]], dtype=uint8)}
  """
  masked = leaves.by_path(phi, layouts.paths_of(layout, 'masked'))
  owners = {p: jnp.zeros(x.shape, jnp.uint8) for p, x in masked.items()}
  return Memory(phi, model_state, owners)


def begin_task(
  memory: Memory, fresh: tuple[Params, ModelState], layout: Layout
) -> Memory:
  """Re-initialises what is free or private (line 13 of Algorithm 1).

  Args:
    memory: the memory that earlier tasks left, or that of `init_memory`.
    fresh: (phi, model_state) of a network that was just initialised.
    layout: a `Layout`.

  Returns:
    The memory with which to train.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> phi = {'linear': {'w': jnp.zeros(3)}, 'logits': {'w': jnp.zeros(2)}}
  >>> layout = continual.make_layout(phi)
  >>> owners = {'linear/w': jnp.array([0, 1, 0], jnp.uint8)}
  >>> memory = continual.Memory(phi, {}, owners)
  >>> fresh = {'linear': {'w': jnp.ones(3)}, 'logits': {'w': jnp.ones(2)}}
  >>> memory = continual.begin_task(memory, (fresh, {}), layout)
  >>> memory.phi['linear']['w'], memory.phi['logits']['w']
  (Array([1., 0., 1.], dtype=float32), Array([1., 1.], dtype=float32))
  """
  phi, model_state = fresh
  masked = leaves.by_path(memory.phi, memory.owners)
  renewed = leaves.by_path(phi, memory.owners)
  found = leaves.by_path(phi, layouts.paths_of(layout, 'private'))
  for path, owner in memory.owners.items():
    found[path] = jnp.where(owner == 0, renewed[path], masked[path])
  if layout.state != 'private':
    model_state = memory.model_state
  return memory._replace(
    phi=leaves.put(memory.phi, found), model_state=model_state
  )


def _backward(memory: Memory, layout: Layout, owner: int, first: bool) -> Any:
  """The mask of what may move: weights of an owner, and leaves not frozen."""

  def mask(path, x):
    if path in memory.owners:
      return memory.owners[path] == owner
    return jnp.full(x.shape, layout.kinds[path] != 'frozen' or first)

  return leaves.map_with_path(mask, memory.phi)


def training_masks(
  memory: Memory, layout: Layout, index: int, omit: Collection[str] = ()
) -> masks.Masks:
  """The masks with which task `index` is trained (line 4 of Algorithm 1).

  All weights are used, and of the masked ones only the free ones may move.

  Args:
    memory: the memory returned by `begin_task`.
    layout: a `Layout`.
    index: the task, from 0.
    omit: paths of masked leaves whose weights of earlier tasks are left out of
      the forward pass. This is not in Algorithm 1.

  Returns:
    `masks.Masks` of the shapes of the parameters.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> phi = {'linear': {'w': jnp.ones(3)}, 'logits': {'w': jnp.ones(2)}}
  >>> layout = continual.make_layout(phi)
  >>> owners = {'linear/w': jnp.array([0, 1, 0], jnp.uint8)}
  >>> memory = continual.Memory(phi, {}, owners)
  >>> masks = continual.training_masks(memory, layout, 1)
  >>> masks.backward['linear']['w'], masks.backward['logits']['w']
  (Array([ True, False,  True], dtype=bool), Array([ True,  True], dtype=bool))
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
  """The masks with which the new weights of task `index` are trained again.

  The weights in the task's mask are used, and those of them that the task was
  the first to take may move.

  Args:
    memory: the memory in which the task owns its new weights (see `claim`).
    layout: a `Layout`.
    index: the task, from 0.
    mask: the mask of the task, one boolean array per masked leaf by its path.

  Returns:
    `masks.Masks` of the shapes of the parameters.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> phi = {'linear': {'w': jnp.ones(3)}, 'logits': {'w': jnp.ones(2)}}
  >>> layout = continual.make_layout(phi)
  >>> owners = {'linear/w': jnp.array([0, 1, 2], jnp.uint8)}
  >>> memory = continual.Memory(phi, {}, owners)
  >>> mask = {'linear/w': jnp.array([False, True, True])}
  >>> masks = continual.retraining_masks(memory, layout, 1, mask)
  >>> masks.forward['linear']['w'], masks.backward['linear']['w']
  (Array([False,  True,  True], dtype=bool),
   Array([False, False,  True], dtype=bool))
  """
  forward = leaves.map_with_path(
    lambda p, x: mask.get(p, jnp.ones(x.shape, bool)), memory.phi
  )
  return masks.Masks(forward, _backward(memory, layout, index + 1, index == 0))


def claim(owners: ByPath, mask: ByPath, index: int) -> ByPath:
  """Gives task `index` the free weights of its mask (line 12 of Algorithm 1).

  Args:
    owners: who owns each weight, by path, as in a `Memory`.
    mask: the mask of the task by path, of the same shapes.
    index: the task, from 0.

  Returns:
    The owners after the task, of the same shapes.

  Raises:
    ValueError: if there are too many tasks for an integer of 16 bits.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> owners = {'w': jnp.array([0, 0, 1], jnp.uint8)}
  >>> continual.claim(owners, {'w': jnp.array([True, False, True])}, 1)
  {'w': Array([2, 0, 1], dtype=uint8)}
  """
  if index + 1 > jnp.iinfo(jnp.uint16).max:
    raise ValueError(
      f'There is no owner for task {index}: a memory has 65,535 tasks at most.'
    )

  def give(path, owner):
    if index + 1 > jnp.iinfo(owner.dtype).max:
      owner = owner.astype(jnp.uint16)
    new = mask[path] & (owner == 0)
    return jnp.where(new, jnp.asarray(index + 1, owner.dtype), owner)

  return {path: give(path, owner) for path, owner in owners.items()}


def free_count(owners: ByPath) -> int:
  """How many weights belong to no task.

  Args:
    owners: who owns each weight, by path, as in a `Memory`.

  Returns:
    A Python integer.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> continual.free_count({'w': jnp.array([0, 0, 1], jnp.uint8)})
  2
  """
  return sum(int(jnp.sum(o == 0)) for o in owners.values())


def store(memory: Memory, mask: ByPath, layout: Layout) -> Task:
  """Makes what is stored of the task that the memory has just learnt.

  Args:
    memory: the memory after training.
    mask: the mask of the task, one boolean array per masked leaf by its path.
    layout: a `Layout`.

  Returns:
    A `Task`.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> phi = {'linear': {'w': jnp.ones(3)}, 'logits': {'w': jnp.ones(2)}}
  >>> layout = continual.make_layout(phi)
  >>> memory = continual.init_memory(phi, {}, layout)
  >>> mask = {'linear/w': jnp.array([True, False, True])}
  >>> task = continual.store(memory, mask, layout)
  >>> task.packed, list(task.private)
  ({'linear/w': Array([160], dtype=uint8)}, ['logits/w'])
  """
  private = leaves.by_path(memory.phi, layouts.paths_of(layout, 'private'))
  state = memory.model_state if layout.state == 'private' else None
  return Task(masks.pack(mask), private, state)


def recall(
  memory: Memory, task: Task, transform: power.PowerTransform
) -> tuple[Any, Any]:
  """The network of a task, made from the memory and what was stored of it.

  The function can be jit-compiled: all tasks of a network have the same
  structure.

  Args:
    memory: the memory after this or any later task.
    task: the task that `learn_task` or `store` returned.
    transform: the `power.power_transform` of the network.

  Returns:
    (theta, model_state): the weights, zero outside of the mask, and the
    statistics.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual, power
  >>> phi = {'linear': {'w': jnp.array([3., 4., 5.])},
  ...        'logits': {'w': jnp.ones(2)}}
  >>> layout = continual.make_layout(phi)
  >>> memory = continual.init_memory(phi, {}, layout)
  >>> mask = {'linear/w': jnp.array([True, False, True])}
  >>> task = continual.store(memory, mask, layout)
  >>> theta, _ = continual.recall(memory, task, power.power_transform(2.0))
  >>> theta['linear']['w']
  Array([ 9.,  0., 25.], dtype=float32)
  """
  theta = transform.to_theta(leaves.put(memory.phi, task.private))
  mask = masks.unpack(task.packed, memory.owners)
  used = masks.apply_mask(leaves.by_path(theta, memory.owners), mask)
  state = memory.model_state if task.model_state is None else task.model_state
  return leaves.put(theta, used), state


def num_bytes(task: Task) -> int:
  """The memory that a task takes for itself, in bytes.

  Args:
    task: a `Task`.

  Returns:
    A Python integer.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> packed = {'w': jnp.zeros(32, jnp.uint8)}  # A mask of 256 weights.
  >>> continual.num_bytes(continual.Task(packed, {'b': jnp.zeros(16)}, None))
  96
  """
  return sum(x.nbytes for x in jax.tree.leaves(task))


def _check_choice(owners: ByPath, mask: ByPath, omit: Collection[str]) -> None:
  """Raises ValueError if a mask does not fit, or takes what is omitted."""
  shapes = {path: jnp.shape(m) for path, m in mask.items()}
  expected = {path: owner.shape for path, owner in owners.items()}
  if shapes != expected:
    raise ValueError(
      f'choose returned a mask of the shapes {shapes}, and the masked weights'
      f' have the shapes {expected}. Return one boolean array per masked leaf,'
      ' by its path.'
    )
  for path in omit:
    if bool(jnp.any(mask[path] & (owners[path] > 0))):
      raise ValueError(
        f'choose took weights of {path!r} that belong to earlier tasks, which'
        f' omit={list(omit)} has left out of the training. Pass the same omit'
        ' to the function that chooses.'
      )


def learn_task(
  memory: Memory,
  index: int,
  fresh: tuple[Params, ModelState],
  layout: Layout,
  *,
  train: Train,
  choose: Choose | None = None,
  retrain: Train | None = None,
  valid: Sequence[Any] = (),
  omit: Collection[str] = (),
) -> tuple[Memory, Task, Any]:
  """Learns a task: lines 4 to 14 of Algorithm 1, and the same for baselines.

  `train` is any training loop that uses and moves what its masks say, such as
  one of `training.make_train_step`. It may move the statistics of normalisation
  too: where the layout freezes them, they are put back after each call from the
  second task on. (Such a task is best trained with normalisation by the frozen
  statistics, as in evaluation, since the network that is kept will use them.)

  Args:
    memory: the memory that earlier tasks left, or that of `init_memory`.
    index: the task, from 0. The number of tasks need not be known.
    fresh: (phi, model_state) of a network that was just initialised.
    layout: a `Layout`.
    train: maps (memory, masks) to the memory after training under the masks.
    choose: chooses the mask of the task after training, such as `packnet(...)`
      or `efficient_packnet(...)`: maps (memory, index, *valid) to the mask, one
      boolean array per masked leaf by its path, and a record of the choice.
      None is for layouts without masked leaves.
    retrain: trains the new weights under the mask once more, as `train` does;
      None leaves it out.
    valid: further arguments of `choose`, such as the validation images and
      labels of the task.
    omit: paths of masked leaves whose weights of earlier tasks the new task
      does not use, as in `training_masks`; `choose` must leave them out too.

  Returns:
    (memory, task, record): the memory after the task, the task to be stored,
    and the record that `choose` returned, or None without it.

  Raises:
    ValueError: if there are masked leaves and no `choose`, if `omit` has what
      is not the path of a masked leaf, if the index is negative or that of a
      task that was learnt before, if `choose` returns a mask that does not fit
      or that takes weights that `omit` leaves out, or if there are too many
      tasks for `claim`.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual
  >>> phi = {'linear': {'w': jnp.array([3., -1., 2., 4.])},
  ...        'logits': {'w': jnp.ones(2)}}
  >>> layout = continual.make_layout(phi)
  >>> memory = continual.init_memory(phi, {}, layout)
  >>> memory, task, _ = continual.learn_task(
  ...     memory, 0, (phi, {}), layout,
  ...     train=lambda memory, masks: memory,
  ...     choose=continual.packnet(num_tasks=2))
  >>> memory.owners
  {'linear/w': Array([1, 0, 0, 1], dtype=uint8)}
  """
  if memory.owners and choose is None:
    raise ValueError(
      f'The weights {list(memory.owners)} are masked, and nothing chooses the'
      ' mask of a task. Pass choose, such as packnet(...) or'
      ' efficient_packnet(...).'
    )
  unknown = sorted(set(omit) - set(memory.owners))
  if unknown or isinstance(omit, str):
    raise ValueError(
      f'omit takes a list of paths of masked leaves, {list(memory.owners)}, got'
      f' {omit!r}.'
    )
  if index < 0:
    raise ValueError(f'Tasks are counted from 0, got {index}.')
  known = [x for x in memory.owners.values() if not power.is_traced(x)]
  number = jnp.int32(index + 1)
  if any(jnp.any(owner == number) for owner in known):
    raise ValueError(
      f'Task {index} has weights already, which training would overwrite. Give'
      ' each task an index of its own.'
    )
  memory = begin_task(memory, fresh, layout)
  frozen = layout.state == 'frozen' and index > 0

  def run(train, memory, chosen):
    # This is a copy, as compiled steps overwrite the state they are given.
    kept = jax.tree.map(jnp.copy, memory.model_state) if frozen else None
    memory = train(memory, chosen)
    return memory._replace(model_state=kept) if frozen else memory

  memory = run(train, memory, training_masks(memory, layout, index, omit))
  mask, record = {}, None
  if choose is not None:
    mask, record = choose(memory, index, *valid)
    _check_choice(memory.owners, mask, omit)
  memory = memory._replace(owners=claim(memory.owners, mask, index))
  if retrain is not None:
    chosen = retraining_masks(memory, layout, index, mask)
    memory = run(retrain, memory, chosen)
  return memory, store(memory, mask, layout), record

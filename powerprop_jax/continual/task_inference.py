"""Inference of the task that a batch of inputs belongs to.

A network that holds many tasks, each under its mask, has to be told which mask
to use. Without the task's number, the masks can be tried: the network of the
right task is sure of its predictions. Three rules choose a task for a batch of
images of one task, without labels:

  * the lowest entropy of the predictions, with one network evaluated per task
    (Wortsman et al. 2020 compare with it);
  * the largest log-sum-exp of the logits, its negative free energy (Liu et al.
    2020), which also sees how large the logits are;
  * one evaluation for all tasks together, the 'one-shot' rule of SupSup
    (Wortsman et al. 2020): mix the tasks' networks in equal parts, and take the
    task whose share, when it is raised, lowers the entropy fastest.

The paper has a rule of its own (section 4, last paragraph). It is in the
supplementary material, which was not available when this was written, so that
it may be none of these.

References:
  Wortsman et al, `Supermasks in superposition
  <https://arxiv.org/abs/2006.14769>`_, 2020.
  Liu et al, `Energy-based out-of-distribution detection
  <https://arxiv.org/abs/2010.03759>`_, 2020.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax.types import ModelState
from powerprop_jax.types import Params

#: Maps (t, images) to the logits [n, classes] of the network of task t, where t
#: is an int32 scalar that may be traced, and can be an index of stacked masks.
Logits = Callable[[jax.Array, jax.Array], jax.Array]


def entropy(logits: jax.Array) -> jax.Array:
  """The entropy of each prediction, in nats.

  Args:
    logits: floats [..., classes].

  Returns:
    Floats [...].

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import task_inference
  >>> task_inference.entropy(jnp.array([0.0, 0.0])) / jnp.log(2)
  Array(1., dtype=float32)
  """
  log_p = jax.nn.log_softmax(logits)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _search(
  cost: Callable[[jax.Array], jax.Array],
  logits: Logits,
  num_tasks: int,
  images: jax.Array,
  halving: bool,
) -> jax.Array:
  """The task of least total cost; `cost` maps logits to a number per image."""
  if num_tasks < 1 or not len(images):
    raise ValueError(
      'There must be a task and an image to choose by, got'
      f' num_tasks={num_tasks} and {len(images)} images.'
    )
  rounds = (num_tasks - 1).bit_length() if halving else 1
  rounds = max(1, min(rounds, len(images)))
  tasks, total = jnp.arange(num_tasks), jnp.zeros(num_tasks)
  for i in range(rounds):
    start, stop = (len(images) * j // rounds for j in (i, i + 1))
    part = images[start:stop]
    total += jax.lax.map(lambda t, x=part: jnp.sum(cost(logits(t, x))), tasks)
    keep = 1 if i == rounds - 1 else -(-len(tasks) // 2)
    # Not by argmin, which would choose the NaN of a network that diverged.
    best = jnp.argsort(total)[:keep]
    tasks, total = tasks[best], total[best]
  return tasks[0]


def lowest_entropy(
  logits: Logits,
  num_tasks: int,
  images: jax.Array,
  halving: bool = False,
) -> jax.Array:
  """The task whose network is surest of a batch, by its mean entropy.

  The function can be jit-compiled, and vmapped over batches.

  Args:
    logits: maps (t, images) to the logits [n, classes] of task t.
    num_tasks: how many tasks there are.
    images: a batch [n, ...], all of one task.
    halving: whether to drop half of the tasks after each of log2(num_tasks)
      parts of the batch, in place of evaluating all tasks on all of it. The
      entropies are summed over all parts so far. At 64 tasks this takes a third
      of the work. A batch with fewer images than parts is divided into single
      images, the last of which decides among all tasks that are left.

  Returns:
    The task, an int32 scalar; the first of those that tie.

  Raises:
    ValueError: if there is no task or no image.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import task_inference
  >>> sure_of = jnp.array([0.1, 5.0, 0.2])  # How sure the network of task t is.
  >>> logits = lambda t, x: jnp.stack([sure_of[t] * x, -sure_of[t] * x], -1)
  >>> task_inference.lowest_entropy(logits, 3, jnp.ones(4))
  Array(1, dtype=int32)
  """
  return _search(entropy, logits, num_tasks, images, halving)


def largest_logsumexp(
  logits: Logits,
  num_tasks: int,
  images: jax.Array,
  halving: bool = False,
) -> jax.Array:
  """The task with the largest mean log-sum-exp of logits over a batch.

  The rule compares the scales of the logits of different networks, so that it
  suits tasks that were trained alike.

  Args:
    logits: as in `lowest_entropy`.
    num_tasks: as in `lowest_entropy`.
    images: as in `lowest_entropy`.
    halving: as in `lowest_entropy`.

  Returns:
    The task, an int32 scalar; the first of those that tie.

  Raises:
    ValueError: if there is no task or no image.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import task_inference
  >>> logits = lambda t, x: jnp.stack([t * x, x], axis=-1)
  >>> task_inference.largest_logsumexp(logits, 3, jnp.ones(4))
  Array(2, dtype=int32)
  """
  return _search(
    lambda x: -jax.nn.logsumexp(x, axis=-1), logits, num_tasks, images, halving
  )


def _rescale(mixed: jax.Array, parts: jax.Array) -> jax.Array:
  """Gives a mixture the root mean square of what it is a mixture of."""
  size = lambda x: jnp.sqrt(jnp.mean(jnp.square(x)))
  factor = size(parts) / jnp.maximum(size(mixed), jnp.finfo(mixed.dtype).tiny)
  # The factor is a constant: the gradient is that of mixing, not of the size.
  return mixed * jax.lax.stop_gradient(factor)


def one_shot(
  apply: Callable[[Params, jax.Array], jax.Array],
  thetas: Params,
  images: jax.Array,
  normalise: bool = False,
) -> jax.Array:
  """The task whose share in a mixture lowers its entropy fastest (SupSup).

  The weights are sum_t c_t theta_t at c_t = 1 / T; the task is the one with the
  steepest descent of the mean entropy, argmax_t -dH/dc_t. It takes one forward
  and one backward pass for any number of tasks. The rule was made for random
  weights under many masks that each keep half of them; masks that share little
  mix to weights near zero, which predict nothing.

  Args:
    apply: maps (theta, images) to logits [n, classes].
    thetas: the weights of all tasks, zero outside of their masks, each leaf
      with a leading axis of tasks.
    images: a batch [n, ...], all of one task.
    normalise: whether to scale every leaf of the mixture to the root mean
      square of the leaves it is mixed from. (Holding the sum of c at 1 instead
      would change nothing: it takes the same number off every derivative.)

  Returns:
    The task, an int32 scalar.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import task_inference
  >>> apply = lambda theta, x: x @ theta['w']
  >>> w = jnp.zeros((2, 3, 2)).at[0, 0].set(jnp.array([4.0, -4.0]))
  >>> thetas = {'w': w.at[1, 1].set(jnp.array([4.0, -4.0]))}
  >>> images = jnp.array([[0.0, 1.0, 0.0]])  # The network of task 1 is sure.
  >>> task_inference.one_shot(apply, thetas, images)
  Array(1, dtype=int32)
  """
  num_tasks = len(jax.tree.leaves(thetas)[0])

  def mean_entropy(c):
    mixed = jax.tree.map(lambda x: jnp.tensordot(c, x, 1), thetas)
    if normalise:
      mixed = jax.tree.map(_rescale, mixed, thetas)
    return jnp.mean(entropy(apply(mixed, images)))

  return jnp.argmin(jax.grad(mean_entropy)(jnp.full(num_tasks, 1 / num_tasks)))


# Maps (networks of all tasks, images) to the task that a rule chooses.
_Rule = Callable[[Any, jax.Array], jax.Array]


def _make_rules(
  logits: Callable[[Any, Any, jax.Array], jax.Array], num_tasks: int
) -> dict[str, _Rule]:
  """The rules by name, over stacked (theta, model_state) of all tasks."""

  def trying(rule, **options):
    def choose(networks, images):
      def of_task(t, images):
        theta, model_state = jax.tree.map(lambda x: x[t], networks)
        return logits(theta, model_state, images)

      return rule(of_task, num_tasks, images, **options)

    return choose

  def mixing(**options):
    def choose(networks, images):
      thetas, states = networks
      # Statistics are mixed as weights are.
      state = jax.tree.map(
        lambda x: jnp.mean(x, axis=0, dtype=jnp.float32).astype(x.dtype), states
      )
      apply = lambda theta, x: logits(theta, state, x)
      return one_shot(apply, thetas, images, **options)

    return choose

  return {
    'entropy': trying(lowest_entropy),
    'entropy_halving': trying(lowest_entropy, halving=True),
    'logsumexp': trying(largest_logsumexp),
    'one_shot': mixing(),
    'one_shot_normalised': mixing(normalise=True),
  }


def compare_rules(
  logits: Callable[[Any, Any, jax.Array], jax.Array],
  networks: tuple[Params, ModelState],
  images_of: Callable[[int], jax.Array],
  num_tasks: int,
  batch_sizes: Sequence[int] = (1, 10, 100),
  num_images: int = 200,
) -> dict[str, dict[str, float]]:
  """How often each rule finds the task of a batch of images.

  Args:
    logits: maps (theta, model_state, images) to the logits [n, classes].
    networks: (theta, model_state) of all tasks, as `memory.recall` returns
      them, stacked: each leaf has a leading axis of tasks.
    images_of: maps a task to test images of it.
    num_tasks: how many tasks there are.
    batch_sizes: the numbers of images of one task to choose by.
    num_images: how many images of each task to try, at most.

  Returns:
    By the name of each rule a dict of {batch size: share}: the share of whole
    batches whose task the rule finds, averaged over the tasks. The batch size
    is a string, as in JSON. Batch sizes of which there is no whole batch are
    left out.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import task_inference
  >>> def logits(theta, model_state, images):  # Sure of images like theta.
  ...   return (images @ theta)[:, None] * jnp.array([1.0, -1.0])
  >>> thetas = 9.0 * jnp.eye(2)
  >>> images_of = lambda t: jnp.tile(jnp.eye(2)[t], (4, 1))
  >>> found = task_inference.compare_rules(
  ...     logits, (thetas, {}), images_of, num_tasks=2, batch_sizes=[1])
  >>> found['entropy']
  {'1': 1.0}
  """
  rules = _make_rules(logits, num_tasks)

  @functools.partial(jax.jit, static_argnums=0)
  def found(name, networks, batches, t):
    choose = functools.partial(rules[name], networks)
    # This many batches, with their gradients, are in memory together.
    chosen = jax.lax.map(choose, batches, batch_size=20)
    return jnp.mean(chosen == t)

  shares: dict[str, dict[str, list[jax.Array]]] = {name: {} for name in rules}
  for t in range(num_tasks):
    images = images_of(t)[:num_images]
    for size in batch_sizes:
      count = len(images) // size
      if not count:
        continue
      batches = images[: count * size]
      batches = batches.reshape(count, size, *images.shape[1:])
      for name in rules:
        share = found(name, networks, batches, t)
        shares[name].setdefault(str(size), []).append(share)
  return {
    name: {
      size: float(jnp.mean(jnp.stack(values))) for size, values in row.items()
    }
    for name, row in shares.items()
  }

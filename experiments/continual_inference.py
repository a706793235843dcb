"""How often the task is told from its images, by every rule there is."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from powerprop_jax.continual import task_inference

BATCH_SIZES = (1, 10, 100)
_NUM_IMAGES = 200  # Of every task.
_AT_ONCE = 20  # Batches whose gradients are in memory together.


def _make_rules(
  logits: Callable[..., jax.Array], num_tasks: int
) -> dict[str, Callable[..., jax.Array]]:
  """Functions of (networks, images) to a task, by name.

  Args:
    logits: of (theta, model_state, images).
    num_tasks: how many networks there are, stacked.

  Returns:
    A dict of the rules of `task_inference`.
  """

  def of_task(networks):
    def apply(t, images):
      return logits(*jax.tree.map(lambda x: x[t], networks), images)

    return apply

  def trying(rule, **options):
    return lambda networks, images: rule(
      of_task(networks), num_tasks, images, **options
    )

  def mixing(**options):
    def choose(networks, images):
      thetas, states = networks
      # Statistics are mixed as weights are.
      state = jax.tree.map(
        lambda x: jnp.mean(x, axis=0, dtype=jnp.float32).astype(x.dtype), states
      )
      apply = lambda theta, x: logits(theta, state, x)
      return task_inference.one_shot(apply, thetas, images, **options)

    return choose

  entropy = task_inference.lowest_entropy
  return {
    'entropy': trying(entropy),
    'entropy_halving': trying(entropy, halving=True),
    'logsumexp': trying(task_inference.largest_logsumexp),
    'one_shot': mixing(),
    'one_shot_normalised': mixing(normalise=True),
  }


def evaluate(
  logits: Callable[..., jax.Array],
  networks: Any,
  images_of: Callable[[int], jax.Array],
  num_tasks: int,
  batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict[str, dict[str, float]]:
  """The share of batches whose task is found.

  Args:
    logits: of (theta, model_state, images).
    networks: (theta, model_state) of all tasks, with a leading axis of tasks.
    images_of: maps a task to test images of it.
    num_tasks: how many tasks there are.
    batch_sizes: how many images of one task there are to choose by.

  Returns:
    A dict of {batch size: share} by the name of the rule. Batch sizes of which
    there is no whole batch are left out.
  """
  rules = _make_rules(logits, num_tasks)

  @functools.partial(jax.jit, static_argnums=0)
  def found(name, networks, batches, t):
    choose = functools.partial(rules[name], networks)
    chosen = jax.lax.map(choose, batches, batch_size=_AT_ONCE)
    return jnp.mean(chosen == t)

  shares: dict[str, dict[str, list[jax.Array]]] = {name: {} for name in rules}
  for t in range(num_tasks):
    images = images_of(t)[:_NUM_IMAGES]
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

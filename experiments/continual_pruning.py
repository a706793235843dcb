"""How the methods of continual learning choose the mask of a task."""

from collections.abc import Callable, Collection
from typing import Any

import jax

from powerprop_jax import continual
from powerprop_jax import power

SEARCHES = ('linear', 'binary', 'taylor')


def make_choose(
  settings: dict[str, Any],
  method: str,
  accuracy: Callable[..., jax.Array],
  mean_loss: Callable[..., jax.Array],
  transform: power.PowerTransform,
  omit: Collection[str],
) -> continual.Choose | None:
  """How a method chooses a mask; None if it has none.

  Args:
    settings: the flags.
    method: its name.
    accuracy: of (theta, model_state, images, labels).
    mean_loss: of (theta, model_state, (images, labels)).
    transform: between phi and theta.
    omit: paths of which earlier tasks' weights are left out.

  Returns:
    What `continual.learn_task` takes as `choose`.

  Raises:
    ValueError: if the densities are impossible.
  """
  if method == 'packnet':
    return continual.packnet(settings['tasks'])
  if method != 'epn':
    return None
  return continual.efficient_packnet(
    jax.jit(accuracy),
    transform,
    densities=[float(p) for p in settings['densities']],
    gamma=settings['gamma'],
    search=settings['search'],
    search_steps=settings['search_steps'],
    loss=mean_loss,
    min_density=settings['min_density'],
    max_density=settings['max_density'],
    cap=1.0 if settings['cap'] is None else settings['cap'],
    omit=omit,
  )


def describe(choice: continual.Choice | None) -> dict[str, Any]:
  """The record of a choice, for JSON."""
  if choice is None:
    return {}
  return {
    'dense_valid_accuracy': choice.dense,
    'pruned_valid_accuracy': choice.performance,
    'target_met': choice.met,
    'searched_density': choice.density,
    'evaluated': [list(pair) for pair in choice.evaluated],
    'evaluations': len(choice.evaluated),
  }

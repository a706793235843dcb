"""Evaluates a network while it trains, and on all splits at the end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.support import optimisers
from experiments.support import output
from experiments.support import problem as problem_lib
from powerprop_jax import leaves
from powerprop_jax import training
from powerprop_jax.sparse import report as report_lib
from powerprop_jax.training import feeds

# The metric that is largest at the best checkpoint of a run.
BEST = 'valid_accuracy'


class Found(NamedTuple):
  """The result of an evaluation.

  Attributes:
    metrics: the values by name, for metrics.jsonl.
    histograms: arrays [units] by tag, for event files: the share of the weights
      of each output unit of a layer that is in use.
  """

  metrics: dict[str, Any]
  histograms: dict[str, np.ndarray]


# (step, state, weights ever in use, (steps, seconds)) -> the result; state and
# weights are those of one device, and the pair says how long training took.
Evaluate = Callable[[int, training.TrainState, Any, tuple[int, float]], Found]


def on_split(
  feed: feeds.Feed, theta: Any, model_state: Any, split: str, stay: bool = False
) -> dict[str, float]:
  """Evaluates a network on a split, with a progress bar if it takes a while.

  Args:
    feed: the data.
    theta: the weights of the network, as one device holds them.
    model_state: the statistics of its normalisation.
    split: the name of one of `feed.sizes`.
    stay: whether the progress bar stays when it is full.

  Returns:
    Numbers by name, such as `valid_accuracy`.
  """
  size, bar = feed.sizes[split], None

  def seen(count):
    nonlocal bar
    if bar is None and count < size and not jax.process_index():
      bar = output.Progress(size, unit='image', stay=stay)
    if bar is not None:
      bar.at(count, {})

  found = feed.evaluate(theta, model_state, split, seen)
  if bar is not None:
    bar.close()
  return {f'{split}_{name}': x for name, x in found.items()}


def _unit_densities(mask: Any, phi: Any) -> dict[str, np.ndarray]:
  """For each layer, the share of each output unit's weights that is in use."""
  found = {}
  for path, leaf, m in leaves.weight_rows(phi, leaves.is_weight, mask):
    axes = leaves.axes(path, leaf)
    units = (*axes.stack, *axes.outputs)
    others = tuple(i for i in range(m.ndim) if i not in units)
    found[f'in_use/{path}'] = np.mean(m, axis=others).ravel()
  return found


def sparsities(report: dict[str, Any]) -> dict[str, Any]:
  """What metrics and summaries have of a `sparsity_report`."""
  layers = {row['path']: 1 - row['density'] for row in report['layers']}
  total = report['total']
  return {
    'sparsity': {'total': 1 - total['density'], **layers},
    'dead_units': total['dead'],
  }


def make_evaluate(
  problem: problem_lib.Problem,
  feed: feeds.Feed,
  settings: problem_lib.Settings,
  *,
  histograms: bool,
  compare_signs: bool,
  timing: tuple[int, float],
) -> Evaluate:
  """Makes the evaluation of a run, which all hosts have to call together.

  Args:
    problem: what is trained.
    feed: its data, with a validation split.
    settings: of the run.
    histograms: whether results have histograms.
    compare_signs: whether signs are compared with those of the initialisation,
      with which the run must then have begun.
    timing: the steps that were taken before, and the seconds they took.

  Returns:
    A function as `Evaluate` describes it.
  """
  rate = optimisers.learning_rate(settings, settings.steps)
  masked_theta = jax.jit(
    lambda state: training.masked_theta(state, problem.transform)
  )
  positive = None
  if compare_signs:
    # The initialisation is drawn anew from the seed, also if a run goes on.
    positive = jax.jit(lambda phi: jax.tree.map(lambda x: x > 0, phi))(
      problem.init().phi
    )

  @jax.jit
  def shares(phi, forward, ever, positive):
    rest = (forward, ever) if positive is None else (forward, ever, positive)
    used = once = changed = size = 0
    for _, x, m, e, *p in leaves.weight_rows(phi, leaves.is_weight, *rest):
      size += x.size
      used += jnp.sum(m, dtype=jnp.int32)
      once += jnp.sum(e, dtype=jnp.int32)
      if p:
        crossed = jnp.where(p[0], x < 0, x > 0)
        changed += jnp.sum(m & crossed, dtype=jnp.int32)
    found = {'explored': once / size}
    if positive is not None:
      found['sign_changes'] = changed / jnp.maximum(used, 1)
    return found

  before = timing

  def evaluate(step, state, ever, timing):
    nonlocal before
    theta = masked_theta(state)
    metrics: dict[str, Any] = on_split(feed, theta, state.model_state, 'valid')
    forward = state.masks.forward
    found = jax.device_get(shares(state.phi, forward, ever, positive))
    metrics |= {name: float(x) for name, x in found.items()}
    mask = jax.device_get(forward)
    metrics |= sparsities(report_lib.sparsity_report(mask, state.phi))
    metrics['learning_rate'] = float(np.asarray(rate(step - 1)))
    steps, seconds = timing[0] - before[0], timing[1] - before[1]
    before = timing
    if seconds > 0:
      metrics['steps_per_second'] = steps / seconds
      metrics['images_per_second'] = steps / seconds * settings.batch_size
    return Found(
      metrics, _unit_densities(mask, state.phi) if histograms else {}
    )

  return evaluate


def last(feed: feeds.Feed, theta: Any, model_state: Any) -> dict[str, float]:
  """Evaluates the network at the end of a run on all splits, for its summary.

  Args:
    feed: the data.
    theta: the weights of the network, as one device holds them.
    model_state: the statistics of its normalisation.

  Returns:
    Accuracies by name, such as `test_accuracy` and, with more than 100 classes,
    `test_top5`, which counts a label among the five largest outputs as right.
  """
  found = {}
  for split in feed.sizes:
    found |= on_split(feed, theta, model_state, split, stay=True)
  return {name: x for name, x in found.items() if not name.endswith('_loss')}

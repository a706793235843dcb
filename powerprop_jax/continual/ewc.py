"""Elastic weight consolidation: earlier tasks as springs on the weights.

This is the baseline for continual learning by regularisation that section 4 of
the paper names. A task that is learned leaves its weights theta_t and how much
it depends on each, the diagonal of its Fisher information F_t; later tasks add
to their loss

  sum_t strength / 2 sum_i F_ti (theta_i - theta_ti)^2.

Quadratics add up to a quadratic, whose gradient takes no more than sum_t F_t
and sum_t F_t theta_t, so that memory does not grow with the number of tasks.

References:
  Kirkpatrick et al, `Overcoming catastrophic forgetting in neural networks
  <https://arxiv.org/abs/1612.00796>`_, 2017.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from powerprop_jax import leaves
from powerprop_jax.training import step as step_lib
from powerprop_jax.types import Params


class Anchor(NamedTuple):
  """The penalty of all earlier tasks, as two trees of the shapes of theta.

  Attributes:
    fisher: sum_t strength F_t.
    pull: sum_t strength F_t theta_t.
  """

  # They are Any to a type checker, so that leaves can be reached by name.
  fisher: Any
  pull: Any


def no_anchor(theta: Params) -> Anchor:
  """The anchor before any task, whose penalty is zero.

  Args:
    theta: the weights, of which only the shapes and dtypes matter.

  Returns:
    An `Anchor` of zeros.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import ewc
  >>> ewc.no_anchor({'w': jnp.ones(2)}).pull
  {'w': Array([0., 0.], dtype=float32)}
  """
  zeros = lambda: jax.tree.map(jnp.zeros_like, theta)
  return Anchor(fisher=zeros(), pull=zeros())


def fisher(
  logits: Callable[[Params, jax.Array], jax.Array],
  theta: Params,
  images: jax.Array,
  *,
  key: jax.Array | None = None,
  labels: jax.Array | None = None,
) -> Any:
  """The diagonal of the Fisher information, averaged over examples.

  F is the mean of the squared gradient of log p(y | x, theta), with y drawn
  from the network's own prediction. With the labels of the data in place of y
  it is the 'empirical' Fisher, which many implementations take for it, but
  which goes to zero as the training data are fitted. A few hundred examples are
  enough; each of them takes a gradient of its own.

  Args:
    logits: maps (theta, images) to logits [n, classes]. Examples must not
      influence each other, as they would through the statistics of a batch.
    theta: the weights, after training.
    images: what `logits` takes, of shape [n, ...], with one row per example.
    key: a PRNG key with which y is drawn.
    labels: int [n], in place of a key; examples with negative labels do not
      count.

  Returns:
    A tree of the structure and the shapes of theta, of numbers >= 0.

  Raises:
    ValueError: if both a key and labels are given, or neither, or if there are
      no examples.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import ewc
  >>> logits = lambda theta, x: jnp.stack([theta['w'] * x, 0 * x], axis=-1)
  >>> images, labels = jnp.array([1.0, 3.0]), jnp.array([0, 1])
  >>> ewc.fisher(logits, {'w': jnp.float32(0)}, images, labels=labels)
  {'w': Array(1.25, dtype=float32)}
  """
  if (key is None) == (labels is None):
    raise ValueError(
      'Give either a key, to draw labels from the network, or the labels of'
      f' the data, got key={key} and labels={labels}.'
    )
  if not len(images):
    raise ValueError('There must be examples, got none.')
  classes: Any = labels
  if key is not None:
    classes = jax.random.categorical(key, logits(theta, images))

  @jax.grad
  def score(theta, image, label):
    return jax.nn.log_softmax(logits(theta, image[None])[0])[label]

  # One after another: XLA on a CPU takes thirty times as long for the gradients
  # of several examples at once.
  def add(total, example):
    grads = score(theta, *example)
    counts = example[1] >= 0
    return jax.tree.map(
      lambda t, g: t + jnp.where(counts, jnp.square(g.astype(t.dtype)), 0),
      total,
      grads,
    ), None

  zeros = leaves.zeros_for_sum(theta)
  total, _ = jax.lax.scan(add, zeros, (images, classes))
  count = jnp.maximum(jnp.sum(classes >= 0), 1)
  return jax.tree.map(lambda x, t: (t / count).astype(x.dtype), theta, total)


def add_task(
  anchor: Anchor,
  fisher: Params,
  theta: Params,
  strength: float | jax.Array = 1.0,
  held: Any = None,
) -> Anchor:
  """Adds a task that was just learned to the anchor of later tasks.

  Args:
    anchor: the anchor of the tasks before it, or `no_anchor`.
    fisher: the result of the function `fisher`.
    theta: the weights, after training.
    strength: how strongly to hold the weights, finite and not negative.
    held: a pytree of bools: which leaves to hold; None holds all. A head that
      every task has for itself should not be held.

  Returns:
    The anchor of all tasks so far.

  Raises:
    ValueError: if the strength is a number that is negative, infinite or NaN;
      an array, which may be traced, is not checked.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import ewc
  >>> theta = {'w': jnp.array([1.0, -2.0])}
  >>> fisher = {'w': jnp.array([0.5, 0.25])}
  >>> ewc.add_task(ewc.no_anchor(theta), fisher, theta, strength=10.0).pull
  {'w': Array([ 5., -5.], dtype=float32)}
  """
  if not isinstance(strength, jax.Array) and not 0 <= strength < math.inf:
    raise ValueError(
      f'strength must be finite and not negative, got {strength}.'
    )
  if held is None:
    held = jax.tree.map(lambda _: True, theta)
  weighted = jax.tree.map(
    lambda h, f: strength * f if h else jnp.zeros_like(f), held, fisher
  )
  return Anchor(
    fisher=jax.tree.map(jnp.add, anchor.fisher, weighted),
    pull=jax.tree.map(lambda p, f, x: p + f * x, anchor.pull, weighted, theta),
  )


def penalty(fisher: Params, pull: Params) -> step_lib.Penalty:
  """The gradient of the penalty, for `training.make_train_step`.

  To compile once for all tasks, make the step inside of the compiled function,
  and give it the anchor as an argument:

    def run(state, anchor, data, indices):
      step = training.make_train_step(..., penalty=ewc.penalty(*anchor))
      return training.make_run_steps(step)(state, data, indices)

  Args:
    fisher: the `fisher` of an `Anchor`.
    pull: the `pull` of the same `Anchor`.

  Returns:
    A function that maps (theta, masks) to fisher * theta - pull, a tree of the
    structure and the shapes of theta.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.continual import ewc
  >>> gradient = ewc.penalty({'w': jnp.array([2.0])}, {'w': jnp.array([6.0])})
  >>> gradient({'w': jnp.array([5.0])}, None)
  {'w': Array([4.], dtype=float32)}
  """

  def gradient(theta, masks):
    del masks
    return jax.tree.map(lambda f, x, p: f * x - p, fisher, theta, pull)

  return gradient

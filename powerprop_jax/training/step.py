"""The train step of a reparameterised, masked network, and loops of it.

One step is the line of section 2 of the paper, with masks:

  phi -> theta -> mask -> loss -> gradient at theta -> optimiser -> mask -> phi

The gradient is taken at theta, outside the power map, so optimisers see an
ordinary network and masks are scored by the same gradient. The update is masked
after the optimiser and not before: momentum and weight decay would move a
protected weight whose gradient alone is masked.

Data sets that fit on the device are trained on in compiled chunks of many
steps, without any Python in between.
"""

from collections.abc import Callable
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from powerprop_jax import power
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import updaters

Params = Any
ModelState = Any
Batch = Any
Metrics = dict[str, jax.Array]
# (theta, model_state, key, batch) -> (loss, (model_state, metrics))
LossFn = Callable[
  [Params, ModelState, jax.Array, Batch],
  tuple[jax.Array, tuple[ModelState, Metrics]],
]


class TrainState(NamedTuple):
  """Everything that training changes, and all a checkpoint has to hold.

  Attributes:
    phi: the parameters.
    model_state: statistics of the network, as of BatchNorm; {} if it has none.
    opt_state: the state of the optimiser.
    masks: `masks.Masks`.
    step: the number of steps taken, an int32 scalar.
    key: the PRNG key of the run. It does not change: step t draws from
      `jax.random.fold_in(key, t)`.
  """

  phi: Params
  model_state: ModelState
  opt_state: optax.OptState
  masks: masks_lib.Masks
  step: jax.Array
  key: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
MaskStep = Callable[[TrainState, Batch], TrainState]
Penalty = Callable[[Params, masks_lib.Masks], Params]


def init_state(
  key: jax.Array,
  theta: Params,
  model_state: ModelState,
  tx: optax.GradientTransformation,
  transform: power.PowerTransform,
) -> TrainState:
  """The state of a dense network at step 0, from ordinary parameters theta."""
  # Copies, because compiled steps donate the state, and the caller's arrays
  # would go with it.
  key, phi, model_state = jax.tree.map(
    jnp.copy, (key, transform.to_phi(theta), model_state)
  )
  return TrainState(
    phi=phi,
    model_state=model_state,
    opt_state=tx.init(phi),
    masks=masks_lib.dense(phi),
    step=jnp.zeros([], jnp.int32),
    key=key,
  )


def _gradient(loss_fn, theta, state, key, batch):
  """The gradient at theta, with what `loss_fn` returns beside it."""
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, (model_state, metrics)), grads = grad_fn(
    theta, state.model_state, key, batch
  )
  return grads, model_state, {'loss': loss, **metrics}


def _mean_statistics(model_state, axis_name):
  """The mean over devices; counters are the same on all, and stay integers."""

  def mean(x):
    is_float = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return jax.lax.pmean(x, axis_name) if is_float else x

  return jax.tree.map(mean, model_state)


def masked_theta(state: TrainState, transform: power.PowerTransform) -> Params:
  """The weights the network uses: where(forward, psi(phi), 0)."""
  return masks_lib.apply_mask(
    transform.to_theta(state.phi), state.masks.forward
  )


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  transform: power.PowerTransform,
  axis_name: str | None = None,
  penalty: Penalty | None = None,
) -> TrainStep:
  """One step of training, a pure function to be compiled by its caller.

  Args:
    loss_fn: maps (theta, model_state, key, batch) to (loss, (model_state,
      metrics)), where loss is the mean over the batch.
    tx: a transformation of gradients at theta into updates of phi, such as
      `transforms.target_propagation(optax.adam(1e-3), transform)`.
    transform: a `power.power_transform`.
    axis_name: the axis of a pmap over which to average gradients, statistics
      and metrics.
    penalty: maps all weights theta and the masks to a gradient to be added.
      Unlike a term of the loss it reaches weights that the forward mask cuts,
      as that of Top-KAST must.

  Returns:
    A function of (state, batch) that returns (state, metrics), `metrics` with
    the loss added under 'loss'.
  """

  def train_step(state, batch):
    theta = transform.to_theta(state.phi)
    grads, model_state, metrics = _gradient(
      loss_fn,
      masks_lib.apply_mask(theta, state.masks.forward),
      state,
      jax.random.fold_in(state.key, state.step),
      batch,
    )
    if axis_name is not None:
      grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
      model_state = _mean_statistics(model_state, axis_name)
    if penalty is not None:
      extra = penalty(theta, state.masks)
      grads = jax.tree.map(jnp.add, grads, extra)
    updates, opt_state = tx.update(grads, state.opt_state, state.phi)
    updates = masks_lib.apply_mask(updates, state.masks.backward)
    state = state._replace(
      phi=optax.apply_updates(state.phi, updates),
      model_state=model_state,
      opt_state=opt_state,
      step=state.step + 1,
    )
    return state, metrics

  return train_step


def reset_moments(
  tx: optax.GradientTransformation,
  opt_state: optax.OptState,
  phi: Params,
  where: Any,
) -> optax.OptState:
  """Puts the statistics of some parameters back to their initial values.

  Works for every optimiser: what in its state belongs to a parameter is found
  by `optax.tree_utils.tree_map_params`. Statistics of another shape than the
  parameter, as the row sums of Adafactor, belong to many and stay.

  Args:
    tx: the transformation.
    opt_state: its state.
    phi: the parameters.
    where: a pytree of boolean arrays: which entries of phi start afresh.

  Returns:
    A state of the same structure.
  """

  def is_missing(x):
    return isinstance(x, optax.MaskedNode)

  def select(value, mask):
    if is_missing(value):
      return value
    return mask if jnp.shape(value) == mask.shape else False

  selected = optax.tree_utils.tree_map_params(
    tx,
    select,
    opt_state,
    where,
    transform_non_params=lambda _: False,
    is_leaf=is_missing,
  )
  return jax.tree.map(jnp.where, selected, tx.init(phi), opt_state)


def _mean_gradient(loss_fn, theta, state, batches):
  """The gradient at theta, averaged over the leading axis of batches."""
  key = jax.random.fold_in(state.key, state.step)

  def add(total, batch):
    grads, _, _ = _gradient(loss_fn, theta, state, key, batch)
    return jax.tree.map(jnp.add, total, grads), None

  zeros = jax.tree.map(jnp.zeros_like, theta)
  total, _ = jax.lax.scan(add, zeros, batches)
  n = len(jax.tree.leaves(batches)[0])
  return jax.tree.map(lambda g: g / n, total)


def _with_masks(state, tx, phi, masks):
  """The state under other masks; what they free starts with new moments."""
  grown = jax.tree.map(
    lambda now, was: now & ~was, masks.backward, state.masks.backward
  )
  opt_state = reset_moments(tx, state.opt_state, phi, grown)
  return state._replace(phi=phi, opt_state=opt_state, masks=masks)


def make_mask_updates(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  updater: updaters.MaskUpdater,
  transform: power.PowerTransform,
  axis_name: str | None = None,
) -> tuple[MaskStep, MaskStep]:
  """The first choice of masks and their updates, apart from the train step.

  They are functions of their own, which the host calls every so many steps: in
  the train step, under `lax.cond`, they would double its compilation time.

  Args:
    loss_fn: as in `make_train_step`.
    tx: as in `make_train_step`.
    updater: a method of `updaters`.
    transform: a `power.power_transform`.
    axis_name: the axis of a pmap over which to average gradients. Masks are
      scored by the average, with one key on every device, so that all devices
      choose the same.

  Returns:
    Two pure functions of (state, batches) that return a state: one makes the
    masks at the start, the other updates them. The leading axis of batches is
    that of the batches over which the gradient is averaged.
  """

  def inputs(state, batches):
    """The key, the weights and the gradient, which an updater sees."""
    theta = transform.to_theta(state.phi)
    masked = masks_lib.apply_mask(theta, state.masks.forward)
    grads = _mean_gradient(loss_fn, masked, state, batches)
    if axis_name is not None:
      grads = jax.lax.pmean(grads, axis_name)
    # The train step folds the step number alone into the key, hence 2^31.
    key = jax.random.fold_in(jax.random.fold_in(state.key, 2**31), state.step)
    return key, theta, grads

  def init_masks(state, batches):
    return state._replace(masks=updater.init(*inputs(state, batches)))

  def update_masks(state, batches):
    key, theta, grads = inputs(state, batches)
    new_theta, masks = updater.update(
      key, state.step, theta, state.masks, grads
    )
    # Only what changed is mapped back: a round trip would cost a rounding.
    phi = jax.tree.map(
      lambda old, new, a, b: jnp.where(old == new, a, b),
      theta,
      new_theta,
      state.phi,
      transform.to_phi(new_theta),
    )
    return _with_masks(state, tx, phi, masks)

  return init_masks, update_masks


def batch_indices(
  key: jax.Array, start: int, num_steps: int, batch_size: int, size: int
) -> jax.Array:
  """Which examples the steps [start, start + num_steps) train on.

  The examples come in one stream of epochs, each in an order of its own; a
  batch may hold the end of one epoch and the beginning of the next. The order
  depends on the key and the step alone, so training goes on from any step as if
  it had never stopped.

  Args:
    key: a PRNG key.
    start: the first step.
    num_steps: the number of steps.
    batch_size: examples a step.
    size: the number of examples of the data set.

  Returns:
    An int32 array [num_steps, batch_size] of indices below size.
  """
  # In Python integers: the position in the stream outgrows int32.
  start, num_steps, batch_size, size = map(
    operator.index, (start, num_steps, batch_size, size)
  )
  first, offset = divmod(start * batch_size, size)
  count = num_steps * batch_size
  num_epochs = -(-(offset + count) // size)
  epochs = jnp.arange(num_epochs) + first
  return _stream(key, epochs, offset, size)[:count].reshape(num_steps, -1)


@functools.partial(jax.jit, static_argnums=3)
def _stream(key, epochs, offset, size):
  order = jax.lax.map(
    lambda e: jax.random.permutation(jax.random.fold_in(key, e), size), epochs
  )
  return jnp.roll(order.ravel(), -offset)


def make_run_steps(
  train_step: TrainStep,
) -> Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]:
  """A chunk of training steps over data that lie on the device.

  Args:
    train_step: a function made by `make_train_step`.

  Returns:
    A pure function of (state, data, indices), where data is a pytree of arrays
    with one row an example and indices is an int array [steps, batch]. It
    returns the state and the metrics of every step, stacked.
  """

  def run_steps(state, data, indices):
    def body(state, index):
      batch = jax.tree.map(lambda x: x[index], data)
      return train_step(state, batch)

    return jax.lax.scan(body, state, indices)

  return run_steps

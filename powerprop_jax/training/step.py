"""The train step of a reparameterised, masked network, and chunks of steps.

One step is that of section 2 of the paper, with masks:

  phi -> theta -> mask -> loss -> gradient at theta -> optimiser -> mask -> phi

The gradient is taken at theta, outside the power map, so that optimisers see an
ordinary network and masks are scored by the same gradient. `sparse.masking`
says how an optimiser works under masks; `sparse.sparsify` has the same parts as
an optax transformation, for other training loops.

On data sets that fit on the device, networks are trained in compiled chunks of
many steps, without any Python in between.
"""

from collections.abc import Callable
import functools
import operator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import types
from powerprop_jax.sparse import masking
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import updaters

#: What the loss takes: any tree of arrays.
Batch: TypeAlias = Any
#: Scalars by name.
Metrics: TypeAlias = dict[str, jax.Array]
#: (theta, model_state, key, batch) -> (loss, (model_state, metrics))
LossFn: TypeAlias = Callable[
  [types.Params, types.ModelState, jax.Array, Batch],
  tuple[jax.Array, tuple[types.ModelState, Metrics]],
]


class TrainState(NamedTuple):
  """Everything that training changes, and all that a checkpoint has to hold.

  Attributes:
    phi: the dense parameters. Those that the masks cut keep their values here,
      and `to_theta(phi)` is therefore *not* the sparse network: `masked_theta`
      returns that, which is what has to be evaluated, exported and reported.
    model_state: statistics of the network, such as those of BatchNorm; {} if it
      has none.
    opt_state: the state of the optimiser.
    masks: `masks.Masks`.
    step: the number of steps taken, an int32 scalar.
    key: the PRNG key of the run. It does not change: step t draws from
      `jax.random.fold_in(key, t)`.
  """

  phi: types.Params
  model_state: types.ModelState
  opt_state: optax.OptState
  masks: masks_lib.Masks
  step: jax.Array
  key: jax.Array


#: (state, batch) -> (state, metrics)
TrainStep: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
#: (state, batch) -> state, with other masks
MaskStep: TypeAlias = Callable[[TrainState, Batch], TrainState]
#: (theta, masks) -> what is added to the gradient
Penalty: TypeAlias = Callable[[types.Params, masks_lib.Masks], types.Params]


def init_state(
  key: jax.Array,
  theta: types.Params,
  model_state: types.ModelState,
  tx: optax.GradientTransformation,
  transform: power.PowerTransform,
) -> TrainState:
  """The state of a dense network at step 0, from ordinary parameters theta.

  The arrays are copies, because compiled steps donate the state, and the arrays
  of the caller would be donated with it.

  >>> import jax, jax.numpy as jnp, optax
  >>> from powerprop_jax import power
  >>> transform = power.power_transform(2.0)
  >>> theta = {'linear': {'w': jnp.array([4.0, -9.0])}}
  >>> key, tx = jax.random.key(0), optax.sgd(0.1)
  >>> init_state(key, theta, {}, tx, transform).phi
  {'linear': {'w': Array([ 2., -3.], dtype=float32)}}

  Args:
    key: the PRNG key of the run.
    theta: the parameters, as the network's own initialisation makes them.
    model_state: statistics of the network; {} if it has none.
    tx: a transformation of gradients at theta into updates of phi, such as
      `transforms.target_propagation(optax.adam(1e-3), transform)`.
    transform: a `power.power_transform`.

  Returns:
    A `TrainState` with masks of ones.
  """
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


def _on_each_device(theta, axis_name):
  """Lets every device have a gradient of its own, for the mean to be taken.

  `jax.shard_map` sums the gradients at what all devices share by itself, unless
  check_vma is False.
  """

  def varying(x):
    try:
      return jax.lax.pcast(x, axis_name, to='varying')
    except ValueError:  # It varies already.
      return x

  return theta if axis_name is None else jax.tree.map(varying, theta)


def _mean_statistics(model_state, axis_name):
  """The mean over devices; counters are the same on all, and stay integers."""

  def mean(x):
    is_float = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return jax.lax.pmean(x, axis_name) if is_float else x

  return jax.tree.map(mean, model_state)


def masked_theta(
  state: TrainState, transform: power.PowerTransform
) -> types.Params:
  """The weights that the network uses: where(forward, psi(phi), 0).

  >>> import jax, jax.numpy as jnp, optax
  >>> from powerprop_jax import power
  >>> from powerprop_jax.sparse import masks
  >>> transform, tx = power.power_transform(2.0), optax.sgd(0.1)
  >>> key, theta = jax.random.key(0), {'w': jnp.array([4.0, 9.0])}
  >>> state = init_state(key, theta, {}, tx, transform)
  >>> mask = {'w': jnp.array([True, False])}
  >>> state = state._replace(masks=masks.Masks(mask, mask))
  >>> masked_theta(state, transform)
  {'w': Array([4., 0.], dtype=float32)}

  Args:
    state: a `TrainState`.
    transform: the `power.power_transform` of its phi.

  Returns:
    A pytree of the structure, shapes and dtypes of `state.phi`.
  """
  return masks_lib.apply_mask(
    transform.to_theta(state.phi), state.masks.forward
  )


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  transform: power.PowerTransform,
  axis_name: str | None = None,
  penalty: Penalty | None = None,
  norms: bool = False,
) -> TrainStep:
  """Makes one step of training, a pure function for its caller to compile.

  The optimiser sees the gradient and the parameters where the backward mask is
  True and zero elsewhere, and its update is masked again, so that it trains the
  network without the weights that may not move (see `sparse.masking`).

  It is also given the loss as `value`, which `optax.polyak_sgd` and
  `optax.contrib.reduce_on_plateau` ask for. Line searches, which evaluate the
  loss anew, need a loop of their own: this step cannot know whether they do so
  in theta, inside `target_propagation`, or in phi, outside of it.

  >>> import jax, jax.numpy as jnp, optax
  >>> from powerprop_jax import power, transforms
  >>> def loss_fn(theta, model_state, key, batch):
  ...   return jnp.sum(theta['w'] * batch), (model_state, {})
  >>> transform = power.power_transform(2.0)
  >>> tx = transforms.target_propagation(optax.sgd(0.1), transform)
  >>> theta, key = {'w': jnp.array([4.0])}, jax.random.key(0)
  >>> state = init_state(key, theta, {}, tx, transform)
  >>> step = jax.jit(make_train_step(loss_fn, tx, transform))
  >>> state, metrics = step(state, jnp.array([1.0]))
  >>> state.phi, metrics  # phi = 2 - 0.1 * 1 * 2 |phi|.
  ({'w': Array([1.6], dtype=float32)}, {'loss': Array(4., dtype=float32)})

  Args:
    loss_fn: maps (theta, model_state, key, batch) to (loss, (model_state,
      metrics)), where loss is the mean over the batch.
    tx: a transformation of gradients at theta into updates of phi, such as
      `transforms.target_propagation(optax.adam(1e-3), transform)`.
    transform: a `power.power_transform`.
    axis_name: the axis of a pmap or shard_map over which to average gradients,
      statistics and metrics.
    penalty: maps (theta, masks), where theta has all weights, to a gradient
      that is added. Unlike a term of the loss it reaches weights that the
      forward mask cuts, as that of Top-KAST must.
    norms: whether metrics also have the Euclidean norms of the gradient at
      theta, as `gradient_norm`, and of the update of phi, as `update_norm`;
      both count only what may move.

  Returns:
    A function of (state, batch) that returns (state, metrics), where metrics
    are those of `loss_fn`, and the loss under 'loss'.

  References:
    Schwarz et al, `Powerpropagation`, NeurIPS 2021, section 2.
  """

  def train_step(state, batch):
    masks = state.masks
    theta = transform.to_theta(state.phi)
    key = jax.random.fold_in(state.key, state.step)
    masked = masks_lib.apply_mask(theta, masks.forward)
    grads, model_state, metrics = _gradient(
      loss_fn, _on_each_device(masked, axis_name), state, key, batch
    )
    if axis_name is not None:
      grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
      model_state = _mean_statistics(model_state, axis_name)
    if penalty is not None:
      grads = jax.tree.map(jnp.add, grads, penalty(theta, masks))

    updates, opt_state = masking.masked_update(
      tx,
      grads,
      state.opt_state,
      state.phi,
      masks,
      value=metrics['loss'],
    )
    if norms:
      moving = masks_lib.apply_mask(grads, masks.backward)
      metrics = metrics | {
        'gradient_norm': optax.tree.norm(moving),
        'update_norm': optax.tree.norm(updates),
      }
    state = state._replace(
      phi=optax.apply_updates(state.phi, updates),
      model_state=model_state,
      opt_state=opt_state,
      step=state.step + 1,
    )
    return state, metrics

  return train_step


def _mean_gradient(loss_fn, theta, state, batches):
  """The gradient at theta, averaged over the leading axis of batches."""
  key = jax.random.fold_in(state.key, state.step)

  def add(total, batch):
    grads, _, _ = _gradient(loss_fn, theta, state, key, batch)
    return jax.tree.map(jnp.add, total, grads), None

  total, _ = jax.lax.scan(add, leaves.zeros_for_sum(theta), batches)
  n = len(jax.tree.leaves(batches)[0])
  return jax.tree.map(lambda x, g: (g / n).astype(x.dtype), theta, total)


def make_mask_updates(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  updater: updaters.MaskUpdater,
  transform: power.PowerTransform,
  axis_name: str | None = None,
) -> tuple[MaskStep, MaskStep]:
  """Makes the functions that choose the first masks and that update them.

  They are apart from the train step, and the host calls them every so many
  steps: in the train step, under `lax.cond`, they would double its compilation
  time.

  >>> import jax, jax.numpy as jnp, optax
  >>> from powerprop_jax import power, transforms
  >>> from powerprop_jax.sparse import distributions, updaters
  >>> def loss_fn(theta, model_state, key, batch):
  ...   return jnp.sum((theta['w'] - batch) ** 2), (model_state, {})
  >>> transform = power.power_transform(2.0)
  >>> tx = transforms.target_propagation(optax.adam(0.1), transform)
  >>> half = updaters.magnitude(distributions.uniform(0.5))
  >>> init_masks, update_masks = make_mask_updates(loss_fn, tx, half, transform)
  >>> theta, key = {'w': jnp.array([4.0, 1.0])}, jax.random.key(0)
  >>> state = init_state(key, theta, {}, tx, transform)
  >>> batches = jnp.zeros([1, 2])  # One batch.
  >>> state = update_masks(init_masks(state, batches), batches)
  >>> state.masks.forward
  {'w': Array([ True, False], dtype=bool)}

  Args:
    loss_fn: as in `make_train_step`.
    tx: as in `make_train_step`.
    updater: a method of `updaters`.
    transform: a `power.power_transform`.
    axis_name: the axis of a pmap or shard_map over which to average gradients.
      Masks are scored by the average, with one key on every device, so that all
      devices choose the same masks.

  Returns:
    Two pure functions of (state, batches) that return a state: one makes the
    masks at the start, the other updates them. The arrays in batches have the
    shape [number of batches, examples per batch, ...]; the gradient is averaged
    over all batches. Both functions raise ValueError when they are traced if
    the state of tx cannot follow masks (see `masking.check_resettable`).
  """

  def inputs(state, batches):
    """The key, the weights and the gradient, which an updater sees."""
    masking.check_resettable(tx, state.phi)
    theta = transform.to_theta(state.phi)
    masked = masks_lib.apply_mask(theta, state.masks.forward)
    masked = _on_each_device(masked, axis_name)
    grads = _mean_gradient(loss_fn, masked, state, batches)
    if axis_name is not None:
      grads = jax.lax.pmean(grads, axis_name)
    # The train step folds in a number below 2^31, so that its keys are others.
    key = jax.random.fold_in(jax.random.fold_in(state.key, 2**31), state.step)
    return key, theta, grads

  def with_masks(state, phi, masks):
    opt_state = masking.change_masks(
      tx, state.opt_state, phi, state.masks, masks
    )
    return state._replace(phi=phi, opt_state=opt_state, masks=masks)

  def init_masks(state, batches):
    masks = updater.init(*inputs(state, batches))
    return with_masks(state, state.phi, masks)

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
    return with_masks(state, phi, masks)

  return init_masks, update_masks


def batch_indices(
  key: jax.Array, start: int, num_steps: int, batch_size: int, size: int
) -> jax.Array:
  """Which examples the steps [start, start + num_steps) train on.

  The examples come in one stream of epochs, each in an order of its own; a
  batch may hold the end of one epoch and the beginning of the next. The order
  depends on the key and the step alone, so training goes on from any step as if
  it had never stopped.

  >>> import jax
  >>> indices = batch_indices(jax.random.key(0), 0, 2, 3, size=6)
  >>> indices.shape, sorted(indices.ravel().tolist())
  ((2, 3), [0, 1, 2, 3, 4, 5])

  Args:
    key: a PRNG key.
    start: the first step; this and all numbers below are integers of Python, or
      concrete ones of numpy or JAX.
    num_steps: the number of steps.
    batch_size: the number of examples per step.
    size: the number of examples of the data set.

  Returns:
    An int32 array [num_steps, batch_size] of indices in [0, size).

  Raises:
    ValueError: if there are no examples, or none are asked for.
  """
  # In Python integers: the position in the stream outgrows int32.
  start, num_steps, batch_size, size = map(
    operator.index, (start, num_steps, batch_size, size)
  )
  if size < 1:
    raise ValueError(f'There are no examples to choose from: size is {size}.')
  if num_steps < 1 or batch_size < 1:
    raise ValueError(
      'num_steps and batch_size must be at least 1, got'
      f' {num_steps} and {batch_size}.'
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
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
  """Makes a function that takes a chunk of steps over data on the device.

  >>> import jax, jax.numpy as jnp, optax
  >>> from powerprop_jax import power
  >>> def loss_fn(theta, model_state, key, batch):
  ...   return jnp.mean((theta['w'] - batch) ** 2), (model_state, {})
  >>> transform, tx = power.power_transform(1.0), optax.sgd(0.5)
  >>> key, theta = jax.random.key(0), {'w': jnp.array(0.0)}
  >>> state = init_state(key, theta, {}, tx, transform)
  >>> run = jax.jit(make_run_steps(make_train_step(loss_fn, tx, transform)))
  >>> data, indices = jnp.array([0.0, 1.0, 2.0]), jnp.array([[1, 1], [0, 2]])
  >>> state, metrics = run(state, data, indices)
  >>> int(state.step), metrics['loss']
  (2, Array([1., 1.], dtype=float32))

  Args:
    train_step: a function made by `make_train_step`.

  Returns:
    A pure function of (state, data, indices), where data is a pytree of arrays
    with one row per example and indices is an int array [steps, batch]. It
    returns the state, and the metrics of all steps, of shape [steps].
  """

  def run_steps(state, data, indices):
    def body(state, index):
      batch = jax.tree.map(lambda x: x[index], data)
      return train_step(state, batch)

    return jax.lax.scan(body, state, indices)

  return run_steps

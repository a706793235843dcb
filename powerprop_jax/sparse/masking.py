"""How an optimiser works under masks.

A sparse network has to train as the small network does that is left when its
cut weights are taken away, and what a mask protects has to stay as it is. Three
rules follow, which every train step keeps:

  * The update is masked after the optimiser. Momentum and weight decay move a
    weight whose gradient alone is masked.
  * The gradient is masked before the optimiser too, and with it the parameters
    that the optimiser reads. Optimisers that take a norm (clipping, LAMB, LARS,
    Muon, NovoGrad) would otherwise count what may not move, and an infinite
    gradient at a cut weight would stop all others.
  * Where the masks change, the moments start afresh. A weight that is freed
    would otherwise be moved by what it did before it was cut, and what remains
    of a weight that was cut would still be in the norms.

Statistics that many weights share, such as the row sums of Adafactor, depend on
the size of a layer; there the sparse and the small network differ.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from powerprop_jax import types
from powerprop_jax.sparse import masks as masks_lib


def masked_update(
  tx: optax.GradientTransformation,
  grads: types.Updates,
  opt_state: optax.OptState,
  params: types.Params,
  masks: masks_lib.Masks,
  **extra_args: Any,
) -> tuple[types.Updates, optax.OptState]:
  """The update of an optimiser that sees and moves the backward mask only.

  >>> import jax.numpy as jnp, optax
  >>> from powerprop_jax.sparse import masks
  >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
  >>> params = {'w': jnp.ones(3)}
  >>> mask = {'w': jnp.array([True, True, False])}
  >>> both = masks.Masks(forward=mask, backward=mask)
  >>> grads = {'w': jnp.array([3.0, 4.0, jnp.inf])}
  >>> updates, state = masked_update(tx, grads, tx.init(params), params, both)
  >>> updates
  {'w': Array([-0.6, -0.8,  0. ], dtype=float32)}

  Args:
    tx: an optimiser.
    grads: the gradient, of the structure and the shapes of params.
    opt_state: the state of the optimiser.
    params: the parameters.
    masks: the masks, whose `backward` says what the optimiser may move.
    **extra_args: further arguments of the update of tx. For line searches a
      gradient that comes as `grad` is masked as `grads` is, and a loss that
      comes as `value_fn` is evaluated with the values of params where the mask
      hides them.

  Returns:
    The updates, zero where the backward mask is False, and the new state.

  Raises:
    ValueError: if a mask has another shape than its parameter.
  """
  if 'grad' in extra_args:
    extra_args['grad'] = masks_lib.apply_mask(
      extra_args['grad'], masks.backward
    )
  if 'value_fn' in extra_args:
    value_fn = extra_args['value_fn']

    @functools.wraps(value_fn)  # Optax looks at the names of its arguments.
    def evaluate(seen, *args, **kwargs):
      whole = jax.tree.map(jnp.where, masks.backward, seen, params)
      return value_fn(whole, *args, **kwargs)

    extra_args['value_fn'] = evaluate
  updates: Any
  updates, opt_state = optax.with_extra_args_support(tx).update(
    masks_lib.apply_mask(grads, masks.backward),
    opt_state,
    masks_lib.apply_mask(params, masks.backward),
    **extra_args,
  )
  return masks_lib.apply_mask(updates, masks.backward), opt_state


def reset_moments(
  tx: optax.GradientTransformation,
  opt_state: optax.OptState,
  params: types.Params,
  where: types.Mask,
) -> optax.OptState:
  """Puts the statistics of some parameters back to their initial values.

  It works for every optimiser whose state holds one number per parameter: what
  belongs to a parameter is found by `optax.tree_utils.tree_map_params`.
  Statistics of another shape than the parameter, such as the row sums of
  Adafactor, belong to many parameters and stay.

  >>> import jax.numpy as jnp, optax
  >>> tx, params = optax.sgd(0.1, momentum=0.9), {'w': jnp.ones(2)}
  >>> _, state = tx.update({'w': jnp.ones(2)}, tx.init(params))
  >>> where = {'w': jnp.array([True, False])}
  >>> reset_moments(tx, state, params, where)[0].trace
  {'w': Array([0., 1.], dtype=float32)}

  Args:
    tx: the optimiser.
    opt_state: its state.
    params: the parameters, from which initial values are taken.
    where: which entries of the parameters start afresh, a pytree of boolean
      arrays.

  Returns:
    A state of the structure, the shapes and the dtypes of opt_state.
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
  # Compiled, because an initialisation may refuse values that it can look at,
  # such as a layer of zeros, which masked parameters may well hold. Parameters
  # that it does not read are kept, because they tell on which devices it runs.
  fresh = jax.jit(tx.init, keep_unused=True)(params)
  return jax.tree.map(jnp.where, selected, fresh, opt_state)


def change_masks(
  tx: optax.GradientTransformation,
  opt_state: optax.OptState,
  params: types.Params,
  old: masks_lib.Masks,
  new: masks_lib.Masks,
) -> optax.OptState:
  """The state of an optimiser after a change of its masks.

  The moments of all weights that are freed, and of all that are cut, are those
  of a new network. The count of steps, by which Adam corrects the bias of its
  moments, is one for all weights and goes on: a weight that is grown late in
  training takes steps some three to five times as large as those of a new
  network, until its moments have caught up after some hundreds of steps.

  >>> import jax.numpy as jnp, optax
  >>> from powerprop_jax.sparse import masks
  >>> tx, params = optax.sgd(0.1, momentum=0.9), {'w': jnp.ones(3)}
  >>> _, state = tx.update({'w': jnp.ones(3)}, tx.init(params))
  >>> a, b = jnp.array([True, True, False]), jnp.array([True, False, True])
  >>> old, new = (masks.Masks({'w': m}, {'w': m}) for m in (a, b))
  >>> change_masks(tx, state, params, old, new)[0].trace
  {'w': Array([1., 0., 0.], dtype=float32)}

  Args:
    tx: the optimiser.
    opt_state: its state under the old masks.
    params: the parameters, in which freed weights have their new values.
    old: the masks up to now.
    new: the masks from now on.

  Returns:
    The state under the new masks.
  """
  changed = jax.tree.map(jnp.not_equal, old.backward, new.backward)
  params = masks_lib.apply_mask(params, new.backward)
  return reset_moments(tx, opt_state, params, changed)


def check_resettable(
  tx: optax.GradientTransformation, params: types.Params
) -> None:
  """Raises ValueError if moments of single weights cannot be reset.

  The check costs no computation: the state is only traced.

  >>> import jax.numpy as jnp, optax
  >>> params = {'w': jnp.ones(3)}
  >>> check_resettable(optax.adam(1e-3), params)
  >>> check_resettable(optax.flatten(optax.adam(1e-3)), params)
  Traceback (most recent call last):
  ...
  ValueError: The state of this optimiser has no entry for each parameter...

  Args:
    tx: the optimiser.
    params: its parameters, or anything of their shapes.

  Raises:
    ValueError: if the state of the optimiser is not made of trees that are
      shaped like the parameters, as those of `optax.flatten` and SM3 are not.
  """
  state = jax.eval_shape(tx.init, params)
  everything = jax.eval_shape(
    lambda x: jax.tree.map(masks_lib.ones_like, x), params
  )
  try:
    jax.eval_shape(
      lambda *args: reset_moments(tx, *args), state, params, everything
    )
  except Exception as error:  # The state may be anything, and so may this be.
    raise ValueError(
      'The state of this optimiser has no entry for each parameter, so that the'
      ' moments of weights that are grown or cut could not be reset. Leave out'
      ' optax.flatten, which changes no number but the time of a step; instead'
      ' of SM3, take an optimiser such as Adam, Adagrad or Adafactor.'
    ) from error

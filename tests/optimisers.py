"""Optimisers and wrappers of optax with which several tests run."""

import optax
from optax import contrib

from powerprop_jax import leaves

# Optimisers that may be inside `target_propagation` and `powerprop`. Schedules
# end after the four steps that tests take.
OPTIMISERS = {
  'sgd': lambda: optax.sgd(0.1),
  'momentum': lambda: optax.sgd(0.1, momentum=0.9),
  'nesterov': lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
  'adabelief': lambda: optax.adabelief(0.1),
  'adafactor': lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
  'adagrad': lambda: optax.adagrad(0.1),
  'adam': lambda: optax.adam(0.1),
  'adamw': lambda: optax.adamw(0.1, weight_decay=0.1),
  'amsgrad': lambda: optax.amsgrad(0.1),
  'lamb': lambda: optax.lamb(0.1, weight_decay=0.1),
  'lars': lambda: optax.lars(0.1, weight_decay=0.1),
  'lion': lambda: optax.lion(0.1, weight_decay=0.1),
  'novograd': lambda: optax.novograd(0.1, weight_decay=0.1),
  'radam': lambda: optax.radam(0.1),
  'rmsprop': lambda: optax.rmsprop(0.1, momentum=0.9),
  'yogi': lambda: optax.yogi(0.1),
  'ademamix': lambda: contrib.ademamix(0.1, weight_decay=0.1),
  'muon': lambda: contrib.muon(0.1, weight_decay=0.1),
  'prodigy': lambda: contrib.prodigy(0.1, weight_decay=0.1),
  'polyak_sgd': lambda: optax.polyak_sgd(),
  'multi_steps': lambda: optax.MultiSteps(
    optax.adamw(0.1), 2
  ).gradient_transformation(),
  'apply_if_finite': lambda: optax.apply_if_finite(optax.adamw(0.1), 3),
  'inject_hyperparams': lambda: optax.inject_hyperparams(optax.adamw)(
    learning_rate=optax.linear_schedule(0.1, 0.0, 4), weight_decay=0.1
  ),
  'masked': lambda: optax.chain(
    optax.masked(optax.scale_by_adam(), leaves.weight_mask),
    optax.add_decayed_weights(0.1, mask=leaves.weight_mask),
    optax.scale(-0.1),
  ),
  'partition': lambda: optax.partition(
    {True: optax.adamw(0.1), False: optax.sgd(0.1, 0.9)}, leaves.weight_mask
  ),
  'chain': lambda: optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.1),
    optax.scale_by_schedule(optax.cosine_decay_schedule(-0.1, 4)),
  ),
}
# The keyword arguments of their updates.
EXTRA_ARGS = {'polyak_sgd': {'value': 2.0}}

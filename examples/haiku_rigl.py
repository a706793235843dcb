"""Haiku: BatchNorm, target propagation and RigL, on all devices.

  python -m examples.haiku_rigl

trains with a tenth of the weights, chosen by RigL, on all devices.
XLA_FLAGS=--xla_force_host_platform_device_count=2 makes two devices of a CPU.
"""

import functools

import haiku as hk
import jax
import numpy as np
import optax

import powerprop_jax
from powerprop_jax import training
from powerprop_jax.data import in_memory
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters
from powerprop_jax.training import classification
from powerprop_jax.training import devices

AXIS = 'devices'


def forward(x, is_training, axis=None):
  x = hk.Conv2D(32, 5, stride=3, with_bias=False)(x)
  norm = hk.BatchNorm(True, True, 0.9, cross_replica_axis=axis)
  x = hk.Flatten()(jax.nn.relu(norm(x, is_training)))
  return hk.Linear(10, name='logits')(x)


def train(data, alpha: float, steps: int, sparsity: float) -> float:
  """Trains a sparse network and returns its test accuracy."""
  # The axis over which BatchNorm averages exists only in the mapped step.
  network = hk.transform_with_state(functools.partial(forward, axis=AXIS))
  single = hk.transform_with_state(forward)
  key, images = jax.random.key(0), data.train.images[:1] / 255.0
  theta, model_state = single.init(key, images, True)
  transform = powerprop_jax.power_transform(alpha)
  tx = powerprop_jax.target_propagation(optax.adam(2e-3), transform)
  rigl = updaters.rigl(
    distributions.erdos_renyi(sparsity),
    schedules.drop_fraction(0.3, steps),
    # Grown weights go on from the value that they had, or from their initial
    # one. From zero, which is usual for RigL, they would never move.
    regrow=None,
  )
  loss_fn = classification.make_loss(network.apply)
  step = training.make_train_step(loss_fn, tx, transform, AXIS)
  others = training.make_mask_updates(loss_fn, tx, rigl, transform, AXIS)
  step, choose, trade = (devices.on_devices(f, AXIS) for f in (step, *others))
  state = training.init_state(key, theta, model_state, tx, transform)
  state, rng = devices.replicate(state, AXIS), np.random.default_rng(0)
  due = schedules.every(steps // 12, steps // 12, stop=3 * steps // 4)
  for t in range(steps):
    rows = rng.integers(len(data.train.labels), size=(1, 80))
    # Masks are scored by the mean gradient over one batch, or several.
    batches = (data.train.images[rows], data.train.labels[rows])
    if t == 0 or due(t):
      scored = devices.shard(batches, AXIS, dim=1)
      state = trade(state, scored) if t else choose(state, scored)
    batch = jax.tree.map(lambda x: x[0], batches)
    state, _ = step(state, devices.shard(batch, AXIS))
  state = devices.unreplicate(state, AXIS)
  accuracy = jax.jit(classification.make_accuracy(single.apply))
  theta = training.masked_theta(state, transform)
  return float(accuracy(theta, state.model_state, *data.test))


def main(steps: int = 600, sparsity: float = 0.9) -> dict[float, float]:
  """Prints and returns the test accuracy for each alpha."""
  data, results = in_memory.load('mnist_5k'), {}
  for alpha in (1.0, 2.0):  # 1 is the ordinary network.
    results[alpha] = train(data, alpha, steps, sparsity)
    print(
      f'alpha = {alpha:g}, {sparsity:.0%} sparse from the start: test accuracy'
      f' {results[alpha]:.1%}'
    )
  return results


if __name__ == '__main__':
  main()

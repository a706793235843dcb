"""Measures the cost of a power in a training step, as a ratio to alpha = 1.

  python -m benchmarks.step

LeNet-300-100 is trained on mnist_5k with batches of 60 and plain SGD, in
compiled chunks of 500 steps. The alphas take turns, and the fastest turn of
each counts.
"""

import time

import jax
import optax

from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax import transforms
from powerprop_jax.data import in_memory
from powerprop_jax.models import networks
from powerprop_jax.training import classification

ALPHAS = (1.0, 2.0, 3.0, 4.0, 1.375, 1.7)
STEPS = 500
TURNS = 12


def make_chunk(alpha: float, data: in_memory.Dataset):
  """A function that takes STEPS training steps and waits for them."""
  network = networks.build('lenet_300_100', data.num_classes)
  transform = power.power_transform(alpha)
  tx = transforms.target_propagation(optax.sgd(0.01), transform)
  key = jax.random.key(0)
  theta, model_state = network.init(key, data.train.images[:1] / 255.0, True)
  state = training.init_state(key, theta, model_state, tx, transform)
  run_steps = jax.jit(
    training.make_run_steps(
      training.make_train_step(
        classification.make_loss(network.apply), tx, transform
      )
    )
  )
  split = jax.device_put((data.train.images, data.train.labels))
  size = len(data.train.labels)
  indices = training.batch_indices(key, 0, STEPS, 60, size)
  return lambda: jax.block_until_ready(run_steps(state, split, indices))


def main() -> None:
  data = in_memory.load('mnist_5k')
  chunks = {alpha: make_chunk(alpha, data) for alpha in ALPHAS}
  seconds = {alpha: [] for alpha in ALPHAS}
  for turn in range(TURNS + 1):
    for alpha, chunk in chunks.items():
      start = time.perf_counter()
      chunk()
      if turn:  # The first one compiles.
        seconds[alpha].append(time.perf_counter() - start)
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}')
  base = min(seconds[1.0])
  for alpha in ALPHAS:
    best = min(seconds[alpha])
    print(
      f'alpha = {alpha:<5g}  {1e6 * best / STEPS:7.0f} us per step '
      f' {best / base:.2f} x alpha = 1'
    )


if __name__ == '__main__':
  main()

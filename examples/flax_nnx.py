"""Flax nnx: a small convolutional network, gradually pruned while it learns.

  python -m examples.flax_nnx

trains on 4,000 real digits with AdamW down to a few of the weights. The five
changes of an ordinary loop are numbered. alpha = 1 is the ordinary network. In
a network as small as this one, pruned as gradually, alpha = 2 is no better.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax
from powerprop_jax.data import in_memory
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters

# The best of 0.002, 0.004 and 0.01 for 1, and of 0.0025, 0.005 and 0.01 for 2.
RATES = {1.0: 1e-2, 2.0: 5e-3}


class Network(nnx.Module):
  """Two convolutions and a linear layer."""

  def __init__(self, rngs: nnx.Rngs):
    self.conv_0 = nnx.Conv(1, 16, (5, 5), strides=2, rngs=rngs)
    self.conv_1 = nnx.Conv(16, 32, (5, 5), strides=2, rngs=rngs)
    self.output = nnx.Linear(7 * 7 * 32, 10, rngs=rngs)

  def __call__(self, images):
    x = nnx.relu(self.conv_0(images / 255.0))
    x = nnx.relu(self.conv_1(x))
    return self.output(x.reshape(len(x), -1))


def used(model, optimiser):
  """The network with the weights that are not cut."""
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  weights = optimiser.tx.weights(params, optimiser.opt_state)  # 1
  return nnx.merge(graph, weights, rest)


@nnx.jit
def train_step(model, optimiser, images, labels):
  def loss_fn(model):
    logits = used(model, optimiser)(images)  # 2: It was model(images).
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  optimiser.update(model, nnx.grad(loss_fn)(model))


@nnx.jit
def accuracy(model, optimiser, images, labels):
  found = jnp.argmax(used(model, optimiser)(images), axis=-1)
  return jnp.mean(found == labels)


def train(data, alpha, rate, steps, density) -> float:
  """The test accuracy of the sparse network."""
  model = Network(nnx.Rngs(0))
  tx = optax.adamw(optax.cosine_decay_schedule(rate, steps))
  method = updaters.magnitude(  # 3
    distributions.erdos_renyi(1 - density), schedules.cubic(0, 3 * steps // 4)
  )
  key, due = jax.random.key(0), schedules.every(max(steps // 50, 1))  # 4
  tx = powerprop_jax.powerprop(tx, alpha)
  tx = powerprop_jax.sparsify(tx, method, key=key, due=due)  # 5
  optimiser = nnx.Optimizer(model, tx, wrt=nnx.Param)
  rng = np.random.default_rng(0)
  for _ in range(steps):
    rows = rng.integers(len(data.train.labels), size=64)
    images, labels = data.train.images[rows], data.train.labels[rows]
    train_step(model, optimiser, images, labels)
  return float(accuracy(model, optimiser, *data.test))


def main(steps: int = 800, density: float = 0.02) -> dict[float, float]:
  """Prints and returns the test accuracy for each alpha."""
  data, results = in_memory.load('mnist_5k'), {}
  for alpha, rate in RATES.items():
    results[alpha] = train(data, alpha, rate, steps, density)
    print(
      f'alpha = {alpha:g}: test accuracy {results[alpha]:.1%} with'
      f' {density:.0%} of the weights'
    )
  return results


if __name__ == '__main__':
  main()

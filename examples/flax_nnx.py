"""Flax nnx: a small convolutional network, with one line changed.

  python -m examples.flax_nnx

trains on 4,000 real digits with AdamW, with and without Powerpropagation, and
prunes both networks once to a few of their weights.
"""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax
from powerprop_jax.data import in_memory
from powerprop_jax.sparse import pruning


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


@nnx.jit
def train_step(model, optimiser, images, labels):
  def loss_fn(model):
    return optax.softmax_cross_entropy_with_integer_labels(
      model(images), labels
    ).mean()

  optimiser.update(model, nnx.grad(loss_fn)(model))


@nnx.jit
def accuracy(model, images, labels):
  return jnp.mean(jnp.argmax(model(images), axis=-1) == labels)


def train(data: in_memory.Dataset, alpha: float, steps: int) -> Network:
  model = Network(nnx.Rngs(0))
  # The one line: it was `tx = optax.adamw(2e-3)`.
  tx = powerprop_jax.powerprop(optax.adamw(2e-3), alpha)
  optimiser = nnx.Optimizer(model, tx, wrt=nnx.Param)
  rng = np.random.default_rng(0)
  for _ in range(steps):
    rows = rng.integers(len(data.train.labels), size=64)
    images, labels = data.train.images[rows], data.train.labels[rows]
    train_step(model, optimiser, images, labels)
  return model


def main(steps: int = 800, density: float = 0.05) -> dict[float, list[float]]:
  """Prints and returns the test accuracy, dense and pruned, of each alpha."""
  data, results = in_memory.load('mnist_5k'), {}
  for alpha in (1.0, 2.0):
    model = train(data, alpha, steps)
    dense = accuracy(model, *data.test)
    theta = nnx.state(model, nnx.Param)
    mask = pruning.prune(theta, density)
    nnx.update(model, powerprop_jax.apply_mask(theta, mask))
    results[alpha] = [float(dense), float(accuracy(model, *data.test))]
    print(
      f'alpha = {alpha:g}: test accuracy {results[alpha][0]:.1%},'
      f' {results[alpha][1]:.1%} with {density:.0%} of the weights'
    )
  return results


if __name__ == '__main__':
  main()

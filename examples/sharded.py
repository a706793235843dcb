"""Sharded: gradual pruning and Powerpropagation of weights cut into pieces.

  python -m examples.sharded

Eight virtual devices of a CPU are a mesh of 4 x 2. Matrices, with their masks
and moments, are cut along both axes, and batches along the first.
"""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

import powerprop_jax
from powerprop_jax.data import in_memory
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters

RATES = {1.0: 1e-3, 2.0: 3e-3}
SIZES = (784, 256, 128, 10)


def apply(params, images):
  x = images.reshape(len(images), -1) / 255.0
  for i, layer in enumerate(params.values()):
    x = (jax.nn.relu(x) if i else x) @ layer['w'] + layer['b']
  return x


def init():
  rng, params = np.random.default_rng(0), {}
  for i, (n, m) in enumerate(itertools.pairwise(SIZES)):
    w = (2 / n) ** 0.5 * rng.standard_normal((n, m), np.float32)
    params[f'layer_{i}'] = {'w': w, 'b': np.zeros(m, np.float32)}
  return params


def train(data, mesh, alpha, steps, sparsity):
  cut = {1: PartitionSpec('model'), 2: PartitionSpec('data', 'model')}
  params = jax.tree.map(
    lambda x: jax.device_put(x, NamedSharding(mesh, cut[x.ndim])), init()
  )
  rows = NamedSharding(mesh, PartitionSpec('data'))
  method = updaters.magnitude(
    distributions.erdos_renyi(sparsity), schedules.cubic(0, 3 * steps // 4)
  )
  inner = optax.adamw(optax.cosine_decay_schedule(RATES[alpha], steps))
  tx = powerprop_jax.sparsify(
    powerprop_jax.powerprop(inner, alpha),
    method,
    key=jax.random.key(0),
    due=schedules.every(max(steps // 50, 1)),
  )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, images, labels):
    def loss_fn(params):
      logits = apply(tx.weights(params, state), images)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels
      ).mean()

    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, updates), state

  state, rng = tx.init(params), np.random.default_rng(0)
  for _ in range(steps):
    chosen = rng.integers(len(data.train.labels), size=64)
    batch = (data.train.images[chosen], data.train.labels[chosen])
    params, state = step(params, state, *jax.device_put(batch, rows))
    jax.block_until_ready(state.count)  # Devices share the cores.
  weights = tx.weights(params, state)
  found = jnp.argmax(jax.jit(apply)(weights, data.test.images), axis=-1)
  return float(np.mean(found == data.test.labels)), weights


def main(steps: int = 1500, sparsity: float = 0.99) -> dict[float, float]:
  """Prints and returns the test accuracy for each alpha."""
  mesh = jax.make_mesh((4, 2), ('data', 'model'), (AxisType.Auto,) * 2)
  data, results = in_memory.load('mnist_5k'), {}
  for alpha in RATES:
    results[alpha], weights = train(data, mesh, alpha, steps, sparsity)
    print(f'alpha = {alpha:g}: {sparsity:.0%} sparse, {results[alpha]:.1%}')
    print(f'  sharded by {jax.tree.leaves(weights)[1].sharding.spec}')
  return results


if __name__ == '__main__':
  os.environ['NPROC'] = '64'  # Threads: devices wait for each other in them.
  jax.config.update('jax_num_cpu_devices', 8)
  main()

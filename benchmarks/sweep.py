"""Times training at several alphas, against an obvious Python loop.

  python -m benchmarks.sweep

The package runs compiled chunks of steps over data on the device, with one
network on each core. The obvious way is a Python loop over a compiled step that
differentiates phi |phi|^(alpha - 1), fed with batches by numpy. Both train
LeNet-300-100 at five alphas on mnist_5k with batches of 60 and plain SGD.
Prints the ratio of the times; compilation is left out of both. The matrix
products of the steps, which are timed alone, compiled and on all cores, bound
the ratio that can be reached.
"""

import argparse
from collections.abc import Callable
import concurrent.futures
import functools
import itertools
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.support import runs
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax import transforms
from powerprop_jax.data import in_memory
from powerprop_jax.models import networks
from powerprop_jax.training import classification
from powerprop_jax.training import feeds
from powerprop_jax.training import loop

ALPHAS = (1.0, 2.0, 3.0, 4.0, 5.0)
BATCH = 60
RATE = 0.05


def on_all_devices(work: Callable[[int], None]) -> float:
  """Seconds until work(i) is done by a thread for each device i."""
  count = jax.local_device_count()
  start = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(count) as pool:
    list(pool.map(work, range(count)))
  return time.perf_counter() - start


def package(data: in_memory.Dataset, steps: int) -> float:
  """Seconds of the training of the package at all alphas, on all cores."""
  network = networks.build('lenet_300_100', data.num_classes)
  split = (data.train.images, data.train.labels)
  key = jax.random.key(0)

  def make(alpha):
    transform = power.power_transform(alpha)
    tx = transforms.target_propagation(optax.sgd(RATE), transform)
    loss_fn = classification.make_loss(network.apply)
    step = training.make_train_step(loss_fn, tx, transform)

    def init():
      theta, state = network.init(key, jnp.zeros((1, 28, 28, 1)), True)
      return training.init_state(key, theta, state, tx, transform)

    return init, feeds.compile_steps(step, None)

  jobs = [make(alpha) for alpha in ALPHAS]
  devices = jax.local_devices()
  local = [jax.device_put(split, d) for d in devices]

  def train(worker, steps):
    with jax.default_device(devices[worker]):
      for init, run_steps in jobs[worker :: len(devices)]:
        advance = feeds.make_advance(
          run_steps,
          local[worker],
          key,
          batch_size=BATCH,
          size=len(data.train.labels),
        )
        state = loop.run(advance, init(), start=0, stop=steps, chunk=500)
        jax.block_until_ready(state)

  # This compiles; the order of examples is drawn for 1,000 steps at a time.
  on_all_devices(functools.partial(train, steps=min(steps, 1000)))
  return on_all_devices(functools.partial(train, steps=steps))


def products(data: in_memory.Dataset, steps: int) -> float:
  """Seconds of the matrix products of all alphas, on all cores.

  A network without activations, loss or reparameterisation, on one batch.
  """
  sizes = (data.train.images[0].size, 300, 100, data.num_classes)
  weights = [
    np.full(shape, 1e-3, np.float32) for shape in itertools.pairwise(sizes)
  ]
  x, cotangent = np.ones((BATCH, sizes[0])), np.ones((BATCH, sizes[-1]))
  devices = jax.local_devices()

  def step(w, _):
    out, vjp = jax.vjp(lambda w: functools.reduce(jnp.matmul, w, x), w)
    (grads,) = vjp(cotangent - out)
    return jax.tree.map(lambda w, g: w - 1e-9 * g, w, grads), None

  run = jax.jit(lambda w: jax.lax.scan(step, w, length=steps)[0])

  def work(worker):
    for _ in ALPHAS[worker :: len(devices)]:
      jax.block_until_ready(run(jax.device_put(weights, devices[worker])))

  on_all_devices(work)  # Compiles.
  return on_all_devices(work)


def obvious(data: in_memory.Dataset, steps: int) -> float:
  """Seconds of the Python loop at all alphas in turn, on all cores."""
  network = networks.build('lenet_300_100', data.num_classes)
  theta, _ = network.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), True)
  tx = optax.sgd(RATE)
  total = 0.0
  for alpha in ALPHAS:

    def psi(path, x, alpha=alpha):
      return x * jnp.abs(x) ** (alpha - 1) if path[-1].key == 'w' else x

    def to_phi(path, x, alpha=alpha):
      root = jnp.sign(x) * jnp.abs(x) ** (1 / alpha)
      return root if path[-1].key == 'w' else x

    def loss_fn(phi, images, labels, psi=psi):
      params = jax.tree_util.tree_map_with_path(psi, phi)
      logits, _ = network.apply(params, {}, None, images, True)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return jnp.mean(losses)

    @jax.jit
    def step(phi, opt_state, images, labels, loss_fn=loss_fn):
      loss, grads = jax.value_and_grad(loss_fn)(phi, images, labels)
      updates, opt_state = tx.update(grads, opt_state, phi)
      return optax.apply_updates(phi, updates), opt_state, loss

    phi = jax.tree_util.tree_map_with_path(to_phi, theta)
    opt_state = tx.init(phi)
    rng = np.random.default_rng(0)
    start = 0.0
    for i in range(steps + 1):
      index = rng.integers(0, len(data.train.labels), BATCH)
      images = data.train.images[index].astype(np.float32) / 255.0
      labels = data.train.labels[index]
      phi, opt_state, _ = step(phi, opt_state, images, labels)
      if i == 0:  # The first step compiles.
        jax.block_until_ready(phi)
        start = time.perf_counter()
    jax.block_until_ready(phi)
    total += time.perf_counter() - start
  return total


TIMED = (package, obvious, products)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--steps', type=int, default=2000, help='The number of steps of each alpha.'
  )
  parser.add_argument(
    '--only',
    choices=[f.__name__ for f in TIMED],
    help='Times one of them only, in this process, and prints the seconds.',
  )
  args = parser.parse_args()
  if args.only:
    data = in_memory.load('mnist_5k')
    if args.only != 'obvious':
      runs.use_cores(len(ALPHAS))
    (timed,) = (f for f in TIMED if f.__name__ == args.only)
    print(timed(data, args.steps))
    return
  # Each has a process of its own, since the package sets how XLA uses the
  # cores. They take turns, since other work on the machine comes and goes.
  seconds = {f.__name__: [] for f in TIMED}
  for _ in range(2):
    for name, times in seconds.items():
      command = [sys.executable, '-m', 'benchmarks.sweep', '--only', name]
      command += ['--steps', str(args.steps)]
      out = subprocess.run(command, check=True, capture_output=True, text=True)
      times.append(float(out.stdout))
  ours, theirs, bound = (min(times) for times in seconds.values())
  print(
    f'{len(ALPHAS)} alphas x {args.steps} steps: {theirs / ours:.1f} times'
    f' faster than a Python loop ({ours:.1f} s against {theirs:.1f} s; the'
    f' matrix products alone take {bound:.1f} s, so that at most'
    f' {theirs / bound:.1f} times could be reached);'
    f' {jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax'
    f' {jax.__version__}'
  )


if __name__ == '__main__':
  main()

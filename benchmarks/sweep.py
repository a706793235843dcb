"""Training several alphas as the package does, against the obvious way.

  python -m benchmarks.sweep

The package: compiled chunks of steps over data on the device, one network on
each core. The obvious way: a Python loop over a compiled step that
differentiates phi |phi|^(alpha - 1), fed with batches by numpy. Five alphas of
LeNet-300-100 on mnist_5k, batches of 60, plain SGD. Prints the ratio of the
times; compilation is left out of both.
"""

import argparse
import concurrent.futures
import functools
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import runner
from powerprop_jax import classification
from powerprop_jax import datasets
from powerprop_jax import networks
from powerprop_jax import power
from powerprop_jax import propagation
from powerprop_jax import training

ALPHAS = (1.0, 2.0, 3.0, 4.0, 5.0)
BATCH = 60
RATE = 0.05


def package(data: datasets.Dataset, steps: int) -> float:
  """Seconds for all alphas, on all cores."""
  network = networks.build('lenet_300_100', data.num_classes)
  split = (data.train.images, data.train.labels)
  key = jax.random.key(0)

  def make(alpha):
    transform = power.power_transform(alpha)
    tx = propagation.target_propagation(optax.sgd(RATE), transform)
    loss_fn = classification.make_loss(network.apply)
    run_steps = training.make_run_steps(
      training.make_train_step(loss_fn, tx, transform)
    )

    def init():
      theta, state = network.init(key, jnp.zeros((1, 28, 28, 1)), True)
      return training.init_state(key, theta, state, tx, transform)

    return init, jax.jit(run_steps, donate_argnums=0)

  jobs = [make(alpha) for alpha in ALPHAS]
  devices = jax.local_devices()
  local = [jax.device_put(split, d) for d in devices]

  def train(worker, steps):
    with jax.default_device(devices[worker]):
      for init, run_steps in jobs[worker :: len(devices)]:
        state = runner.train(
          init(),
          run_steps,
          local[worker],
          key,
          steps=steps,
          batch_size=BATCH,
          report=lambda step, metrics: None,
        )
        jax.block_until_ready(state)

  def train_all(steps):
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
      list(pool.map(functools.partial(train, steps=steps), range(len(devices))))
    return time.perf_counter() - start

  train_all(500)  # Compiles.
  return train_all(steps)


def obvious(data: datasets.Dataset, steps: int) -> float:
  """Seconds for all alphas, one after another, on all cores each."""
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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=2000)
  parser.add_argument('--only', choices=['package', 'obvious'])
  args = parser.parse_args()
  if args.only:
    data = datasets.load('mnist_5k')
    if args.only == 'package':
      runner.use_cores(len(ALPHAS))
    f = package if args.only == 'package' else obvious
    print(f(data, args.steps))
    return
  # A process each, since the package sets how XLA uses the cores; by turns,
  # since other work on the machine comes and goes.
  seconds = {'package': [], 'obvious': []}
  for _ in range(2):
    for name, times in seconds.items():
      command = [sys.executable, '-m', 'benchmarks.sweep', '--only', name]
      command += ['--steps', str(args.steps)]
      out = subprocess.run(command, check=True, capture_output=True, text=True)
      times.append(float(out.stdout))
  ours, theirs = min(seconds['package']), min(seconds['obvious'])
  print(
    f'{len(ALPHAS)} alphas x {args.steps} steps: {theirs / ours:.1f} times'
    f' faster than a Python loop ({ours:.1f} s against {theirs:.1f} s);'
    f' {jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax'
    f' {jax.__version__}'
  )


if __name__ == '__main__':
  main()

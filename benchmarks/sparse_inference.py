"""Measures at which sparsities sparse matrices make a pruned network faster.

Times inference with the matrices of `export.to_sparse` against that with dense
ones, in one run: `csr` of scipy, on the CPU, against the faster of numpy and
jax there; `bcoo` of jax, compiled, against jax on the default device. Prints
the ratio sparse / dense of median times: below one, sparse is faster.

  python -m benchmarks.sparse_inference
"""

from collections.abc import Callable
import functools
import itertools
import os
import time
from typing import Any

import jax
import numpy as np

from powerprop_jax import export

NETWORKS = {'LeNet-300-100': (784, 300, 100, 10), '4096 x 4096': (4096, 4096)}
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
BATCHES = (1, 128)
# A product of a batch with a bcoo matrix makes a copy of the batch for each
# weight on a CPU; beyond this many numbers it is not tried.
LARGEST = 50_000_000


def make(widths: tuple[int, ...], density: float) -> tuple[Any, Any]:
  """Random weights and biases of linear layers, and masks of the weights.

  Args:
    widths: the number of inputs, and that of the outputs of each layer.
    density: the probability with which a mask keeps a weight.

  Returns:
    (theta, masks), lists of a dict for each layer: `w` has the shape [inputs,
    outputs], and `b` [outputs].
  """
  rng = np.random.default_rng(0)
  theta, masks = [], []
  for shape in itertools.pairwise(widths):
    w = rng.standard_normal(shape, np.float32)
    theta.append({'w': w, 'b': np.zeros(shape[1], np.float32)})
    masks.append({'w': rng.random(shape, np.float32) < density})
  return theta, masks


def forward(theta: Any, x: Any) -> Any:
  for layer in theta:
    x = x @ layer['w'] + layer['b']
    x = x * (x > 0)
  return x


def median_time(f: Callable[[], Any], seconds: float = 0.05) -> float:
  """The median time of a call, of those in `seconds`, and of three at least."""
  jax.block_until_ready(f())  # Compiles.
  times, start = [], time.perf_counter()
  while len(times) < 3 or time.perf_counter() - start < seconds:
    begin = time.perf_counter()
    jax.block_until_ready(f())
    times.append(time.perf_counter() - begin)
  return float(np.median(times))


def compare(
  widths: tuple[int, ...], sparsity: float, batch: int
) -> dict[str, float]:
  """The ratios sparse / dense of the times of a network, by kind of matrix."""
  theta, masks = make(widths, 1 - sparsity)
  x = np.random.default_rng(1).standard_normal((batch, widths[0]), np.float32)
  compiled, ratios = jax.jit(forward), {}
  on_cpu = functools.partial(jax.device_put, device=jax.devices('cpu')[0])
  here = jax.device_put
  for kind, run, rivals in (
    ('csr', forward, ((forward, np.asarray), (compiled, on_cpu))),
    ('bcoo', compiled, ((compiled, here),)),
  ):
    copied = max(int(m['w'].sum()) for m in masks) * batch
    if kind == 'bcoo' and copied > LARGEST and jax.default_backend() == 'cpu':
      continue
    data = here(x) if kind == 'bcoo' else x
    calls = [functools.partial(run, export.to_sparse(theta, masks, kind), data)]
    calls += [
      functools.partial(f, jax.tree.map(place, theta), place(x))
      for f, place in rivals
    ]
    # They take turns and the fastest counts: other work comes and goes.
    sparse, *dense = np.min(
      [[median_time(call) for call in calls] for _ in range(4)], axis=0
    )
    ratios[kind] = float(sparse / min(dense))
  return ratios


def main() -> None:
  print(
    f'{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax'
    f' {jax.__version__}; time sparse / dense'
  )
  print(f'{"network":<14} {"batch":>5} {"matrix":>6}', end='')
  print(''.join(f'{s:>9.0%}' for s in SPARSITIES))
  for name, widths in NETWORKS.items():
    for batch in BATCHES:
      found = [compare(widths, s, batch) for s in SPARSITIES]
      for kind in ('csr', 'bcoo'):
        cells = [f'{r[kind]:.2f}' if kind in r else '-' for r in found]
        print(f'{name:<14} {batch:>5} {kind:>6}', end='')
        print(''.join(f'{cell:>9}' for cell in cells))


if __name__ == '__main__':
  main()

"""Times the exact top-k mask of one large leaf, against one made by sorting.

Prints how many times faster `masks.topk_mask` is than `jnp.argsort`, timed in
one run on as many scores as ResNet-50 has parameters. The masks must be
identical, or the script fails.

  python -m benchmarks.topk
"""

import argparse
from collections.abc import Callable
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.sparse import masks

_DENSITY = 0.1


def best_of(n: int, f: Callable[..., Any], *args: Any) -> tuple[Any, float]:
  """The result of f, and the seconds of the fastest of n calls after one."""
  result = jax.block_until_ready(f(*args))  # Compiles.
  seconds = []
  for _ in range(n):
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    seconds.append(time.perf_counter() - start)
  return result, min(seconds)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--size', type=int, default=25_500_000, help='The number of scores.'
  )
  size = parser.parse_args().size

  rng = np.random.default_rng(0)
  scores = jnp.abs(jnp.asarray(rng.standard_normal(size, dtype=np.float32)))
  find = jax.jit(masks.topk_mask, static_argnums=1)
  mask, ours = best_of(7, find, scores, _DENSITY)
  # Only the sort is timed: making a mask from the order takes extra time.
  order, sorting = best_of(2, jax.jit(lambda s: jnp.argsort(-s)), scores)
  kept = np.asarray(order)[: masks.num_kept(_DENSITY, size)]
  expected = np.zeros(size, bool)
  expected[kept] = True
  if not np.array_equal(mask, expected):
    raise SystemExit('The masks differ.')
  print(
    f'topk_mask of {size} float32 scores: {sorting / ours:.1f} times faster'
    f' than jnp.argsort ({ours:.3f} s against {sorting:.3f} s), identical'
    f' masks; {jax.devices()[0].device_kind}, jax {jax.__version__}'
  )


if __name__ == '__main__':
  main()

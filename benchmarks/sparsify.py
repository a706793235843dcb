"""Measures what `sparsify` costs in steps that leave the masks as they are.

  python -m benchmarks.sparsify

A multilayer perceptron of 5 M weights is trained with Adam under RigL at 90 %,
with and without Powerpropagation. The times are ratios to the step of the bare
optimiser, in seconds and, in brackets, in seconds of the processor, which
programs beside this one disturb less. The masks change when the host calls for
it (`due=None`) or inside `update`; none of the steps that are timed changes
them. Forms take turns, and a ratio is the median over the turns.

If masks change inside `update`, the step has a larger buffer, for their
selection. The malloc
of glibc returns buffers above 32 MB to the kernel after every step and gets
them back page by page, which on a CPU may cost more than all the rest. With
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 in the environment it keeps
them. Accelerators allocate memory in another way.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters

_SIZES = (784, 2048, 1640, 10)
# Sizes of a batch, and whether the state is donated. The time of the step
# without masks grows with the batch, and the cost of masks does not.
_KINDS = ((128, False), (128, True), (512, True))
_TURNS = 60


def loss_fn(params, x, labels):
  *hidden, last = params.values()
  for layer in hidden:
    x = jax.nn.relu(x @ layer['w'] + layer['b'])
  logits = x @ last['w'] + last['b']
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return jnp.mean(losses)


def make_turn(tx, batch: int, donate: bool):
  """A function without arguments that takes a step and waits for it."""
  rng = np.random.default_rng(0)
  params = {
    f'layer_{i}': {
      'w': jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, 'f'),
      'b': jnp.zeros(shape[1]),
    }
    for i, shape in enumerate(itertools.pairwise(_SIZES))
  }
  x = jnp.asarray(rng.standard_normal((batch, _SIZES[0])), 'f')
  labels = jnp.asarray(rng.integers(10, size=batch))
  weights = getattr(tx, 'weights', lambda params, state: params)

  @functools.partial(jax.jit, donate_argnums=(0, 1) if donate else ())
  def step(params, state):
    grads = jax.grad(lambda params: loss_fn(weights(params, state), x, labels))(
      params
    )
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  carry = [(params, tx.init(params))]

  def turn():
    carry[0] = step(*carry[0])
    jax.block_until_ready(carry[0])

  return turn


def make_forms(inner):
  """The optimiser, bare and under RigL with masks changed in two ways."""
  rigl = updaters.rigl(
    distributions.erdos_renyi(0.9), schedules.drop_fraction(0.3, 10_000), None
  )
  sparsify = functools.partial(
    powerprop_jax.sparsify, inner, rigl, key=jax.random.key(0)
  )
  return {
    'bare': inner,
    'on the host': sparsify(due=None),
    'inside': sparsify(due=schedules.every(10_000, start=10_000)),
  }


def main() -> None:
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}')
  optimisers = {
    'Adam': optax.adam(1e-4),
    'powerprop(Adam, 2)': powerprop_jax.powerprop(optax.adam(1e-4), 2.0),
  }
  for (name, inner), (batch, donate) in itertools.product(
    optimisers.items(), _KINDS
  ):
    turns = {
      form: make_turn(tx, batch, donate)
      for form, tx in make_forms(inner).items()
    }
    seconds = {form: [] for form in turns}
    for i in range(_TURNS + 1):
      for form, turn in turns.items():
        start = time.perf_counter(), time.process_time()
        turn()
        end = time.perf_counter(), time.process_time()
        if i:  # The first one compiles.
          seconds[form].append(np.subtract(end, start))
    times = {form: np.array(x) for form, x in seconds.items()}
    bare = times.pop('bare')
    ratios = (
      '{} {:.2f} x ({:.2f} x)'.format(form, *np.median(x / bare, axis=0))
      for form, x in times.items()
    )
    print(
      f'{name}, batch of {batch}, {"" if donate else "not "}donated:'
      f' {1e3 * np.median(bare[:, 0]):.1f} ms per step of the bare optimiser;'
      f' {", ".join(ratios)}'
    )


if __name__ == '__main__':
  main()

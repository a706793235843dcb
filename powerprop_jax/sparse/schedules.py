r"""When masks change, and by how much.

Sparse training methods differ in few numbers that depend on the step t: whether
the mask is updated at all (a cadence, decided on the host, since an update is a
compiled function of its own), the sparsity to prune to, which gradual pruning
raises from s_i to s_f along a cubic,

  s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3,

and the fraction of the active weights that SET and RigL exchange, which RigL
anneals along a half cosine, f(t) = f_0 / 2 (1 + cos(pi t / T)). The latter two
are pure functions of a step, traced or not, as `optax.Schedule`s are.

References:
  Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_,
  2017, section 3 (the cubic).
  Evci et al, `Rigging the lottery <https://arxiv.org/abs/1911.11134>`_, 2020,
  section 3 (the cosine).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Step = int | jax.Array
Schedule = Callable[[Step], jax.Array]


def every(
  n: int, start: int = 0, stop: int | None = None
) -> Callable[[int], bool]:
  """The cadence of mask updates: true at the steps of `range(start, stop, n)`.

  Args:
    n: number of steps from one update to the next, at least 1.
    start: first step with an update.
    stop: first step from which on there are none; None for no end.

  Returns:
    A function of the step, a Python int, that returns a bool. It runs on the
    host.

  Raises:
    ValueError: if n < 1, start < 0, or stop <= start.
  """
  if n < 1:
    raise ValueError(f'n must be at least 1, got {n}.')
  if start < 0:
    raise ValueError(f'start must not be negative, got {start}.')
  if stop is not None and stop <= start:
    raise ValueError(
      f'stop must be after start, or None for no end, got {start=} and {stop=}.'
    )

  def due(step: int) -> bool:
    inside = start <= step and (stop is None or step < stop)
    return bool(inside and (step - start) % n == 0)

  return due


def cubic(start: int, stop: int) -> Schedule:
  """The share of gradual pruning that is done: fast first, then slower.

  1 - (1 - done)^3, with done the share of the steps from start to stop. The
  final sparsity times it is the sparsity of Zhu and Gupta.

  Args:
    start: step t_0 up to which the share is 0.
    stop: step t_1 from which on it is 1, exactly.

  Returns:
    A function from the step to a scalar array.

  Raises:
    ValueError: if start < stop does not hold.
  """
  if not start < stop:
    raise ValueError(f'start < stop must hold, got {start=} and {stop=}.')

  def schedule(step: Step) -> jax.Array:
    # The difference is taken in integers: float32 counts to 2^24 only.
    done = jnp.clip((jnp.asarray(step) - start) / (stop - start), 0.0, 1.0)
    return 1.0 - (1.0 - done) ** 3

  return schedule


def cubic_sparsity(
  final: float, start: int, stop: int, initial: float = 0.0
) -> Schedule:
  """Sparsity that rises fast while there is much to prune, then slower.

  Args:
    final: sparsity s_f from step `stop` on, in [initial, 1).
    start: step t_0 up to which the sparsity is `initial`.
    stop: step t_1.
    initial: sparsity s_i, in [0, 1).

  Returns:
    A function from the step to a scalar array.

  Raises:
    ValueError: if 0 <= initial <= final < 1 or start < stop does not hold.
  """
  if not 0.0 <= initial <= final < 1.0:
    raise ValueError(
      f'0 <= initial <= final < 1 must hold, got {initial=} and {final=}.'
    )
  if not 0 <= start < stop:
    raise ValueError(f'0 <= start < stop must hold, got {start=} and {stop=}.')
  progress = cubic(start, stop)
  return lambda step: final + (initial - final) * (1.0 - progress(step))


def drop_fraction(initial: float, stop: int, kind: str = 'cosine') -> Schedule:
  """Fraction of the active weights that an update drops and regrows.

  Args:
    initial: fraction f_0 at step 0, in [0, 1].
    stop: step T from which on the fraction is 0.
    kind: `cosine`, which falls from f_0 to 0, or `constant`, f_0 up to T.

  Returns:
    A function from the step to a scalar array.

  Raises:
    ValueError: if the fraction, the step or the kind is not possible.
  """
  if not 0.0 <= initial <= 1.0:
    raise ValueError(f'initial must be in [0, 1], got {initial}.')
  if stop < 1:
    raise ValueError(f'stop must be at least 1, got {stop}.')
  if kind not in ('cosine', 'constant'):
    raise ValueError(f"kind must be 'cosine' or 'constant', got {kind!r}.")

  def schedule(step: Step) -> jax.Array:
    done = jnp.clip(jnp.asarray(step) / stop, 0.0, 1.0)
    if kind == 'cosine':
      value = 0.5 * initial * (1.0 + jnp.cos(jnp.pi * done))
    else:
      value = jnp.full_like(done, initial)
    # Exactly 0 from there on, which the cosine misses by a rounding error.
    return jnp.where(jnp.asarray(step) >= stop, 0.0, value)

  return schedule

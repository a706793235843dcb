r"""When masks change, and by how much.

Sparse training methods have a few settings that depend on the step t: whether
the masks are updated at all (a cadence), how far gradual pruning has come,
which raises the sparsity from 0 to s_f along a cubic,

  s(t) = s_f (1 - (1 - (t - t_0) / (t_1 - t_0))^3),

and the fraction of the active weights that SET and RigL trade, which RigL
anneals along a half cosine, f(t) = f_0 / 2 (1 + cos(pi t / T)). All of them are
pure functions of a step, traced or not, as `optax.Schedule`s are, and any
schedule of optax may take their place.

References:
  Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_,
  2017, section 3 (the cubic).
  Evci et al, `Rigging the lottery <https://arxiv.org/abs/1911.11134>`_, 2020,
  section 3 (the cosine).
"""

from collections.abc import Sequence
import itertools
from typing import Any, Protocol, overload

import jax
import optax


class Cadence(Protocol):
  """Whether something happens before a step.

  It is asked by a loop on the host, with a Python int, or inside of a compiled
  function, with an array.
  """

  @overload
  def __call__(self, step: int, /) -> bool: ...

  @overload
  def __call__(self, step: jax.Array, /) -> jax.Array: ...


def every(n: int, start: int = 0, stop: int | None = None) -> Cadence:
  """The cadence of mask updates: true at the steps of `range(start, stop, n)`.

  Args:
    n: the number of steps from one update to the next, at least 1.
    start: the first step with an update.
    stop: the step from which on there are no updates; None for no end. Gradual
      pruning is complete only if there is one at or after the end of its
      schedule, such as `cubic`.

  Returns:
    A function of the step. It returns a bool for a Python int, as a loop on the
    host needs it, and a boolean scalar for an array, traced or not.

  Raises:
    ValueError: if n < 1, start < 0, or stop <= start.

  >>> due = every(100, start=200, stop=500)
  >>> [t for t in range(1000) if due(t)]
  [200, 300, 400]
  """
  if n < 1:
    raise ValueError(f'n must be at least 1, got {n}.')
  if start < 0:
    raise ValueError(f'start must not be negative, got {start}.')
  if stop is not None and stop <= start:
    raise ValueError(
      f'stop must be after start, or None for no end, got {start=} and {stop=}.'
    )

  def due(step: Any) -> Any:
    hit = (step >= start) & ((step - start) % n == 0)
    return hit if stop is None else hit & (step < stop)

  return due


def cubic(start: int, stop: int) -> optax.Schedule:
  """The share of gradual pruning that is done: fast at first, then slower.

  The share is 1 - (1 - done)^3, where done is the share of the steps from start
  to stop. The final sparsity times it is the sparsity of Zhu and Gupta.

  Args:
    start: step t_0, up to which the share is 0. It may be negative, so that
      pruning has begun at step 0 already.
    stop: step t_1, from which on the share is exactly 1.

  Returns:
    A function from the step to a float32 scalar.

  Raises:
    ValueError: if start < stop does not hold.

  >>> progress = cubic(0, 100)
  >>> [float(progress(t)) for t in (0, 50, 100, 200)]
  [0.0, 0.875, 1.0, 1.0]
  """
  if not start < stop:
    raise ValueError(f'start < stop must hold, got {start=} and {stop=}.')
  rise = optax.polynomial_schedule(
    init_value=0.0, end_value=1.0, power=3, transition_steps=stop - start
  )
  # Shifted here, since the `transition_begin` of optax must not be negative.
  return lambda step: rise(step - start)


def drop_fraction(
  initial: float, stop: int, kind: str = 'cosine'
) -> optax.Schedule:
  """The fraction of the active weights that an update drops and regrows.

  The cosine ends in zero, where an update trades nothing. Let the last update
  come well before `stop`: choose as `stop` the step at which the next update
  after the last would come.

  Args:
    initial: the fraction f_0 at step 0, in [0, 1].
    stop: step T, from which on the fraction is 0.
    kind: 'cosine', which falls from f_0 to 0, or 'constant', f_0 up to T.

  Returns:
    A function from the step to a float32 scalar.

  Raises:
    ValueError: if initial is outside [0, 1], if stop < 1, or if there is no
      such kind.

  >>> fraction = drop_fraction(0.3, stop=100)
  >>> [round(float(fraction(t)), 3) for t in (0, 50, 100)]
  [0.3, 0.15, 0.0]
  """
  if not 0.0 <= initial <= 1.0:
    raise ValueError(f'initial must be in [0, 1], got {initial}.')
  if stop < 1:
    raise ValueError(f'stop must be at least 1, got {stop}.')
  if kind == 'cosine':
    return optax.cosine_decay_schedule(initial, decay_steps=stop)
  if kind == 'constant':
    return optax.piecewise_constant_schedule(initial, {stop: 0.0})
  raise ValueError(f"kind must be 'cosine' or 'constant', got {kind!r}.")


def alternating(boundaries: Sequence[int]) -> Cadence:
  """Dense and sparse phases in turn, of which the last one is sparse.

  Args:
    boundaries: the first step of each phase but the first, which is dense and
      starts at step 0. They rise from 1 on, and are odd in number: [sparse,
      dense, sparse, ...].

  Returns:
    A function of the step that is true in sparse phases, as `updaters.acdc`
    takes it: a bool for a Python int, a boolean scalar for an array.

  Raises:
    ValueError: if the steps do not rise from 1 on, or their number is even.

  References:
    Peste et al, `AC/DC <https://arxiv.org/abs/2106.12379>`_, NeurIPS 2021.

  >>> compressed = alternating([2, 4, 5])
  >>> [compressed(t) for t in range(7)]
  [False, False, True, True, False, True, True]
  """
  steps = [int(b) for b in boundaries]
  if any(a >= b for a, b in itertools.pairwise([0, *steps])):
    raise ValueError(f'boundaries must rise from 1 on, got {boundaries}.')
  if len(steps) % 2 == 0:
    raise ValueError(
      f'There must be an odd number of boundaries, so that the last phase is'
      f' sparse, got {boundaries}.'
    )

  def compressed(step: Any) -> Any:
    return sum((step >= b) * 1 for b in steps) % 2 == 1

  return compressed

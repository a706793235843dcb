"""The training loop: compiled chunks of steps between boundaries.

Between two boundaries only compiled code runs; at a boundary Python looks at
the loss, reports, and calls what is due there: an update of the masks, an
evaluation, a checkpoint. Boundaries lie at the same steps whether or not a run
was stopped in between, and nothing but the state and the step decides what
comes next, so that a run that was killed and goes on from a checkpoint ends
with the same bits as one that was not.

The loop does not know where the examples come from. `advance(state, start,
stop)`, which `feeds` makes, takes the steps [start, stop) of a data set in
memory or of a stream.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import os
import signal
import threading
from typing import Any, NamedTuple, TypeVar

import numpy as np

State = TypeVar('State')
#: What every step of a chunk measured, by name: numpy arrays [steps].
Metrics = Mapping[str, np.ndarray]
#: (state, start, stop) -> (state, metrics): takes the steps [start, stop).
Advance = Callable[[State, int, int], tuple[State, Metrics]]
#: (step, mean metrics of the chunk that ended before that step).
Report = Callable[[int, dict[str, float]], None]


class Diverged(Exception):
  """Training failed: the loss is not finite, or a layer has no weights left."""


class Interrupted(Exception):
  """Training was asked to stop before its last step."""


class Hook(NamedTuple):
  """Something to be done at some boundaries.

  Attributes:
    due: maps a step to whether the hook is called at it.
    act: maps (step, state) to a state. `run` ignores the state that a hook in
      `after` returns.

  >>> halve = Hook(due=every(100), act=lambda step, state: state / 2)
  >>> halve.act(100, 8.0) if halve.due(100) else 8.0
  4.0
  """

  due: Callable[[int], bool]
  act: Callable[[int, Any], Any]


def every(n: int) -> Callable[[int], bool]:
  """A condition that holds at the multiples of n.

  Args:
    n: the number of steps from one multiple to the next, at least 1.

  Returns:
    A function of a step that returns a bool, for `Hook.due`.

  Raises:
    ValueError: if n < 1.

  >>> from powerprop_jax.training import loop
  >>> [step for step in range(7) if loop.every(3)(step)]
  [0, 3, 6]
  """
  if n < 1:
    raise ValueError(f'n must be at least 1, got {n}.')
  return lambda step: step % n == 0


def next_boundary(
  step: int, stop: int, chunk: int, hooks: Sequence[Hook] = ()
) -> int:
  """The end of the chunk that begins at a step.

  Args:
    step: where the chunk begins.
    stop: the last boundary.
    chunk: there is a boundary at every multiple of it.
    hooks: there is a boundary wherever one of them is due.

  Returns:
    A step in (step, stop].

  >>> from powerprop_jax.training import loop
  >>> masks = loop.Hook(loop.every(30), lambda step, state: state)
  >>> ends = [0]
  >>> while ends[-1] < 120:
  ...   ends.append(loop.next_boundary(ends[-1], 120, 100, [masks]))
  >>> ends
  [0, 30, 60, 90, 100, 120]
  """
  for end in range(step + 1, stop):
    if end % chunk == 0 or any(hook.due(end) for hook in hooks):
      return end
  return stop


def check_loss(loss: np.ndarray, start: int, recipe: Mapping[str, Any]) -> None:
  """Raises `Diverged` if the loss of a chunk is not finite.

  Args:
    loss: the loss of every step, [steps].
    start: the first of these steps.
    recipe: settings of the run by name that the error reports, such as alpha
      and the learning rate.

  Raises:
    Diverged: if a loss is NaN or infinite; the error has the step, the recipe
      and a remedy.

  >>> import numpy as np
  >>> from powerprop_jax.training import loop
  >>> loss, recipe = np.array([2.3, np.nan]), {'alpha': 3.0, 'rate': 0.5}
  >>> try:
  ...   loop.check_loss(loss, 100, recipe)
  ... except loop.Diverged as e:
  ...   print(e)
  the loss became nan at step 101, with alpha = 3 and rate = 0.5. Lower the \
learning rate, or clip the gradient.
  """
  finite = np.isfinite(loss)
  if finite.all():
    return
  first = int(np.argmin(finite))
  *others, last = [
    f'{name} = {value:g}' if isinstance(value, float) else f'{name} = {value}'
    for name, value in recipe.items()
  ] or ['']
  told = f'{", ".join(others)} and {last}' if others else last
  raise Diverged(
    f'the loss became {loss[first]} at step {start + first}'
    f'{told and ", with "}{told}. Lower the learning rate, or clip the'
    ' gradient.'
  )


def run(
  advance: Advance[State],
  state: State,
  *,
  start: int,
  stop: int,
  chunk: int = 100,
  before: Sequence[Hook] = (),
  after: Sequence[Hook] = (),
  report: Report = lambda step, metrics: None,
  recipe: Mapping[str, Any] | None = None,
  stopped: Callable[[], bool] = lambda: False,
) -> tuple[int, State]:
  """Trains from one step to another.

  At a boundary the hooks `after` come first, which look at what the steps have
  made of the state, and then the hooks `before`, which change the state for
  the steps that follow. So a checkpoint that is written by a hook `after` holds
  the state before the update of masks at the same step, and a run that goes on
  from it makes that update.

  Args:
    advance: takes steps; it may donate the state.
    state: the state at the step `start`.
    start: the first step.
    stop: the step to train to.
    chunk: there is a boundary at every multiple of it: how often the loss is
      looked at, and how soon training stops if it is asked to.
    before: hooks that are called before the step at which they are due, also
      at `start` and never at `stop`.
    after: hooks that are called when as many steps have been taken as the step
      at which they are due, also at `stop` and never at `start`.
    report: called at every boundary after `start` with the step and the mean
      metrics since the boundary before.
    recipe: settings of the run by name that an error reports.
    stopped: asked at every boundary whether to stop there.

  Returns:
    The step at which training ended, which is `stop` unless it was stopped,
    and the state.

  Raises:
    Diverged: if the loss, the metric named 'loss', is NaN or infinite.
    ValueError: if chunk is below 1.

  >>> import numpy as np
  >>> from powerprop_jax.training import loop
  >>> def advance(state, start, stop):
  ...   return state + stop - start, {'loss': np.ones(stop - start)}
  >>> double = loop.Hook(lambda step: step == 2, lambda step, state: 2 * state)
  >>> loop.run(advance, 0, start=0, stop=5, before=[double])
  (5, 7)
  """
  if chunk < 1:
    raise ValueError(f'chunk must be at least 1, got {chunk}.')
  step = start
  while step < stop and not stopped():
    for hook in before:
      if hook.due(step):
        state = hook.act(step, state)
    end = next_boundary(step, stop, chunk, [*before, *after])
    state, metrics = advance(state, step, end)
    check_loss(metrics['loss'], step, recipe or {})
    step = end
    report(step, {name: float(np.mean(x)) for name, x in metrics.items()})
    for hook in after:
      if hook.due(step):
        hook.act(step, state)
  return step, state


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
  """Catches Ctrl-C, and SIGTERM, by which batch systems end a job.

  Enter the context in the main thread, the only one that receives signals; all
  threads may use the event. Python sees a signal between two instructions of
  its own: one that comes while XLA compiles is seen afterwards. After the first
  signal Ctrl-C has its usual meaning and ends the process at once.

  Yields:
    An event that is set when a signal has come.

  >>> with stop_on_signals() as asked:
  ...   before = asked.is_set()
  ...   signal.raise_signal(signal.SIGTERM)
  ...   before, asked.is_set()
  (False, True)
  """
  asked = threading.Event()

  def hear(number, frame):
    del number, frame
    asked.set()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Not `print`, which must not be called again while it is running.
    os.write(2, b'\nStopping after these steps; another Ctrl-C ends at once.\n')

  numbers = (signal.SIGTERM, signal.SIGINT)
  previous = {number: signal.signal(number, hear) for number in numbers}
  try:
    yield asked
  finally:
    for number, handler in previous.items():
      # None stands for a handler that is not Python's and cannot be set again.
      signal.signal(number, handler or signal.SIG_DFL)

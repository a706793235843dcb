"""Tests of the loop of training."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from powerprop_jax.training import loop


def _advance(state, start, stop):
  """Takes steps of a state that lists what happened to it."""
  loss = np.arange(start, stop, dtype=np.float32)
  return [*state, (start, stop)], {'loss': loss}


@pytest.mark.parametrize(
  ('start', 'due', 'every', 'wanted'),
  [
    (0, (), 1000, [100, 200, 250]),
    (0, (30, 60), 1000, [30, 60, 100, 200, 250]),
    (0, (), 70, [70, 100, 140, 200, 210, 250]),
    (140, (), 70, [200, 210, 250]),  # As without a stop.
  ],
)
def test_chunks_end_at_the_same_steps(start, due, every, wanted):
  hooks = [
    loop.Hook(lambda s: s in due, lambda s, state: state),
    loop.Hook(loop.every(every), lambda s, state: state),
  ]
  found = []
  while start < 250:
    start = loop.next_boundary(start, 250, 100, hooks)
    found.append(start)
  assert found == wanted


def test_hooks_come_between_chunks():
  """Masks change before the step, checkpoints are written after it."""
  saved, reports = [], []
  masks = loop.Hook(
    loop.every(4), lambda step, state: [*state, f'masks {step}']
  )
  save = loop.Hook(
    loop.every(8), lambda step, state: saved.append((step, len(state)))
  )
  step, state = loop.run(
    _advance,
    [],
    start=0,
    stop=12,
    chunk=6,
    before=[masks],
    after=[save],
    report=lambda step, metrics: reports.append((step, metrics['loss'])),
  )
  assert step == 12
  assert state == [
    'masks 0',
    (0, 4),
    'masks 4',
    (4, 6),
    (6, 8),
    'masks 8',
    (8, 12),
  ]
  assert saved == [(8, 5)]  # It lacks the masks of step 8.
  assert reports == [(4, 1.5), (6, 4.5), (8, 6.5), (12, 9.5)]


def test_a_stopped_run_goes_on_as_if_it_had_not_been():
  masks = loop.Hook(
    loop.every(3), lambda step, state: [*state, f'masks {step}']
  )
  options = {'stop': 10, 'chunk': 4, 'before': [masks]}
  whole = loop.run(_advance, [], start=0, **options)
  answers = iter([False, False, True])
  step, state = loop.run(
    _advance, [], start=0, stopped=lambda: next(answers), **options
  )
  assert step == 4
  assert loop.run(_advance, state, start=step, **options) == whole


@pytest.mark.parametrize('chunk', [0, -1])
def test_chunks_without_steps_are_refused(chunk):
  with pytest.raises(
    ValueError, match=f'chunk must be at least 1, got {chunk}'
  ):
    loop.run(lambda *_: None, 0, start=0, stop=5, chunk=chunk)


def test_a_loss_that_is_not_finite():
  def advance(state, start, stop):
    loss = np.ones(stop - start)
    loss[7 - start :] = np.inf
    return state, {'loss': loss}

  recipe = {'alpha': 2.0, 'learning_rate': 1e20, 'seed': 3}
  with pytest.raises(loop.Diverged) as e:
    loop.run(advance, 0, start=5, stop=100, recipe=recipe)
  assert str(e.value) == (
    'the loss became inf at step 7, with alpha = 2, learning_rate = 1e+20 and'
    ' seed = 3. Lower the learning rate, or clip the gradient.'
  )


def test_signals_are_heard_and_handlers_put_back():
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [signal.getsignal(n) for n in numbers]
  with loop.stop_on_signals() as asked:
    assert not asked.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked.wait(10)
    os.kill(os.getpid(), signal.SIGTERM)  # Batch systems may send it twice.
  assert [signal.getsignal(n) for n in numbers] == before


def test_threads_see_a_signal():
  seen = []
  with loop.stop_on_signals() as asked:
    thread = threading.Thread(target=lambda: seen.append(asked.wait(10)))
    thread.start()
    os.kill(os.getpid(), signal.SIGINT)
    thread.join()
  assert seen == [True]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_process():
  code = (
    'import time\nfrom powerprop_jax.training import loop\n'
    'with loop.stop_on_signals() as asked:\n'
    '  print("ready", flush=True)\n  asked.wait()\n'
    '  print("asked", flush=True)\n  time.sleep(100)'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', code],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == 'asked\n'
  time.sleep(0.1)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert process.returncode == -signal.SIGINT
  assert 'Ctrl-C ends at once' in err
  assert 'Traceback' not in err

"""Runs many small networks at once, one a device, and keeps what is finished.

On a CPU every core is a device: networks of the size of LeNet train faster each
on a core of its own than one after another on all cores.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import json
import os
import pathlib
import queue
import signal
import sys
import threading
from typing import Any, NoReturn

import jax
import numpy as np
import tqdm

from experiments import common
from powerprop_jax import training

# Called with the step and the mean metrics of the steps since the last call.
Report = Callable[[int, dict[str, float]], None]
# (data on the device, report) -> the result, JSON-serialisable.
Run = Callable[[Any, Report], dict[str, Any]]


class Diverged(Exception):
  """The loss became NaN or infinite."""


def use_cores(num_runs: int) -> None:
  """Makes every core of the CPU a device. Has no effect on accelerators."""
  cores = os.cpu_count() or 1
  if num_runs >= cores > 1:
    jax.config.update('jax_num_cpu_devices', cores)
    # Threads within an operation would only compete with one another.
    os.environ['XLA_FLAGS'] = (
      os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_multi_thread_eigen=false'
    )


def train(
  state: training.TrainState,
  run_steps: Callable[..., tuple[training.TrainState, training.Metrics]],
  data: Any,
  data_key: jax.Array,
  *,
  steps: int,
  batch_size: int,
  report: Report,
  chunk: int = 500,
  before: Callable[[int, training.TrainState], training.TrainState] = (
    lambda step, state: state
  ),
) -> training.TrainState:
  """Trains in compiled chunks, and looks at the loss after each.

  Args:
    state: the state to start from, which is donated.
    run_steps: as of `training.make_run_steps`.
    data: (images, labels) on the device.
    data_key: decides the order of the examples.
    steps: how many steps to take.
    batch_size: examples a step.
    report: called after every chunk.
    chunk: steps between two looks at the loss.
    before: maps the step and the state before a chunk to the state to go on
      from, for updates of masks.

  Returns:
    The state after the last step.

  Raises:
    Diverged: if the loss becomes NaN or infinite, with the step.
  """
  # To put an epoch in order takes as long as some thirty steps of LeNet-300-100
  # do, so that it is not done for every chunk.
  block = -(-1000 // chunk) * chunk
  indices = np.zeros([0, batch_size], np.int32)
  for start in range(0, steps, chunk):
    size = min(chunk, steps - start)
    if start % block == 0:
      count = min(block, steps - start)
      indices = np.asarray(
        training.batch_indices(data_key, start, count, batch_size, len(data[1]))
      )
    state = before(start, state)
    rows = indices[start % block :][:size]
    state, metrics = run_steps(state, data, rows)
    metrics = jax.device_get(metrics)
    finite = np.isfinite(metrics['loss'])
    if not finite.all():
      first = int(np.argmin(finite))
      raise Diverged(
        f'the loss became {metrics["loss"][first]} at step {start + first}'
      )
    report(start + size, {k: float(np.mean(x)) for k, x in metrics.items()})
  return state


def _make_reports(
  runs: Mapping[str, Run], bar: Any, path: pathlib.Path, stop: threading.Event
) -> dict[str, Report]:
  """Reports of several threads, to one progress bar and one file."""
  lock = threading.Lock()

  def make_report(name):
    done = 0

    def report(step, metrics):
      nonlocal done
      if stop.is_set():
        raise InterruptedError
      line = json.dumps({'run': name, 'step': step, **metrics})
      with lock, path.open('a') as f:
        f.write(line + '\n')
        bar.update(step - done)
        bar.set_postfix({k: f'{v:.4g}' for k, v in metrics.items()})
      done = step

    return report

  return {name: make_report(name) for name in runs}


def run_all(
  runs: Mapping[str, Run], data: Any, steps: int, out_dir: pathlib.Path
) -> tuple[list[str], bool]:
  """Runs what is not finished, and writes a file for each run.

  Ctrl-C and SIGTERM, by which a batch system ends a job, stop all runs and
  leave what is finished.

  Args:
    runs: functions by name. Each is called on one of the devices.
    data: given to every run, on its device.
    steps: how many steps a run reports, for the time left.
    out_dir: the folder of results; the files are runs/<name>.json.

  Returns:
    A message for each run that diverged, while the others went on; and whether
    it was interrupted.
  """
  missing = {n: run for n, run in runs.items() if n not in finished(out_dir)}
  if not missing:
    return [], False
  _drop_unfinished_metrics(out_dir)
  free = queue.SimpleQueue()
  for device in jax.local_devices():
    free.put((device, jax.device_put(data, device)))
  stop = threading.Event()
  bar = tqdm.tqdm(total=len(missing) * steps, unit='step', smoothing=0.1)
  reports = _make_reports(missing, bar, out_dir / 'metrics.jsonl', stop)

  def work(name):
    device, local_data = free.get()
    try:
      with jax.default_device(device):
        result = missing[name](local_data, reports[name])
      common.write_json(out_dir / 'runs' / f'{name}.json', result)
    finally:
      free.put((device, local_data))

  messages, interrupted = [], False
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  with bar, concurrent.futures.ThreadPoolExecutor(free.qsize()) as pool:
    futures = {pool.submit(work, name): name for name in missing}
    try:
      for future in concurrent.futures.as_completed(futures):
        if isinstance(future.exception(), Diverged):
          messages.append(f'{futures[future]}: {future.exception()}')
        else:
          future.result()
    except KeyboardInterrupt:
      interrupted = True
    finally:
      # After an error or an interrupt, threads leave at their next report.
      stop.set()
      pool.shutdown(wait=True, cancel_futures=True)
  return messages, interrupted


def finished(out_dir: pathlib.Path) -> dict[str, Any]:
  """The results there are, by the name of the run."""
  paths = sorted((out_dir / 'runs').glob('*.json'))
  return {path.stem: json.loads(path.read_text()) for path in paths}


def _drop_unfinished_metrics(out_dir: pathlib.Path) -> None:
  """Removes the lines that a run which starts anew will write again."""
  (out_dir / 'runs').mkdir(exist_ok=True)
  path, names = out_dir / 'metrics.jsonl', finished(out_dir)
  lines = path.read_text().splitlines() if path.exists() else []
  kept = []
  for line in lines:
    try:
      if json.loads(line)['run'] in names:
        kept.append(line + '\n')
    except json.JSONDecodeError:
      continue  # The end of a file that was cut off.
  path.write_text(''.join(kept))


def exit_with(
  messages: list[str], interrupted: bool, done: int, total: int
) -> NoReturn:
  """Ends the program: with 130 if interrupted, 1 if a run diverged, or 0."""
  for message in messages:
    print(f'error: {message}', file=sys.stderr)
  if interrupted:
    print(
      f'\nInterrupted with {done} of {total} runs finished. The same command'
      ' continues.',
      file=sys.stderr,
    )
  sys.exit(130 if interrupted else bool(messages))

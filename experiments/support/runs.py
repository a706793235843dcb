"""Runs many small networks at once, one per device, and keeps their results.

On a CPU every core is a device: networks of the size of LeNet train faster if
each has a core of its own than one after another on all cores.
"""

from collections.abc import Callable, Iterable, Mapping
import concurrent.futures
import os
import queue
import sys
from typing import Any, NamedTuple, NoReturn

from etils import epath
import jax

from experiments.support import config
from experiments.support import output
from experiments.support import settings as settings_lib
from powerprop_jax.training import loop


class Watch(NamedTuple):
  """How a run is followed and stopped; both are arguments of `loop.run`.

  Attributes:
    report: called with the step and the metrics.
    stopped: whether the program was asked to stop. A run that heeds it raises
      `loop.Interrupted`.
  """

  report: loop.Report
  stopped: Callable[[], bool]


# (data on the device, watch) -> the result, which JSON can hold.
Run = Callable[[Any, Watch], dict[str, Any]]


def use_cores(num_runs: int) -> None:
  """Makes every core of the CPU a device, if there are enough runs for them.

  It must be called before JAX makes its devices, and has no effect on
  accelerators.

  Args:
    num_runs: the number of runs.
  """
  cores = settings_lib.num_cores()
  if num_runs >= cores > 1:
    jax.config.update('jax_num_cpu_devices', cores)
    # Threads within an operation would only compete with one another.
    os.environ['XLA_FLAGS'] = (
      os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_multi_thread_eigen=false'
    )


def finished(
  out_dir: epath.Path,
  names: Iterable[str] | None = None,
  fields: Iterable[str] = (),
) -> dict[str, Any]:
  """Reads the results of finished runs.

  Args:
    out_dir: the folder of results.
    names: the names of the runs to look for; without them all are read.
    fields: the entries that every result must have besides 'valid_accuracy'.

  Returns:
    The results by the name of the run, in the order of the names. Runs that
    are not finished have none.

  Raises:
    config.Refused: if a file in the place of a result does not hold one.
  """
  folder = out_dir / 'runs'
  if names is None:
    paths = sorted(folder.glob('*.json')) if folder.exists() else []
    names = [path.stem for path in paths]
  found = {}
  for name in names:
    path = folder / f'{name}.json'
    if path.exists():
      found[name] = output.read_json(path)
      if not {'valid_accuracy', *fields} <= found[name].keys():
        raise config.Refused(f'{path} is no result of a run. Move it away.')
  return found


def run_all(
  runs: Mapping[str, Run],
  data: Any,
  steps: int,
  out_dir: epath.Path,
  workers: int | None = None,
  fields: Iterable[str] = (),
) -> tuple[list[str], bool]:
  """Makes the runs that are not finished, and writes a file for each of them.

  Ctrl-C and SIGTERM stop all runs at their next boundary. The results of
  finished runs stay.

  Args:
    runs: functions by name. Each is called on one of the devices.
    data: a pytree of arrays that is given to every run, on its device.
    steps: the number of steps of a run, by which the time left is estimated.
    out_dir: the folder of results; the files are runs/<name>.json.
    workers: the number of devices to use; without it all are used.
    fields: the entries that every result must have, as for `finished`.

  Returns:
    A message for each run that diverged, while the others went on; and whether
    the runs were interrupted.

  Raises:
    config.Refused: if a file in the place of a result does not hold one.
    Exception: any other error of a run than `loop.Diverged`, after the other
      runs have stopped.
  """
  done = finished(out_dir, runs, fields)
  missing = {name: run for name, run in runs.items() if name not in done}
  if not missing:
    return [], False
  if done:
    count = f'{len(done)} of {len(runs)}'
    print(f'Finished already: {count} runs.', file=sys.stderr)
  (out_dir / 'runs').mkdir(exist_ok=True)
  write = output.Metrics(
    out_dir / 'metrics.jsonl', lambda line: line.get('run') not in missing
  )
  free = queue.SimpleQueue()
  for device in jax.local_devices()[:workers]:
    free.put((device, jax.device_put(data, device)))
  progress = output.Progress(len(missing) * steps)

  def make_report(name):
    def report(step, metrics):
      write({'run': name, 'step': step, **metrics})
      progress.at(step, metrics, name)

    return report

  messages, interrupted = [], False
  with loop.stop_on_signals() as asked:

    def work(name):
      device, local_data = free.get()
      try:
        if asked.is_set():
          raise loop.Interrupted
        with jax.default_device(device):
          watch = Watch(make_report(name), asked.is_set)
          result = missing[name](local_data, watch)
        output.write_json(out_dir / 'runs' / f'{name}.json', result)
      finally:
        write.close(name)
        free.put((device, local_data))

    with concurrent.futures.ThreadPoolExecutor(free.qsize()) as pool:
      futures = {pool.submit(work, name): name for name in missing}
      try:
        for future in concurrent.futures.as_completed(futures):
          try:
            future.result()
          except loop.Diverged as e:
            messages.append(f'{futures[future]}: {e}')
          except loop.Interrupted:
            interrupted = True
      finally:
        asked.set()  # After an error the other runs stop as well.
        progress.close()
  return messages, interrupted


def finish(
  messages: list[str], interrupted: bool, done: int, total: int
) -> NoReturn:
  """Prints what went wrong, and ends the program.

  The exit code is 130 if the runs were interrupted, 1 if one diverged, or 0.

  Args:
    messages: one for each run that diverged.
    interrupted: whether the runs were interrupted.
    done: how many runs are finished.
    total: how many runs there are.
  """
  for message in messages:
    print(f'error: {message}', file=sys.stderr)
  if interrupted:
    print(
      f'\nInterrupted with {done} of {total} runs finished. The same command'
      ' keeps these and makes the others.',
      file=sys.stderr,
    )
  sys.exit(130 if interrupted else bool(messages))

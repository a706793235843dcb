"""Writes what `continual_learning` has learnt to a file, for `export_model`."""

from collections.abc import Callable
import pathlib
from typing import Any, NamedTuple

import jax

from experiments import continual_data
from experiments import continual_problem
from experiments import continual_progress
from powerprop_jax import continual
from powerprop_jax import export
from powerprop_jax import leaves
from powerprop_jax.continual import layouts
from powerprop_jax.data import in_memory
from powerprop_jax.export import format as export_format
from powerprop_jax.sparse import masks
from powerprop_jax.training import checkpoint


class Tasks(NamedTuple):
  """The networks of a sequence of tasks.

  Attributes:
    alpha: the power.
    shared: {'theta': ..., 'state': ...} after the last task.
    masks: for each task {'theta': masks by path}.
    private: for each task {'theta': its own leaves by path, 'state': ...}.
    networks: for each task {'theta': ..., 'state': ...} as it was learnt.
    evaluate: maps a task and its network to the accuracy on test data.
  """

  alpha: float
  shared: dict[str, Any]
  masks: list[dict[str, Any]]
  private: list[dict[str, Any]]
  networks: list[dict[str, Any]]
  evaluate: Callable[[int, dict[str, Any]], float]


def load(found: checkpoint.Checkpoint, data_dir: str | None) -> Tasks:
  """The tasks that a run had learnt when it wrote a checkpoint."""
  settings: dict[str, Any] = {**found.config, 'data_parallel': False}
  data = in_memory.load(settings['dataset'], data_dir)
  benchmark = continual_data.make_benchmark(settings, data, settings['seed'])
  problem = continual_problem.make_problem(
    settings,
    settings['method'],
    settings['alpha'],
    benchmark.input_shape,
    benchmark.num_classes,
  )
  memory = continual.init_memory(
    *problem.fresh(jax.random.key(0)), problem.layout
  )
  start = continual_progress.start(memory, problem.anchor(memory))
  progress = continual_progress.read(found, start, problem.layout)
  memory, learnt = progress.memory, progress.tasks
  part = continual_data.make_part(benchmark, settings['tasks'])
  own = layouts.paths_of(problem.layout, 'private')
  networks = []
  for task in learnt:
    theta, state = problem.recall(memory, task)
    networks.append({'theta': theta, 'state': state})

  def private(task, network):
    state = {} if task.model_state is None else {'state': task.model_state}
    return {'theta': leaves.by_path(network['theta'], own)} | state

  return Tasks(
    alpha=settings['alpha'],
    shared={
      'theta': problem.transform.to_theta(memory.phi),
      'state': memory.model_state,
    },
    masks=[
      {'theta': masks.unpack(task.packed, memory.owners)} for task in learnt
    ],
    private=[private(*pair) for pair in zip(learnt, networks)],
    networks=networks,
    evaluate=lambda t, network: problem.accuracy(
      network['theta'], network['state'], part(t, 'test')
    ),
  )


def write(
  trained: Tasks, path: pathlib.Path, values: str | None
) -> tuple[export_format.Sizes, dict[str, dict[str, float]]]:
  """Writes all tasks, reads each of them again, and evaluates both.

  Args:
    trained: as of `load`.
    path: the file to write.
    values: what kept weights are rounded to; None keeps their type.

  Returns:
    The sizes; and by name of the task the accuracies of its network as it was
    trained, and reloaded.
  """
  sizes = export.save_tasks(
    path,
    trained.shared,
    trained.masks,
    trained.private,
    alpha=trained.alpha,
    values=values,
  )

  def reloaded(t):
    return export.from_dict(export.load_task(path, t).theta, trained.shared)

  return sizes, {
    f'task {t}': {
      'trained': trained.evaluate(t, network),
      'reloaded': trained.evaluate(t, reloaded(t)),
    }
    for t, network in enumerate(trained.networks)
  }

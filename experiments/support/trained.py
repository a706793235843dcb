"""Loads networks that the binaries have trained."""

from collections.abc import Callable, Mapping
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.support import config
from experiments.support import evaluation
from experiments.support import optimisers
from experiments.support import output
from experiments.support import problem as problem_lib
from experiments.support import progress as progress_lib
from experiments.support import sequence
from experiments.support import tasks as tasks_lib
from powerprop_jax import continual
from powerprop_jax import export
from powerprop_jax import leaves
from powerprop_jax import paths
from powerprop_jax.continual import layouts
from powerprop_jax.data import in_memory
from powerprop_jax.models import networks
from powerprop_jax.sparse import masks
from powerprop_jax.training import checkpoint
from powerprop_jax.training import classification


class Network(NamedTuple):
  """One trained network.

  Attributes:
    alpha: the power at the end of training.
    theta: its weights, which are zero where masks are false.
    masks: boolean arrays like theta, true for the weights in use; {} if all
      are.
    state: the statistics of its normalisation.
    evaluate: maps (theta, state) to accuracies by name.
  """

  alpha: float
  theta: Any
  masks: Any
  state: Any
  evaluate: Callable[[Any, Any], dict[str, float]]


class Tasks(NamedTuple):
  """The networks of a sequence of tasks, which share their weights.

  Attributes:
    alpha: the power at the end of training.
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
  evaluate: Callable[[int, Any], float]


def _check_data(trained_on: Mapping[str, Any], fingerprint: str) -> None:
  """Raises ValueError if a network was trained on other data."""
  if trained_on.get('data', fingerprint) != fingerprint:
    raise ValueError(
      'The network was trained on other data than those on which it would be'
      ' evaluated. Give the --data_dir of its training.'
    )


def _of_mnist_pruning(path: pathlib.Path, data_dir: str | None) -> Network:
  file = paths.resolve(str(path)).parent.parent / 'config.json'
  settings = output.read_json(file).get('settings')
  if not isinstance(settings, dict) or 'dataset' not in settings:
    raise ValueError(f'{file} was not written by mnist_pruning.')
  model = export.load_compressed(path)
  if not isinstance(model.alpha, float):
    raise ValueError(f'{path} does not tell the alpha it was trained with.')
  data = in_memory.load(settings['dataset'], data_dir)
  _check_data(settings, in_memory.fingerprint(data))
  name = settings.get('network', 'lenet_300_100')
  network = networks.build(name, data.num_classes)
  accuracy = jax.jit(classification.make_accuracy(network.apply))
  images = jnp.zeros((1, *data.train.images.shape[1:]))
  like, state = jax.eval_shape(
    lambda key: network.init(key, images, True), jax.random.key(0)
  )
  if jax.tree.leaves(state):
    raise ValueError(
      f'{path} has the weights of {name} and not its statistics of'
      ' normalisation, which mnist_pruning does not keep. Train it with'
      ' sparse_training, whose checkpoints have them.'
    )

  def evaluate(theta, state):
    splits = {'valid_accuracy': data.valid, 'test_accuracy': data.test}
    return {k: float(accuracy(theta, state, *s)) for k, s in splits.items()}

  theta = export.from_dict(model.theta, like)
  return Network(model.alpha, theta, {}, state, evaluate)


def _of_sparse_training(
  found: checkpoint.Checkpoint, data_dir: str | None
) -> Network:
  settings = config.restored(
    problem_lib.Settings, found.config, data_dir=data_dir, num_workers=0
  )
  data = problem_lib.load(settings)
  _check_data(found.config, problem_lib.fingerprint(data))
  problem = problem_lib.make(settings, data)
  state = jax.eval_shape(problem.init)
  wanted = {
    'phi': state.phi,
    'masks': state.masks,
    'model_state': state.model_state,
  }
  there = checkpoint.fill({'state': wanted}, found, partial=True)['state']
  theta, chosen = problem.transform.to_theta(there['phi']), there['masks']
  return Network(
    alpha=optimisers.last_alpha(settings, settings.alpha),
    theta=masks.apply_mask(theta, chosen.forward),
    masks=chosen.forward,
    state=there['model_state'],
    evaluate=problem.make_feed().accuracy,
  )


def _of_continual_learning(
  found: checkpoint.Checkpoint, data_dir: str | None
) -> Tasks:
  settings = config.restored(
    tasks_lib.Settings, found.config | {'data_parallel': False}
  )
  job = tasks_lib.Job(*(found.config[name] for name in tasks_lib.Job._fields))
  data = in_memory.load(settings.dataset, data_dir)
  _check_data(found.config, in_memory.fingerprint(data))
  benchmark = tasks_lib.make_benchmark(settings, data, job.seed)
  problem = tasks_lib.make_problem(
    settings,
    job.method,
    job.alpha,
    benchmark.input_shape,
    benchmark.num_classes,
  )
  memory = continual.init_memory(
    *problem.fresh(jax.random.key(0)), problem.layout
  )
  start = progress_lib.start(memory, problem.anchor(memory))
  progress = progress_lib.read(found, start, problem.layout)
  memory, learnt = progress.memory, progress.tasks
  own = layouts.paths_of(problem.layout, 'private')
  recalled = []
  for task in learnt:
    theta, state = problem.recall(memory, task)
    recalled.append({'theta': theta, 'state': state})

  def private(task, network):
    state = {} if task.model_state is None else {'state': task.model_state}
    return {'theta': leaves.by_path(network['theta'], own)} | state

  # Each part is asked for twice, before and after the file is written.
  part = functools.cache(benchmark.part)
  return Tasks(
    alpha=optimisers.last_alpha(settings, job.alpha),
    shared={
      'theta': problem.transform.to_theta(memory.phi),
      'state': memory.model_state,
    },
    masks=[
      {'theta': masks.unpack(task.packed, memory.owners)} for task in learnt
    ],
    private=[private(*pair) for pair in zip(learnt, recalled)],
    networks=recalled,
    evaluate=lambda t, network: problem.accuracy(
      network['theta'], network['state'], part(t, 'test')
    ),
  )


_FROM_CHECKPOINT = {
  'sparse_training': _of_sparse_training,
  sequence.BINARY: _of_continual_learning,
}


def folder(path: str) -> pathlib.Path:
  """The folder with the networks of an experiment.

  Args:
    path: as `load` takes it.

  Returns:
    The folder of the file, or that of the checkpoints.
  """
  place = pathlib.Path(path).expanduser()
  inside = place / 'checkpoints'
  if place.is_file():
    return place.parent
  return inside if inside.is_dir() else place


def load(
  path: str, data_dir: str | None, best: bool = False
) -> Network | Tasks:
  """Loads a network, or a sequence of tasks, that a binary has trained.

  Args:
    path: a file `runs/<name>.safetensors` of `mnist_pruning`; the folder of a
      run of `sparse_training`, or its folder of checkpoints; or the folder of
      one run in the checkpoints of `continual_learning`.
    data_dir: the folder of data sets, as the flag --data_dir has it.
    best: whether to take the checkpoint of the best validation accuracy, and
      not the newest one.

  Returns:
    A `Network`; or, of `continual_learning`, its `Tasks`.

  Raises:
    ValueError: if the path holds something else, if its file is damaged, or if
      the data are not those of the training.
    FileNotFoundError: if there is no file and no whole checkpoint.
  """
  place = pathlib.Path(path).expanduser()
  remedy = (
    'Runs of sparse_training with --evaluate_every have one.'
    if best
    else 'Give a file runs/NAME.safetensors of mnist_pruning, the folder of a'
    ' run of sparse_training, or a folder checkpoints/NAME of'
    ' continual_learning; sparse_sweep keeps no networks.'
  )
  if not paths.resolve(path).exists():
    raise FileNotFoundError(f'There is no file or folder {path}. {remedy}')
  if place.is_file():
    if best:
      raise ValueError(
        f'{place} holds the last weights of a run and no best ones. Leave'
        ' --which out.'
      )
    return _of_mnist_pruning(place, data_dir)
  try:
    found = checkpoint.load(folder(path), evaluation.BEST if best else None)
  except FileNotFoundError as e:
    raise FileNotFoundError(f'{e} {remedy}') from e
  binary = found.config.get('binary')
  if binary not in _FROM_CHECKPOINT:
    raise ValueError(
      f'{place} holds no checkpoint of {" or ".join(_FROM_CHECKPOINT)}, but one'
      f' of {binary or "another program"}.'
    )
  return _FROM_CHECKPOINT[binary](found, data_dir)

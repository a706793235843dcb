r"""Prunes a trained network and writes it to a small file.

  python -m experiments.export_model --density=0.02 --density_scale=logits=2 \
    --checkpoint=results/mnist_pruning/runs/NAME.safetensors

takes a run of `mnist_pruning`, and

  python -m experiments.export_model --checkpoint=results/sparse_training

the newest checkpoint of `sparse_training`, with the masks it was trained with
if there is no --density. A checkpoint of `continual_learning` becomes a file of
all its tasks, which share their weights:

  python -m experiments.export_model \
    --checkpoint=results/continual_learning/checkpoints/epn-alpha=2.0-seed=0

The network is evaluated before it is written and
after it was read back. `export.load_compressed` reads the file, whose leaves
are `theta/...` and, of networks with BatchNorm, `state/...`; of tasks,
`export.load_task` reads one.
"""

from collections.abc import Callable, Sequence
import functools
import json
import pathlib
from typing import Any, NamedTuple

from absl import app
from absl import flags
import jax
import jax.numpy as jnp

from experiments import common
from experiments import export_tasks
from experiments.support import config as config_lib
from experiments.support import problem as problem_lib
from powerprop_jax import export
from powerprop_jax.data import in_memory
from powerprop_jax.export import format as export_format
from powerprop_jax.models import networks
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import pruning
from powerprop_jax.training import checkpoint
from powerprop_jax.training import classification

_VALUES = ('float32', 'float16', 'bfloat16')


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this binary."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  enum = functools.partial(flags.DEFINE_enum, flag_values=values)
  string('checkpoint', None, 'A checkpoint, or the folder of a run.')
  flags.DEFINE_float(
    'density',
    None,
    'Fraction of the weights to keep; those in use if not given.',
    flag_values=values,
  )
  enum('scope', 'layer', ['layer', 'global'], 'How magnitudes are ranked.')
  flags.DEFINE_list(
    'density_scale',
    [],
    'pattern=factor,...: factors of the density for layers whose path has a'
    ' match; the first that matches counts.',
    flag_values=values,
  )
  enum('values', 'float32', _VALUES, 'What kept weights are rounded to.')
  string('out', 'results/model.safetensors', 'The file to write.')
  string('data_dir', None, 'Where TFDS, idx files or image folders lie.')


class Trained(NamedTuple):
  """A network that was trained.

  Attributes:
    alpha: the power.
    theta: its weights, zero where it is sparse already.
    masks: of the weights it uses; {} if it uses all.
    state: its statistics, as of BatchNorm.
    evaluate: maps (theta, state) to accuracies by name.
  """

  alpha: float
  theta: Any
  masks: Any
  state: Any
  evaluate: Callable[[Any, Any], dict[str, float]]


def _from_mnist_pruning(path: pathlib.Path, data_dir: str | None) -> Trained:
  config = json.loads((path.parent.parent / 'config.json').read_text())
  model = export.load_compressed(path)
  if not isinstance(model.alpha, float):
    raise ValueError(f'{path} does not tell the alpha it was trained with.')
  data = in_memory.load(config['settings']['dataset'], data_dir)
  network = networks.build('lenet_300_100', data.num_classes)
  accuracy = jax.jit(classification.make_accuracy(network.apply))
  images = jnp.zeros((1, *data.train.images.shape[1:]))
  like, state = jax.eval_shape(
    lambda key: network.init(key, images, False), jax.random.key(0)
  )

  def evaluate(theta, state):
    splits = {'valid_accuracy': data.valid, 'test_accuracy': data.test}
    return {k: float(accuracy(theta, state, *s)) for k, s in splits.items()}

  theta = export.from_dict(model.theta, like)
  return Trained(model.alpha, theta, {}, state, evaluate)


def _from_sparse_training(
  found: checkpoint.Checkpoint, data_dir: str | None
) -> Trained:
  settings = config_lib.restored(
    problem_lib.Settings, found.config, data_dir=data_dir, num_workers=0
  )
  problem = problem_lib.make(settings, problem_lib.load(settings))
  state = jax.eval_shape(problem.init)
  wanted = {
    'phi': state.phi,
    'masks': state.masks,
    'model_state': state.model_state,
  }
  there = checkpoint.fill({'state': wanted}, found, partial=True)['state']
  theta, masks = problem.transform.to_theta(there['phi']), there['masks']
  return Trained(
    alpha=settings.alpha,
    theta=masks_lib.apply_mask(theta, masks.forward),
    masks=masks.forward,
    state=there['model_state'],
    evaluate=problem.make_feed().accuracy,
  )


# What wrote a checkpoint is told by a flag that only it has.
_FROM_CHECKPOINT = {
  'update_every': _from_sparse_training,
  'steps_per_task': export_tasks.load,
}


def load(path: str, data_dir: str | None) -> Trained | export_tasks.Tasks:
  """Reads what one of the binaries has trained.

  Args:
    path: a file `runs/<name>.safetensors` of `mnist_pruning`; or the folder of
      a run, or its folder of checkpoints.
    data_dir: where data sets lie.

  Returns:
    A `Trained`; of `continual_learning`, its `Tasks`.

  Raises:
    ValueError: if it is nothing of these, or damaged.
    FileNotFoundError: if there is nothing.
  """
  place = pathlib.Path(path)
  if place.is_file():
    return _from_mnist_pruning(place, data_dir)
  inside = place / 'checkpoints'
  found = checkpoint.load(inside if inside.is_dir() else place)
  for flag, make in _FROM_CHECKPOINT.items():
    if flag in found.config:
      return make(found, data_dir)
  raise ValueError(
    f'{place} holds no checkpoint of a binary that is known here. Its settings'
    f' are {sorted(found.config)}.'
  )


def choose_masks(
  trained: Trained, density: float | None, options: dict[str, Any]
) -> Any:
  """The masks to write: of largest magnitude, or those of the network."""
  if density is None:
    return trained.masks
  pruning.check_finite(trained.theta)
  chosen = pruning.prune(trained.theta, density, **options)
  if not trained.masks:
    return chosen
  # What training has pruned stays so, however much may be kept.
  return jax.tree.map(jnp.logical_and, chosen, trained.masks)


def write(
  trained: Trained, masks: Any, path: pathlib.Path, values: str | None
) -> tuple[export_format.Sizes, dict[str, dict[str, float]]]:
  """Writes the network, reads it again, and evaluates all three.

  Args:
    trained: the network.
    masks: of the weights to keep; {} keeps all.
    path: the file to write.
    values: what kept weights are rounded to; None keeps their type.

  Returns:
    The sizes; and for the network as it was trained, pruned, and reloaded, its
    accuracies.
  """
  tree = {'theta': trained.theta, 'state': trained.state}
  masks = {'theta': masks}
  sizes = export.save_compressed(
    path, tree, masks, alpha=trained.alpha, values=values
  )
  networks_ = {
    'trained': tree,
    'pruned': export.from_dict(export.to_dict(tree, masks), tree),
    'reloaded': export.from_dict(export.load_compressed(path).theta, tree),
  }
  return sizes, {
    name: trained.evaluate(network['theta'], network['state'])
    for name, network in networks_.items()
  }


def table(
  sizes: export_format.Sizes, accuracies: dict[str, dict[str, float]]
) -> str:
  """The result as a person reads it."""
  rows = [
    ('dense', f'{sizes.dense:,} bytes'),
    ('file', f'{sizes.file:,} bytes, {sizes.dense / sizes.file:.1f} x smaller'),
    (
      'bound',
      f'{sizes.bound:,} bytes: kept values and the entropy of their positions;'
      f' the file is {sizes.file / sizes.bound - 1:.1%} above',
    ),
  ]
  for name, found in accuracies.items():
    shown = [f'{k} {100 * v:.2f} %' for k, v in found.items()]
    rows.append((name, ', '.join(shown)))
  return '\n'.join(f'{name:<10}{text}' for name, text in rows)


def read_flags(values: flags.FlagValues) -> Callable[..., Any]:
  """What writes the network of the flags, given the path and the values."""
  if values.checkpoint is None:
    raise ValueError('--checkpoint must be given.')
  if values.density is not None:
    masks_lib.check_density(values.density)
  scale = common.parse_factors(values.density_scale, 'density_scale')
  trained = load(values.checkpoint, values.data_dir)
  if isinstance(trained, export_tasks.Tasks):
    if values.density is not None:
      raise ValueError(
        f'--density={values.density:g} is not for continual learning, whose'
        ' tasks keep the masks that they were learnt with. Leave it out.'
      )
    return functools.partial(export_tasks.write, trained)
  options = {'scope': values.scope, 'density_scale': scale}
  masks = choose_masks(trained, values.density, options)
  return functools.partial(write, trained, masks)


def main(argv: Sequence[str]) -> None:
  common.check_no_arguments(argv)
  values = flags.FLAGS
  path = pathlib.Path(values.out)
  try:
    write_to = read_flags(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = None if values.values == 'float32' else values.values
    result = write_to(path, rounded)
  except (ValueError, OSError) as e:
    common.fail(e)
  print(table(*result))
  print(f'\nIn {values.out}')


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  app.run(main)

r"""Prunes a trained network and writes it to a small file.

  python -m experiments.export_model --density=0.02 --density_scale=logits=2 \
    --checkpoint=results/mnist_pruning/runs/NAME.safetensors

prunes a network that `mnist_pruning` has trained, and

  python -m experiments.export_model --checkpoint=results/sparse_training

writes the newest checkpoint of `sparse_training` (the best one with
--which=best), with the masks of its training if there is no --density. A
checkpoint of `continual_learning` becomes a file of all its tasks, which share
their weights:

  python -m experiments.export_model \
    --checkpoint=results/continual_learning/checkpoints/epn-alpha=2.0-seed=0

The network is evaluated before it is written and after it is read back.
`export.load_compressed` reads the file, whose leaves are `theta/...` and, for
networks with BatchNorm, `state/...`. From a file of tasks, `export.load_task`
reads the network of one task.

With jax 0.10.2, a network of the preset `best` of `mnist_pruning` that keeps
2.07 % (--density=0.0207 --density_scale=logits=2) takes 29,266 bytes in place
of 1,066,440, which is 2.3 % above the bound: the kept values and the entropy of
their positions. Ten tasks of the preset `epn-2` of `continual_learning` take
643,994 bytes, 1.5 % above their bound, where one dense network with ten heads
takes 1,122,840.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from experiments.support import config
from experiments.support import output
from experiments.support import settings as settings_lib
from experiments.support import trained as trained_lib
from powerprop_jax import export
from powerprop_jax.export import format as export_format
from powerprop_jax.sparse import masks as masks_lib
from powerprop_jax.sparse import pruning

# The sizes of a file, and the accuracies of each network in it by name.
Result = tuple[export_format.Sizes, dict[str, dict[str, float]]]


@dataclasses.dataclass(frozen=True)
class Settings(config.Settings):
  """The network and the file."""

  checkpoint: str | None = config.flag(
    None,
    'The trained network: a file in runs/ of mnist_pruning, the folder of a run'
    ' of sparse_training or of its checkpoints, or the folder of one run in'
    ' checkpoints/ of continual_learning.',
  )
  which: str = config.flag(
    'newest',
    'Which checkpoint to take: the newest one or, from a run of sparse_training'
    ' with --evaluate_every, the one with the best validation accuracy.',
    choices=('newest', 'best'),
  )
  density: float | None = config.flag(
    None,
    'The density: the fraction of the weights to keep, which are those of'
    ' largest magnitude. By default all weights in use are kept.',
    check=masks_lib.check_density,
  )
  scope: str = config.flag(
    'layer',
    'Whether --density is that of each layer, or of all weights together.',
    choices=('layer', 'global'),
  )
  density_scale: tuple[str, ...] = config.flag(
    (),
    'Factors by which --density is multiplied in some layers, as'
    ' pattern=factor,...: a factor applies to the layers in whose path its'
    ' regular expression has a match, and the first that matches counts.',
    check=lambda text: config.factors([text]),
  )
  values: str = config.flag(
    'float32',
    'The type to which kept weights are rounded.',
    choices=('float32', 'float16', 'bfloat16'),
  )
  out: str = config.flag('results/model.safetensors', 'The file to write.')
  data_dir: str | None = config.like(settings_lib.Data, 'data_dir')

  def __post_init__(self):
    super().__post_init__()
    if not self.checkpoint:
      raise ValueError('--checkpoint must be given.')
    if self.density_scale and self.density is None:
      raise ValueError(
        f'--density_scale={",".join(self.density_scale)} needs the --density'
        ' that it scales.'
      )


def choose_masks(network: trained_lib.Network, settings: Settings) -> Any:
  """Chooses the masks to write: those of --density, or those of training.

  Args:
    network: the trained network.
    settings: how it is pruned.

  Returns:
    Boolean arrays with the structure and the shapes of theta, true for the
    weights to keep; {} keeps all.

  Raises:
    ValueError: if a weight is not finite, or if the density, the scope or a
      factor is impossible for this network.
  """
  if settings.density is None:
    return network.masks
  pruning.check_finite(network.theta)
  chosen = pruning.prune(
    network.theta,
    settings.density,
    scope=settings.scope,
    density_scale=config.factors(settings.density_scale),
  )
  if not network.masks:
    return chosen
  # What training has pruned stays pruned, even if more weights may be kept.
  return jax.tree.map(jnp.logical_and, chosen, network.masks)


def write_network(
  network: trained_lib.Network,
  masks: Any,
  path: pathlib.Path,
  values: str | None,
) -> Result:
  """Writes a network, reads it again, and evaluates it three times.

  Args:
    network: the trained network.
    masks: boolean arrays like theta, true for the weights to keep; {} keeps
      all.
    path: the file to write.
    values: the type to which kept weights are rounded; None keeps their type.

  Returns:
    The sizes of the file; and the accuracies of the network as it was
    'trained', 'pruned' and 'reloaded'.
  """
  tree = {'theta': network.theta, 'state': network.state}
  masks = {'theta': masks}
  sizes = export.save_compressed(
    path, tree, masks, alpha=network.alpha, values=values
  )
  if not masks['theta']:
    print('No weight is pruned: there is no --density.', file=sys.stderr)
  networks = {
    'trained': tree,
    'pruned': export.from_dict(export.to_dict(tree, masks), tree),
    'reloaded': export.from_dict(export.load_compressed(path).theta, tree),
  }
  return sizes, {
    name: network.evaluate(found['theta'], found['state'])
    for name, found in networks.items()
  }


def write_tasks(
  tasks: trained_lib.Tasks, path: pathlib.Path, values: str | None
) -> Result:
  """Writes all tasks, reads each again, and evaluates it before and after.

  Args:
    tasks: the tasks of a trained network.
    path: the file to write.
    values: the type to which kept weights are rounded; None keeps their type.

  Returns:
    The sizes of the file; and by the name of each task the accuracies of its
    network as it was 'trained' and 'reloaded'.
  """
  sizes = export.save_tasks(
    path,
    tasks.shared,
    tasks.masks,
    tasks.private,
    alpha=tasks.alpha,
    values=values,
  )

  def reloaded(t):
    return export.from_dict(export.load_task(path, t).theta, tasks.shared)

  return sizes, {
    f'task {t + 1}': {
      'trained': tasks.evaluate(t, network),
      'reloaded': tasks.evaluate(t, reloaded(t)),
    }
    for t, network in enumerate(tasks.networks)
  }


def prepare(settings: Settings) -> Callable[..., Result]:
  """Loads the network and chooses its masks; nothing is written yet.

  Args:
    settings: those of the binary.

  Returns:
    A function that writes the network, given the path of the file and the type
    to which kept weights are rounded.

  Raises:
    ValueError: if the network cannot be loaded, or not be pruned as the
      settings say, or if the file would lie beside what was trained.
    FileNotFoundError: if there is no such network.
  """
  assert settings.checkpoint  # Checked where the settings are made.
  trained = trained_lib.load(
    settings.checkpoint, settings.data_dir, settings.which == 'best'
  )
  _check_out(settings.checkpoint, settings.out)
  if isinstance(trained, trained_lib.Network):
    masks = choose_masks(trained, settings)
    return functools.partial(write_network, trained, masks)
  if settings.density is not None:
    raise ValueError(
      f'--density={settings.density:g} is not for continual learning, whose'
      ' tasks keep the masks that they were learnt with. Leave it out.'
    )
  return functools.partial(write_tasks, trained)


def _check_out(checkpoint: str, out: str) -> None:
  """Raises ValueError if the file would take the place of what was trained."""
  path = pathlib.Path(out).expanduser().resolve()
  networks = trained_lib.folder(checkpoint).resolve()
  if path.is_dir() or networks in (path, *path.parents):
    raise ValueError(
      f'--out={out} is a folder, or lies in {networks} beside the trained'
      ' networks. Name a file elsewhere.'
    )


def table(sizes: export_format.Sizes, accuracies: Any) -> str:
  """The result as text for a person to read.

  Args:
    sizes: the sizes of the file.
    accuracies: the accuracies of each network, by its name.

  Returns:
    Text of several lines.
  """
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


def main(settings: Settings) -> None:
  """Writes the file, and prints its sizes and the accuracies."""
  path = pathlib.Path(settings.out).expanduser()
  rounded = None if settings.values == 'float32' else settings.values
  output.announce('export_model')
  with config.refusing():
    write = prepare(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = write(path, rounded)
  print(table(*result))
  print(f'\nIn {settings.out}')


if __name__ == '__main__':
  config.run(main, Settings)

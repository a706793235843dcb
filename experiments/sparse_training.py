"""Sparse training of a network, by any method of the field, with any alpha.

  python -m experiments.sparse_training --method=rigl --alpha=2 --sparsity=0.9

Runs on CPU, GPU or TPU, on all local devices and on several hosts. It may be
killed at any moment: the same command goes on from the last checkpoint and ends
with the same parameters, bit for bit. --out_dir gets config.json,
metrics.jsonl, summary.json and the checkpoints.
"""

from collections.abc import Sequence
import functools
import hashlib
import math
import sys
from typing import Any

from absl import app
from absl import flags
import jax
import numpy as np

from experiments import common
from experiments import methods
from experiments import optimiser_flags
from experiments import sparse_loop
from experiments import sparse_problem
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax.models import networks
from powerprop_jax.sparse import flops
from powerprop_jax.sparse import report as report_lib
from powerprop_jax.training import checkpoint

PRESETS = {
  # ResNet-50 on ImageNet as the field reports it: 100 epochs of batches of
  # 4096, five of them to warm up.
  'imagenet': {
    'dataset': 'imagenet2012',
    'network': 'resnet50',
    'batch_size': 4096,
    'steps': 31_250,
    'optimizer': 'sgd',
    'learning_rate': 1.6,
    'momentum': 0.9,
    'nesterov': True,
    'schedule': 'steps',
    'warmup_steps': 1_563,
    'label_smoothing': 0.1,
    'weight_decay': 1e-4,
    'bfloat16': True,
    'distribution': 'erk',
    'checkpoint_every': 1_000,
  },
}

# What decides the result; a checkpoint fits only a run of equal flags.
_RUN_FLAGS = (
  'method',
  'alpha',
  'network',
  'dataset',
  'steps',
  'steps_multiplier',
  'batch_size',
  'gradient_batches',
  'label_smoothing',
  'bfloat16',
  'image_size',
  'seed',
  'init_from',
  *sparse_problem.METHOD_FLAGS,
  *optimiser_flags.NAMES,
)


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this binary."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  real = functools.partial(flags.DEFINE_float, flag_values=values)
  enum = functools.partial(flags.DEFINE_enum, flag_values=values)
  boolean = functools.partial(flags.DEFINE_bool, flag_values=values)
  enum('method', 'rigl', methods.METHODS, 'Sparse training method.')
  real('alpha', 2.0, 'The power; 1 is the baseline.')
  real('sparsity', 0.9, 'Fraction of the weights removed.', 0.0, 1.0)
  real('backward_sparsity', None, 'Top-KAST: of the backward pass.', 0.0, 1.0)
  string('distribution', 'erk', 'uniform, erk, er or pattern=sparsity,...')
  flags.DEFINE_list(
    'dense_layers', [], 'Patterns of layers to keep dense.', flag_values=values
  )
  enum('scope', 'layer', ['layer', 'global'], 'Ranking of magnitude and snip.')
  integer('update_every', 100, 'Steps between mask updates.', 1)
  integer('update_start', None, 'First mask update; update_every if not given.')
  integer(
    'update_stop', None, 'Last mask update; 3/4 of the steps if not given.'
  )
  real('drop_fraction', 0.3, 'Weights traded in an update.', 0.0, 1.0)
  enum('drop_schedule', 'cosine', ['cosine', 'constant'], 'Of drop_fraction.')
  enum('regrow', 'init', ['init', 'keep', 'zero'], 'Values of grown weights.')
  boolean('regrow_dropped', False, 'Whether a dropped weight may come back.')
  real('exploration_penalty', 1e-4, 'Of Top-KAST, in its backward set.', 0.0)
  integer('gradient_batches', 1, 'Batches averaged to score masks.', 1)
  enum(
    'on_collapse', 'error', ['error', 'warn'], 'If a layer loses all weights.'
  )
  enum('network', 'lenet_300_100', sorted(networks.NETWORKS), 'The network.')
  string('dataset', 'mnist_5k', 'mnist_5k, idx, a TFDS name; folder.')
  string('data_dir', None, 'Where TFDS, idx files or image folders lie.')
  integer('image_size', 224, 'Of streamed images.', 8)
  integer('num_workers', 8, 'Processes that decode streamed images.', 0)
  integer('steps', 5_000, 'Training steps.', 1)
  real(
    'steps_multiplier',
    1.0,
    'Extended training: stretches the run and its schedules.',
    1e-6,
  )
  integer('batch_size', 100, 'Examples a step, over all devices.', 1)
  real('label_smoothing', 0.0, 'Of the targets.', 0.0, 1.0)
  boolean('bfloat16', False, 'Whether activations are bfloat16.')
  integer('seed', 0, 'Of everything random.', 0)
  string('init_from', None, 'Checkpoints of the network to start from.')
  integer('checkpoint_every', 1_000, 'Steps between checkpoints.', 1)
  string('out_dir', 'results/sparse_training', 'Folder of results.')
  enum('preset', None, sorted(PRESETS), 'Settings to start from.')
  string('coordinator', None, 'host:port, or auto on Slurm and cloud TPU.')
  integer('num_processes', None, 'How many hosts, with a coordinator.')
  integer('process_index', None, 'Which host this is, with a coordinator.')
  optimiser_flags.define_flags(values)


def fingerprint(state: training.TrainState) -> str:
  """A SHA-256 over phi and the masks: equal runs have equal ones."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get((state.phi, state.masks))):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def _densities(mask: Any, phi: Any, layers: dict[str, float]) -> dict[str, Any]:
  """The density of every layer that has operations."""
  report = report_lib.sparsity_report(mask, phi)
  found = {row['path']: row['density'] for row in report['layers']}
  return {path: found.get(path, 1.0) for path in layers}


def summarise(
  problem: sparse_problem.Problem,
  progress: sparse_loop.Progress,
  accuracy: dict[str, float],
  steps_per_second: float,
  steps: int,
) -> dict[str, Any]:
  """What summary.json holds."""
  state, layers = progress.state, problem.layer_flops
  masks, ever = jax.device_get((state.masks, progress.ever))
  report = report_lib.sparsity_report(masks.forward, state.phi)
  explored = report_lib.sparsity_report(ever, state.phi)
  densities = methods.Densities(
    *(_densities(m, state.phi, layers) for m in (*masks, ever))
  )
  dense = math.fsum(layers.values())
  kept = flops.inference_flops(layers, densities.forward)
  inference = math.fsum(kept.values())
  step = problem.method.training_flops(layers, densities)
  return {
    **accuracy,
    'sparsity': {
      'total': 1 - report['total']['density'],
      **{row['path']: 1 - row['density'] for row in report['layers']},
    },
    'dead_units': report['total']['dead'],
    'explored': explored['total']['density'],
    'inference_flops': {'absolute': inference, 'relative': inference / dense},
    # Of one example, over the whole run.
    'training_flops': {
      'absolute': step * steps,
      'relative': step / flops.training_flops(dense),
    },
    'steps_per_second': (
      None if math.isnan(steps_per_second) else steps_per_second
    ),
    'fingerprint': fingerprint(state),
  }


def table(summary: dict[str, Any]) -> str:
  """The summary as a person reads it."""
  lines = [f'{"layer":<40} sparsity']
  lines += [f'{k:<40} {v:.4f}' for k, v in summary['sparsity'].items()]
  for name in ('valid_accuracy', 'test_accuracy'):
    if name in summary:
      lines.append(f'{name:<40} {100 * summary[name]:.2f} %')
  for name in ('inference_flops', 'training_flops'):
    value = summary[name]
    lines.append(
      f'{name:<40} {value["absolute"]:.4g} ({value["relative"]:.3f} x dense)'
    )
  lines.append(f'{"weights ever in use":<40} {summary["explored"]:.4f}')
  lines.append(f'{"dead units":<40} {summary["dead_units"]}')
  if summary['steps_per_second'] is not None:
    lines.append(f'{"steps a second":<40} {summary["steps_per_second"]:.1f}')
  return '\n'.join([*lines, f'fingerprint {summary["fingerprint"]}'])


def connect(values: flags.FlagValues) -> None:
  """Joins the other hosts, if there are any."""
  if values.coordinator == 'auto':
    jax.distributed.initialize()
  elif values.coordinator is not None:
    jax.distributed.initialize(
      values.coordinator, values.num_processes, values.process_index
    )


def main(argv: Sequence[str]) -> None:
  common.check_no_arguments(argv)
  values = flags.FLAGS
  if values.preset:
    common.apply_preset(values, PRESETS[values.preset])
  settings = {name: values[name].value for name in _RUN_FLAGS}
  try:
    power.check_alpha(values.alpha)
    settings = sparse_problem.stretched(settings)
    connect(values)
    data = sparse_problem.load(settings, values.data_dir)
    problem = sparse_problem.make_problem(settings, data, values.num_workers)
    out_dir = common.prepare_out_dir(values.out_dir, settings)
    manager = checkpoint.open_manager(out_dir / 'checkpoints', settings)
    feed = problem.make_feed()
    result = sparse_loop.train(
      problem,
      feed,
      manager,
      out_dir,
      settings,
      checkpoint_every=values.checkpoint_every,
      on_collapse=values.on_collapse,
    )
  except sparse_loop.Failed as e:
    common.fail(e, code=1)
  except (ValueError, FileNotFoundError) as e:
    common.fail(e)
  if result is None:
    print('\nInterrupted. The same command goes on.', file=sys.stderr)
    sys.exit(130)
  progress, speed = result
  theta = training.masked_theta(progress.state, problem.transform)
  accuracy = feed.accuracy(theta, progress.state.model_state)
  summary = summarise(problem, progress, accuracy, speed, settings['steps'])
  if jax.process_index() == 0:
    common.write_json(out_dir / 'summary.json', summary)
    print(table(summary))


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  app.run(main)

"""Counts the memory that training needs from shapes: nothing is measured.

  python -m benchmarks.memory

The arrays of the forward pass that the backward pass reads, which are those
that `jax.vjp` of the loss keeps, grow with the number of images. Among them are
arrays of BatchNorm in float32, which a compiler may recompute from arrays in
bfloat16. So there are two counts, with the former and without them. The truth
lies between, plus the memory that the compiler needs for one operation at a
time.
"""

import argparse
import math
from typing import Any

import jax
import jax.numpy as jnp
import tabulate

from experiments import sparse_training
from experiments.presets import sparse_training as presets
from experiments.support import config
from experiments.support import problem as problem_lib
from powerprop_jax.data import augment
from powerprop_jax.data import streams
from powerprop_jax.models import networks
from powerprop_jax.training import classification

_CLASSES = 1000


def size(tree: Any, without: Any = None) -> int:
  """The number of bytes of the arrays of a tree.

  Args:
    tree: arrays, or structs of their shapes and types.
    without: a type; arrays of it are not counted.

  Returns:
    The number of bytes.
  """
  return sum(
    math.prod(x.shape) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if x.dtype != without
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--network', default='resnet50', help='The network to train.'
  )
  parser.add_argument(
    '--image_size',
    type=int,
    default=224,
    help='The height and width of images.',
  )
  parser.add_argument(
    '--batches',
    type=int,
    nargs='+',
    default=[64, 128, 256],
    help='The numbers of images per step for which the memory is counted.',
  )
  args = parser.parse_args()
  flags = ['--preset=imagenet', f'--network={args.network}']
  settings = config.parse(sparse_training.Settings, flags, presets.PRESETS)
  source = streams.Source(
    lambda i: streams.Example(b'', 0, ''), settings.batch_size, _CLASSES
  )
  problem = problem_lib.make(
    settings, problem_lib.Sources(source, None, source)
  )
  state = jax.eval_shape(problem.init)
  held = size((state.phi, state.opt_state, state.masks, state.model_state))
  fixed = held + 2 * size(state.phi)  # A step has theta and its gradient too.

  network = networks.build(args.network, _CLASSES, dtype=jnp.bfloat16)
  loss_fn = classification.make_loss(
    network.apply, augment.usual('imagenet2012', None), settings.label_smoothing
  )

  def residuals(count):
    side = args.image_size
    batch = (
      jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8),
      jax.ShapeDtypeStruct((count,), jnp.int32),
    )

    def pull(theta, batch):
      key = jax.random.key(0)
      loss = lambda x: loss_fn(x, model_state, key, batch)
      return jax.tree.leaves(jax.vjp(loss, theta, has_aux=True)[1])

    model_state = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), state.model_state
    )
    return jax.eval_shape(pull, state.phi, batch)

  one, two = residuals(1), residuals(2)
  most = size(two) - size(one)
  least = size(two, jnp.float32) - size(one, jnp.float32)
  print(
    f'{args.network}, {args.image_size} x {args.image_size}, bfloat16:'
    f' {held / 1e6:.0f} MB of phi, momentum, masks and statistics,'
    f' {fixed / 1e6:.0f} with theta and its gradient, and'
    f' {least / 1e6:.0f} to {most / 1e6:.0f} MB per image'
  )
  rows = [
    (n, *(f'{(fixed + n * x) / 1e9:.1f}' for x in (least, most)))
    for n in args.batches
  ]
  print(tabulate.tabulate(rows, ('images', 'GB at least', 'GB at most')))


if __name__ == '__main__':
  main()

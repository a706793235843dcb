"""Times a step of convolutional networks on a CPU, beside that of PyTorch.

  python -m benchmarks.convolutions

LeNet-5 and a ResNet-8 of 16, 32 and 64 channels (`wide_resnet` of depth 10 and
width 1) are trained on batches of 128 random images with plain SGD on one core.
JAX is timed in three forms: with the operations of Haiku in a Python loop over
compiled steps, as networks with convolutions were trained before; with those of
`models.convolutions` in the same loop; and with the latter in a compiled chunk
of steps, as everything is trained now. In a chunk Haiku's operations take 0.6 s
per step of LeNet-5 and 10 s per step of the ResNet-8, and are left out. The
forms take turns. The seconds of CPU are those of the fastest turn of each form,
as other work on the machine comes and goes.

PyTorch is no dependency of this package. If it can be imported it is timed in
the same turns, in its own layout of images and in `channels_last`:

  pip install torch --index-url https://download.pytorch.org/whl/cpu

A second table has the times of the pieces of a step, each in a compiled loop.
"""

import argparse
from collections.abc import Callable
import contextlib
import functools
import importlib
import importlib.util
import os
import time
from typing import Any
from unittest import mock

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabulate

from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax import transforms
from powerprop_jax.models import convolutions
from powerprop_jax.models import networks
from powerprop_jax.training import classification

BATCH = 128
STEPS = 4  # In each turn.
NETWORKS: dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]] = {
  'LeNet-5': (networks.lenet_5, (28, 28, 1)),
  'ResNet-8': (
    functools.partial(networks.wide_resnet, depth=10, width=1),
    (32, 32, 3),
  ),
}
# The size and channels of the images, the output channels, and the size, the
# stride and the padding of the kernel.
LAYERS = (
  (28, 1, 20, 5, 1, 'VALID'),
  (12, 20, 50, 5, 1, 'VALID'),
  (32, 3, 16, 3, 1, 'SAME'),
  (32, 16, 16, 3, 1, 'SAME'),
  (32, 16, 32, 3, 2, 'SAME'),
  (16, 32, 32, 3, 1, 'SAME'),
  (16, 32, 64, 3, 2, 'SAME'),
  (8, 64, 64, 3, 1, 'SAME'),
  (32, 16, 32, 1, 2, 'SAME'),
  (16, 32, 64, 1, 2, 'SAME'),
)
Turn = Callable[[], object]  # Takes STEPS steps, and waits for them.


def _random(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _haiku_max(images: jax.Array, side: int) -> jax.Array:
  return hk.max_pool(images, (side, side, 1), (side, side, 1), 'VALID')


def jax_forms(name: str) -> dict[str, Turn]:
  """The three forms of training in JAX, by name."""
  function, shape = NETWORKS[name]
  transform = power.power_transform(1.0)
  tx = transforms.target_propagation(optax.sgd(0.01), transform)
  data = jax.device_put((_random(4 * BATCH, *shape), np.arange(4 * BATCH) % 10))
  indices = np.arange(STEPS * BATCH).reshape(STEPS, BATCH) % (4 * BATCH)

  def make(ours):
    def forward(images, is_training):
      with contextlib.ExitStack() as stack:
        if ours:
          stack.enter_context(convolutions.in_haiku())
        else:
          old = mock.patch.object(convolutions, 'max_pool', _haiku_max)
          stack.enter_context(old)
        return function(images, is_training, 10)

    network = hk.transform_with_state(forward)
    key = jax.random.key(0)
    init = jax.jit(network.init, static_argnums=2)
    theta, model_state = init(key, data[0][:1], True)
    state = training.init_state(key, theta, model_state, tx, transform)
    loss_fn = classification.make_loss(network.apply, lambda key, x, train: x)
    return state, training.make_train_step(loss_fn, tx, transform)

  def loop(ours):
    start, step = make(ours)
    take = jax.jit(
      lambda state, data, index: step(
        state, jax.tree.map(lambda x: x[index], data)
      )
    )

    def turn():
      state = start
      for index in indices:
        state, _ = take(state, data, index)
      jax.block_until_ready(state)

    return turn

  state, step = make(True)
  chunk = jax.jit(training.make_run_steps(step))
  return {
    'Haiku, step by step': loop(False),
    'here, step by step': loop(True),
    'here, chunk': lambda: jax.block_until_ready(chunk(state, data, indices)),
  }


def _torch_network(torch: Any, name: str) -> Any:
  """The same network in PyTorch."""
  nn = torch.nn
  if name == 'LeNet-5':
    layers = []
    for inputs, outputs in (1, 20), (20, 50):
      layers += [nn.Conv2d(inputs, outputs, 5), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(800, 500), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(500, 10))

  def conv(inputs, outputs, size, stride=1):
    # Those of stride 2 are padded on one side, as in JAX.
    one_side = size > 1 and stride > 1
    padding = 0 if one_side else size // 2
    layer = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
    if not one_side:
      return layer
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), layer)

  class Block(nn.Module):
    """The same block as `networks._wide_block`."""

    def __init__(self, inputs, outputs, stride):
      super().__init__()
      self.norms = nn.ModuleList(map(nn.BatchNorm2d, (inputs, outputs)))
      self.first = conv(inputs, outputs, 3, stride)
      self.second = conv(outputs, outputs, 3)
      self.shortcut = None
      if inputs != outputs:
        self.shortcut = conv(inputs, outputs, 1, stride)

    def forward(self, x):
      out = torch.relu(self.norms[0](x))
      shortcut = x if self.shortcut is None else self.shortcut(out)
      out = self.first(out)
      return self.second(torch.relu(self.norms[1](out))) + shortcut

  return nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1, bias=False),
    Block(16, 16, 1),
    Block(16, 32, 2),
    Block(32, 64, 2),
    nn.BatchNorm2d(64),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(64, 10),
  )


def torch_forms(name: str) -> dict[str, Turn]:
  """Training in two layouts of PyTorch; {} if it cannot be imported."""
  if importlib.util.find_spec('torch') is None:
    return {}
  torch: Any = importlib.import_module('torch')
  torch.set_num_threads(1)
  height, width, channels = NETWORKS[name][1]
  labels = torch.arange(BATCH) % 10

  def make(layout):
    network = _torch_network(torch, name).to(memory_format=layout)
    images = torch.randn(BATCH, channels, height, width)
    images = images.to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)

    def turn():
      for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    return turn

  return {
    'PyTorch': make(torch.contiguous_format),
    'PyTorch, channels last': make(torch.channels_last),
  }


def fastest(turns: dict[str, Turn], count: int) -> dict[str, float]:
  """Milliseconds of CPU per step, in the fastest turn of each form."""
  seconds = {form: [] for form in turns}
  for turn in range(count + 1):
    for form, take in turns.items():
      start = time.process_time()
      take()
      if turn:  # The first one compiles.
        seconds[form].append(time.process_time() - start)
  return {form: 1e3 * min(x) / STEPS for form, x in seconds.items()}


def _in_a_loop(function: Callable[..., Any], *args: Any) -> Turn:
  """Makes a turn that computes a function STEPS times, one after another."""
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args)
  )

  def body(carry, _):
    args, old = carry
    first = jax.tree.leaves(old)[0].ravel()[0]
    args = jax.tree.map(lambda x: x + 1e-30 * first, args)
    return (args, function(*args)), None

  run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=STEPS)[0])
  carry = jax.device_put((args, zeros))
  return lambda: jax.block_until_ready(run(carry))


def _gradient(function: Callable[..., Any], x: Any, y: Any) -> Any:
  """The gradient at x for a cotangent y, without the output of the function."""
  return jax.vjp(function, x)[1](y)[0]


def pieces(count: int) -> list[list[str]]:
  """Rows of a table: a layer, and the times of its output and gradients.

  Args:
    count: how many turns each piece takes.
  """
  rows = []

  def add(name, **functions):
    turns = {k: _in_a_loop(f, *args) for k, (f, *args) in functions.items()}
    found = fastest(turns, count)
    columns = ('output', 'images', 'kernel')
    rows.append(
      [name, *(f'{found[k]:.1f}' if k in found else '' for k in columns)]
    )

  for size, inputs, outputs, side, stride, padding in LAYERS:
    x, w = (
      _random(BATCH, size, size, inputs),
      _random(side, side, inputs, outputs),
    )

    def conv(x, w, stride=stride, padding=padding):
      return convolutions.conv2d(x, w, stride, padding)

    y = _random(*jax.eval_shape(conv, x, w).shape)
    add(
      f'{side} x {side}, {inputs} to {outputs}, of {size} x {size}'
      + (f', stride {stride}' if stride > 1 else ''),
      output=(conv, x, w),
      images=(
        lambda w, y, x=x, conv=conv: _gradient(lambda x: conv(x, w), x, y),
        w,
        y,
      ),
      kernel=(
        lambda x, y, w=w, conv=conv: _gradient(lambda w: conv(x, w), w, y),
        x,
        y,
      ),
    )
  for size, channels in (24, 20), (8, 50):
    x = _random(BATCH, size, size, channels)
    y = _random(BATCH, size // 2, size // 2, channels)
    for name, pool in ('', convolutions.max_pool), (', Haiku', _haiku_max):
      function = lambda x, pool=pool: pool(x, 2)
      add(
        f'maximum of {size} x {size} x {channels}{name}',
        output=(function, x),
        images=(functools.partial(_gradient, function), x, y),
      )
  for size, channels in (32, 16), (16, 32), (8, 64):
    norm = hk.transform_with_state(
      lambda x: jax.nn.relu(hk.BatchNorm(True, True, 0.9, 1e-5)(x, True))
    )
    x = _random(BATCH, size, size, channels)
    params, state = norm.init(None, x)

    def normalise(x, norm=norm, params=params, state=state):
      return norm.apply(params, state, None, x)[0]

    add(
      f'BatchNorm and ReLU of {size} x {size} x {channels}',
      output=(normalise, x),
      images=(functools.partial(_gradient, normalise), x, x),
    )
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--turns', type=int, default=8, help='How many turns each form takes.'
  )
  args = parser.parse_args()
  # XLA and PyTorch read the number of cores when they are first used.
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  print(f'{jax.devices()[0].device_kind}, one core, jax {jax.__version__}')
  rows = []
  for name in NETWORKS:
    turns = jax_forms(name) | torch_forms(name)
    found = fastest(turns, args.turns)
    chunk = found['here, chunk']
    for form, ms in found.items():
      rows.append([name, form, f'{ms:.0f}', f'{chunk / ms:.2f}'])
  headers = ['network', 'form', 'ms per step', 'chunk / form']
  print(tabulate.tabulate(rows, headers, 'github', disable_numparse=True))
  if importlib.util.find_spec('torch') is None:
    print('PyTorch is not installed; --help shows the command.')
  headers = ['piece, ms', 'output', 'gradient by images', 'by kernel']
  print()
  print(
    tabulate.tabulate(
      pieces(args.turns), headers, 'github', disable_numparse=True
    )
  )


if __name__ == '__main__':
  main()

"""Tests of the transforms of sharded parameters, on eight devices of a CPU."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_SCRIPT = """
  import jax
  from jax.sharding import AxisType
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec
  import numpy as np
  import optax

  from powerprop_jax import power
  from powerprop_jax import transforms

  transform = power.power_transform(3.0)
  schedule = optax.linear_schedule(1.0, 3.0, 4)
  FORMS = {
    'powerprop': transforms.powerprop(optax.adam(0.1), 2.5),
    'floor': transforms.powerprop(optax.adam(0.1), 2.5, floor=0.1),
    'schedule': transforms.powerprop(optax.adam(0.1), schedule),
    'phi': optax.chain(
      transforms.target_propagation(optax.adam(0.1), transform, floor=0.1),
      transforms.decay_phi(1e-3),
    ),
    'l1': transforms.decay_phi(1e-3, 'l1'),
    'p norm': transforms.decay_phi(optax.linear_schedule(1e-3, 0.0, 9), 0.5),
  }


  def random(seed):
    rng = np.random.default_rng(seed)
    return {
      'w': rng.standard_normal((16, 8)).astype(np.float32),
      'b': rng.standard_normal(8).astype(np.float32),
    }


  params, grads = random(0), random(1)
  kind = getattr(AxisType, '%s')
  mesh = jax.make_mesh((4, 2), ('rows', 'columns'), axis_types=(kind, kind))
  shardings = {
    'w': NamedSharding(mesh, PartitionSpec('rows', 'columns')),
    'b': NamedSharding(mesh, PartitionSpec('columns')),
  }
  for name, tx in FORMS.items():
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    with jax.set_mesh(mesh):
      theta, slopes = jax.device_put((params, grads), (shardings, shardings))
      state = tx.init(theta)
      program = jax.jit(tx.update).lower(slopes, state, theta).compile()
      eager, _ = tx.update(slopes, state, theta)
      updates, state = program(slopes, state, theta)
    assert 'all-gather' not in program.as_text(), name
    moments = optax.tree_utils.tree_get(state, 'mu', {})
    for tree in (updates, eager, moments):
      for leaf, x in tree.items():
        assert x.sharding.is_equivalent_to(shardings[leaf], x.ndim), name
    for leaf, x in updates.items():
      # Vectors of another width round differently.
      limit = 16 * np.finfo(np.float32).eps * np.abs(params[leaf]).max()
      assert np.abs(x - expected[leaf]).max() < limit, name
    print(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_transforms_keep_the_sharding_of_every_leaf(kind):
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', textwrap.dedent(_SCRIPT % kind)],
    cwd=_ROOT,
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': os.environ['XLA_FLAGS']
      + ' --xla_force_host_platform_device_count=8',
      'PYTHONPATH': str(_ROOT),
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert len(done.stdout.splitlines()) == 6

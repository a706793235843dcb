"""Tests of `devices` in this process, on eight devices, and on two hosts."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.training import devices

_ROOT = pathlib.Path(__file__).parents[2]


def run_python(code, count, *args):
  """Starts Python on a number of virtual devices."""
  return subprocess.Popen(
    [sys.executable, '-W', 'error', '-c', textwrap.dedent(code), *args],
    cwd=_ROOT,
    env=os.environ
    | {
      'XLA_FLAGS': os.environ['XLA_FLAGS']
      + f' --xla_force_host_platform_device_count={count}',
      'JAX_PLATFORMS': 'cpu',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def result(process):
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize('count', [1, 2, 8])
def test_axis_name(count):
  assert devices.axis_name(count) == (None if count == 1 else devices.AXIS)


@pytest.mark.parametrize(
  ('count', 'size', 'nearest'),
  [(8, 100, '96 and 104'), (8, 3, '8'), (3, 10, '9 and 12'), (4, 6, '4 and 8')],
)
def test_check_batch_size_names_the_nearest(monkeypatch, count, size, nearest):
  monkeypatch.setattr(jax, 'device_count', lambda: count)
  with pytest.raises(ValueError, match='does not divide') as error:
    devices.check_batch_size(size)
  assert str(error.value) == (
    f'batch_size={size} does not divide among {count} devices. The nearest that'
    f' do are {nearest}.'
  )


def test_check_batch_size_takes_what_divides(monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  devices.check_batch_size(8)
  devices.check_batch_size(96)


def test_one_device_adds_no_axis():
  tree = {'a': np.arange(3), 'key': jax.random.key(0)}
  replicated = devices.replicate(tree, None)
  assert isinstance(replicated['a'], jax.Array)
  assert replicated['a'].shape == (3,)
  assert devices.unreplicate(replicated, None) is replicated
  assert devices.shard(tree, None) is tree
  assert devices.any_host(True)
  assert not devices.any_host(False)


def test_on_devices_donates_the_first_argument_only():
  a, b = jnp.zeros([100]), jnp.ones([100])
  np.testing.assert_array_equal(devices.on_devices(jnp.add, None)(a, b), 1.0)
  assert a.is_deleted()
  assert not b.is_deleted()


_LAYOUT = """
  import json
  import jax
  import jax.numpy as jnp
  import numpy as np
  from powerprop_jax.training import devices

  axis = devices.axis_name()
  images = np.arange(16).reshape(8, 2)
  split = devices.shard({'x': images, 'y': np.arange(8)}, axis)
  columns = devices.shard(np.arange(24).reshape(3, 8), axis, dim=1)

  tree = {
    'x': jnp.arange(3.0),
    'mask': np.array([True, False]),
    'step': np.int32(7),
    'key': jax.random.key(3),
  }
  copies = devices.replicate(tree, axis)
  back = devices.unreplicate(copies, axis)
  homes = [sorted(d.id for d in x.sharding.device_set) for x in
           (copies['x'], copies['mask'], copies['step'])]

  mean = devices.on_devices(
    lambda state, x: state + jax.lax.pmean(jnp.mean(x), axis), axis
  )
  state = copies['x']
  result = mean(state, split['y'])
  print(json.dumps({
    'split': {k: x.tolist() for k, x in split.items()},
    'columns': columns.tolist(),
    'homes': homes,
    'shapes': [x.shape for x in jax.tree.leaves(copies)],
    'dtypes': [str(back[k].dtype) for k in ('x', 'mask', 'step')],
    'back': [np.asarray(back[k]).tolist() for k in ('x', 'mask', 'step')],
    # On one device: with others in it, several hosts could wait for ever.
    'home': sorted(d.id for x in back.values() for d in x.devices()),
    'same_key': bool(back['key'] == tree['key']),
    'result': np.asarray(result).tolist(),
    'donated': state.is_deleted(),
  }))
"""


def test_layout_on_four_devices():
  found = result(run_python(_LAYOUT, 4))
  # These are consecutive parts of the batch, as `augment.crop_and_flip`
  # expects.
  assert found['split']['y'] == [[0, 1], [2, 3], [4, 5], [6, 7]]
  assert found['split']['x'][1] == [[4, 5], [6, 7]]
  assert found['columns'][1] == [[2, 3], [10, 11], [18, 19]]
  assert np.shape(found['columns']) == (4, 3, 2)
  # There is a copy on every device from the start, which can be donated.
  assert found['homes'] == [[0, 1, 2, 3]] * 3
  assert [s[0] for s in found['shapes']] == [4] * 4
  assert found['dtypes'] == ['float32', 'bool', 'int32']
  assert found['back'] == [[0.0, 1.0, 2.0], [True, False], 7]
  assert found['home'] == [0, 0, 0, 0]
  assert found['same_key']
  assert found['result'] == [[3.5, 4.5, 5.5]] * 4
  assert found['donated']


_SHARD_MAP = """
  import json
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  from powerprop_jax import power
  from powerprop_jax import training
  from powerprop_jax import transforms
  from powerprop_jax.sparse import distributions
  from powerprop_jax.sparse import schedules
  from powerprop_jax.sparse import updaters

  def loss_fn(theta, model_state, key, batch):
    loss = jnp.mean((batch @ theta['l']['w']) ** 2)
    return loss, (model_state, {'mean': batch.mean()})

  transform = power.power_transform(2.0)
  tx = transforms.target_propagation(optax.sgd(0.01, momentum=0.9), transform)
  rigl = updaters.rigl(
    distributions.uniform(0.5), schedules.drop_fraction(0.3, 10), None
  )
  rng = np.random.default_rng(0)
  theta = {'l': {'w': rng.standard_normal((8, 6)).astype('f')}}
  batch = rng.standard_normal((16, 8)).astype('f')

  def run(axis):
    step = training.make_train_step(loss_fn, tx, transform, axis, norms=True)
    first, later = training.make_mask_updates(
      loss_fn, tx, rigl, transform, axis
    )

    def steps(state, batch):
      state, _ = step(first(state, batch[None]), batch)
      state = later(state, batch[None])
      state, metrics = step(state, batch)
      return state.phi, state.masks, metrics

    return steps

  def each(state, batch):  # The state varies too, as under pmap.
    found = run('x')(jax.tree.map(lambda x: x[0], state), batch)
    return jax.tree.map(lambda x: x[None], found)

  state = training.init_state(jax.random.key(0), theta, {}, tx, transform)
  expected = jax.jit(run(None))(state, batch)
  mesh = jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  one, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec('x')
  copies = jax.tree.map(lambda x: jnp.stack([x] * 4), state)
  errors = []
  for check in (True, False):
    for of, function, spec in ((state, run('x'), one), (copies, each, split)):
      found = jax.jit(jax.shard_map(
        function, mesh=mesh, in_specs=(spec, split), out_specs=spec,
        check_vma=check,
      ))(of, batch)
      errors.append(max(
        float(np.abs(np.float64(a) - np.float64(b)).max())
        for a, b in zip(*map(jax.tree.leaves, (found, expected)))
      ))
  print(json.dumps(errors))
"""


@pytest.mark.slow
def test_steps_in_a_shard_map_are_those_of_one_device():
  errors = result(run_python(_SHARD_MAP, 4))
  assert len(errors) == 4
  assert max(errors) < 1e-5


_HOSTS = """
  import json
  import sys
  import jax
  import jax.numpy as jnp
  import numpy as np

  jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
  from powerprop_jax.training import devices

  axis, me = devices.axis_name(), jax.process_index()
  state = devices.replicate({'x': jnp.zeros([2]), 'k': jax.random.key(0)}, axis)
  total = devices.on_devices(
    lambda s, x: {'x': s['x'] + jax.lax.psum(x.sum(), axis), 'k': s['k']}, axis
  )
  state = total(state, devices.shard(np.arange(4) + 4 * me, axis))
  print(json.dumps({
    'count': jax.device_count(),
    'total': np.asarray(devices.unreplicate(state, axis)['x']).tolist(),
    'any': [devices.any_host(f) for f in (me == 1, False, True)],
  }))
"""


def test_two_hosts_of_two_devices():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  hosts = [run_python(_HOSTS, 2, str(port), str(i)) for i in range(2)]
  wanted = {'count': 4, 'total': [28.0, 28.0], 'any': [True, False, True]}
  assert [result(host) for host in hosts] == [wanted] * 2

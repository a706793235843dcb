"""Tests on sharded parameters: the masks, their sharding, and what travels.

Weights must not travel between devices as a whole: a compiled program may only
exchange counts and thresholds. Most tests need eight devices, and run in a
process that has them.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from powerprop_jax import leaves
from powerprop_jax import sparse
from powerprop_jax import transforms
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import pruning
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters

_COUNT = 8
_ON_EIGHT = jax.device_count() == _COUNT
_KINDS = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}

on_eight = pytest.mark.skipif(not _ON_EIGHT, reason='needs eight devices')


@pytest.mark.slow
@pytest.mark.skipif(_ON_EIGHT, reason='has eight devices already')
def test_on_eight_devices():
  flags = os.environ['XLA_FLAGS']
  flags += f' --xla_force_host_platform_device_count={_COUNT}'
  found = subprocess.run(
    [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__],
    cwd=pathlib.Path(__file__).parents[2],
    # Collectives of eight devices wait for one another, which takes threads
    # for all of them.
    env=os.environ
    | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'NPROC': '64'},
    capture_output=True,
    text=True,
    timeout=1200,
  )
  assert found.returncode == 0, found.stdout + found.stderr


# A linear layer, a convolution, and three layers in a stack. The last has rows
# of which only the columns are sharded.
_SHAPES = {
  'a': {'w': (256, 64), 'b': (64,)},
  'conv': {'w': (3, 3, 64, 32)},
  'ScanBlock_0': {'Dense_0': {'kernel': (3, 64, 64)}},
}
_SPECS = {
  'a': {'w': PartitionSpec('x', 'y'), 'b': PartitionSpec('y')},
  'conv': {'w': PartitionSpec(None, None, 'x', 'y')},
  'ScanBlock_0': {'Dense_0': {'kernel': PartitionSpec(None, 'y', 'x')}},
}
_SMALLEST_SHARD = 3 * 64 * 64 // _COUNT


def _map(f, *trees):
  return jax.tree.map(f, *trees, is_leaf=lambda x: isinstance(x, tuple))


def _tree(seed):
  """Weights that are not sharded; many are equal, and some are zero."""
  rng = np.random.default_rng(seed)
  return _map(
    lambda shape: (np.round(8 * rng.standard_normal(shape)) / 8).astype('f'),
    _SHAPES,
  )


def _shard(tree, kind):
  axis_types = (_KINDS[kind],) * 2
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=axis_types)
  shardings = jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    {name: _SPECS[name] for name in tree},
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )
  return jax.device_put(tree, shardings), shardings


def _check_sharding(found, shardings):
  def check(x, sharding):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), x.sharding

  jax.tree.map(check, found, shardings)


def _check_traffic(function, *args, local=False):
  """Runs a function, compiled, that sends no weight from device to device.

  Where it is not `local`, it sends counts. This shows that the pattern below
  finds what this version of the compiler writes.
  """
  compiled = jax.jit(function).lower(*args).compile()
  sent = re.findall(
    r' = (.*?) (all-gather|all-to-all|collective-permute|all-reduce'
    r'|reduce-scatter)(?:-start)?\(',
    compiled.as_text(),
  )
  assert local != bool(sent)
  for shapes, name in sent:
    for dims in re.findall(r'\[([\d,]*)\]', shapes):
      size = np.prod([int(n) for n in dims.split(',') if n])
      assert size < _SMALLEST_SHARD, (name, shapes)
  return compiled(*args)


def _check(function, kind, *trees, eager=False, local=False):
  """A function returns the masks of whole weights, sharded like the weights."""
  expected = function(*trees)
  sharded = [_shard(tree, kind) for tree in trees]
  args, shardings = [tree for tree, _ in sharded], sharded[0][1]
  structure = jax.tree.structure(shardings)

  def is_group(x):
    return jax.tree.structure(x) == structure

  compiled = functools.partial(_check_traffic, function, local=local)
  for run in (compiled, function) if eager else (compiled,):
    found = run(*args)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for group in jax.tree.leaves(found, is_leaf=is_group):
      _check_sharding(group, shardings)


@on_eight
@pytest.mark.parametrize(('kind', 'density'), list(zip(_KINDS, (0.1, 0.55))))
def test_topk_mask(kind, density):
  theta, _ = _shard(_tree(0), kind)
  for path, x in leaves.by_path(theta).items():
    if path == 'a/b':
      continue
    mask = _check_traffic(lambda x: masks.topk_mask(x, density), x)
    expected = masks.topk_mask(np.asarray(x), density)
    np.testing.assert_array_equal(mask, expected)
    assert mask.sharding.is_equivalent_to(x.sharding, x.ndim)


@on_eight
@pytest.mark.parametrize('kind', _KINDS)
def test_topk_mask_of_a_vector(kind):
  # The fault occurred with this: all devices are along the only axis.
  mesh = jax.make_mesh((_COUNT,), ('x',), axis_types=(_KINDS[kind],))
  sharding = NamedSharding(mesh, PartitionSpec('x'))
  x = jax.device_put(jnp.arange(4096.0), sharding)
  mask = masks.topk_mask(x, 0.1)
  np.testing.assert_array_equal(mask, np.arange(4096) >= 4096 - 409)
  assert mask.sharding.is_equivalent_to(sharding, 1)


_PRUNE = {
  'layer': {'density': 0.3},
  'whole': {'density': 1.0},
  'global': {'density': 0.3, 'scope': 'global'},
  'output': {'density': 0.3, 'scope': 'output'},
  'erk': {'density': distributions.erdos_renyi(0.8)},
  'n_of_m': {'density': distributions.n_of_m(2, 4)},
}


@on_eight
@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    *(('auto', name) for name in _PRUNE if name != 'whole'),
    ('explicit', 'global'),
    ('explicit', 'n_of_m'),
  ],
)
def test_prune(kind, name):
  prune = functools.partial(pruning.prune, **_PRUNE[name])
  _check(prune, kind, _tree(0), eager=name in ('layer', 'global'))


@on_eight
@pytest.mark.parametrize('name', ['layer', 'global', 'output', 'n_of_m'])
def test_each_device_may_prune_what_it_holds(name):
  mesh = jax.make_mesh((_COUNT,), ('x',), axis_types=(AxisType.Auto,))
  theta = {'a': _tree(0)['a']}
  prune = functools.partial(pruning.prune, **_PRUNE[name])
  spec = PartitionSpec('x')
  found = jax.shard_map(prune, mesh=mesh, in_specs=spec, out_specs=spec)(theta)
  # One tree for each device, of the rows that it holds.
  parts = jax.tree.map(lambda x: np.split(x, _COUNT), theta)
  parts = [
    {'a': dict(zip('wb', x))} for x in zip(parts['a']['w'], parts['a']['b'])
  ]
  expected = jax.tree.map(lambda *xs: np.concatenate(xs), *map(prune, parts))
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@on_eight
def test_each_device_may_have_a_density():
  mesh = jax.make_mesh((_COUNT,), ('x',), axis_types=(AxisType.Auto,))
  scores = _tree(0)['a']['w']
  densities = np.linspace(0.1, 0.8, _COUNT, dtype='f')
  found = jax.shard_map(
    lambda scores, density: masks.topk_mask(scores, density[0])[None],
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec('x')),
    out_specs=PartitionSpec('x'),
  )(scores, densities)
  for mask, density in zip(found, densities):
    expected = masks.topk_mask(scores, jnp.asarray(density))
    np.testing.assert_array_equal(mask, expected)


@on_eight
@pytest.mark.parametrize('kind', _KINDS)
def test_masks_that_keep_everything_are_sharded_too(kind):
  theta, shardings = _shard(_tree(0), kind)
  whole = functools.partial(pruning.prune, **_PRUNE['whole'])
  for f in (masks.dense, whole):
    for run in (f, jax.jit(f)):
      found = run(theta)
      assert all(x.all() for x in jax.tree.leaves(found))
      for mask in found if f is masks.dense else [found]:
        _check_sharding(mask, shardings)


@on_eight
@pytest.mark.parametrize('kind', _KINDS)
def test_prune_by_other_scores(kind):
  def prune(theta, grads):
    scores = pruning.taylor_scores(theta, grads)
    return pruning.prune(theta, 0.3, scores=scores, scope='global')

  _check(prune, kind, _tree(0), _tree(1))


_counts = distributions.erdos_renyi(0.8)
_wide = distributions.erdos_renyi(0.6)
_pattern = distributions.n_of_m(1, 4)
_drop = schedules.drop_fraction(0.3, 100)
_progress = schedules.cubic(0, 100)
_phases = schedules.alternating([10])
_UPDATERS = {
  'random': updaters.random(_counts),
  'snip': updaters.snip(_counts),
  'snip by layer': updaters.snip(_counts, 'layer'),
  'set': updaters.set_(_counts, _drop, None),
  'rigl': updaters.rigl(_counts, _drop, None),
  'rigl of other weights': updaters.rigl(_counts, _drop, None, False),
  'rigl in a pattern': updaters.rigl(_pattern, _drop, None),
  'top_kast': updaters.top_kast(_counts, _wide),
  'magnitude': updaters.magnitude(_counts, _progress),
  'magnitude of all': updaters.magnitude(_counts, _progress, 'global'),
  'magnitude in a pattern': updaters.magnitude(_pattern, _progress),
  'acdc': updaters.acdc(_counts, _phases, None),
}


# Each group of a pattern lies on one device here.
_LOCAL = ('magnitude in a pattern',)
# Layers are ranked together here. Elsewhere each is ranked by itself, which the
# tests of `prune` show of the convolution.
_TOGETHER = ('snip', 'magnitude of all')
# Axes that are explicit matter where masks are made, which is done by the same
# functions in all of them.
_EXPLICIT = ('snip', 'rigl', 'magnitude in a pattern')


@on_eight
@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    *(('auto', name) for name in _UPDATERS),
    *(('explicit', name) for name in _EXPLICIT),
  ],
)
def test_updaters(kind, name):
  updater = _UPDATERS[name]

  def update(theta, grads, later):
    key = jax.random.key(0)
    made = updater.init(key, theta, grads)
    return made, updater.update(key, 50, later, made, grads)

  layers = _SHAPES if name in _TOGETHER else ('a', 'ScanBlock_0')
  trees = [{x: _tree(seed)[x] for x in layers} for seed in range(3)]
  _check(update, kind, *trees, eager=name == 'random', local=name in _LOCAL)


@on_eight
@pytest.mark.parametrize('kind', _KINDS)
def test_sparsify(kind):
  """A step of a user's loop changes masks and gives grown weights values."""
  theta, target = ({'a': _tree(seed)['a']} for seed in (0, 1))

  def step_of(theta):
    tx = sparse.sparsify(
      transforms.powerprop(optax.adam(0.1), 2.0),
      updaters.rigl(_counts, _drop, lambda key: jax.tree.map(jnp.sin, theta)),
      key=jax.random.key(0),
      due=lambda step: step == 0,
    )

    def step(theta, state, target):
      loss = lambda theta: sum(
        jnp.sum((x - y) ** 2)
        for x, y in zip(
          *map(jax.tree.leaves, (tx.weights(theta, state), target))
        )
      )
      updates, state = tx.update(jax.grad(loss)(theta), state, theta)
      return optax.apply_updates(theta, updates), state

    return step, tx.init(theta)

  step, state = step_of(theta)
  values, after = jax.jit(step)(theta, state, target)
  (theta, shardings), (target, _) = _shard(theta, kind), _shard(target, kind)
  step, state = step_of(theta)
  found, sharded = _check_traffic(step, theta, state, target)
  jax.tree.map(np.testing.assert_array_equal, sharded.masks, after.masks)
  assert np.any(after.masks.forward['a']['w'] != state.masks.forward['a']['w'])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    found,
    values,
  )
  moments = sharded.inner_state[0]
  for tree in (found, *state.masks, *sharded.masks, moments.mu, moments.nu):
    _check_sharding(tree, shardings)


@on_eight
@pytest.mark.parametrize(
  ('kind', 'scope', 'compiled'),
  [
    ('auto', 'layer', False),
    ('auto', 'output', True),
    ('explicit', 'layer', True),
    ('explicit', 'output', False),
  ],
)
def test_what_is_ranked_by_itself_may_lie_on_several_devices(
  kind, scope, compiled
):
  """These are the layers of a stack, and the units of a layer."""
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(_KINDS[kind],) * 2)
  sharding = NamedSharding(mesh, PartitionSpec('x', None, 'y'))
  rng = np.random.default_rng(0)
  whole = np.round(8 * rng.standard_normal((4, 16, 8))).astype('f')
  whole = {'ScanBlock_0': {'Dense_0': {'kernel': whole}}}
  theta = jax.device_put(whole, sharding)
  prune = functools.partial(pruning.prune, density=0.3, scope=scope)
  expected = prune(whole)
  with jax.set_mesh(mesh):
    found = (jax.jit(prune) if compiled else prune)(theta)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  _check_sharding(found, jax.tree.map(lambda x: sharding, whole))


@on_eight
@pytest.mark.parametrize('kind', _KINDS)
def test_a_given_mask_is_sharded_as_the_weights(kind):
  theta, shardings = _shard(_tree(0), kind)
  mask = jax.tree.map(lambda x: jnp.asarray(x > 0), _tree(1))
  with jax.set_mesh(jax.tree.leaves(shardings)[0].mesh):
    found = updaters.given(mask).init(jax.random.key(0), theta, None)
  for tree in found:
    jax.tree.map(np.testing.assert_array_equal, tree, mask)
    _check_sharding(tree, shardings)


@on_eight
def test_sparsify_under_a_mesh_with_values_that_are_not_sharded():
  """Such are constants under `jax.set_mesh`, and values of an initialiser."""
  whole = {'a': _tree(0)['a']}
  theta, shardings = _shard(whole, 'explicit')
  tx = sparse.sparsify(
    transforms.powerprop(optax.adam(0.1), 2.0),
    updaters.set_(_counts, _drop, lambda key: jax.tree.map(jnp.sin, whole)),
    key=jax.random.key(0),
    due=lambda step: step == 0,
  )
  alone = jax.jit(lambda x: tx.update(x, tx.init(x), x)[1].masks)
  expected = alone(whole)
  with jax.set_mesh(jax.tree.leaves(shardings)[0].mesh):
    updates, state = jax.jit(tx.update)(theta, tx.init(theta), theta)
  jax.tree.map(np.testing.assert_array_equal, state.masks, expected)
  for tree in (updates, *state.masks):
    _check_sharding(tree, shardings)

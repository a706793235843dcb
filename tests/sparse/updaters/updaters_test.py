"""Tests of the sparse training methods, against tables worked by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax import leaves
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import masks
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters
from powerprop_jax.sparse.updaters import protocol

KEY = jax.random.key(0)


def _tree(w, b=(0.0, 0.0)):
  return {'linear': {'w': jnp.asarray(w), 'b': jnp.asarray(b)}}


def _counts(n):
  return lambda theta: {'linear': {'w': n, 'b': theta['linear']['b'].size}}


def _bits(mask):
  return mask['linear']['w'].astype(int).tolist()


def _masks(bits):
  mask = _tree(np.array(bits, bool), np.ones(2, bool))
  return masks.Masks(forward=mask, backward=mask)


def _drop(fraction):
  return lambda step: jnp.asarray(fraction)


THETA = _tree([0.5, -0.1, 0.3, 9.0, -8.0, 7.0])
GRADS = _tree([9.0, 8.0, 7.0, 0.2, -0.4, 0.1])


def test_dense_is_all_ones():
  made = updaters.dense().init(KEY, THETA, GRADS)
  assert _bits(made.forward) == [1] * 6
  theta, same = updaters.dense().update(KEY, 0, THETA, made, GRADS)
  chex.assert_trees_all_equal((theta, same), (THETA, made))


@pytest.mark.parametrize(
  'make',
  [
    updaters.snip,
    lambda counts: updaters.acdc(counts, lambda step: step >= 0, None),
    lambda counts: updaters.magnitude(counts, scope='global'),
    lambda counts: updaters.set_(counts, _drop(0.5), None),
    lambda counts: updaters.rigl(counts, _drop(0.5), None),
    lambda counts: updaters.top_kast(counts, counts),
  ],
)
def test_counts_and_methods_agree_on_what_is_a_weight(make):
  def is_matrix(path, leaf):
    return leaf.ndim == 2

  theta = {'attention': {'scores': jnp.ones((4, 5))}}
  updater = make(distributions.uniform(0.9, is_weight=is_matrix))
  with pytest.raises(ValueError, match=r'2 of the 20 .*the same is_weight'):
    made = updater.init(KEY, theta, theta)
    updater.update(KEY, 0, theta, made, theta)


@pytest.mark.parametrize('dtype', [np.float32, np.int8])
def test_a_given_mask_must_be_boolean(dtype):
  mask = jax.tree.map(
    lambda m: m.astype(dtype), _masks([1, 0, 0, 1, 0, 0]).forward
  )
  with pytest.raises(ValueError, match="'linear/b' must be boolean"):
    updaters.given(mask)


def test_a_given_mask_of_another_network():
  mask = jax.tree.map(lambda x: jnp.ones([*x.shape, 1], bool), THETA)
  with pytest.raises(ValueError, match='The mask of .* has the shape'):
    updaters.given(mask).init(KEY, THETA, GRADS)


def test_given_keeps_a_mask():
  mask = _masks([1, 0, 0, 1, 0, 0]).forward
  made = updaters.given(mask).init(KEY, THETA, GRADS)
  assert _bits(made.forward) == _bits(made.backward) == [1, 0, 0, 1, 0, 0]


def test_random_is_exact():
  updater = updaters.random(_counts(2))
  made = [
    updater.init(jax.random.key(i), THETA, GRADS).forward for i in range(40)
  ]
  bits = np.array([_bits(m) for m in made])
  assert (bits.sum(axis=1) == 2).all()
  assert (bits.sum(axis=0) > 3).all()  # Each weight is drawn.
  assert all(m['linear']['b'].all() for m in made)


def test_snip_ranks_theta_times_gradient():
  # |theta g| = 4.5, 0.8, 2.1, 1.8, 3.2, 0.7.
  made = updaters.snip(_counts(3)).init(KEY, THETA, GRADS)
  assert _bits(made.forward) == [1, 0, 1, 0, 1, 0]
  assert _bits(made.backward) == _bits(made.forward)


def test_snip_ranks_all_layers_together():
  theta = {'a': {'w': jnp.array([1.0, 2.0])}, 'b': {'w': jnp.array([3.0, 4.0])}}
  grads = jax.tree.map(jnp.ones_like, theta)
  counts = lambda _: {'a': {'w': 1}, 'b': {'w': 1}}
  both = updaters.snip(counts).init(KEY, theta, grads).forward
  assert not both['a']['w'].any()
  assert both['b']['w'].all()
  each = updaters.snip(counts, 'layer').init(KEY, theta, grads).forward
  assert each['a']['w'].tolist() == each['b']['w'].tolist() == [False, True]


@pytest.mark.parametrize('make', [updaters.snip, updaters.magnitude])
def test_scopes_are_checked(make):
  with pytest.raises(ValueError, match="got 'row'"):
    make(_counts(1), scope='row')


@pytest.mark.parametrize(
  ('fraction', 'after'),
  [
    # 0.5, 0.1 and 0.3 are active. A third of three is one: 0.1 is dropped, and
    # the weight of the largest gradient of the others, 0.4, is grown.
    (1 / 3 + 1e-6, [1, 0, 1, 0, 1, 0]),
    # Two are dropped, 0.1 and 0.3, and two are grown, 0.4 and 0.2.
    (2 / 3 + 1e-6, [1, 0, 0, 1, 1, 0]),
    (1.0, [0, 0, 0, 1, 1, 1]),
    (0.0, [1, 1, 1, 0, 0, 0]),
    (0.3, [1, 1, 1, 0, 0, 0]),  # floor(0.9) = 0.
  ],
)
def test_rigl_by_hand(fraction, after):
  fresh = lambda key: _tree(jnp.full(6, 0.25))
  updater = updaters.rigl(_counts(3), _drop(fraction), fresh, False)
  before = _masks([1, 1, 1, 0, 0, 0])
  theta, made = jax.jit(updater.update)(KEY, 0, THETA, before, GRADS)
  assert _bits(made.forward) == _bits(made.backward) == after
  grown = np.array(after) > np.array([1, 1, 1, 0, 0, 0])
  np.testing.assert_array_equal(
    theta['linear']['w'], np.where(grown, 0.25, THETA['linear']['w'])
  )
  np.testing.assert_array_equal(theta['linear']['b'], THETA['linear']['b'])


def test_regrow_keep_leaves_the_values():
  updater = updaters.rigl(_counts(3), _drop(1.0), None, False)
  theta, made = updater.update(KEY, 0, THETA, _masks([1, 1, 1, 0, 0, 0]), GRADS)
  assert _bits(made.forward) == [0, 0, 0, 1, 1, 1]
  chex.assert_trees_all_equal(theta, THETA)


def test_a_dropped_weight_comes_back_only_if_it_may():
  # 0.1 is dropped, and has the largest gradient of all that are not active.
  before = _masks([1, 1, 1, 0, 0, 0])
  for may, after in ((True, [1, 1, 1, 0, 0, 0]), (False, [1, 0, 1, 0, 1, 0])):
    updater = updaters.rigl(_counts(3), _drop(0.34), None, regrow_dropped=may)
    _, made = updater.update(KEY, 0, THETA, before, GRADS)
    assert _bits(made.forward) == after


def test_dropped_weights_come_back_if_there_are_no_others():
  # Five of six are active and five are to be traded: one other is free.
  updater = updaters.rigl(_counts(5), _drop(1.0), None, False)
  _, made = updater.update(KEY, 0, THETA, _masks([1, 1, 1, 1, 1, 0]), GRADS)
  # One is traded: the smallest, 0.1, for the last.
  assert _bits(made.forward) == [1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_the_number_of_active_weights_survives_bad_gradients(bad):
  grads = _tree([bad, bad, 1.0, bad, -0.4, bad])
  updater = updaters.rigl(_counts(3), _drop(0.7), None)
  _, made = updater.update(KEY, 0, THETA, _masks([1, 1, 1, 0, 0, 0]), grads)
  assert sum(_bits(made.forward)) == 3


@pytest.mark.parametrize('make', [updaters.set_, updaters.rigl])
def test_the_number_of_active_weights_never_changes(make):
  rng = np.random.default_rng(0)
  params = _tree(rng.normal(size=(40, 30)).astype(np.float32), np.zeros(2))
  counts = distributions.erdos_renyi(0.9)
  drop = schedules.drop_fraction(0.5, 30)
  fresh = lambda key: jax.tree.map(
    lambda x: jax.random.normal(key, x.shape), params
  )
  updater = make(counts, drop, fresh)
  made = updater.init(KEY, params, params)
  total = counts(params)['linear']['w']
  assert int(made.forward['linear']['w'].sum()) == total
  update, seen = jax.jit(updater.update), made.forward['linear']['w']
  for step in range(35):
    grads = _tree(rng.normal(size=(40, 30)).astype(np.float32), np.zeros(2))
    params, made = update(jax.random.key(step), step, params, made, grads)
    assert int(made.forward['linear']['w'].sum()) == total
    seen |= made.forward['linear']['w']
  assert int(seen.sum()) > 2 * total  # It explored.


@pytest.mark.parametrize('make', [updaters.set_, updaters.rigl])
@pytest.mark.parametrize('active', [1, 2, 5, 6])
def test_a_mask_of_another_number_of_weights_keeps_it(make, active):
  updater = make(_counts(3), _drop(0.5), None, regrow_dropped=False)
  before = _masks([1] * active + [0] * (6 - active))
  _, made = jax.jit(updater.update)(KEY, 0, THETA, before, GRADS)
  assert sum(_bits(made.forward)) == sum(_bits(made.backward)) == active
  # Half of them are traded, if there are so many others.
  changed = np.sum(np.array(_bits(made.forward)) != _bits(before.forward))
  assert changed == 2 * min(active // 2, 6 - active)


def _published(theta, growth, active, fraction):
  """The mask update of google-research/rigl, `_get_update_op`, in numpy.

  Sorts with ties by index, as `tf.math.top_k` does.
  """
  num_active = active.sum()
  num_pruned = int(np.float32(num_active) * np.float32(fraction))
  by_magnitude = np.argsort(-np.abs(theta * active), kind='stable')
  kept = np.zeros(theta.size, bool)
  kept[by_magnitude[: num_active - num_pruned]] = True
  growth = np.where(kept, growth.min() - 1, growth)
  grown = np.zeros(theta.size, bool)
  grown[np.argsort(-growth, kind='stable')[:num_pruned]] = True
  assert not (kept & grown).any()
  return kept | grown


@pytest.mark.parametrize('make', [updaters.set_, updaters.rigl])
def test_masks_are_the_published_ones(make):
  rng, size = np.random.default_rng(0), 500
  fractions = np.array([0.1, 0.3, 0.5, 1.0], np.float32)
  updater = make(_counts(3), lambda step: jnp.asarray(fractions)[step], None)
  update = jax.jit(updater.update)
  for step, fraction in enumerate(fractions):
    for density in (0.02, 0.3, 0.8, 1.0):
      theta = rng.normal(size=size).astype(np.float32)
      # Many gradients are equal, and many are zero.
      grads = np.round(rng.normal(size=size)).astype(np.float32)
      active = rng.uniform(size=size) < density
      _, made = update(KEY, step, _tree(theta), _masks(active), _tree(grads))
      growth = np.abs(grads)
      if make is updaters.set_:
        score_key, _ = jax.random.split(KEY)
        growth = protocol.uniform(score_key, _tree(theta))['linear']['w']
      expected = _published(theta, np.asarray(growth), active, fraction)
      np.testing.assert_array_equal(made.forward['linear']['w'], expected)
      np.testing.assert_array_equal(made.backward['linear']['w'], expected)


def test_a_dropped_weight_that_is_grown_again_keeps_its_value():
  # 0.1 is dropped and has the largest gradient: as published, nothing changes.
  fresh = lambda key: _tree(jnp.full(6, 0.25))
  updater = updaters.rigl(_counts(3), _drop(0.34), fresh)
  before = _masks([1, 1, 1, 0, 0, 0])
  theta, made = updater.update(KEY, 0, THETA, before, GRADS)
  assert _bits(made.forward) == [1, 1, 1, 0, 0, 0]
  chex.assert_trees_all_equal(theta, THETA)


def test_set_grows_at_random():
  updater = updaters.set_(_counts(3), _drop(1 / 3 + 1e-6), None, False)
  grown = set()
  for seed in range(30):
    _, made = updater.update(
      jax.random.key(seed), 0, THETA, _masks([1, 1, 1, 0, 0, 0]), GRADS
    )
    bits = _bits(made.forward)
    assert bits[:3] == [1, 0, 1]
    grown.add(bits.index(1, 3))
  assert grown == {3, 4, 5}


@pytest.mark.parametrize('scope', ['layer', 'global'])
def test_magnitude_prunes_gradually_and_for_good(scope):
  progress = schedules.cubic(0, 4)
  updater = updaters.magnitude(_counts(2), progress, scope)
  theta, made = THETA, updater.init(KEY, THETA, GRADS)
  assert _bits(made.forward) == [1] * 6
  # 4 are to be pruned: floor(4 * 37 / 64) = 2, then floor(4 * 7 / 8) = 3, then
  # 4.
  kept = []
  for step in (1, 2, 4):
    theta, made = updater.update(KEY, step, theta, made, GRADS)
    kept.append(_bits(made.forward))
    # Pruned weights stay pruned, however small the others become.
    theta = _tree(
      jnp.where(made.forward['linear']['w'], 1e-3, 1.0)
      * jnp.array([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    )
  assert kept[0] == [1, 0, 0, 1, 1, 1]
  assert kept[1] == [1, 0, 0, 1, 1, 0]
  assert kept[2] == [1, 0, 0, 1, 0, 0]


def test_magnitude_at_once():
  updater = updaters.magnitude(_counts(2))
  _, made = updater.update(KEY, 0, THETA, masks.dense(THETA), GRADS)
  assert _bits(made.forward) == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize('scope', ['layer', 'global'])
def test_magnitude_grows_nothing_in_a_network_that_is_sparser(scope):
  updater = updaters.magnitude(_counts(3), scope=scope)
  _, made = updater.update(KEY, 0, THETA, _masks([1, 0, 0, 0, 1, 0]), GRADS)
  assert _bits(made.forward) == [1, 0, 0, 0, 1, 0]


def test_leaves_that_are_not_weights_stay_whole():
  theta = _tree(jnp.arange(6.0), jnp.arange(2.0))
  counts = distributions.uniform(0.5)
  for updater in (
    updaters.random(counts),
    updaters.snip(counts),
    updaters.magnitude(counts),
    updaters.top_kast(counts, counts),
    updaters.set_(counts, _drop(0.5), None),
    updaters.rigl(counts, _drop(0.5), None),
  ):
    made = updater.init(KEY, theta, theta)
    _, made = updater.update(KEY, 0, theta, made, theta)
    assert made.forward['linear']['b'].all()
    assert made.backward['linear']['b'].all()
    assert int(masks.count(made.forward, leaves.weight_mask(theta))[0]) == 3


# Three layers of 8 inputs and 10 outputs, scanned or not.
def _unroll(tree):
  kernel = tree['ScanBlock_0']['Dense_0']['kernel']
  return {f'Block_{i}': {'kernel': x} for i, x in enumerate(kernel)}


def _stack_of(seed):
  w = np.random.default_rng(seed).normal(size=(3, 8, 10)).astype(np.float32)
  # The layers differ in magnitude, and a ranking of all would empty one.
  w *= np.array([1.0, 0.01, 10.0], np.float32)[:, None, None]
  return {'ScanBlock_0': {'Dense_0': {'kernel': jnp.asarray(w)}}}


_sparse, _wider = distributions.uniform(0.83), distributions.uniform(0.61)


@pytest.mark.parametrize(
  'updater',
  [
    updaters.rigl(_sparse, _drop(0.5), None),
    updaters.rigl(_sparse, _drop(0.5), None, regrow_dropped=False),
    updaters.top_kast(_sparse, _wider),
    updaters.magnitude(_sparse, schedules.cubic(0, 100)),
    updaters.magnitude(_sparse, schedules.cubic(0, 100), 'global'),
    updaters.magnitude(_sparse),
    updaters.acdc(_sparse, schedules.alternating([100]), None, 'layer'),
  ],
)
def test_stacked_layers_are_updated_as_unrolled_ones(updater):
  theta, grads = _stack_of(0), _stack_of(1)
  start = jax.tree.map(lambda x: jnp.abs(x) % 0.1 < 0.02, theta)
  made, unrolled = (masks.Masks(tree, tree) for tree in (start, _unroll(start)))
  _, made = jax.jit(updater.update)(KEY, 50, theta, made, grads)
  _, unrolled = updater.update(
    KEY, 50, _unroll(theta), unrolled, _unroll(grads)
  )
  chex.assert_trees_all_equal(_unroll(made.forward), unrolled.forward)
  chex.assert_trees_all_equal(_unroll(made.backward), unrolled.backward)


@pytest.mark.parametrize(
  'updater',
  [
    updaters.snip(_sparse, 'layer'),
    updaters.snip(_sparse, 'global'),
    updaters.top_kast(_sparse, _wider),
  ],
)
def test_stacked_layers_start_as_unrolled_ones(updater):
  theta, grads = _stack_of(0), _stack_of(1)
  made = updater.init(KEY, theta, grads)
  unrolled = updater.init(KEY, _unroll(theta), _unroll(grads))
  chex.assert_trees_all_equal(_unroll(made.forward), unrolled.forward)
  chex.assert_trees_all_equal(_unroll(made.backward), unrolled.backward)


def test_each_stacked_layer_has_its_number_of_random_weights():
  made = updaters.random(_sparse).init(KEY, _stack_of(0), None)
  kernel = made.forward['ScanBlock_0']['Dense_0']['kernel']
  assert kernel.sum((1, 2)).tolist() == [14, 14, 13]


def test_the_penalty_of_stacked_layers_is_that_of_unrolled_ones():
  theta = _stack_of(0)
  updater = updaters.top_kast(distributions.uniform(0.83), _wider)
  made = updater.init(KEY, theta, theta)
  kernel = made.forward['ScanBlock_0']['Dense_0']['kernel']
  made.forward['ScanBlock_0']['Dense_0']['kernel'] = kernel.at[0, 0].set(False)
  unrolled = masks.Masks(*map(_unroll, made))
  chex.assert_trees_all_close(
    _unroll(updaters.exploration_penalty(theta, made, 0.1)),
    updaters.exploration_penalty(_unroll(theta), unrolled, 0.1),
    rtol=1e-6,
  )


_pattern = distributions.n_of_m(2, 4)


@pytest.mark.parametrize(
  'updater',
  [
    updaters.random(_pattern),
    updaters.snip(_pattern, 'layer'),
    updaters.set_(_pattern, _drop(0.4), None),
    updaters.rigl(_pattern, _drop(0.4), None),
    updaters.rigl(_pattern, _drop(0.4), None, regrow_dropped=False),
    updaters.top_kast(_pattern, distributions.n_of_m(3, 4)),
    updaters.magnitude(_pattern),
    updaters.magnitude(_pattern, schedules.cubic(0, 100)),
    updaters.acdc(_pattern, schedules.alternating([10]), None, 'layer'),
  ],
)
def test_patterns_hold_in_every_group(updater):
  rng = np.random.default_rng(0)
  trees = [_tree(rng.normal(size=(16, 6)).astype(np.float32)) for _ in range(4)]
  made = updater.init(KEY, trees[0], trees[1])
  update = jax.jit(updater.update)
  for step in (100, 200):
    key = jax.random.key(step)
    _, made = update(key, step, trees[2], made, trees[3])
  mask = made.forward['linear']['w']
  assert mask.reshape(4, 4, 6).sum(1).tolist() == [[2] * 6] * 4
  assert masks.n_of_m_axes(mask, 2, 4) == [0]
  assert made.forward['linear']['b'].all()


def test_rigl_in_a_pattern_by_hand():
  # Groups of four. 0.1, 0.2 and 0.3 are dropped: two of the first group, and
  # one of the second. Each grows as many, where its gradient is largest.
  theta = _tree([0.1, 0.2, 5.0, 5.0, 0.3, 4.0, 5.0, 5.0])
  grads = _tree([1.0, 2.0, 4.0, 3.0, 2.0, 0.0, 1.0, 9.0])
  before = _masks([1, 1, 0, 0, 1, 1, 0, 0])
  counts = distributions.n_of_m(2, 4, axis=0)
  updater = updaters.rigl(counts, _drop(0.75), None)
  _, made = updater.update(KEY, 0, theta, before, grads)
  assert _bits(made.forward) == [0, 0, 1, 1, 0, 1, 0, 1]


def test_magnitude_reaches_a_pattern_by_steps():
  theta = _tree([4.0, 3.0, 2.0, 1.0])
  counts = distributions.n_of_m(1, 4, axis=0)
  updater = updaters.magnitude(counts, lambda step: step / 100)
  made = updater.init(KEY, theta, theta)
  seen = []
  for step in (20, 34, 70, 100):
    _, made = updater.update(KEY, step, theta, made, theta)
    seen.append(_bits(made.forward))
  assert seen == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


def test_patterns_are_refused_where_all_weights_are_ranked_together():
  theta = _tree(jnp.ones((4, 2)))
  updater = updaters.snip(_pattern)
  with pytest.raises(ValueError, match="'linear/w' keeps 2 of every 4"):
    updater.init(KEY, theta, theta)


def test_the_last_update_trades_as_long_as_the_cosine_ends_after_it():
  theta = _tree(jnp.arange(1.0, 101.0))
  grads = _tree(jnp.arange(100.0, 0.0, -1.0))
  before = _masks([0] * 50 + [1] * 50)
  # The only update is at step 100. It trades nothing where the cosine has ended
  # or ends right after it, and half of the drop fraction in the middle.
  for stop, traded in ((100, 0), (101, 0), (200, 10)):
    drop = schedules.drop_fraction(0.4, stop)
    updater = updaters.rigl(_counts(50), drop, None)
    _, made = updater.update(KEY, 100, theta, before, grads)
    changed = np.sum(np.array(_bits(made.forward)) != _bits(before.forward))
    assert changed == 2 * traded

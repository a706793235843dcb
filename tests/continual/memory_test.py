"""Tests of the memory of tasks, of layouts and of `learn_task`."""

import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax import continual
from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax import transforms
from powerprop_jax.continual import layouts
from powerprop_jax.continual import search
from powerprop_jax.sparse import masks
from powerprop_jax.training import classification

_CLASSES = 3
# A normal distribution takes XLA longer to compile than the network.
_INIT = hk.initializers.RandomUniform(-0.5, 0.5)


def _mlp(images, is_training):
  del is_training
  x = hk.Flatten()(images)
  x = jax.nn.relu(hk.Linear(16, w_init=_INIT, name='initial_linear')(x))
  x = jax.nn.relu(hk.Linear(12, w_init=_INIT, name='linear_1')(x))
  return hk.Linear(_CLASSES, w_init=_INIT, name='logits')(x)


def _conv(images, is_training):
  x = hk.Conv2D(
    6, 3, padding='VALID', with_bias=False, w_init=_INIT, name='initial_conv'
  )(images)
  x = hk.BatchNorm(True, True, 0.9, name='batchnorm')(x, is_training)
  x = hk.Flatten()(jax.nn.relu(x))
  x = jax.nn.relu(hk.Linear(8, w_init=_INIT, name='linear_1')(x))
  return hk.Linear(_CLASSES, w_init=_INIT, name='logits')(x)


_NETWORKS = {'mlp': _mlp, 'conv': _conv}
_OPTIMISERS = {
  'sgd': optax.sgd(0.1),
  'momentum': optax.sgd(0.05, momentum=0.9),
  'adam': optax.adam(3e-3),
  'adamw': optax.adamw(3e-3, weight_decay=0.1),
  'lion': optax.lion(5e-3, weight_decay=0.1),
  'rmsprop': optax.rmsprop(3e-3),
}


@functools.cache
def _data(t):
  """64 images of 4 x 4 pixels in three classes, in an order of their own."""
  rng = np.random.default_rng(t)
  labels = rng.integers(_CLASSES, size=64)
  centres = np.random.default_rng(99).uniform(0, 255, size=(_CLASSES, 16))
  images = centres[labels] + 30 * rng.normal(size=(64, 16))
  images = images.clip(0, 255)[:, rng.permutation(16)].reshape(64, 4, 4, 1)
  return jnp.asarray(images, jnp.uint8), jnp.asarray(labels, jnp.int32)


def _any_optimiser(name):
  """All optimisers as one, of which `name` acts, so that they compile once."""
  optimisers = list(_OPTIMISERS.values())

  def init(params):
    which = jnp.asarray(list(_OPTIMISERS).index(name))
    return which, [tx.init(params) for tx in optimisers]

  def update(updates, state, params):
    def branch(i, updates, states, params):
      updates, found = optimisers[i].update(updates, states[i], params)
      return updates, [*states[:i], found, *states[i + 1 :]]

    branches = [functools.partial(branch, i) for i in range(len(optimisers))]
    which, states = state
    updates, states = jax.lax.switch(which, branches, updates, states, params)
    return updates, (which, states)

  return optax.GradientTransformation(init, update)  # pyright: ignore


def _make_tx(transform, name):
  """An optimiser with decay of theta inside it, and decay of phi outside."""
  inner = optax.chain(optax.add_decayed_weights(1e-3), _any_optimiser(name))
  return optax.chain(
    transforms.target_propagation(inner, transform),
    optax.add_decayed_weights(-1e-3, mask=leaves.weight_mask),
  )


@functools.cache
def _functions(network, alpha):
  """(transform, fresh, run_steps, logits), compiled once for all tests."""
  net = hk.transform_with_state(_NETWORKS[network])
  transform = power.power_transform(alpha)
  loss_fn = classification.make_loss(net.apply)
  step = training.make_train_step(
    loss_fn, _make_tx(transform, 'sgd'), transform
  )

  @jax.jit
  def fresh(key):
    theta, state = net.init(key, jnp.zeros((1, 4, 4, 1)), True)
    return transform.to_phi(theta), state

  @jax.jit
  def logits(memory, task, images):
    theta, state = continual.recall(memory, task, transform)
    return net.apply(theta, state, None, images / 255.0, False)[0]

  return transform, fresh, jax.jit(training.make_run_steps(step)), logits


class _Learner:
  """A network, and the tasks that it has learnt."""

  def __init__(self, network='mlp', alpha=2.0, optimiser='sgd', **layout):
    functions = _functions(network, alpha)
    self.transform, self.fresh, self.run_steps, self.logits = functions
    self.tx = _make_tx(self.transform, optimiser)
    start = self.fresh(jax.random.key(0))
    self.layout = layouts.make_layout(start[0], **layout)
    self.memory = continual.init_memory(*start, self.layout)
    self.tasks, self.losses = [], []

  def train(self, memory, chosen, t):
    indices = training.batch_indices(jax.random.key(t), 0, 20, 16, 64)
    state = training.TrainState(
      phi=memory.phi,
      model_state=memory.model_state,
      opt_state=self.tx.init(memory.phi),
      masks=chosen,
      step=jnp.zeros([], jnp.int32),
      key=jax.random.key(t),
    )
    state, metrics = self.run_steps(state, _data(t), indices)
    self.losses.append(np.asarray(metrics['loss']))
    return memory._replace(phi=state.phi, model_state=state.model_state)

  def choose(self, memory, density=0.3, omit=(), max_new=None):
    theta = leaves.by_path(self.transform.to_theta(memory.phi), memory.owners)
    ranking = search.rank(theta, memory.owners, omit)
    size = sum(x.size for x in theta.values())
    limit = size if max_new is None else max_new
    return search.select(ranking, int(density * size), limit), None

  def learn(self, retrain=True, choose=None, omit=()):
    t = len(self.tasks)
    choose = choose or (lambda memory, _: self.choose(memory, omit=omit))
    self.memory, task, record = continual.learn_task(
      self.memory,
      t,
      self.fresh(jax.random.key(t)),
      self.layout,
      train=lambda memory, chosen: self.train(memory, chosen, t),
      choose=choose if self.memory.owners else None,
      retrain=(lambda memory, chosen: self.train(memory, chosen, t))
      if retrain
      else None,
      omit=omit,
    )
    self.tasks.append(task)
    return record

  def recorded(self, t):
    return np.asarray(self.logits(self.memory, self.tasks[t], _data(t)[0]))


@pytest.mark.parametrize('optimiser', _OPTIMISERS)
@pytest.mark.parametrize('network', _NETWORKS)
def test_earlier_tasks_stay_bit_for_bit(network, optimiser):
  learner = _Learner(network, 2.0, optimiser)
  recorded, alone = [], []
  for t in range(5):
    before = learner.memory.phi
    learner.learn()
    recorded.append(learner.recorded(t))
    alone.append(before)
  for t in range(5):
    np.testing.assert_array_equal(learner.recorded(t), recorded[t])
  # Something did happen: weights are shared, and others moved.
  owners = np.concatenate([np.ravel(o) for o in learner.memory.owners.values()])
  assert len(np.unique(owners)) == 6
  last = masks.unpack(learner.tasks[4].packed, learner.memory.owners)
  earlier = [m & (learner.memory.owners[p] < 5) for p, m in last.items()]
  assert sum(int(jnp.sum(m)) for m in earlier) > 0
  for path, owner in learner.memory.owners.items():
    was, now = (
      np.asarray(leaves.by_path(phi, [path])[path])
      for phi in (alone[4], learner.memory.phi)
    )
    frozen = np.asarray(owner)
    frozen = (frozen > 0) & (frozen < 5)
    np.testing.assert_array_equal(was[frozen], now[frozen])
    assert np.mean(was[~frozen] != now[~frozen]) > 0.9
  assert all(loss[-1] < loss[0] for loss in learner.losses[::2])


@pytest.mark.parametrize(
  'layout',
  [
    {'heads': 'shared'},
    {'biases': 'frozen'},
    {'norm': 'frozen'},
    {'heads': 'shared', 'biases': 'frozen', 'norm': 'frozen'},
  ],
)
def test_every_layout_keeps_earlier_tasks(layout):
  learner = _Learner('conv', 2.0, 'adam', **layout)
  recorded = []
  for t in range(3):
    learner.learn()
    recorded.append(learner.recorded(t))
  for t in range(3):
    np.testing.assert_array_equal(learner.recorded(t), recorded[t])
  task = learner.tasks[0]
  kinds = set(learner.layout.kinds.values())
  assert bool(task.private) == ('private' in kinds)
  assert (task.model_state is None) == (layout.get('norm') == 'frozen')


def test_frozen_statistics_survive_steps_that_overwrite_them():
  learner = _Learner('conv', norm='frozen')
  learner.learn()
  recorded = learner.recorded(0)
  before = jax.tree.map(np.array, learner.memory.model_state)
  train = learner.train

  def donating(memory, chosen, t):
    after = train(memory, chosen, t)
    jax.tree.map(lambda x: x.delete(), memory.model_state)
    return after

  learner.train = donating
  learner.learn()
  chex.assert_trees_all_equal(learner.memory.model_state, before)
  np.testing.assert_array_equal(learner.recorded(0), recorded)


def test_retraining_of_the_first_task_moves_frozen_statistics():
  learner = _Learner('conv', norm='frozen')
  seen, train = [], learner.train

  def recording(memory, chosen, t):
    after = train(memory, chosen, t)
    seen.append(jax.tree.map(np.array, after.model_state))
    return after

  learner.train = recording
  learner.learn()
  chex.assert_trees_all_equal(learner.memory.model_state, seen[1])
  assert np.any(seen[0]['batchnorm/~/mean_ema']['average'] != 0)
  assert np.any(
    seen[0]['batchnorm/~/mean_ema']['average']
    != seen[1]['batchnorm/~/mean_ema']['average']
  )


def test_masked_weights_need_a_choice():
  learner = _Learner()
  with pytest.raises(ValueError, match='nothing chooses the mask'):
    continual.learn_task(
      learner.memory,
      0,
      learner.fresh(jax.random.key(0)),
      learner.layout,
      train=lambda memory, chosen: memory,
    )


def test_each_task_has_an_index_of_its_own():
  learner = _Learner()
  learner.learn()
  for index, message in ((0, 'has weights already'), (-1, 'counted from 0')):
    with pytest.raises(ValueError, match=message):
      continual.learn_task(
        learner.memory,
        index,
        learner.fresh(jax.random.key(0)),
        learner.layout,
        train=lambda memory, chosen: memory,
        choose=lambda memory, index: learner.choose(memory),
      )


@pytest.mark.parametrize(
  'mask',
  [
    {},
    {'initial_linear/w': np.ones((16, 16), bool)},
    {
      'initial_linear/w': np.ones((16, 16), bool),
      'linear_1/w': np.ones(12, bool),
    },
  ],
)
def test_a_mask_that_does_not_fit_is_refused(mask):
  learner = _Learner()
  with pytest.raises(ValueError, match='one boolean array per masked leaf'):
    learner.learn(choose=lambda memory, index: (mask, None))


@pytest.mark.parametrize('omit', [['initial_linear'], 'initial_linear/w'])
def test_omitting_what_is_not_masked_is_refused(omit):
  with pytest.raises(ValueError, match='omit takes a list .*initial_linear'):
    _Learner().learn(omit=omit)


def test_a_choice_that_forgets_what_is_omitted_is_refused():
  learner, omit = _Learner(), ['initial_linear/w']
  learner.learn(omit=omit)
  with pytest.raises(ValueError, match='Pass the same omit'):
    learner.learn(
      omit=omit, choose=lambda memory, _: learner.choose(memory, density=1.0)
    )


def test_the_record_of_a_choice_and_validation_data_are_handed_on():
  learner = _Learner()
  given = []

  def choose(memory, index, *valid):
    given.append((index, *valid))
    return learner.choose(memory)[0], 'a record'

  memory, task, record = continual.learn_task(
    learner.memory,
    0,
    learner.fresh(jax.random.key(0)),
    learner.layout,
    train=lambda memory, chosen: memory,
    choose=choose,
    valid=('images', 'labels'),
  )
  assert record == 'a record'
  assert given == [(0, 'images', 'labels')]
  assert isinstance(memory, continual.Memory)
  assert isinstance(task, continual.Task)


def test_finetuning_forgets():
  learner = _Learner(weights='shared', biases='shared', norm='shared')
  learner.learn()
  recorded = learner.recorded(0)
  learner.learn()
  assert not np.array_equal(learner.recorded(0), recorded)
  assert learner.tasks[0].packed == {}


def test_independent_networks_are_networks_alone():
  learner = _Learner(
    weights='private', heads='private', biases='private', norm='private'
  )
  learner.learn()
  recorded = learner.recorded(0)
  learner.learn()
  np.testing.assert_array_equal(learner.recorded(0), recorded)
  other = _Learner()
  phi, state = other.fresh(jax.random.key(1))
  memory = continual.init_memory(phi, state, other.layout)
  memory = other.train(memory, masks.dense(phi), 1)
  # The second network began as if there had been no first one.
  memory = other.train(memory, masks.dense(phi), 1)
  chex.assert_trees_all_equal(memory.phi, learner.memory.phi)


def test_free_weights_move_at_alpha_3():
  learner = _Learner(alpha=3.0)
  learner.learn()
  phi = learner.memory.phi
  free = {p: np.asarray(o == 0) for p, o in learner.memory.owners.items()}
  renewed = continual.begin_task(
    learner.memory, learner.fresh(jax.random.key(1)), learner.layout
  )
  trained = learner.train(
    renewed, continual.training_masks(renewed, learner.layout, 1), 1
  )
  for path, mask in free.items():
    old, new, after = (
      np.asarray(leaves.by_path(x, [path])[path])
      for x in (phi, renewed.phi, trained.phi)
    )
    np.testing.assert_array_equal(old[~mask], new[~mask])
    assert np.all(new[mask] != 0)
    assert np.mean(new[mask] != old[mask]) > 0.99
    assert np.mean(after[mask] != new[mask]) > 0.9
    np.testing.assert_array_equal(after[~mask], new[~mask])


def test_private_leaves_start_afresh_and_frozen_ones_stay():
  learner = _Learner('conv', biases='frozen', norm='private')
  learner.learn()
  fresh = learner.fresh(jax.random.key(7))
  memory = continual.begin_task(learner.memory, fresh, learner.layout)
  private = layouts.paths_of(learner.layout, 'private')
  assert sorted(private) == [
    'batchnorm/offset',
    'batchnorm/scale',
    'logits/b',
    'logits/w',
  ]
  chex.assert_trees_all_equal(
    leaves.by_path(memory.phi, private), leaves.by_path(fresh[0], private)
  )
  chex.assert_trees_all_equal(memory.model_state, fresh[1])
  frozen = leaves.by_path(learner.memory.phi, ['linear_1/b'])
  assert np.any(np.asarray(frozen['linear_1/b']) != 0)
  chex.assert_trees_all_equal(
    leaves.by_path(memory.phi, ['linear_1/b']), frozen
  )
  chosen = continual.training_masks(memory, learner.layout, 1)
  backward = leaves.by_path(chosen.backward, [*private, 'linear_1/b'])
  assert not np.any(backward.pop('linear_1/b'))
  assert all(np.all(m) for m in backward.values())


def test_a_task_that_needs_no_new_weight_takes_none():
  learner = _Learner()
  learner.learn()
  owners = learner.memory.owners
  learner.learn(choose=lambda memory, _: learner.choose(memory, max_new=0))
  chex.assert_trees_all_equal(learner.memory.owners, owners)
  mask = masks.unpack(learner.tasks[1].packed, owners)
  assert sum(int(jnp.sum(m)) for m in mask.values()) > 0


def test_the_first_layer_of_earlier_tasks_can_be_left_out():
  learner, omit = _Learner(), ['initial_linear/w']
  learner.learn()
  owned = learner.memory.owners['initial_linear/w'] > 0
  chosen = continual.training_masks(learner.memory, learner.layout, 1, omit)
  forward = leaves.by_path(chosen.forward, leaves_of(learner))
  np.testing.assert_array_equal(forward.pop('initial_linear/w'), ~owned)
  assert all(np.all(m) for m in forward.values())
  recorded = learner.recorded(0)
  learner.learn(omit=omit)
  mask = masks.unpack(learner.tasks[1].packed, learner.memory.owners)
  assert not np.any(mask['initial_linear/w'] & owned)
  assert np.any(mask['initial_linear/w'])
  assert np.any(mask['linear_1/w'] & (learner.memory.owners['linear_1/w'] == 1))
  np.testing.assert_array_equal(learner.recorded(0), recorded)


def leaves_of(learner):
  return list(learner.layout.kinds)


def test_retraining_moves_new_weights_alone():
  learner = _Learner(biases='frozen')
  learner.learn(retrain=False)
  learner.learn(retrain=False)
  mask = masks.unpack(learner.tasks[1].packed, learner.memory.owners)
  chosen = continual.retraining_masks(learner.memory, learner.layout, 1, mask)
  for path, owner in learner.memory.owners.items():
    found = leaves.by_path(chosen.backward, [path])[path]
    np.testing.assert_array_equal(found, owner == 2)
    np.testing.assert_array_equal(
      leaves.by_path(chosen.forward, [path])[path], mask[path]
    )
  assert np.all(leaves.by_path(chosen.backward, ['logits/w'])['logits/w'])
  assert not np.any(
    leaves.by_path(chosen.backward, ['linear_1/b'])['linear_1/b']
  )


def test_packnet_uses_every_weight_once():
  learner, recorded = _Learner(), []
  choose = continual.packnet(num_tasks=3)
  for t in range(3):
    learner.learn(choose=choose)
    recorded.append(learner.recorded(t))
    for path, size in ('initial_linear/w', 256), ('linear_1/w', 192):
      owner = np.asarray(learner.memory.owners[path])
      mask = masks.unpack(learner.tasks[t].packed, learner.memory.owners)
      np.testing.assert_array_equal(mask[path], owner > 0)
      assert np.sum(owner > 0) == size * (t + 1) // 3
  assert continual.free_count(learner.memory.owners) == 0
  for t in range(3):
    np.testing.assert_array_equal(learner.recorded(t), recorded[t])


@pytest.mark.parametrize(
  ('size', 'num_tasks', 'counts'),
  [(10, 3, [3, 3, 4]), (6, 3, [2, 2, 2]), (2, 4, [0, 1, 0, 1]), (5, 1, [5])],
)
def test_packnet_counts_by_hand(size, num_tasks, counts):
  found = [
    continual.packnet_counts({'w': size}, t, num_tasks)['w']
    for t in range(num_tasks)
  ]
  assert found == counts


@pytest.mark.parametrize('index', [-1, 3])
def test_packnet_knows_its_tasks(index):
  with pytest.raises(ValueError, match='set up for 3 tasks'):
    continual.packnet_counts({'w': 10}, index, 3)


def test_packnet_needs_a_task():
  with pytest.raises(ValueError, match='num_tasks must be at least 1, got 0'):
    continual.packnet(0)


def test_packnet_chooses_by_magnitude_and_layer():
  phi = {
    'a': {'w': jnp.array([-9.0, 1, -3, 2, 0.5, 0])},
    'logits': {'w': jnp.array([0.1, -0.2, 0.3])},
  }
  owners = {
    'a/w': jnp.array([1, 1, 0, 0, 0, 0], jnp.uint8),
    'logits/w': jnp.array([0, 1, 0], jnp.uint8),
  }
  choose = continual.packnet(num_tasks=3)
  # Validation data are not looked at.
  mask, record = choose(continual.Memory(phi, {}, owners), 1, None, None)
  np.testing.assert_array_equal(mask['a/w'], [1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(mask['logits/w'], [0, 1, 1])
  assert record is None


def test_packnet_leaves_owned_weights_out_where_it_is_told():
  learner, omit = _Learner(), ['initial_linear/w']
  choose = continual.packnet(num_tasks=2, omit=omit)
  learner.learn(choose=choose, omit=omit)
  learner.learn(choose=choose, omit=omit)
  owners = learner.memory.owners
  mask = masks.unpack(learner.tasks[1].packed, owners)
  first, other = 'initial_linear/w', 'linear_1/w'
  np.testing.assert_array_equal(mask[first], owners[first] == 2)
  np.testing.assert_array_equal(mask[other], owners[other] > 0)
  assert np.sum(owners[first] == 2) == 128


def test_packnet_mask_by_hand():
  theta = {'layer': {'w': jnp.array([-9.0, 1, -3, 2, 0, 0])}}
  owners = {'layer/w': jnp.array([1, 1, 0, 0, 0, 0], jnp.uint8)}
  for count, expected in (
    (0, [1, 1, 0, 0, 0, 0]),
    (1, [1, 1, 1, 0, 0, 0]),
    (3, [1, 1, 1, 1, 1, 0]),
  ):
    mask = jax.jit(continual.packnet_mask)(theta, owners, {'layer/w': count})
    np.testing.assert_array_equal(mask['layer/w'], expected)


def test_claim_by_hand():
  owners = {'w': jnp.array([0, 0, 1, 2], jnp.uint8)}
  mask = {'w': jnp.array([True, False, True, False])}
  found = continual.claim(owners, mask, 2)
  np.testing.assert_array_equal(found['w'], [3, 0, 1, 2])
  assert found['w'].dtype == jnp.uint8
  assert continual.free_count(found) == 1


def test_owners_outgrow_a_byte():
  owners = {'w': jnp.array([0, 0, 255], jnp.uint8)}
  mask = {'w': jnp.array([True, False, True])}
  assert continual.claim(owners, mask, 254)['w'].dtype == jnp.uint8
  found = continual.claim(owners, mask, 255)
  np.testing.assert_array_equal(found['w'], [256, 0, 255])
  assert found['w'].dtype == jnp.uint16
  found = continual.claim(found, {'w': jnp.ones(3, bool)}, 65_534)
  np.testing.assert_array_equal(found['w'], [256, 65_535, 255])
  with pytest.raises(ValueError, match='no owner for task 65535'):
    continual.claim(found, mask, 65_535)


def test_a_task_takes_a_bit_a_weight():
  learner = _Learner()
  learner.learn()
  task = learner.tasks[0]
  sizes = {p: o.size for p, o in learner.memory.owners.items()}
  assert sizes == {'initial_linear/w': 256, 'linear_1/w': 192}
  assert {p: x.nbytes for p, x in task.packed.items()} == {
    'initial_linear/w': 32,
    'linear_1/w': 24,
  }
  # These are biases of 16 and 12, and a head of 12 x 3 with 3 biases, in
  # float32.
  assert continual.num_bytes(task) == 56 + 4 * (16 + 12 + 36 + 3)
  assert all(o.dtype == jnp.uint8 for o in learner.memory.owners.values())


def test_recall_needs_nothing_that_is_not_masked():
  """A task needs the weights in its mask and its own leaves, nothing else."""
  learner = _Learner()
  learner.learn()
  recorded = learner.recorded(0)
  spoilt = {
    path: jnp.where(owner == 1, x, jnp.nan)
    for (path, x), owner in zip(
      leaves.by_path(learner.memory.phi, learner.memory.owners).items(),
      learner.memory.owners.values(),
    )
  }
  nothing = {
    path: jnp.full_like(x, jnp.nan)
    for path, x in leaves.by_path(
      learner.memory.phi, layouts.paths_of(learner.layout, 'private')
    ).items()
  }
  phi = leaves.put(learner.memory.phi, spoilt | nothing)
  learner.memory = learner.memory._replace(phi=phi)
  np.testing.assert_array_equal(learner.recorded(0), recorded)


def test_kinds_of_leaves():
  params = jax.eval_shape(_Learner('conv').fresh, jax.random.key(0))[0]
  assert layouts.make_layout(params) == layouts.Layout(
    {
      'batchnorm/offset': 'private',
      'batchnorm/scale': 'private',
      'initial_conv/w': 'masked',
      'linear_1/b': 'private',
      'linear_1/w': 'masked',
      'logits/b': 'private',
      'logits/w': 'private',
    },
    'private',
  )
  layout = layouts.make_layout(
    params, heads='shared', biases='frozen', norm='private'
  )
  assert layout.kinds['logits/w'] == 'masked'
  assert layout.kinds['logits/b'] == 'frozen'
  assert layout.kinds['batchnorm/scale'] == 'private'


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'weights': 'frozen'}, 'weights must be among'),
    ({'heads': 'frozen'}, 'heads must be among'),
    ({'biases': 'masked'}, 'biases must be among'),
    ({'norm': 'none'}, 'norm must be among'),
    ({'biases': 'shared'}, 'forgotten'),
    ({'norm': 'shared'}, 'forgotten'),
    ({'head': 'output'}, 'No layer matches'),
  ],
)
def test_impossible_layouts(options, message):
  params = {'linear': {'w': jnp.ones(2)}, 'logits': {'w': jnp.ones(2)}}
  with pytest.raises(ValueError, match=message):
    layouts.make_layout(params, **options)

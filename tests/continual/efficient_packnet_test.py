"""Tests of `efficient_packnet`: lines 5 to 11 of Algorithm 1 by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax import continual
from powerprop_jax import power

# At alpha = 2 the weights have the magnitudes 100, 64, 36, 25, 16, 9, 4, 4, 1
# and 0.25. Weights in both leaves are ranked together.
_PHI = {
  'first': {'w': jnp.array([[-10.0, 0.5, 4.0], [5.0, 2.0, -1.0]])},
  'second': {'w': jnp.array([8.0, -2.0, 6.0, 3.0]), 'b': jnp.array([7.0])},
}
_ORDER = [
  ('first/w', 0),
  ('second/w', 0),
  ('second/w', 2),
  ('first/w', 3),
  ('first/w', 2),
  ('second/w', 3),
  ('first/w', 4),  # Of equal ones the first leaf comes first.
  ('second/w', 1),
  ('first/w', 5),
  ('first/w', 1),
]
_DENSITIES = [0.2, 0.4, 0.6, 0.8, 1.0]
# The performance of the network by its number of weights.
_TABLE = {2: 0.125, 4: 0.25, 6: 0.375, 8: 0.4375, 10: 0.5}
_TRANSFORM = power.power_transform(2.0)


def _memory(owners=None):
  none = {'first/w': np.zeros((2, 3)), 'second/w': np.zeros(4)}
  owners = {p: jnp.asarray(o, jnp.uint8) for p, o in (owners or none).items()}
  return continual.Memory(_PHI, {}, owners)


def _count(theta):
  return sum(int(jnp.sum(theta[x]['w'] != 0)) for x in ('first', 'second'))


def _evaluate(theta, model_state):
  """The performance of the table, of a network pruned from the smallest up."""
  assert model_state == {}
  np.testing.assert_array_equal(theta['second']['b'], [7.0])
  count = _count(theta)
  weights = {
    'first/w': np.ravel(theta['first']['w']),
    'second/w': np.ravel(theta['second']['w']),
  }
  kept = [bool(weights[path][i] != 0) for path, i in _ORDER]
  assert kept == [True] * count + [False] * (10 - count)
  return _TABLE[count]


def _kept(mask):
  """The places in the order of magnitudes that a mask keeps."""
  flat = {path: np.ravel(m) for path, m in mask.items()}
  return [n for n, (path, i) in enumerate(_ORDER) if flat[path][i]]


def _choose(evaluate=_evaluate, **options):
  options = {'densities': _DENSITIES, 'search': 'linear', **options}
  return continual.efficient_packnet(evaluate, _TRANSFORM, **options)


def test_a_float32_performance_meets_a_decimal_target():
  # 19 of 20 right is 0.95, which is not a binary number.
  table = {10: 20, 8: 19, 6: 18, 4: 17, 2: 16}

  def evaluate(theta, model_state):
    return jnp.float32(table[_count(theta)]) / 20

  _, choice = _choose(evaluate, gamma=0.95)(_memory(), 0)
  assert (choice.density, choice.met) == (0.8, True)


@pytest.mark.parametrize(
  ('gamma', 'density', 'met', 'evaluated'),
  [
    # The target is 0.25: 0.4 of the weights meet it exactly, 0.2 miss it.
    (0.5, 0.4, True, [1.0, 0.8, 0.6, 0.4, 0.2]),
    # The target is 0.4 here.
    (0.8, 0.8, True, [1.0, 0.8, 0.6]),
    # Everything meets 0: the search ends at the lowest candidate.
    (0.0, 0.2, True, [1.0, 0.8, 0.6, 0.4, 0.2]),
    (1.0, 1.0, True, [1.0, 0.8]),
  ],
)
def test_algorithm_1_by_hand(gamma, density, met, evaluated):
  mask, choice = _choose(gamma=gamma)(_memory(), 0)
  assert (choice.density, choice.met) == (density, met)
  assert [p for p, _ in choice.evaluated] == evaluated
  assert choice.dense == 0.5
  assert choice.performance == _TABLE[round(10 * density)]
  assert dict(choice.evaluated)[density] == choice.performance
  assert {path: m.shape for path, m in mask.items()} == {
    'first/w': (2, 3),
    'second/w': (4,),
  }
  assert _kept(mask) == list(range(round(10 * density)))


@pytest.mark.parametrize(
  ('search_steps', 'density', 'evaluated'),
  [
    (None, 0.4, [0.6, 0.4, 0.2]),
    (3, 0.4, [0.6, 0.4, 0.2]),
    (1, 0.6, [0.6]),
    (0, 1.0, [1.0]),
  ],
)
def test_binary_search_by_hand(search_steps, density, evaluated):
  choose = _choose(gamma=0.5, search='binary', search_steps=search_steps)
  mask, choice = choose(_memory(), 0)
  assert choice.density == density
  assert [p for p, _ in choice.evaluated] == evaluated
  assert _kept(mask) == list(range(round(10 * density)))


def test_binary_search_is_the_default():
  found = continual.efficient_packnet(
    _evaluate, _TRANSFORM, densities=_DENSITIES, gamma=0.5
  )(_memory(), 0)[1]
  assert found.evaluated == [(0.6, 0.375), (0.4, 0.25), (0.2, 0.125)]


def test_the_largest_density_is_taken_if_none_meets_the_target():
  choose = _choose(gamma=0.9, max_density=0.4)
  mask, choice = choose(_memory(), 0)
  assert (choice.density, choice.met, choice.performance) == (0.4, False, 0.25)
  assert choice.evaluated == [(0.4, 0.25)]
  assert _kept(mask) == [0, 1, 2, 3]


def test_bounds_of_the_density():
  _, choice = _choose(gamma=0.0, min_density=0.5)(_memory(), 0)
  assert choice.density == 0.6
  with pytest.raises(ValueError, match='None of the densities'):
    _choose(gamma=0.5, min_density=0.65, max_density=0.7)


# An earlier task owns the largest, the third and the fifth of all weights.
_OWNED = {'first/w': [[1, 0, 1], [0, 0, 0]], 'second/w': [0, 0, 1, 0]}


def test_weights_of_earlier_tasks_are_ranked_with_all_others():
  mask, _ = _choose(gamma=0.5)(_memory(_OWNED), 1)
  assert _kept(mask) == [0, 1, 2, 3]


def test_a_cap_counts_new_weights_alone():
  counts = []

  def evaluate(theta, model_state):
    counts.append(_count(theta))
    return 1.0

  # Two of ten weights may be new: the second and the fourth largest.
  choose = _choose(evaluate, gamma=0.5, cap=0.2, densities=[0.5, 1.0])
  mask, choice = choose(_memory(_OWNED), 1)
  assert counts == [10, 5, 5]  # The dense network has no cap.
  assert choice.density == 0.5
  assert _kept(mask) == [0, 1, 2, 3, 4]
  choose = _choose(evaluate, gamma=0.5, cap=0.0, densities=[1.0])
  assert _kept(choose(_memory(_OWNED), 1)[0]) == [0, 2, 4]


def test_omitted_leaves_keep_free_weights_alone():
  counts = []

  def evaluate(theta, model_state):
    counts.append(_count(theta))
    return 1.0

  choose = _choose(evaluate, gamma=0.5, omit=['first/w'], densities=[0.4, 1.0])
  mask, _ = choose(_memory(_OWNED), 1)
  # Weights that training leaves out are left out of the dense network too.
  assert counts == [8, 8, 4]
  assert _kept(mask) == [1, 2, 3, 5]


def test_validation_data_are_arguments_and_compile_once():
  traced = []

  @jax.jit
  def evaluate(theta, model_state, images, labels):
    traced.append(images.shape)
    kept = jnp.sum(theta['first']['w'] != 0) + jnp.sum(
      theta['second']['w'] != 0
    )
    return kept / 10 * jnp.mean(images) * labels[0]

  choose = _choose(evaluate, gamma=0.5)
  for t, size in enumerate((1.0, 2.0, 3.0)):
    valid = jnp.full((4, 2), size), jnp.full(4, 2)
    _, choice = choose(_memory(), t, *valid)
    assert choice.dense == pytest.approx(2 * size)
    assert choice.density == 0.6
  assert traced == [(4, 2)]


def _loss(theta, model_state, batch):
  """A loss whose gradient by a weight is one at each of these places."""
  (rows,) = batch
  assert rows.shape == (2, 1)
  places = theta['first']['w'][0, 0] + theta['second']['w'][0]
  return jnp.mean(rows) * places


def test_the_taylor_search_evaluates_what_it_predicts():
  # Only the two largest weights have a gradient: without them the loss rises.
  calls = []

  def evaluate(theta, model_state, rows):
    calls.append(_count(theta))
    return _evaluate(theta, model_state)

  choose = _choose(
    evaluate, gamma=0.25, search='taylor', loss=_loss, loss_batch_size=2
  )
  # Five rows are two batches and a row that does not count.
  mask, choice = choose(_memory(), 0, jnp.ones((5, 1)))
  assert calls == [10, 2]
  assert choice.evaluated == [(0.2, 0.125)]
  assert _kept(mask) == [0, 1]


def test_a_search_in_a_sequence_of_tasks():
  """The mask that is chosen is also stored and recalled."""
  phi = {'linear': {'w': jnp.array([3.0, -1.0, 2.0, 4.0])}}
  layout = continual.make_layout(phi, heads='shared')
  memory = continual.init_memory(phi, {}, layout)

  def evaluate(theta, model_state, wanted):
    return jnp.mean((theta['linear']['w'] != 0) == wanted)

  choose = continual.efficient_packnet(
    evaluate, _TRANSFORM, densities=[0.25, 0.5, 1.0], gamma=1.0
  )
  fresh = {'linear': {'w': jnp.array([9.0, 5.0, 9.0, 9.0])}}
  wanted = jnp.array([[1, 0, 0, 1], [1, 1, 1, 1]], bool)
  choices, tasks = [], []
  for t in range(2):
    memory, task, choice = continual.learn_task(
      memory,
      t,
      (fresh if t else phi, {}),
      layout,
      train=lambda memory, chosen: memory,
      choose=choose,
      valid=(wanted[t],),
    )
    choices.append(choice)
    tasks.append(task)
  # The dense network of the first task has half of the places right, and that
  # of its largest weight three of four. The second task needs all places.
  assert [choice.dense for choice in choices] == [0.5, 1.0]
  assert [choice.evaluated for choice in choices] == [
    [(0.5, 1.0), (0.25, 0.75)],
    [(0.5, 0.5), (1.0, 1.0)],
  ]
  np.testing.assert_array_equal(memory.owners['linear/w'], [2, 2, 2, 1])
  thetas = [continual.recall(memory, task, _TRANSFORM)[0] for task in tasks]
  np.testing.assert_array_equal(thetas[0]['linear']['w'], [0, 0, 0, 16])
  np.testing.assert_array_equal(thetas[1]['linear']['w'], [81, 25, 81, 16])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'gamma': 1.5}, r'gamma must be in \[0, 1\], got 1.5'),
    ({'gamma': float('nan')}, r'gamma must be in \[0, 1\], got nan'),
    ({'search': 'random'}, "among linear, binary, taylor, got 'random'"),
    ({'search_steps': -1}, 'search_steps must be 0 or more, got -1'),
    ({'cap': float('nan')}, r'cap must be in \[0, 1\], got nan'),
    ({'cap': 2}, r'cap must be in \[0, 1\], got 2'),
    ({'search': 'taylor'}, 'Pass loss'),
    ({'loss_batch_size': 0}, 'loss_batch_size must be at least 1, got 0'),
    ({'densities': [0.5, 0.2]}, 'must rise'),
    ({'densities': []}, 'None of the densities'),
    ({'densities': [0.5, float('nan')]}, r'density must be in \(0, 1\]'),
  ],
)
def test_impossible_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    _choose(**{'gamma': 0.5, **options})


def test_what_shows_only_when_a_task_is_learnt():
  nothing = continual.Memory(_PHI, {}, {})
  with pytest.raises(ValueError, match='No weights are masked'):
    _choose(gamma=0.5)(nothing, 0)
  with pytest.raises(ValueError, match='Pass valid to learn_task'):
    _choose(gamma=0.5, search='taylor', loss=_loss)(_memory(), 0)
  for value in (-0.5, float('nan')):
    choose = _choose(lambda theta, state, value=value: value, gamma=0.5)
    with pytest.raises(ValueError, match=f'evaluate returned {value} for task'):
      choose(_memory(), 3)

"""Tests of task inference, against choices worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax.continual import task_inference

# Logits of four tasks on images 0, 1, 2 and 3, two classes.
_MARGINS = np.array(
  [
    [0.0, 0.0, 9.0, 9.0],
    [1.0, 1.0, 1.0, 1.0],
    [2.0, 2.0, 0.0, 0.0],
    [0.5, 0.5, 0.5, 9.0],
  ]
)


def _logits(t, images):
  """Task t has the margin of the table, and logits that grow with t."""
  margin = jnp.asarray(_MARGINS)[t, images]
  return jnp.stack([margin, jnp.zeros_like(margin)], axis=-1) + t / 10


def _entropy(margin):
  p = 1 / (1 + np.exp(-margin))
  return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def test_entropy_by_hand():
  logits = jnp.array([[0.0, 0.0], [np.log(3), 0.0], [1000.0, 0.0]])
  expected = [np.log(2), -0.75 * np.log(0.75) - 0.25 * np.log(0.25), 0.0]
  found = task_inference.entropy(logits)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('images', [[0], [2, 3], [0, 1, 2, 3], [0, 1, 2]])
def test_rules_by_hand(images):
  margins = _MARGINS[:, images]
  entropies = _entropy(margins).mean(axis=1)
  energies = np.log1p(np.exp(margins)).mean(axis=1) + np.arange(4) / 10
  x = jnp.array(images)
  choose = jax.jit(
    lambda x: (
      task_inference.lowest_entropy(_logits, 4, x),
      task_inference.largest_logsumexp(_logits, 4, x),
    )
  )
  assert [int(t) for t in choose(x)] == [
    np.argmin(entropies),
    np.argmax(energies),
  ]


def test_halving_drops_tasks_by_what_it_has_seen():
  # After images 0 and 1, tasks 2 and 1 are left; of these 2 is surest in sum.
  # Over all images task 0 would be the surest.
  x = jnp.arange(4)
  assert task_inference.lowest_entropy(_logits, 4, x) == 0
  assert task_inference.lowest_entropy(_logits, 4, x, halving=True) == 2


def _ranked_logits(t, images):
  """Task 11 is the surest on every image, then come 10, 12, 9, 13 and so on."""
  margin = 20.0 - 1.5 * jnp.abs(t - 10.9) + 0 * images
  return jnp.stack([margin, jnp.zeros_like(margin)], axis=-1)


@pytest.mark.parametrize(
  ('num_tasks', 'num_images'), [(1, 3), (2, 1), (13, 3), (16, 30), (17, 5)]
)
def test_halving_finds_the_best_where_images_agree(num_tasks, num_images):
  rule = task_inference.largest_logsumexp
  found = jax.jit(lambda x: rule(_ranked_logits, num_tasks, x, halving=True))(
    jnp.zeros(num_images)
  )
  assert found == min(11, num_tasks - 1)
  assert found.dtype == jnp.int32


@pytest.mark.parametrize(
  ('halving', 'expected'),
  # 16 tasks on 40 images; or 16, 8, 4 and 2 tasks on 10 images each.
  [(False, 16 * 40), (True, 30 * 10)],
)
def test_work_of_halving(halving, expected):
  evaluated = []

  def logits(t, images):
    jax.debug.callback(lambda: evaluated.append(len(images)), ordered=False)
    return _ranked_logits(t, images)

  task_inference.lowest_entropy(logits, 16, jnp.zeros(40), halving=halving)
  jax.effects_barrier()
  assert sum(evaluated) == expected


def test_batches_can_be_vmapped():
  images = jnp.arange(4)[:, None]
  found = jax.vmap(lambda x: task_inference.lowest_entropy(_logits, 4, x))(
    images
  )
  assert found.tolist() == [2, 2, 0, 0]


def test_a_network_that_diverged_is_not_chosen():
  def logits(t, images):
    return jnp.where(t == 1, jnp.nan, _logits(t, images))

  for halving in False, True:
    x = jnp.array([0, 0, 1, 1])
    assert task_inference.lowest_entropy(logits, 3, x, halving=halving) == 2


def test_logsumexp_sees_all_classes():
  table = jnp.array([[1.5, -9.0, -9.0], [1.0, 1.0, 1.0]])
  logits = lambda t, images: jnp.broadcast_to(table[t], (len(images), 3))
  assert task_inference.largest_logsumexp(logits, 2, jnp.zeros(4)) == 1


def test_ties_go_to_the_first_task():
  same = lambda t, images: jnp.zeros((len(images), 2))
  assert task_inference.lowest_entropy(same, 5, jnp.zeros(3)) == 0


@pytest.mark.parametrize(('num_tasks', 'n'), [(0, 3), (2, 0)])
def test_there_must_be_something_to_choose_by(num_tasks, n):
  with pytest.raises(ValueError, match=f'num_tasks={num_tasks} and {n} images'):
    task_inference.lowest_entropy(_logits, num_tasks, jnp.zeros(n, int))


def _linear(theta, x):
  return x @ theta['w']


def _descent(thetas, x, scale):
  """-dH/dc by finite differences, where the weights are scale * mixture."""
  n = len(thetas)

  def mean_entropy(c):
    logits = x @ (scale * np.tensordot(c, thetas, 1))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return -np.mean(np.sum(p * np.log(p), axis=1))

  c, eye = np.full(n, 1 / n), 1e-5 * np.eye(n)
  return np.array([mean_entropy(c - e) - mean_entropy(c + e) for e in eye])


def _one_shot(normalise):
  return jax.jit(
    lambda w, x: task_inference.one_shot(_linear, {'w': w}, x, normalise)
  )


@pytest.mark.parametrize('normalise', [False, True])
def test_one_shot_is_the_steepest_descent(normalise):
  rng, found, expected = np.random.default_rng(0), [], []
  choose = _one_shot(normalise)
  for _ in range(20):
    thetas, x = rng.normal(size=(5, 4, 3)), rng.normal(size=(7, 4))
    scale = 1.0
    if normalise:
      scale = np.sqrt(np.mean(thetas**2) / np.mean(thetas.mean(axis=0) ** 2))
    expected.append(np.argmax(_descent(thetas, x, scale)))
    found.append(int(choose(jnp.array(thetas), jnp.array(x))))
  assert found == expected


@pytest.mark.parametrize('normalise', [False, True])
def test_one_shot_by_hand(normalise):
  choose = _one_shot(normalise)
  # Each task reads an input of its own; its weights are zero elsewhere.
  weights = jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
  for t in range(2):
    assert choose(weights, jnp.eye(2)[t : t + 1]) == t
  # Masks without any weight are equally good.
  assert choose(0 * weights, jnp.ones((1, 2))) == 0


def test_rules_are_compared_on_whole_batches():
  # The network of task t is sure of images of task t, and of no others.
  def logits(theta, model_state, images):
    del model_state
    return (images * theta['w'][None]) @ jnp.array([[1.0, -1.0]] * 3)

  found = task_inference.compare_rules(
    logits,
    ({'w': 9.0 * jnp.eye(3)}, {}),
    lambda t: jnp.eye(3)[jnp.full(25, t)],
    num_tasks=3,
    batch_sizes=(1, 10, 100),
    num_images=20,
  )
  for rule in ('entropy', 'entropy_halving', 'logsumexp'):
    assert found[rule] == {'1': 1.0, '10': 1.0}  # There are no hundred images.
  assert found.keys() >= {'one_shot', 'one_shot_normalised'}


def test_a_rule_that_is_always_wrong():
  def logits(theta, model_state, images):
    del model_state
    return (images @ theta)[:, None] * jnp.array([1.0, -1.0])

  # The network of task t is sure of images of the other task.
  found = task_inference.compare_rules(
    logits,
    (9.0 * jnp.eye(2)[::-1], {}),
    lambda t: jnp.tile(jnp.eye(2)[t], (4, 1)),
    num_tasks=2,
    batch_sizes=[2],
  )
  assert found['entropy'] == found['logsumexp'] == {'2': 0.0}

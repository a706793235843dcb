"""Tests of the task sequences, on sets small enough to work out by hand."""

import jax
import numpy as np
import pytest

from powerprop_jax.continual import benchmarks
from powerprop_jax.data import in_memory


def _data(shape=(4, 4, 1), classes=10, name='set'):
  """Parts of 30, 20 and 40 images of random bytes, with classes in turn."""
  rng = np.random.default_rng(0)

  def part(n):
    images = rng.integers(0, 256, (n, *shape), np.uint8)
    return in_memory.Split(images, np.arange(n, dtype=np.int32) % classes)

  return in_memory.Dataset(name, part(30), part(20), part(40), classes)


def _parts(task):
  return task.train, task.valid, task.test


def _benchmarks(data):
  return (
    benchmarks.permuted(data, 5, seed=1),
    benchmarks.rotated(data, 5),
    benchmarks.split(data),
  )


@pytest.mark.parametrize('kind', range(3))
@pytest.mark.parametrize('shape', [(4, 4, 1), (32, 32, 3), (4, 6, 1)])
def test_a_task_is_a_data_set_on_the_device(kind, shape):
  benchmark = _benchmarks(_data(shape))[kind]
  assert benchmark.num_tasks == 5
  assert benchmark.input_shape == shape
  assert benchmark.num_classes == (2 if kind == 2 else 10)
  for t in range(5):
    task = benchmark.task(t)
    assert task.num_classes == benchmark.num_classes
    assert task.name == f'{benchmark.name}/{t}'
    for part in _parts(task):
      assert isinstance(part.images, jax.Array)
      assert part.images.dtype == np.uint8
      assert part.images.shape == (len(part.labels), *shape)
      assert part.labels.dtype == np.int32
      assert set(part.labels.tolist()) == set(range(benchmark.num_classes))


@pytest.mark.parametrize('kind', range(3))
def test_a_task_is_the_same_every_time_and_in_parts(kind):
  first, again = (_benchmarks(_data())[kind] for _ in range(2))
  for t in (3, 0, 3):
    jax.tree.map(
      np.testing.assert_array_equal,
      _parts(first.task(t)),
      tuple(again.part(t, part) for part in ('train', 'valid', 'test')),
    )


def test_permuted_moves_whole_pixels_alike_in_all_images():
  data = _data((3, 5, 3))
  benchmark = benchmarks.permuted(data, 3, seed=1)
  orders = []
  for t in range(3):
    task = benchmark.task(t)
    before, after = (
      part.images.reshape(-1, 15, 3)
      for part in (data.train, jax.device_get(task.train))
    )
    # No two pixels are alike in all thirty images.
    same = (before[:, None] == after[:, :, None]).all(axis=(0, 3))
    order = np.argmax(same, axis=1).tolist()
    for part, source in zip(_parts(task), _parts(data)):
      moved = source.images.reshape(-1, 15, 3)[:, order]
      np.testing.assert_array_equal(part.images.reshape(-1, 15, 3), moved)
      np.testing.assert_array_equal(part.labels, source.labels)
    assert sorted(order) == list(range(15))
    orders.append(order)
  assert orders[0] == list(range(15))
  assert orders[1] != orders[2] != orders[0] != orders[1]


def test_permuted_depends_on_the_seed_and_the_task_alone():
  def images(num_tasks, seed):
    task = benchmarks.permuted(_data(), num_tasks, seed).task(2)
    return np.asarray(task.train.images)

  np.testing.assert_array_equal(images(3, 1), images(100, 1))
  assert (images(3, 1) != images(3, 2)).any()


@pytest.mark.parametrize('shape', [(4, 4, 1), (5, 5, 3)])
def test_rotated_by_right_angles(shape):
  data = _data(shape)
  benchmark = benchmarks.rotated(data, 4, max_angle=270)
  for t in range(4):
    for part, source in zip(_parts(benchmark.task(t)), _parts(data)):
      turned = np.rot90(source.images, t, axes=(1, 2))
      np.testing.assert_array_equal(part.images, turned)
      np.testing.assert_array_equal(part.labels, source.labels)


def test_rotated_by_45_degrees_by_hand():
  images = np.zeros((1, 3, 3, 1), np.uint8)
  images[0, 1, 1], images[0, 0, 1], images[0, 0, 2] = 100, 200, 40
  part = in_memory.Split(images, np.zeros(1, np.int32))
  data = in_memory.Dataset('one', part, part, part, 2)
  turned = benchmarks.rotated(data, 2, max_angle=45).task(1).train.images
  # The pixel above the centre comes from (1, 1) + (-1, 1) / sqrt(2): a is the
  # weight of the nearer row or column, and b that of the other.
  a, b = np.sqrt(0.5), 1 - np.sqrt(0.5)
  above = b * b * 100 + a * b * 200 + a * a * 40
  # Right of the centre comes from (1, 1) + (1, 1) / sqrt(2); left of it from
  # (1, 1) - (1, 1) / sqrt(2).
  right, left = b * b * 100, b * b * 100 + a * b * 200
  picture = np.asarray(turned)[0, :, :, 0]
  assert picture[0, 1] == round(above)
  assert picture[1].tolist() == [round(left), 100, round(right)]
  # The upper left corner was sqrt(2) above the centre, and 0.41 outside.
  assert picture[0, 0] == round((2 - np.sqrt(2)) * 200)


def test_rotated_spaces_its_angles_evenly():
  data = _data((6, 6, 1))
  long, short = benchmarks.rotated(data, 5, 80), benchmarks.rotated(data, 3, 80)
  for t, s in (0, 0), (2, 1), (4, 2):
    np.testing.assert_array_equal(
      long.task(t).test.images, short.task(s).test.images
    )
  np.testing.assert_array_equal(
    benchmarks.rotated(data, 1).task(0).test.images, data.test.images
  )


def test_split_takes_classes_in_turn_and_relabels_them():
  data = _data()
  benchmark = benchmarks.split(data)
  assert (benchmark.num_tasks, benchmark.num_classes) == (5, 2)
  for t in range(5):
    for part, source in zip(_parts(benchmark.task(t)), _parts(data)):
      rows = [i for i, c in enumerate(source.labels) if c in (2 * t, 2 * t + 1)]
      np.testing.assert_array_equal(part.images, source.images[rows])
      np.testing.assert_array_equal(part.labels + 2 * t, source.labels[rows])


@pytest.mark.parametrize(
  ('classes', 'each', 'num_tasks'), [(10, 5, 2), (10, 10, 1), (20, 4, 5)]
)
def test_split_by_more_classes(classes, each, num_tasks):
  benchmark = benchmarks.split(_data(classes=classes), each)
  assert (benchmark.num_tasks, benchmark.num_classes) == (num_tasks, each)
  labels = benchmark.task(num_tasks - 1).test.labels
  assert set(labels.tolist()) == set(range(each))


@pytest.mark.parametrize('kind', range(3))
@pytest.mark.parametrize('t', [-1, 5])
def test_there_is_no_such_task(kind, t):
  benchmark = _benchmarks(_data())[kind]
  with pytest.raises(ValueError, match=f'tasks 0 to 4; there is no task {t}'):
    benchmark.task(t)
  with pytest.raises(ValueError, match="one of .* got 'all'"):
    benchmark.part(0, 'all')


@pytest.mark.parametrize('make', [benchmarks.rotated, benchmarks.permuted])
def test_a_benchmark_has_tasks(make):
  with pytest.raises(ValueError, match='num_tasks must be at least 1, got 0'):
    make(_data(), 0, 1)


@pytest.mark.parametrize('angle', [0, -10, 360, float('nan')])
def test_angles_make_a_difference(angle):
  with pytest.raises(ValueError, match=f'between 0 and 360 .* got {angle}'):
    benchmarks.rotated(_data(), 2, angle)


@pytest.mark.parametrize('each', [0, 1, 3, 20])
def test_classes_per_task_must_divide(each):
  message = rf'divide the 10 classes of set, got {each}.*\[2, 5, 10\]'
  with pytest.raises(ValueError, match=message):
    benchmarks.split(_data(), each)


def test_every_part_of_a_split_task_needs_examples():
  data = _data()
  valid = in_memory.Split(data.valid.images[:4], data.valid.labels[:4])
  with pytest.raises(
    ValueError, match='no valid examples of task 2, classes 4'
  ):
    benchmarks.split(data._replace(valid=valid))


def test_sizes_are_told_without_making_parts():
  for benchmark in _benchmarks(_data()):
    for t in range(5):
      for which in ('train', 'valid', 'test'):
        count = len(benchmark.part(t, which).labels)
        assert benchmark.size(t, which) == count
  with pytest.raises(ValueError, match='there is no task 5'):
    benchmark.size(5, 'train')


def _uneven():
  """Five tasks of two classes with 6, 5, 6, 6 and 4 training examples."""
  data = _data()
  labels = np.delete(np.arange(30) % 10, [2, 8, 9]).astype(np.int32)
  train = in_memory.Split(data.train.images[:27], labels)
  return benchmarks.split(data._replace(train=train))


def test_padded_parts_have_one_shape():
  plain = _uneven()
  benchmark = benchmarks.padded(plain)
  assert [plain.size(t, 'train') for t in range(5)] == [6, 5, 6, 6, 4]
  for t in range(5):
    images, labels = benchmark.part(t, 'train')
    size = plain.size(t, 'train')
    assert benchmark.size(t, 'train') == size
    assert images.shape == (6, 4, 4, 1)
    assert images.dtype == np.uint8 and labels.dtype == np.int32
    np.testing.assert_array_equal(labels[:size], plain.part(t, 'train').labels)
    np.testing.assert_array_equal(images[:size], plain.part(t, 'train').images)
    assert labels[size:].tolist() == [-1] * (6 - size)
    assert not images[size:].any()
    np.testing.assert_array_equal(benchmark.task(t).train.labels, labels)
    # All test parts have eight examples.
    assert benchmark.part(t, 'test').labels.tolist() == [0, 1] * 4


def test_parts_of_equal_tasks_are_not_padded():
  plain = benchmarks.permuted(_data(), 3, seed=0)
  benchmark = benchmarks.padded(plain)
  for which in ('train', 'valid', 'test'):
    jax.tree.map(
      np.testing.assert_array_equal,
      benchmark.part(2, which),
      plain.part(2, which),
    )


@pytest.mark.parametrize(
  ('part', 'message'),
  [
    (([4, 4, 3], [0, 1]), r'the shape \(4, 4, 3\), and the others'),
    (([4, 4, 1], [0, 2]), 'labels from 0 to 2, and 2 classes'),
    (([4, 4, 1], [-1, 1]), 'labels from -1 to 1, and 2 classes'),
    (([4, 4, 1], []), 'without examples'),
  ],
)
def test_tasks_that_a_network_cannot_learn(part, message):
  shape, labels = part
  found = in_memory.Split(
    np.zeros((len(labels), *shape), np.uint8), np.array(labels, np.int32)
  )
  benchmark = benchmarks.split(_data())._replace(part=lambda t, which: found)
  with pytest.raises(ValueError, match=f'Task 3 of split_set has .*{message}'):
    benchmarks.padded(benchmark).part(3, 'train')


@pytest.mark.parametrize('part', ['train', 'valid', 'test'])
@pytest.mark.parametrize('kind', range(3))
def test_an_empty_part_is_an_error(kind, part):
  data = _data()
  empty = in_memory.Split(*(x[:0] for x in data.test))
  data = data._replace(**{part: empty})
  makers = (
    lambda: benchmarks.permuted(data, 2, seed=1),
    lambda: benchmarks.rotated(data, 2),
    lambda: benchmarks.split(data),
  )
  with pytest.raises(ValueError, match=f'set has no {part} examples'):
    makers[kind]()

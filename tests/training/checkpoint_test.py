"""Tests of checkpoints: exact, atomic, and refused where they do not fit."""

import json
import logging
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax.sparse import masks
from powerprop_jax.training import checkpoint

CONFIG = {'network': 'lenet_300_100', 'alpha': 2.0, 'layers': (300, 100)}
ROOT = pathlib.Path(__file__).resolve().parents[2]


def _tree(step):
  """One leaf of every kind, its content a function of the step."""
  return {
    'mlp/~/linear': {
      'w': jnp.arange(12.0).reshape(3, 4) / 7 + step,
      'b': jnp.array([0.1, jnp.nan, -jnp.inf], jnp.bfloat16) * step,
    },
    # Long enough to be stored in a file of its own.
    'long': jax.random.normal(jax.random.key(step), [5000]),
    'mask': jnp.arange(5) % (step + 1) == 0,
    'step': jnp.int32(step),
    'old_key': jax.random.PRNGKey(step),
    'key': jax.random.split(jax.random.key(step), 3),
    'rbg': jax.random.key(step, impl='rbg'),
    'empty': {},
    'none': None,
    'numpy': np.arange(3) + step,
    'float64': np.float64(np.pi),
    'int': step,
    'float': 1 / 3,
    'bool': True,
    'no_elements': jnp.zeros((0, 3), jnp.bfloat16),
    'no_keys': jax.random.split(jax.random.key(0), 3)[:0],
  }


def _assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    if isinstance(b, jax.Array) and jnp.issubdtype(
      b.dtype, jax.dtypes.prng_key
    ):
      assert a.dtype == b.dtype
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
    assert isinstance(a, jax.Array) or type(a) is type(b)
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


def _write(directory, steps, keep=3, config=CONFIG):
  manager = checkpoint.open_manager(directory, config, keep)
  for step in steps:
    checkpoint.save(manager, step, _tree(step), {'step': step})
  checkpoint.close(manager)


def _restore(directory, like, config=CONFIG):
  manager = checkpoint.open_manager(directory, config)
  try:
    return checkpoint.restore_latest(manager, like)
  finally:
    checkpoint.close(manager)


def _names(directory):
  return sorted(x.name for x in directory.iterdir())


def test_round_trip_is_bit_identical(tmp_path):
  extra = {'iterator': b'\x00\xff', 'epochs': [1, 2.5, None], 'name': 'é'}
  manager = checkpoint.open_manager(tmp_path / 'new' / 'folder', CONFIG)
  assert checkpoint.restore_latest(manager, _tree(0)) is None
  checkpoint.save(manager, 7, _tree(7), extra)
  found = checkpoint.restore_latest(manager, _tree(0))
  checkpoint.close(manager)
  assert found is not None
  step, state, found_extra = found
  assert (step, found_extra) == (7, extra)
  _assert_same(state, _tree(7))


@pytest.mark.parametrize(
  'tx',
  [
    optax.sgd(0.1),
    optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
    optax.multi_transform(
      {'w': optax.adam(1e-3), 'b': optax.sgd(1e-2, momentum=0.9)},
      {'linear': {'w': 'w', 'b': 'b'}},
    ),
  ],
  ids=['sgd', 'adamw', 'multi_transform'],
)
def test_round_trip_of_a_train_state(tmp_path, tx):
  theta = {'linear': {'w': jnp.ones((3, 2)), 'b': jnp.zeros(2)}}
  transform = power.power_transform(2.0)
  state = training.init_state(jax.random.key(1), theta, {}, tx, transform)
  state = jax.tree.map(
    lambda x: x + 1 if jnp.issubdtype(x.dtype, jnp.floating) else x, state
  )
  manager = checkpoint.open_manager(tmp_path, CONFIG)
  checkpoint.save(manager, 0, state)
  checkpoint.close(manager)
  like = training.init_state(jax.random.key(0), theta, {}, tx, transform)
  for abstract in (False, True):
    found = _restore(
      tmp_path, jax.eval_shape(lambda: like) if abstract else like
    )
    assert found is not None
    _assert_same(found[1], state)


def test_state_may_be_donated_at_once(tmp_path):
  # These are 8 MB: writing takes longer than the step that overwrites them.
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = step(jnp.zeros(2_000_000))
  manager = checkpoint.open_manager(tmp_path, CONFIG)
  checkpoint.save(manager, 0, {'x': x})
  y = step(x)
  for _ in range(5):
    y = step(y)
  assert x.is_deleted()
  found = checkpoint.restore_latest(manager, {'x': y})
  assert found is not None
  np.testing.assert_array_equal(found[1]['x'], 1.0)
  # Restored arrays may be donated as well.
  np.testing.assert_array_equal(step(found[1]['x']), 2.0)
  checkpoint.close(manager)


@pytest.mark.parametrize(
  'state',
  [
    {},
    {'a': None},
    {'a': np.zeros((2, 0))},
    jnp.arange(3),
    np.float32(2),
    jnp.zeros(0),
  ],
  ids=['empty', 'none', 'no_elements', 'leaf', 'scalar', 'empty_leaf'],
)
def test_trees_of_little(tmp_path, state):
  with checkpoint.open_manager(tmp_path, CONFIG) as manager:
    checkpoint.save(manager, 0, state)
    found = checkpoint.restore_latest(manager, state)
  assert found is not None
  _assert_same(found[1], state)


def test_checkpoints_of_version_0_1_are_read(tmp_path):
  state = {'w': jnp.arange(3.0), 'key': jax.random.key(1)}
  with checkpoint.open_manager(tmp_path, CONFIG) as manager:
    checkpoint.save(manager, 3, state)
  path = tmp_path / '3' / 'record' / 'metadata'
  record = json.loads(path.read_text())
  del record['checksum']
  del record['empty']
  arrays = {
    'w': np.arange(3, dtype=np.float32),
    'key': np.asarray(jax.random.key_data(state['key'])),
  }
  record['checksum'] = checkpoint._checksum(record, arrays)
  path.write_text(json.dumps(record))
  found = _restore(tmp_path, state)
  assert found is not None
  _assert_same(found[1], state)


@pytest.mark.parametrize(
  ('step', 'message'),
  [
    (7.0, 'must be an integer, got 7.0'),
    ('7', "must be an integer, got '7'"),
    (None, 'must be an integer, got None'),
    (jnp.float32(7), 'must be an integer'),
    (jnp.arange(2), 'must be an integer'),
    (-1, 'must be 0 or more, got -1'),
    (np.int32(-1), 'must be 0 or more, got -1'),
  ],
)
def test_steps_that_are_none(tmp_path, step, message):
  with checkpoint.open_manager(tmp_path, CONFIG) as manager:
    with pytest.raises(ValueError, match=message):
      checkpoint.save(manager, step, {'x': jnp.float32(1)})
    assert checkpoint.restore_latest(manager, {'x': jnp.float32(0)}) is None
  assert not _names(tmp_path)


@pytest.mark.parametrize('integer', [np.int64, jnp.int32, jnp.uint8])
def test_steps_may_be_arrays(tmp_path, integer):
  with checkpoint.open_manager(tmp_path, CONFIG) as manager:
    checkpoint.save(manager, integer(7), {'x': jnp.float32(1)})
    checkpoint.save(manager, 7, {'x': jnp.float32(2)})  # Does nothing.
    found = checkpoint.restore_latest(manager, {'x': jnp.float32(0)})
  assert found is not None
  assert (found[0], type(found[0]), found[1]['x']) == (7, int, 1)


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    (float('nan'), r"config\['rate'\] = nan cannot be compared"),
    ([1.0, float('-inf')], r"config\['rate'\] = \[1.0, -inf\] cannot"),
    ({1, 2}, r"config\['rate'\] = \{1, 2\} cannot be compared"),
    (jnp.float32(1), r"config\['rate'\] = .* cannot be compared"),
  ],
)
def test_configurations_that_cannot_be_compared(tmp_path, value, message):
  with pytest.raises(ValueError, match=message):
    checkpoint.open_manager(tmp_path / 'new', {'alpha': 2.0, 'rate': value})
  assert not (tmp_path / 'new').exists()


def test_another_folder_is_left_alone(tmp_path):
  _write(tmp_path, [1])
  holidays = tmp_path / '2024'
  holidays.mkdir()
  (holidays / 'beach.jpg').write_bytes(b'a')
  with pytest.raises(ValueError, match='2024 is no checkpoint'):
    checkpoint.open_manager(tmp_path, CONFIG)
  assert checkpoint.load(tmp_path).step == 1
  assert _names(tmp_path) == ['1', '2024']
  assert _names(holidays) == ['beach.jpg']
  # Names that Orbax does not take for steps do not matter.
  holidays.rename(tmp_path / '0x2024')
  found = _restore(tmp_path, _tree(0))
  assert found is not None and found[0] == 1


def test_closing_twice_and_closing_after_an_error(tmp_path):
  manager = checkpoint.open_manager(tmp_path, CONFIG)
  with pytest.raises(KeyError, match='mine'), manager:
    checkpoint.save(manager, 1, _tree(1))
    raise KeyError('mine')
  checkpoint.close(manager)
  assert checkpoint.load(tmp_path).step == 1


def test_steps_that_are_kept(tmp_path):
  manager = checkpoint.open_manager(tmp_path, CONFIG, keep=2)
  for step in (1, 2, 3):
    checkpoint.save(manager, step, {'x': jnp.float32(step)})
  checkpoint.save(manager, 3, {'x': jnp.float32(-1)})  # Does nothing.
  with pytest.raises(ValueError, match='holds step 3, which is after step 2'):
    checkpoint.save(manager, 2, {'x': jnp.float32(2)})
  checkpoint.close(manager)
  assert _names(tmp_path) == ['2', '3']
  found = _restore(tmp_path, {'x': jnp.float32(0)})
  assert found is not None
  assert found[0] == found[1]['x'] == 3
  with pytest.raises(ValueError, match='keep must be at least 1, got 0'):
    checkpoint.open_manager(tmp_path, CONFIG, keep=0)


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
  (tmp_path / '5.orbax-checkpoint-tmp').mkdir()
  _write(tmp_path, [4])
  assert _names(tmp_path) == ['4']


def _delete(path):
  path.unlink()


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _scramble(path):
  path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


# If many arrays cannot be read, Orbax waits for the first only; the others warn
# that nobody retrieved their errors.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage', [_delete, _truncate, _scramble, _flip])
def test_damaged_checkpoints_are_skipped(tmp_path, caplog, damage):
  whole = tmp_path / 'whole'
  _write(whole, [1, 2])
  files = [
    x.relative_to(whole) for x in (whole / '2').rglob('*') if x.is_file()
  ]
  assert len(files) > 5
  skipped = set()
  for i, file in enumerate(files):
    directory = tmp_path / str(i)
    shutil.copytree(whole, directory)
    damage(directory / file)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      manager = checkpoint.open_manager(directory, CONFIG)
      found = checkpoint.restore_latest(manager, _tree(0))
    assert found is not None
    step, state, extra = found
    # Some files hold nothing that is needed. What counts is that no state is
    # ever wrong, and that there is a warning where it is not the newest.
    _assert_same(state, _tree(step))
    assert extra == {'step': step}
    assert (step == 1) == ('Skipped' in caplog.text)
    if step == 1:
      skipped.add(file.parts[1])
      assert '2.damaged' in _names(directory)
    # Training comes to the same step again, and this time it is whole.
    checkpoint.save(manager, 2, _tree(2), {'step': 2})
    checkpoint.close(manager)
    again = _restore(directory, _tree(0))
    assert again is not None and again[0] == 2
  assert {'state', 'record'} <= skipped


def test_nothing_whole(tmp_path):
  with pytest.raises(FileNotFoundError, match='no whole checkpoint'):
    checkpoint.load(tmp_path / 'absent')
  _write(tmp_path, [1])
  (tmp_path / '1' / 'record' / 'metadata').write_text('{}')
  with pytest.raises(FileNotFoundError, match='no whole checkpoint'):
    checkpoint.load(tmp_path)
  assert _names(tmp_path) == ['1']
  # A run of days must not start anew without being told to.
  with pytest.raises(FileNotFoundError, match='is whole. Move it away'):
    _restore(tmp_path, _tree(0))
  assert _names(tmp_path) == ['1']


def test_other_configuration_is_refused(tmp_path):
  _write(tmp_path, [1])
  config = {'network': 'lenet_5', 'alpha': 3.0, 'layers': [300, 100], 'new': 0}
  with pytest.raises(ValueError, match='another configuration') as error:
    _restore(tmp_path, _tree(0), config)
  lines = str(error.value).splitlines()[1:-1]
  assert lines == [
    '  alpha: 2.0 there, 3.0 here',
    '  network: lenet_300_100 there, lenet_5 here',
    '  new: absent there, 0 here',
  ]


def test_other_tree_is_refused(tmp_path):
  _write(tmp_path, [1])
  like = _tree(0)
  like['mlp/~/linear'] = {'w': jnp.zeros((4, 3)), 'v': jnp.zeros(2)}
  like['key'] = jax.random.key_data(like['key'])
  like['int'] = 1.0
  with pytest.raises(
    ValueError, match='is not that of the checkpoint'
  ) as error:
    _restore(tmp_path, like)
  assert str(error.value).splitlines()[1:] == [
    '  int: int64[] there, float64[] here',
    '  key: key<fry>[3] there, uint32[3, 2] here',
    '  mlp/~/linear/b: bfloat16[3] there, absent here',
    '  mlp/~/linear/v: absent there, float32[2] here',
    '  mlp/~/linear/w: float32[3, 4] there, float32[4, 3] here',
  ]


def test_long_lists_of_differences_are_cut(tmp_path):
  _write(tmp_path, [1])
  with pytest.raises(ValueError, match=r'and 17 more$'):
    _restore(tmp_path, {f'x{i}': jnp.zeros(1) for i in range(22)})


def test_two_leaves_with_one_path(tmp_path):
  manager = checkpoint.open_manager(tmp_path, CONFIG)
  with pytest.raises(ValueError, match='have the same path'):
    checkpoint.save(manager, 0, {'a/b': 1, 'a': {'b': 2}})
  checkpoint.close(manager)


def _empty_the_folder(path):
  shutil.rmtree(path)
  path.mkdir()


def _a_file_in_its_place(path):
  shutil.rmtree(path)
  path.write_bytes(b'')


def _a_folder_for_every_file(path):
  for file in [x for x in path.rglob('*') if x.is_file()]:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
  'damage', [_empty_the_folder, _a_file_in_its_place, _a_folder_for_every_file]
)
def test_folders_that_are_damaged_as_a_whole(tmp_path, damage):
  _write(tmp_path, [1, 2])
  damage(tmp_path / '2')
  with checkpoint.open_manager(tmp_path, CONFIG) as manager:
    found = checkpoint.restore_latest(manager, _tree(0))
    assert found is not None and found[0] == 1
    _assert_same(found[1], _tree(1))
    checkpoint.save(manager, 2, _tree(2))
  assert checkpoint.load(tmp_path).step == 2
  assert _names(tmp_path) == ['1', '2', '2.damaged']


UNCLOSED = """
import sys
import jax.numpy as jnp
from powerprop_jax.training import checkpoint

for name in sys.argv[2:]:
  manager = checkpoint.open_manager(f'{sys.argv[1]}/{name}', {})
  checkpoint.save(manager, 1, {'w': jnp.ones(300_000)})
if name == 'failed':
  raise SystemExit('The evaluation has failed.')
"""


@pytest.mark.slow
@pytest.mark.parametrize('names', [['a', 'b'], ['failed']])
def test_what_nobody_waited_for_is_finished(tmp_path, names):
  done = subprocess.run(
    [sys.executable, '-c', UNCLOSED, tmp_path, *names],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == (names == ['failed'])
  assert 'Error' not in done.stderr
  for name in names:
    assert checkpoint.load(tmp_path / name).step == 1
    assert _names(tmp_path / name) == ['1']


def test_threads_that_save_at_the_same_time(tmp_path):
  together, errors = threading.Barrier(2), []

  def work(name):
    try:
      manager = checkpoint.open_manager(tmp_path / name, {}, keep=2)
      for step in range(5):
        together.wait(60)
        checkpoint.save(manager, step, {'name': np.array(ord(name) + step)})
      checkpoint.close(manager)
    except Exception as e:
      errors.append(e)
      together.abort()

  threads = [threading.Thread(target=work, args=(name,)) for name in 'ab']
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not errors
  for name in 'ab':
    found = checkpoint.load(tmp_path / name)
    assert (found.step, found.arrays['name']) == (4, ord(name) + 4)


def test_parts_of_the_checkpoint_of_another_run(tmp_path):
  phi = {'linear': {'w': jnp.arange(6.0).reshape(3, 2)}}
  sparse = masks.dense(phi)
  sparse.forward['linear']['w'] = phi['linear']['w'] > 2
  state = training.TrainState(
    phi, {}, optax.adam(1e-3).init(phi), sparse, jnp.int32(9), jax.random.key(0)
  )
  manager = checkpoint.open_manager(tmp_path, {'method': 'set'})
  checkpoint.save(manager, 9, state)
  checkpoint.close(manager)
  found = checkpoint.load(tmp_path)
  assert (found.step, found.config) == (9, {'method': 'set'})
  assert found.types['phi/linear/w'] == 'float32[3, 2]'
  like = jax.eval_shape(lambda: {'phi': phi, 'masks': sparse})
  with pytest.raises(ValueError, match=r'step: int32.* there, absent here'):
    checkpoint.fill(like, found)
  part = checkpoint.fill(like, found, partial=True)
  _assert_same(part, {'phi': phi, 'masks': sparse})
  # A step that overwrites one copy leaves the next one whole.
  jax.block_until_ready(
    jax.jit(lambda x: x + 1, donate_argnums=0)(part['phi']['linear']['w'])
  )
  part = checkpoint.fill(like, found, partial=True)
  _assert_same(part, {'phi': phi, 'masks': sparse})


LOOP = """
import sys
import jax
import numpy as np
from powerprop_jax.training import checkpoint

def state(step):
  return {
    'x': np.arange(250_000, dtype=np.float32) + step,
    'key': jax.random.key(step),
  }

if __name__ == '__main__':
  manager = checkpoint.open_manager(sys.argv[1], {}, keep=3)
  found = checkpoint.restore_latest(manager, state(0))
  step = 0 if found is None else found[0]
  while True:
    step += 1
    checkpoint.save(manager, step, state(step), {'step': step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_at_random_moments(tmp_path):
  directory = tmp_path / 'checkpoints'
  moments = random.Random(0)
  whole = 0
  for _ in range(3):
    process = subprocess.Popen(
      [sys.executable, '-c', LOOP, str(directory)],
      stdout=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
    assert process.stdout is not None
    first = int(process.stdout.readline())
    assert first >= whole + 1
    time.sleep(moments.uniform(0, 0.4))
    process.kill()
    rest = process.communicate()[0].split('\n')[:-1]
    last = int(rest[-1]) if rest else first
    like = {'x': np.zeros(250_000, np.float32), 'key': jax.random.key(0)}
    found = _restore(directory, like, {})
    # When a save has begun, the one before it is whole.
    whole = max(whole, last - 1)
    if found is None:
      assert whole == 0
      continue
    step, state, extra = found
    assert whole <= step <= last + 1
    assert extra == {'step': step}
    np.testing.assert_array_equal(
      state['x'], np.arange(250_000, dtype=np.float32) + step
    )
    assert (state['key'] == jax.random.key(step)).all()
    whole = step
  assert whole > 1


TWO_PROCESSES = """
import json
import pathlib
import sys
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from powerprop_jax.training import checkpoint

port, index, folder = sys.argv[1:]
jax.distributed.initialize(f'localhost:{port}', 2, int(index))
state = lambda step: {'x': jnp.full(3, step), 'key': jax.random.key(step)}
manager = checkpoint.open_manager(folder, {'alpha': 2.0})
steps = []
def restore():
  found = checkpoint.restore_latest(manager, state(0))
  if found is None:
    return steps.append(None)
  step, tree, extra = found
  assert (tree['x'] == step).all()
  assert tree['key'] == jax.random.key(step)
  steps.append([step, extra])

restore()
for step in range(1, 4):
  checkpoint.save(manager, step, state(step), step)
restore()
if index == '0':
  (pathlib.Path(folder) / '3' / 'record' / 'metadata').write_text('{')
restore()
checkpoint.save(manager, 3, state(3), 'again')
restore()
checkpoint.close(manager)
try:
  checkpoint.restore_latest(manager._replace(config={'alpha': 3.0}), state(0))
except ValueError as error:
  steps.append('alpha: 2.0 there, 3.0 here' in str(error))
multihost_utils.sync_global_devices('end')
print(json.dumps(steps))
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', TWO_PROCESSES, str(port), index, str(tmp_path)],
      stdout=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
    for index in ('0', '1')
  ]
  try:
    outputs = [process.communicate(timeout=600)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  expected = [None, [3, 3], [2, 2], [3, 'again'], True]
  assert [json.loads(x.splitlines()[-1]) for x in outputs] == [expected] * 2
  assert _names(tmp_path) == ['1', '2', '3', '3.damaged']


def test_what_cannot_be_written_is_an_os_error(tmp_path, monkeypatch):
  """Orbax raises a ValueError for a full disk."""

  def fail(*args, **kwargs):
    raise ValueError('RESOURCE_EXHAUSTED: no space left\nmore')

  manager = checkpoint.open_manager(tmp_path, {})
  message = f'{tmp_path}: a checkpoint cannot be written: RESOURCE_.* left$'
  with monkeypatch.context() as patched:
    patched.setattr(manager.writer, 'save', fail)
    with pytest.raises(OSError, match=message):
      checkpoint.save(manager, 1, {'w': jnp.ones(2)})
  close = manager.writer.close
  monkeypatch.setattr(manager.writer, 'close', lambda: (close(), fail()))
  with pytest.raises(OSError, match=message):
    checkpoint.close(manager)

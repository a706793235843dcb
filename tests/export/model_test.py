"""Tests of files, dictionaries and sparse matrices of pruned networks."""

import json
import math
import pickle
import random
import sys
import threading
import tracemalloc
import zlib

import equinox as eqx
from flax import linen
from flax import nnx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from powerprop_jax import export
from powerprop_jax import leaves
from powerprop_jax.export import codes
from powerprop_jax.sparse import masks as masks_lib

_SHAPES = {'initial_linear': (784, 300), 'linear': (300, 100), 'out': (100, 10)}


def _lenet(density, seed=0):
  """LeNet-300-100 with random weights and random masks of exact counts."""
  rng = np.random.default_rng(seed)
  theta, masks = {}, {}
  for name, shape in _SHAPES.items():
    mask = np.zeros(math.prod(shape), bool)
    mask[rng.permutation(mask.size)[: int(density * mask.size)]] = True
    w, b = (rng.normal(size=s).astype(np.float32) for s in (shape, shape[1:]))
    theta[name] = {'w': w, 'b': b}
    masks[name] = {'w': mask.reshape(shape), 'b': np.ones(shape[1], bool)}
  return theta, masks


def _assert_same_bits(a, b):
  assert a.keys() == b.keys()
  for path in a:
    assert (a[path].dtype, a[path].shape) == (b[path].dtype, b[path].shape)
    assert a[path].tobytes() == b[path].tobytes(), path


def _header(path):
  content = path.read_bytes()
  size = int.from_bytes(content[:8], 'little')
  return json.loads(content[8 : 8 + size]), 8 + size


# --- codes --------------------------------------------------------------------


def _mask(size, kept):
  mask = np.zeros(size, bool)
  mask[list(kept)] = True
  return mask


@pytest.mark.parametrize(
  ('mask', 'rice', 'bits'),
  [
    # The gaps are 3, 0 and 4: lowest bits 1, 0, 0; the rest 1, 0, 2 in unary.
    (_mask(16, [3, 4, 9]), 1, '100' + '01' + '1' + '001'),
    # These are the bits of the mask, up to the last one.
    (_mask(9, [0, 2, 3, 6]), 0, '1011001'),
    # More than half are kept: the positions 2 and 5 of the others.
    (~_mask(7, [2, 5]), 0, '001' + '001'),
    (_mask(5, []), 0, ''),
    (~_mask(5, []), 0, ''),
    (_mask(0, []), 0, ''),
    (_mask(300, [255]), 7, '1' * 7 + '01'),
  ],
)
def test_codes_worked_by_hand(mask, rice, bits):
  found, code = codes.encode(mask)
  assert found == rice
  assert code.tolist() == np.packbits(np.array(list(bits), int)).tolist()
  decoded = codes.decode(code, mask.size, int(mask.sum()), rice)
  np.testing.assert_array_equal(decoded, mask)


@pytest.mark.parametrize(
  'density', [0, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.8, 0.99, 1]
)
@pytest.mark.parametrize('size', [1, 2, 63, 1000, 200_001])
def test_codes_are_exact_and_near_the_bound(density, size):
  mask = np.random.default_rng(size).random(size) < density
  rice, code = codes.encode(mask)
  count = int(mask.sum())
  decoded = codes.decode(code, size, count, rice)
  np.testing.assert_array_equal(decoded, mask)
  bound = codes.entropy_bits(size, count)
  # The last byte, and a tenth of a bit for each position that is coded.
  assert 8 * code.size <= bound + 16 + 0.1 * min(count, size - count)


def test_clustered_masks_cost_no_more_than_two_bits_above_the_bound():
  mask = np.zeros(100_000, bool)
  mask[40_000:41_000] = mask[::500] = True
  rice, code = codes.encode(mask)
  count = int(mask.sum())
  np.testing.assert_array_equal(
    codes.decode(code, mask.size, count, rice), mask
  )
  bound = codes.entropy_bits(mask.size, count)
  assert 8 * code.size < bound + 2 * count


@pytest.mark.parametrize(
  ('size', 'count', 'bits'),
  [(4, 2, math.log2(6)), (10, 0, 0.0), (10, 10, 0.0), (266_200, 1, None)],
)
def test_entropy_bits(size, count, bits):
  wanted = math.log2(size) if bits is None else bits
  assert codes.entropy_bits(size, count) == pytest.approx(wanted)


@pytest.mark.parametrize(
  ('size', 'count', 'rice'), [(16, 4, 1), (16, 3, 9), (8, 3, 1), (16, 17, 1)]
)
def test_codes_of_other_masks_are_refused(size, count, rice):
  _, code = codes.encode(_mask(16, [3, 4, 9]))
  with pytest.raises(ValueError, match=r'no code of|outside'):
    codes.decode(code, size, count, rice)


# --- one network --------------------------------------------------------------


@pytest.mark.parametrize('density', [0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
def test_sizes_are_within_five_percent_of_the_bound(tmp_path, density):
  path = tmp_path / 'model.safetensors'
  theta, masks = _lenet(density)
  sizes = export.save_compressed(path, theta, masks, alpha=2.0)
  assert sizes.file == path.stat().st_size
  kept = sum(int(density * math.prod(s)) for s in _SHAPES.values())
  entropy = sum(
    codes.entropy_bits(n, int(density * n))
    for n in map(math.prod, _SHAPES.values())
  )
  assert sizes.bound == math.ceil(4 * (kept + 410) + entropy / 8)
  assert sizes.dense == 4 * 266_610
  assert sizes.bound < sizes.file < 1.05 * sizes.bound
  model = export.load_compressed(path)
  _assert_same_bits(model.theta, export.to_dict(theta, masks))
  _assert_same_bits(model.masks, export.to_dict(masks))
  assert model.alpha == 2.0


def test_every_bit_of_every_dtype_comes_back(tmp_path):
  special = [0.0, -0.0, np.nan, -np.inf, 1e-45, np.nextafter(1, 2), 3.0, -7.0]
  theta = {
    'a/b': {'w': np.array(special, np.float32)},
    'half': jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    'wide': np.array([1 / 3, 2 / 3]),
    'count': np.array(3, np.int32),
    'empty': np.zeros((0, 4), np.float16),
    'all pruned': np.ones(3, np.float32),
    'flag': np.array([True, False]),
  }
  masks = jax.tree.map(lambda x: np.ones(x.shape, bool), theta)
  masks['a/b']['w'] = _mask(8, [0, 1, 2, 3, 4, 7])
  masks['half'] = np.array([[True, False, True], [False, False, True]])
  masks['all pruned'] = np.zeros(3, bool)
  path = tmp_path / 'model'
  export.save_compressed(path, theta, masks)
  model = export.load_compressed(path)
  _assert_same_bits(model.theta, export.to_dict(theta, masks))
  _assert_same_bits(model.masks, export.to_dict(masks))
  assert model.alpha is None
  # Leaves without a mask are stored whole; only paths matter, not containers.
  some = {'a/b/w': masks['a/b']['w']}
  export.save_compressed(tmp_path / 'some', theta, some)
  found = export.load_compressed(tmp_path / 'some').theta
  _assert_same_bits(found, export.to_dict(theta, some))
  assert found['all pruned'].tolist() == [1, 1, 1]
  # The same network is the same file.
  export.save_compressed(tmp_path / 'again', theta, masks)
  assert (tmp_path / 'again').read_bytes() == path.read_bytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'again',
    'model',
    'some',
  ]


def test_the_metadata_are_plain_text(tmp_path):
  path = tmp_path / 'model'
  theta, masks = _lenet(0.01)
  powers = {'out/w': 1.5, 'linear/w': 3}
  export.save_compressed(path, theta, masks, alpha=powers, values='float16')
  text = json.loads(_header(path)[0]['__metadata__']['powerprop_jax'])
  assert (text['version'], text['alpha'], text['values']) == (
    2,
    powers,
    'float16',
  )
  rows = {row[0]: row[1:] for row in text['leaves']['']}
  assert rows['out/b'] == ['float32', [10]]
  assert rows['out/w'][:4] == ['float32', [100, 10], 10, 0.01]
  assert export.load_compressed(path).alpha == powers
  # This is what another reader of the container sees.
  tensors = safetensors.numpy.load_file(path)
  assert tensors['float16'].shape == (2352 + 300 + 10,)
  assert tensors['float32'].shape == (410,)


@pytest.mark.parametrize('values', ['float16', 'bfloat16', jnp.bfloat16])
def test_values_can_be_rounded_where_a_leaf_is_pruned(tmp_path, values):
  theta, masks = _lenet(0.1)
  path = tmp_path / 'model'
  sizes = export.save_compressed(path, theta, masks, values=values)
  assert sizes.file < 1.05 * sizes.bound
  found = export.load_compressed(path).theta
  rounded = {
    k: {
      'w': v['w'].astype(jnp.dtype(values)).astype(np.float32),
      'b': v['b'],
    }
    for k, v in theta.items()
  }
  _assert_same_bits(found, export.to_dict(rounded, masks))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'values': 'float64'}, r"float16, bfloat16 or None, got 'float64'"),
    ({'alpha': 0.5}, r'alpha must be .* got 0.5'),
    ({'alpha': {'out/w': float('nan')}}, r'alpha must be'),
    ({'values': 'float16'}, r"'out/w' has values beyond float16"),
    (
      {'masks': {'w': np.ones((2, 2), bool)}},
      r"'w' does not fit .*out/w \(2, 2",
    ),
    ({'masks': {'out': {'w': np.ones((2, 2))}}}, r"'out/w' does not fit"),
    ({'masks': {'out/w': np.ones(2, bool)}}, r"'out/w' does not fit"),
  ],
)
def test_impossible_arguments_write_nothing(tmp_path, change, message):
  theta = {'out': {'w': np.full((2, 2), 1e5, np.float32), 'b': np.zeros(2)}}
  masks = {'out': {'w': np.eye(2, dtype=bool), 'b': np.ones(2, bool)}}
  arguments = {'theta': theta, 'masks': masks} | change
  with pytest.raises(ValueError, match=message):
    export.save_compressed(tmp_path / 'model', **arguments)
  assert not list(tmp_path.iterdir())


def test_truncated_files_are_refused(tmp_path):
  theta, masks = _lenet(0.01)
  whole = tmp_path / 'whole'
  export.save_compressed(whole, theta, masks)
  content, cut = whole.read_bytes(), tmp_path / 'cut'
  for size in (0, 3, 8, 100, 600, 2000, len(content) - 1):
    cut.write_bytes(content[:size])
    with pytest.raises(ValueError, match=r'cut.* is no whole file'):
      export.load_compressed(cut)
  with pytest.raises(FileNotFoundError):
    export.load_compressed(tmp_path / 'absent')


class _Trap:
  def __reduce__(self):
    return pytest.fail, ('The file was unpickled.',)


def _container(text, tensors):
  """A file of this metadata, whose checksums are right."""
  sums = {k: zlib.crc32(x.tobytes()) for k, x in tensors.items()}
  text = {k: v for k, v in text.items() if k != 'crc32'} | {'tensors': sums}
  packed = json.dumps(text, separators=(',', ':'))
  text['crc32'] = zlib.crc32(packed.encode())
  packed = json.dumps(text, separators=(',', ':'))
  return safetensors.numpy.save(tensors, {'powerprop_jax': packed})


_ONES = np.ones(4, np.float32)
_NO_CODE = np.zeros(0, np.uint8)


@pytest.mark.parametrize(
  ('rows', 'tensors'),
  [
    ([['w', 'float32', [2_000_000_000]]], {'float32': _ONES}),
    (
      [['w', 'float32', [2_000_000_000], 0, 0.0, 0, 0]],
      {'float32': _ONES[:0], 'masks': _NO_CODE},
    ),
    ([['w', 'S100000000', [4]]], {'float32': _ONES}),
    ([['w', 'float32', [-4]]], {'float32': _ONES}),
    ([['w', 'float32', [True, 4]]], {'float32': _ONES}),
    ([['w', 'float32', [0, 2**60]]], {'float32': _ONES[:0]}),
    ([[['w'], 'float32', [4]]], {'float32': _ONES}),
    ([['w', None, [4], 4, 1.0, 0, 0]], {'masks': _NO_CODE}),
    (
      [['w', 'float32', [4], 4, 1.0, 10**9, 0]],
      {'float32': _ONES, 'masks': _NO_CODE},
    ),
    ([['w', 'float32', [4]]], {'float32': _ONES.reshape(2, 2)}),
    ([['w', 'float64', [4]]], {'float64': _ONES}),
    (None, {'float32': _ONES}),
    (3, {'float32': _ONES}),
  ],
)
def test_hostile_files_are_refused_in_little_memory(tmp_path, rows, tensors):
  text = {'version': 2, 'alpha': None, 'values': None, 'leaves': {'': rows}}
  (tmp_path / 'model').write_bytes(_container(text, tensors))
  tracemalloc.start()
  try:
    with pytest.raises(ValueError):
      export.load_compressed(tmp_path / 'model')
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 10e6


@pytest.mark.parametrize(
  'alpha',
  [float('nan'), float('inf'), '2.0', True, 0.5, [2], {'w': '2'}, {'w': None}],
)
def test_impossible_powers_in_a_file_are_refused(tmp_path, alpha):
  rows = [['w', 'float32', [4]]]
  text = {'version': 2, 'alpha': alpha, 'values': None, 'leaves': {'': rows}}
  (tmp_path / 'model').write_bytes(_container(text, {'float32': _ONES}))
  with pytest.raises(ValueError, match='is no whole file'):
    export.load_compressed(tmp_path / 'model')


def test_large_networks_need_a_limit(tmp_path):
  path = tmp_path / 'model'
  export.save_compressed(path, {'w': np.zeros(1000, np.float32)}, {})
  with pytest.raises(ValueError, match='6000 bytes .* limit=5999'):
    export.load_compressed(path, limit=5999)
  assert export.load_compressed(path, limit=6000).theta['w'].size == 1000


def _damage(content, moments):
  """Flips a bit, replaces, inserts, reverses or cuts off some bytes."""
  data, kind = bytearray(content), moments.randrange(5)
  first, last = sorted(moments.sample(range(len(data)), 2))
  if kind == 0:
    data[first] ^= 1 << moments.randrange(8)
  elif kind == 1:
    data[first : first + 8] = moments.randbytes(moments.randrange(9))
  elif kind == 2:
    data[first:first] = moments.randbytes(moments.randrange(1, 20))
  elif kind == 3:
    data[first:last] = data[first:last][::-1]
  else:
    del data[first:]
  return bytes(data)


def _assert_same_model(model, wanted):
  _assert_same_bits(model.theta, wanted.theta)
  _assert_same_bits(model.masks, wanted.masks)
  assert model.alpha == wanted.alpha


def test_no_damaged_file_gives_another_network(tmp_path):
  rng = np.random.default_rng(0)
  theta = {'w': rng.normal(size=(30, 20)), 'b': np.arange(20.0)}
  masks = {'w': rng.random((30, 20)) < 0.1}
  other = {'w': rng.random((30, 20)) < 0.1}
  path, damaged = tmp_path / 'whole', tmp_path / 'damaged'
  export.save_compressed(path, theta, masks, alpha=2.0)
  one = path.read_bytes(), export.load_compressed
  export.save_tasks(path, theta, [masks, other], [{}, {'b': np.ones(20)}])
  many = path.read_bytes(), lambda path: export.load_task(path, 1)
  moments = random.Random(0)
  for content, load in (one, many):
    path.write_bytes(content)
    wanted = load(path)
    refused = 0
    for _ in range(300):
      damaged.write_bytes(_damage(content, moments))
      try:
        model = load(damaged)
      except ValueError:
        refused += 1
      else:
        _assert_same_model(model, wanted)
    # Changes of unused bytes, or of texts that keep their meaning, do no harm.
    assert refused > 250


def test_files_of_version_0_1_are_read_with_a_warning(tmp_path, caplog):
  text = {
    'version': 1,
    'alpha': 2.0,
    'values': None,
    'leaves': {'': [['w', 'float32', [4]]]},
  }
  packed = {'powerprop_jax': json.dumps(text)}
  path = tmp_path / 'model'
  path.write_bytes(safetensors.numpy.save({'float32': _ONES}, packed))
  model = export.load_compressed(path)
  assert (model.alpha, model.theta['w'].tolist()) == (2.0, [1, 1, 1, 1])
  (record,) = caplog.records
  assert 'without a checksum' in record.getMessage()


@pytest.mark.parametrize('dtype', ['float8_e4m3fn', 'int4', 'complex128'])
def test_dtypes_that_cannot_be_read_are_not_written(tmp_path, dtype):
  theta = {'w': np.ones(3).astype(jnp.dtype(dtype))}
  with pytest.raises(ValueError, match=f"'w' is of dtype {dtype}"):
    export.save_compressed(tmp_path / 'model', theta, {})
  assert not list(tmp_path.iterdir())


def test_threads_that_write_to_one_path(tmp_path):
  theta, masks = _lenet(0.01)
  path, errors = tmp_path / 'model', []

  def work():
    try:
      for _ in range(5):
        export.save_compressed(path, theta, masks)
    except Exception as error:
      errors.append(error)

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not errors
  _assert_same_bits(
    export.load_compressed(path).theta, export.to_dict(theta, masks)
  )
  assert [x.name for x in tmp_path.iterdir()] == ['model']


def test_files_in_the_home_folder_and_in_buckets(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  export.save_compressed('~/model', {'w': np.ones(3)}, {})
  assert (tmp_path / 'model').is_file()
  assert export.load_compressed('~/model').theta['w'].size == 3
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  with pytest.raises(ValueError, match='gs://bucket/model'):
    export.save_compressed('gs://bucket/model', {'w': np.ones(3)}, {})


def test_foreign_files_are_refused(tmp_path):
  theta, masks = _lenet(0.01)
  path = tmp_path / 'model'
  export.save_compressed(path, theta, masks)
  tensors = safetensors.numpy.load_file(path)
  text = json.loads(_header(path)[0]['__metadata__']['powerprop_jax'])

  def changed(**fields):
    return _container({**text, **fields}, tensors)

  rows = text['leaves']['']
  foreign = [
    pickle.dumps(_Trap()),
    safetensors.numpy.save(tensors),
    safetensors.numpy.save(tensors, {'powerprop_jax': 'alpha = 2'}),
    safetensors.numpy.save(tensors, {'powerprop_jax': '[' * 100_000}),
    changed(version=3),
    changed(leaves={}),
    changed(leaves={'': [['w']]}),
    changed(leaves={'': [*rows, ['more', 'float32', [9]]]}),
    changed(leaves={'': [*rows, rows[0]]}),
    changed(leaves={'': rows[:-1]}),
    changed(leaves={'': [['w', 'float32', [784, 300], 2353, 0.01, 6, 2385]]}),
  ]
  for content in foreign:
    path.write_bytes(content)
    with pytest.raises(ValueError, match='is no whole file of this format'):
      export.load_compressed(path)
  path.write_bytes(changed())
  export.load_compressed(path)


# --- tasks --------------------------------------------------------------------


def _tasks(count=3):
  """Weights and masks of a sequence; each task has its biases and its head."""
  theta, _ = _lenet(0.1)
  masks = [_lenet(0.1, seed=t)[1] for t in range(count)]
  rng = np.random.default_rng(9)
  private = []
  for mask in masks:
    own = {k: {'b': rng.normal(size=v['b'].shape)} for k, v in theta.items()}
    own['out']['w'] = rng.normal(size=(100, 10)).astype(np.float32)
    private.append({**own, 'norm': {'scale': rng.normal(size=300)}})
    mask['linear'] = masks[0]['linear']  # Some masks are equal.
  return theta, masks, private


def _wanted(theta, mask, private):
  arrays = export.to_dict(theta, mask)
  own, mask = export.to_dict(private), export.to_dict(mask)
  own['out/w'] = np.where(mask['out/w'], own['out/w'], np.float32(0))
  ones = {p: np.ones(x.shape, bool) for p, x in own.items()}
  return arrays | own, ones | mask


def test_tasks_come_back_and_share_their_weights(tmp_path):
  path = tmp_path / 'tasks'
  theta, masks, private = _tasks()
  sizes = export.save_tasks(path, theta, masks, private, alpha=2.0)
  for t, (mask, own) in enumerate(zip(masks, private)):
    model = export.load_task(path, t)
    wanted, wanted_masks = _wanted(theta, mask, own)
    _assert_same_bits(model.theta, wanted)
    _assert_same_bits(model.masks, wanted_masks)
    assert model.alpha == 2.0
  used = [
    np.logical_or.reduce([mask[name]['w'] for mask in masks])
    for name in ('initial_linear', 'linear')
  ]
  tensors = safetensors.numpy.load_file(path)
  assert tensors['float32'].size == sum(int(m.sum()) for m in used)
  assert tensors['tasks/1/float64'].size == 410 + 300
  assert tensors['tasks/1/float32'].size == 100
  # The second masks are one, of which each task uses all.
  rows = json.loads(_header(path)[0]['__metadata__']['powerprop_jax'])
  named = [row[0] for row in rows['leaves']['tasks/1/']]
  assert 'initial_linear/w' in named
  assert 'linear/w' not in named
  # This is less than the masks alone would take at one bit per weight.
  coded = sum(x.nbytes for k, x in tensors.items() if k.endswith('masks'))
  assert coded < 3 * 266_200 / 8
  assert sizes.bound < sizes.file < 1.05 * sizes.bound


def test_a_task_is_loaded_without_reading_the_others(tmp_path):
  path = tmp_path / 'tasks'
  theta, masks, private = _tasks()
  export.save_tasks(path, theta, masks, private)
  header, start = _header(path)
  content = bytearray(path.read_bytes())
  for name, tensor in header.items():
    if name.startswith(('tasks/0', 'tasks/2')):
      a, b = (start + offset for offset in tensor['data_offsets'])
      content[a:b] = b'\xff' * (b - a)
  path.write_bytes(content)
  wanted, _ = _wanted(theta, masks[1], private[1])
  _assert_same_bits(export.load_task(path, 1).theta, wanted)
  with pytest.raises(ValueError, match='The checksum of tasks/0/'):
    export.load_task(path, 0)


def test_a_private_leaf_of_another_shape_has_no_mask(tmp_path):
  theta, own = {'w': np.ones(4), 'b': np.ones(2)}, {'b': np.ones(3)}
  masks = {'w': np.ones(4, bool), 'b': np.array([True, False])}
  with pytest.raises(ValueError, match=r"'b' of task 0 .* \(3,\), .* \(2,\)"):
    export.save_tasks(tmp_path / 'tasks', theta, [masks], [own])
  export.save_tasks(tmp_path / 'tasks', theta, [{'w': masks['w']}], [own])
  found = export.load_task(tmp_path / 'tasks', 0).theta['b']
  np.testing.assert_array_equal(found, own['b'])


def test_leaves_that_some_tasks_share(tmp_path):
  """A leaf that is private to one task is that of theta for the others."""
  path = tmp_path / 'tasks'
  theta = {'w': np.arange(4.0), 'b': np.array([1.0, 2.0])}
  ones = np.ones(2, bool)
  masks = [
    {'w': np.array([True, True, False, False]), 'b': ones},
    {'w': np.array([False, True, False, True]), 'b': ones},
  ]
  export.save_tasks(path, theta, masks, [{'b': np.array([5.0, 6.0])}, {}])
  first, second = (export.load_task(path, t).theta for t in range(2))
  assert {k: v.tolist() for k, v in first.items()} == {
    'w': [0, 1, 0, 0],
    'b': [5, 6],
  }
  assert {k: v.tolist() for k, v in second.items()} == {
    'w': [0, 1, 0, 3],
    'b': [1, 2],
  }
  for task in (-1, 2):
    with pytest.raises(ValueError, match=f'no task {task}. Tasks .* last is 1'):
      export.load_task(path, task)
  with pytest.raises(ValueError, match='use load_task'):
    export.load_compressed(path)
  for bad in ([], [{}]):
    with pytest.raises(ValueError, match='One mask and one tree'):
      export.save_tasks(path, theta, masks[: 2 * len(bad)], bad)


# --- dictionaries -------------------------------------------------------------


def _half(params):
  """A mask of half of every weight."""

  def mask(path, x):
    cut = np.median(np.abs(x)) if leaves.is_weight(path, x) else -1.0
    return np.abs(x) > cut

  return leaves.map_with_path(mask, params)


class _Linen(linen.Module):
  @linen.compact
  def __call__(self, x):
    return linen.Dense(2)(linen.LayerNorm()(linen.Dense(8, name='hidden')(x)))


class _Nnx(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.LayerNorm(8, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(8, 2, rngs=rngs)])

  def __call__(self, x):
    return self.layers[0](self.norm(self.hidden(x)))


def _haiku_model(x):
  network = hk.without_apply_rng(
    hk.transform(lambda x: hk.nets.MLP([8, 2], name='hidden')(x))
  )
  return network.init(jax.random.key(0), x), network.apply


def _linen_model(x):
  return _Linen().init(jax.random.key(0), x), _Linen().apply


def _nnx_model(x):
  del x
  graph, state = nnx.split(_Nnx(nnx.Rngs(0)))
  return state, lambda state, x: nnx.merge(graph, state)(x)


def _equinox_model(x):
  del x
  model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
  params, static = eqx.partition(model, eqx.is_array)
  return params, lambda p, x: jax.vmap(eqx.combine(p, static))(x)


@pytest.mark.parametrize(
  ('make', 'path'),
  [
    (_haiku_model, 'hidden/~/linear_0/w'),
    (_linen_model, 'params/hidden/kernel'),
    (_nnx_model, 'layers/0/kernel'),
    (_equinox_model, 'layers/0/weight'),
  ],
  ids=['haiku', 'flax_linen', 'flax_nnx', 'equinox'],
)
def test_models_of_every_library_go_there_and_back(tmp_path, make, path):
  x = jnp.linspace(-1, 1, 12).reshape(3, 4)
  params, apply = make(x)
  mask = _half(params)
  pruned = masks_lib.apply_mask(params, mask)
  arrays = export.to_dict(params, mask)
  assert 0 < np.count_nonzero(arrays[path]) <= arrays[path].size / 2
  back = export.from_dict(arrays, jax.eval_shape(lambda: params))
  assert jax.tree.structure(back) == jax.tree.structure(params)
  np.testing.assert_array_equal(apply(back, x), apply(pruned, x))
  export.save_compressed(tmp_path / 'model', params, mask)
  model = export.load_compressed(tmp_path / 'model')
  loaded = export.from_dict(model.theta, params)
  np.testing.assert_array_equal(apply(loaded, x), apply(pruned, x))
  masks = export.from_dict(model.masks, params)
  jax.tree.map(np.testing.assert_array_equal, masks, mask)


def test_torch_takes_the_dictionary():
  torch = pytest.importorskip('torch')
  x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
  params, apply = _haiku_model(x)
  arrays = export.to_dict(params, _half(params))
  model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
  )
  # torch keeps its matrices the other way round.
  state = {
    f'{2 * i}.{theirs}': torch.tensor(arrays[f'hidden/~/linear_{i}/{ours}'].T)
    for i in (0, 1)
    for ours, theirs in (('w', 'weight'), ('b', 'bias'))
  }
  model.load_state_dict(state)
  wanted = apply(export.from_dict(arrays, params), x)
  np.testing.assert_allclose(
    model(torch.tensor(x)).detach().numpy(), wanted, atol=1e-6
  )


def test_keras_takes_the_dictionary():
  keras = pytest.importorskip('keras')
  x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
  params, apply = _haiku_model(x)
  arrays = export.to_dict(params, _half(params))
  model = keras.Sequential(
    [keras.layers.Dense(8, activation='relu'), keras.layers.Dense(2)]
  )
  model.build(x.shape)
  names = [f'hidden/~/linear_{i}/{leaf}' for i in (0, 1) for leaf in 'wb']
  model.set_weights([arrays[name] for name in names])
  wanted = apply(export.from_dict(arrays, params), x)
  np.testing.assert_allclose(np.asarray(model(x)), wanted, atol=1e-6)


def test_dictionaries_are_checked():
  tree = {'a': {'w': np.ones((2, 3))}, 'b': np.ones(2)}
  with pytest.raises(ValueError, match=r'a/w: absent .* \(2, 3\) in the tree'):
    export.from_dict({'b': np.ones(2)}, tree)
  arrays = export.to_dict(tree) | {'b': np.ones(3)}
  with pytest.raises(ValueError, match=r'b: \(3,\) in the dictionary, \(2,\)'):
    export.from_dict(arrays, tree)
  with pytest.raises(ValueError, match='Two leaves have the same path'):
    export.to_dict({'a/b': 1.0, 'a': {'b': 2.0}})
  with pytest.raises(ValueError, match=r"'f' is no array. Filter"):
    export.to_dict({'f': jax.nn.relu})
  # Arrays that jax would convert to float32 keep their type.
  mask = {'w': np.array([True, False])}
  found = export.to_dict({'w': np.array([1 / 3, 1.0])}, mask)['w']
  assert found.dtype == np.float64
  assert found.tolist() == [1 / 3, 0.0]


def test_integers_are_not_cut_short():
  tree = {'steps': np.array([2**40 + 1])}
  with pytest.raises(ValueError, match='do not fit into int32'):
    export.from_dict(export.to_dict(tree), tree)
  small = {'steps': np.array([7])}
  assert export.from_dict(export.to_dict(small), small)['steps'].tolist() == [7]


# --- sparse matrices ----------------------------------------------------------


def _forward(theta, x):
  for name in _SHAPES:
    x = x @ theta[name]['w'] + theta[name]['b']
    x = x if name == 'out' else x * (x > 0)
  return x


@pytest.mark.parametrize('kind', ['csr', 'bcoo'])
def test_sparse_matrices_compute_what_the_masked_network_does(kind):
  theta, masks = _lenet(0.1)
  theta['linear']['w'][0] = 0.0
  x = np.random.default_rng(1).normal(size=(5, 784)).astype(np.float32)
  pruned = masks_lib.apply_mask(theta, masks)
  network = export.to_sparse(theta, masks, kind)
  matrix = network['linear']['w']
  # Zeros that the mask keeps are stored.
  assert (matrix.nnz if kind == 'csr' else matrix.nse) == 3000
  dense = matrix.toarray() if kind == 'csr' else matrix.todense()
  np.testing.assert_array_equal(dense, pruned['linear']['w'])
  run = _forward if kind == 'csr' else jax.jit(_forward)
  np.testing.assert_allclose(
    run(network, x), _forward(pruned, x), rtol=1e-4, atol=1e-2
  )


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_sparse_matrices_of_half_precision(dtype):
  theta = {'w': jnp.arange(6.0, dtype=dtype).reshape(3, 2)}
  mask = {'w': np.array([[False, True], [True, True], [False, True]])}
  matrix = export.to_sparse(theta, mask)['w']
  np.testing.assert_array_equal(np.ones((1, 3), 'f') @ matrix, [[2.0, 9.0]])


def test_sparse_matrices_of_integers_stay_integers():
  theta = {'w': np.arange(6, dtype=np.int8).reshape(3, 2)}
  assert export.to_sparse(theta, {'w': theta['w'] > 2})['w'].dtype == np.int8


@pytest.mark.parametrize(
  ('kind', 'array'), [('csr', np.ndarray), ('bcoo', jax.Array)]
)
def test_what_is_no_pruned_matrix_stays_an_array(kind, array):
  theta = {'conv': jnp.ones((2, 2, 1, 3)), 'dense': jnp.ones((2, 2))}
  mask = {
    'conv': jnp.zeros((2, 2, 1, 3), bool),
    'dense': jnp.ones((2, 2), bool),
  }
  found = export.to_sparse(theta, mask, kind)
  assert isinstance(found['conv'], array)
  assert isinstance(found['dense'], array)
  assert not found['conv'].any()
  with pytest.raises(ValueError, match="'csr' or 'bcoo', got 'csc'"):
    export.to_sparse(theta, mask, 'csc')

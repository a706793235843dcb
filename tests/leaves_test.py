"""Tests of which leaves are weights, in trees of Haiku, Flax and Equinox."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
from flax import nnx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax import leaves
from powerprop_jax import types

KEY = jax.random.key(0)
X = np.ones((2, 4), np.float32)
IMAGES = np.ones((1, 5, 5, 2), np.float32)
TOKENS = np.zeros(2, np.int32)


def _chosen(params, is_weight=leaves.is_weight):
  """The paths of the weights, and of the other leaves."""
  decisions = {}

  def decide(path, leaf):
    decisions[str(path)] = is_weight(path, leaf)

  leaves.map_with_path(decide, params)
  weights = {p for p, w in decisions.items() if w}
  return weights, set(decisions) - weights


def _attention(x):
  init = hk.initializers.Constant(0.0)
  return hk.MultiHeadAttention(2, 4, w_init=init)(x, x, x)


def _core(make):
  def f(x):
    core = make()
    return core(x, core.initial_state(len(x)))

  return f


def _haiku(make):
  return lambda x: make()(x)


# Each row has a module, its input, its weights and its other leaves.
HAIKU = {
  'Linear': (_haiku(lambda: hk.Linear(3)), X, 'linear/w', 'linear/b'),
  'Conv1D': (
    _haiku(lambda: hk.Conv1D(3, 3)),
    np.ones((1, 5, 2)),
    'conv1_d/w',
    'conv1_d/b',
  ),
  'Conv2D': (
    _haiku(lambda: hk.Conv2D(3, 3)),
    IMAGES,
    'conv2_d/w',
    'conv2_d/b',
  ),
  'Conv3D': (
    _haiku(lambda: hk.Conv3D(3, 3)),
    np.ones((1, 5, 5, 5, 2)),
    'conv3_d/w',
    'conv3_d/b',
  ),
  'DepthwiseConv2D': (
    _haiku(lambda: hk.DepthwiseConv2D(1, 3)),
    IMAGES,
    'depthwise_conv2_d/w',
    'depthwise_conv2_d/b',
  ),
  'SeparableDepthwiseConv2D': (
    _haiku(lambda: hk.SeparableDepthwiseConv2D(1, 3)),  # pyright: ignore[reportPrivateImportUsage]
    IMAGES,
    'separable_depthwise_conv2_d/~/depthwise_conv2_d/w'
    ' separable_depthwise_conv2_d/~/depthwise_conv2_d_1/w',
    'separable_depthwise_conv2_d/~/depthwise_conv2_d_1/b',
  ),
  'Conv2DTranspose': (
    _haiku(lambda: hk.Conv2DTranspose(3, 3)),
    IMAGES,
    'conv2_d_transpose/w',
    'conv2_d_transpose/b',
  ),
  'MultiHeadAttention': (
    _attention,
    X,
    'multi_head_attention/query/w multi_head_attention/key/w'
    ' multi_head_attention/value/w multi_head_attention/linear/w',
    'multi_head_attention/query/b multi_head_attention/key/b'
    ' multi_head_attention/value/b multi_head_attention/linear/b',
  ),
  'LSTM': (_core(lambda: hk.LSTM(3)), X, 'lstm/linear/w', 'lstm/linear/b'),
  'GRU': (_core(lambda: hk.GRU(3)), X, 'gru/w_i gru/w_h', 'gru/b'),
  'VanillaRNN': (
    _core(lambda: hk.VanillaRNN(3)),
    X,
    'vanilla_rnn/linear/w vanilla_rnn/linear_1/w',
    'vanilla_rnn/linear/b vanilla_rnn/linear_1/b',
  ),
  'Conv2DLSTM': (
    _core(lambda: hk.Conv2DLSTM((5, 5), 3, 3)),
    IMAGES,
    'conv2_dlstm/input_to_hidden/w conv2_dlstm/hidden_to_hidden/w',
    'conv2_dlstm/input_to_hidden/b conv2_dlstm/hidden_to_hidden/b',
  ),
  'LayerNorm': (
    _haiku(lambda: hk.LayerNorm(-1, True, True)),
    X,
    '',
    'layer_norm/scale layer_norm/offset',
  ),
  # Its scale and offset have four dimensions, so that their rank tells nothing.
  'BatchNorm': (
    lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=True),
    IMAGES,
    '',
    'batch_norm/scale batch_norm/offset',
  ),
  'GroupNorm': (
    _haiku(lambda: hk.GroupNorm(2)),
    IMAGES,
    '',
    'group_norm/scale group_norm/offset',
  ),
  'RMSNorm': (_haiku(lambda: hk.RMSNorm(-1)), X, '', 'rms_norm/scale'),
  'Embed': (_haiku(lambda: hk.Embed(5, 3)), TOKENS, '', 'embed/embeddings'),
  'Bias': (_haiku(hk.Bias), X, '', 'bias/b'),
}


@pytest.mark.parametrize('name', HAIKU)
def test_haiku(name):
  f, x, weights, others = HAIKU[name]
  # Shapes are enough, and initialisers need not be compiled.
  params, _ = jax.eval_shape(hk.transform_with_state(f).init, KEY, x)
  assert _chosen(params) == (set(weights.split()), set(others.split()))


LSTM_KERNELS = 'ii/kernel if/kernel ig/kernel io/kernel'
RECURRENT_KERNELS = 'hi/kernel hf/kernel hg/kernel ho/kernel'
ATTENTION = ('query', 'key', 'value', 'out')

LINEN = {
  'Dense': (nn.Dense(3), (X,), 'kernel', 'bias'),
  'DenseGeneral': (nn.DenseGeneral((3, 2)), (X,), 'kernel', 'bias'),
  'Conv': (nn.Conv(3, (3, 3)), (IMAGES,), 'kernel', 'bias'),
  'ConvTranspose': (nn.ConvTranspose(3, (3, 3)), (IMAGES,), 'kernel', 'bias'),
  'MultiHeadDotProductAttention': (
    nn.MultiHeadDotProductAttention(2),
    (np.ones((1, 3, 4)),),
    ' '.join(f'{n}/kernel' for n in ATTENTION),
    ' '.join(f'{n}/bias' for n in ATTENTION),
  ),
  'LSTMCell': (
    nn.LSTMCell(3),
    ((np.ones((2, 3)), np.ones((2, 3))), X),
    f'{LSTM_KERNELS} {RECURRENT_KERNELS}',
    RECURRENT_KERNELS.replace('kernel', 'bias'),
  ),
  'GRUCell': (
    nn.GRUCell(3),
    (np.ones((2, 3)), X),
    'ir/kernel iz/kernel in/kernel hr/kernel hz/kernel hn/kernel',
    'ir/bias iz/bias in/bias hn/bias',
  ),
  'LayerNorm': (nn.LayerNorm(), (X,), '', 'scale bias'),
  'RMSNorm': (nn.RMSNorm(), (X,), '', 'scale'),
  'GroupNorm': (nn.GroupNorm(2), (X,), '', 'scale bias'),
  'BatchNorm': (nn.BatchNorm(True), (IMAGES,), '', 'scale bias'),
  'Embed': (nn.Embed(5, 3), (TOKENS,), '', 'embedding'),
  'PReLU': (nn.PReLU(), (X,), '', 'negative_slope'),
}


@pytest.mark.parametrize('name', LINEN)
def test_flax_linen(name):
  module, inputs, weights, others = LINEN[name]
  params = jax.eval_shape(module.init, KEY, *inputs)['params']
  assert _chosen(params) == (set(weights.split()), set(others.split()))


def test_flax_linen_partitioned():
  init = nn.with_partitioning(nn.initializers.zeros, (None, 'model'))
  params = nn.Dense(3, kernel_init=init).init(KEY, X)['params']
  assert isinstance(params['kernel'], nn.Partitioned)
  assert _chosen(params) == ({'kernel'}, {'bias'})


NNX = {
  'Linear': (lambda r: nnx.Linear(2, 3, rngs=r), 'kernel', 'bias'),
  'Conv': (lambda r: nnx.Conv(1, 2, (3, 3), rngs=r), 'kernel', 'bias'),
  'ConvTranspose': (
    lambda r: nnx.ConvTranspose(1, 2, (3, 3), rngs=r),
    'kernel',
    'bias',
  ),
  'MultiHeadAttention': (
    lambda r: nnx.MultiHeadAttention(2, 4, rngs=r),
    ' '.join(f'{n}/kernel' for n in ATTENTION),
    ' '.join(f'{n}/bias' for n in ATTENTION),
  ),
  'LSTMCell': (
    lambda r: nnx.LSTMCell(2, 3, rngs=r),
    f'{LSTM_KERNELS} {RECURRENT_KERNELS}'.replace('if/', 'if_/'),
    RECURRENT_KERNELS.replace('kernel', 'bias'),
  ),
  'BatchNorm': (lambda r: nnx.BatchNorm(3, rngs=r), '', 'scale bias'),
  'LayerNorm': (lambda r: nnx.LayerNorm(3, rngs=r), '', 'scale bias'),
  'Embed': (lambda r: nnx.Embed(5, 3, rngs=r), '', 'embedding'),
}


@pytest.mark.parametrize('name', NNX)
def test_flax_nnx(name):
  make, weights, others = NNX[name]
  expected = set(weights.split()), set(others.split())
  module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  state = nnx.state(module, nnx.Param)
  assert _chosen(state) == expected
  assert _chosen(nnx.to_pure_dict(state)) == expected
  # The module itself holds more than parameters, but no more weights.
  assert _chosen(module)[0] == expected[0]


_MyLinear: Any = type('MyLinear', (eqx.nn.Linear,), {})


class _Scale(eqx.Module):
  weight: jax.Array
  kernel_size: jax.Array


EQUINOX = {
  'Linear': (lambda k: eqx.nn.Linear(2, 3, key=k), 'weight', 'bias'),
  'subclass of Linear': (lambda k: _MyLinear(2, 3, key=k), 'weight', 'bias'),
  'Conv1d': (lambda k: eqx.nn.Conv1d(1, 2, 3, key=k), 'weight', 'bias'),
  'Conv2d': (lambda k: eqx.nn.Conv2d(1, 2, 3, key=k), 'weight', 'bias'),
  'ConvTranspose2d': (
    lambda k: eqx.nn.ConvTranspose2d(1, 2, 3, key=k),
    'weight',
    'bias',
  ),
  'LSTMCell': (
    lambda k: eqx.nn.LSTMCell(2, 3, key=k),
    'weight_ih weight_hh',
    'bias',
  ),
  'GRUCell': (
    lambda k: eqx.nn.GRUCell(2, 3, key=k),
    'weight_ih weight_hh',
    'bias bias_n',
  ),
  'MultiheadAttention': (
    lambda k: eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=k),
    'query_proj/weight key_proj/weight value_proj/weight output_proj/weight',
    'query_proj/bias',
  ),
  'MLP': (
    lambda k: eqx.nn.MLP(2, 3, 4, 1, key=k),
    'layers/0/weight layers/1/weight',
    'layers/0/bias layers/1/bias',
  ),
  'MLP in a dictionary': (
    lambda k: {'net': [eqx.nn.MLP(2, 3, 4, 0, key=k)]},
    'net/0/layers/0/weight',
    'net/0/layers/0/bias',
  ),
  'LayerNorm': (lambda k: eqx.nn.LayerNorm((3, 3)), '', 'weight bias'),
  'RMSNorm': (lambda k: eqx.nn.RMSNorm((3, 3)), '', 'weight bias'),
  'GroupNorm': (lambda k: eqx.nn.GroupNorm(2, 4), '', 'weight bias'),
  'Embedding': (lambda k: eqx.nn.Embedding(5, 3, key=k), '', 'weight'),
  'PReLU': (lambda k: eqx.nn.PReLU(), '', 'negative_slope'),
  'module of another class': (
    lambda k: _Scale(jnp.ones((2, 2)), jnp.ones(2)),
    '',
    'weight kernel_size',
  ),
}


@pytest.mark.parametrize('name', EQUINOX)
def test_equinox(name):
  make, weights, others = EQUINOX[name]
  model = eqx.filter_eval_shape(make, KEY)
  params = eqx.filter(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
  assert _chosen(params) == (set(weights.split()), set(others.split()))
  # Unfiltered, activation functions are leaves too.
  assert _chosen(model)[0] == set(weights.split())


def test_equinox_batch_norm():
  model = eqx.nn.BatchNorm(3, 'batch', mode='batch')
  weights, others = _chosen(model)
  assert weights == set()
  assert {'weight', 'bias'} < others


EMBEDDINGS = {
  'Haiku': lambda: {'embed': {'embeddings': jnp.ones((5, 3))}},
  'Flax': lambda: {'embed': {'embedding': jnp.ones((5, 3))}},
  'Equinox': lambda: {'embed': eqx.nn.Embedding(5, 3, key=KEY)},
}


@pytest.mark.parametrize('library', EMBEDDINGS)
def test_embeddings_are_weights_if_asked_for(library):
  params = EMBEDDINGS[library]() | {'linear': {'w': X, 'b': X[0]}}
  assert _chosen(params)[0] == {'linear/w'}
  with_embeddings = functools.partial(leaves.is_weight, embeddings=True)
  weights, others = _chosen(params, with_embeddings)
  assert others == {'linear/b'}
  assert len(weights) == 2


def test_only_flax_hides_arrays_in_a_value():
  class Attention(NamedTuple):
    query: jax.Array
    value: jax.Array

  tree = {'attention': Attention(X, X), 'flax': nnx.Param(X)}
  paths = ['attention/query', 'attention/value', 'flax']
  assert leaves.paths(tree) == paths


def test_names_without_an_owner():
  # Only the class distinguishes an Equinox weight from a scale.
  params = {'linear': {'weight': X, 'weight_ih': X}, 'w': X, 'new': {'ww': X}}
  assert _chosen(params)[0] == {'w'}
  assert leaves.is_weight('net/linear/w', X)
  assert not leaves.is_weight('net/linear/weight', X)
  # The whole last part counts, and nothing before it.
  assert _chosen({'w': {'b': X}, 'kernel': {'bias': X}})[0] == set()
  assert _chosen(X) == (set(), {''})


@pytest.mark.parametrize(
  'dtype, weight',
  [
    ('float32', True),
    ('bfloat16', True),
    ('float16', True),
    ('int8', False),
    ('uint32', False),
    ('bool', False),
    ('complex64', False),
  ],
)
def test_only_real_floats_are_weights(dtype, weight):
  leaf = jnp.zeros((2, 2), dtype)
  chosen, why = leaves.decide('linear/w', leaf)
  assert chosen == weight
  assert weight or why == f'{dtype} is not real floating point'
  assert leaves.is_weight('linear/w', jax.ShapeDtypeStruct((), dtype)) == weight


def test_decide_says_why():
  linear = eqx.nn.Linear(2, 3, key=KEY)
  norm = eqx.nn.LayerNorm(3)
  params = {'h': {'w': X, 'b': X, 'embeddings': X}, 'e': linear, 'n': norm}
  decisions = {}
  leaves.map_with_path(
    lambda p, x: decisions.update({str(p): leaves.decide(p, x)}), params
  )
  assert decisions == {
    'h/w': (True, 'Haiku weight'),
    'h/b': (False, "'b' is not the name of a weight"),
    'h/embeddings': (False, 'embedding'),
    'e/weight': (True, 'weight of Linear'),
    'e/bias': (False, "'bias' is not the name of a weight"),
    'n/weight': (False, 'weight of LayerNorm'),
    'n/bias': (False, "'bias' is not the name of a weight"),
  }


def test_map_with_path_takes_more_trees():
  tree = {'a': [X, None], 'b': {'w': X}}
  other = {'a': [1, None], 'b': {'w': 2}}
  out = leaves.map_with_path(lambda path, x, n: (path, n), tree, other)
  assert out == {'a': [('a/0', 1), None], 'b': {'w': ('b/w', 2)}}
  assert isinstance(out['b']['w'][0], types.Path)


def test_weights_is_a_tree_of_bools():
  params = {'linear': {'w': X, 'b': X[0]}, 'embed': {'embeddings': X}}
  assert leaves.weight_mask(params) == {
    'linear': {'w': True, 'b': False},
    'embed': {'embeddings': False},
  }
  by_path = leaves.weight_mask(
    params, lambda path, leaf: path.startswith('embed')
  )
  assert by_path == {
    'linear': {'w': False, 'b': False},
    'embed': {'embeddings': True},
  }


def test_weight_rows():
  params = {'a': {'w': X, 'b': X[0]}, 'none': None, 'c': {'w': 2 * X}}
  other = {'a': {'w': 1, 'b': 2}, 'none': None, 'c': {'w': 3}}
  rows = leaves.weight_rows(params, leaves.is_weight, other)
  assert [(path, n) for path, _, n in rows] == [('a/w', 1), ('c/w', 3)]
  assert rows[0][1] is X
  with pytest.raises(ValueError, match='no weight among .*scale'):
    leaves.weight_rows({'norm': {'scale': X}}, leaves.is_weight)


def test_weights_is_a_mask_of_optax():
  params = {'linear': {'w': jnp.asarray([2.0]), 'b': jnp.asarray([3.0])}}
  tx = optax.add_decayed_weights(0.5, mask=leaves.weight_mask)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  assert updates == {'linear': {'w': 1.0, 'b': 0.0}}


# Axes are those of the installed libraries. The sizes are 7 for inputs (or 2
# where the module says so), 3 for units, 2 for kernels, 4 for stacks, 5 for the
# number of heads and 6 for their size.

_IMAGE = np.ones((1, 5, 5, 7), np.float32)
_X7 = np.ones((2, 6, 7), np.float32)


def _axes(params, **options):
  """By path, the sizes of the axes (stack, inputs, outputs) of every weight."""
  found = {}

  def add(path, leaf):
    if leaves.is_weight(path, leaf):
      axes = leaves.axes(path, leaf, **options)
      found[str(path)] = tuple(
        tuple(leaf.shape[i] for i in dims) for dims in axes
      )

  leaves.map_with_path(add, params)
  return found


def _stacked(make, **options):
  def f(x):
    # Haiku's scan calls its body with the output of the body before.
    return hk.experimental.layer_stack(4, **options)(lambda x: make()(x))(x)

  return f


def _attention_7(x):
  init = hk.initializers.Constant(0.0)
  return hk.MultiHeadAttention(5, 6, model_size=3, w_init=init)(x, x, x)


AXES_HAIKU = {
  'Linear': (_haiku(lambda: hk.Linear(3)), _X7, {'linear/w': ((), (7,), (3,))}),
  'Conv1D': (
    _haiku(lambda: hk.Conv1D(3, 2)),
    _X7,
    {'conv1_d/w': ((), (7,), (3,))},
  ),
  'Conv2D': (
    _haiku(lambda: hk.Conv2D(3, 2)),
    _IMAGE,
    {'conv2_d/w': ((), (7,), (3,))},
  ),
  'Conv2D, NCHW': (
    _haiku(lambda: hk.Conv2D(3, 2, data_format='NCHW')),
    np.ones((1, 7, 5, 5)),
    {'conv2_d/w': ((), (7,), (3,))},
  ),
  'Conv2D of groups': (
    _haiku(lambda: hk.Conv2D(14, 2, feature_group_count=7)),
    _IMAGE,
    {'conv2_d/w': ((), (1,), (14,))},
  ),
  'DepthwiseConv2D': (
    _haiku(lambda: hk.DepthwiseConv2D(3, 2)),
    _IMAGE,
    {'depthwise_conv2_d/w': ((), (1,), (21,))},
  ),
  'Conv1DTranspose': (
    _haiku(lambda: hk.Conv1DTranspose(3, 2)),
    _X7,
    {'conv1_d_transpose/w': ((), (7,), (3,))},
  ),
  'Conv2DTranspose': (
    _haiku(lambda: hk.Conv2DTranspose(3, 2, name='my_transposed')),
    _IMAGE,
    {'my_transposed/w': ((), (7,), (3,))},
  ),
  'MultiHeadAttention': (
    _attention_7,
    _X7,
    {
      'multi_head_attention/key/w': ((), (7,), (30,)),
      'multi_head_attention/query/w': ((), (7,), (30,)),
      'multi_head_attention/value/w': ((), (7,), (30,)),
      'multi_head_attention/linear/w': ((), (30,), (3,)),
    },
  ),
  'GRU': (
    _core(lambda: hk.GRU(3)),
    np.ones((2, 7)),
    {'gru/w_i': ((), (7,), (9,)), 'gru/w_h': ((), (3,), (9,))},
  ),
  'LSTM': (
    _core(lambda: hk.LSTM(3)),
    np.ones((2, 7)),
    {'lstm/linear/w': ((), (10,), (12,))},
  ),
  'Conv2DLSTM': (
    _core(lambda: hk.Conv2DLSTM((5, 5), 3, 2)),
    _IMAGE,
    {
      'conv2_dlstm/input_to_hidden/w': ((), (7,), (12,)),
      'conv2_dlstm/hidden_to_hidden/w': ((), (3,), (12,)),
    },
  ),
  'layer_stack': (
    _stacked(lambda: hk.Linear(7, name='mine')),
    _X7,
    {'__layer_stack_no_per_layer/mine/w': ((4,), (7,), (7,))},
  ),
  'layer_stack of convolutions': (
    _stacked(lambda: hk.Conv2D(7, 2, name='mine')),
    _IMAGE,
    {'__layer_stack_no_per_layer/mine/w': ((4,), (7,), (7,))},
  ),
  'layer_stack in a layer_stack': (
    _stacked(lambda: _stacked(lambda: hk.Linear(7))),
    _X7,
    {
      '__layer_stack_no_per_layer/__layer_stack_no_per_layer/linear/w': (
        (4, 4),
        (7,),
        (7,),
      )
    },
  ),
  'layer_stack under a name': (
    _stacked(lambda: hk.Linear(7), name='blocks'),
    _X7,
    {'blocks/linear/w': ((4,), (7,), (7,))},
  ),
  'layer_stack of convolutions under a name': (
    _stacked(lambda: hk.Conv1D(7, 2), name='blocks'),
    _X7,
    {'blocks/conv1_d/w': ((4,), (7,), (7,))},
  ),
}


@pytest.mark.parametrize('name', AXES_HAIKU)
def test_axes_of_haiku(name):
  f, x, expected = AXES_HAIKU[name]
  params, _ = jax.eval_shape(hk.transform_with_state(f).init, KEY, x)
  assert _axes(params) == expected


class ScanDense(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(7)(x)


class _Dense(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    return nn.Dense(7)(x), None


class _Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    x = nn.Conv(7, (2,))(x)
    x = nn.MultiHeadDotProductAttention(5, qkv_features=30)(x)
    return nn.Dense(7)(x), None


class _Lifted(nn.Module):
  """A block to which `lift` is applied when it is called."""

  lift: Any

  @nn.compact
  def __call__(self, x):
    y = self.lift()(x)
    return y[0] if isinstance(y, tuple) else y


_OF_LAYERS: dict[str, Any] = {
  'variable_axes': {'params': 0},
  'split_rngs': {'params': True},
}


def _block(prefix, *stack):
  attention = f'{prefix}/MultiHeadDotProductAttention_0'
  return {
    f'{prefix}/Conv_0/kernel': (stack, (7,), (7,)),
    f'{prefix}/Dense_0/kernel': (stack, (7,), (7,)),
    f'{attention}/query/kernel': (stack, (7,), (5, 6)),
    f'{attention}/key/kernel': (stack, (7,), (5, 6)),
    f'{attention}/value/kernel': (stack, (7,), (5, 6)),
    f'{attention}/out/kernel': (stack, (5, 6), (7,)),
  }


AXES_LINEN = {
  'Dense': (nn.Dense(3), (_X7,), {'kernel': ((), (7,), (3,))}),
  'Conv': (nn.Conv(3, (2, 2)), (_IMAGE,), {'kernel': ((), (7,), (3,))}),
  'Conv of groups': (
    nn.Conv(14, (2, 2), feature_group_count=7),
    (_IMAGE,),
    {'kernel': ((), (1,), (14,))},
  ),
  'ConvTranspose': (
    nn.ConvTranspose(3, (2, 2)),
    (_IMAGE,),
    {'kernel': ((), (7,), (3,))},
  ),
  'DenseGeneral': (
    _Lifted(lambda: nn.DenseGeneral((5, 6))),
    (_X7,),
    {'DenseGeneral_0/kernel': ((), (7,), (5, 6))},
  ),
  'attention': (
    nn.MultiHeadDotProductAttention(5, qkv_features=30, out_features=3),
    (_X7,),
    {
      'query/kernel': ((), (7,), (5, 6)),
      'key/kernel': ((), (7,), (5, 6)),
      'value/kernel': ((), (7,), (5, 6)),
      'out/kernel': ((), (5, 6), (3,)),
    },
  ),
  'LSTMCell': (
    nn.OptimizedLSTMCell(3),
    ((np.ones((2, 3)), np.ones((2, 3))), np.ones((2, 7))),
    {f'i{g}/kernel': ((), (7,), (3,)) for g in 'ifgo'}
    | {f'h{g}/kernel': ((), (3,), (3,)) for g in 'ifgo'},
  ),
  'scan': (
    _Lifted(nn.scan(_Block, length=4, **_OF_LAYERS)),
    (_X7,),
    _block('Scan_Block_0', 4),
  ),
  'scan of remat': (
    _Lifted(nn.scan(nn.remat(_Block), length=4, **_OF_LAYERS)),
    (_X7,),
    _block('ScanCheckpoint_Block_0', 4),
  ),
  'jit': (_Lifted(nn.jit(_Block)), (_X7,), _block('Jit_Block_0')),
  'vmap': (
    _Lifted(
      functools.partial(
        nn.vmap(nn.Conv, in_axes=None, axis_size=4, **_OF_LAYERS), 3, (2, 2)
      )
    ),
    (_IMAGE,),
    {'VmapConv_0/kernel': ((4,), (7,), (3,))},
  ),
  # Users named these; the names that Flax gives inside are enough.
  'scan of Dense under a name': (
    _Lifted(lambda: nn.scan(_Dense, length=4, **_OF_LAYERS)(name='layers')),
    (_X7,),
    {'layers/Dense_0/kernel': ((4,), (7,), (7,))},
  ),
  'remat_scan of Dense': (
    _Lifted(lambda: nn.remat_scan(nn.Dense, lengths=(2, 3))(7)),
    (_X7,),
    {'Remat_scanDense_0/kernel': ((2, 3), (7,), (7,))},
  ),
  'class whose name looks lifted': (
    ScanDense(),
    (_X7,),
    {'Dense_0/kernel': ((), (7,), (7,))},
  ),
}


@pytest.mark.parametrize('name', AXES_LINEN)
def test_axes_of_flax_linen(name):
  module, inputs, expected = AXES_LINEN[name]
  params = jax.eval_shape(module.init, KEY, *inputs)['params']
  assert _axes(params) == expected


def test_axes_of_layers_stacked_under_a_name():
  """A name that a user gives says nothing about a stack; `stacked` does."""
  module = _Lifted(
    lambda: nn.scan(_Block, length=4, **_OF_LAYERS)(name='layers')
  )
  params = jax.eval_shape(module.init, KEY, _X7)['params']
  assert _axes(params, stacked='^layers/') == _block('layers', 4)
  # The attention and Dense_0 are known by their names, the convolution is not.
  known = _block('layers', 4) | {'layers/Conv_0/kernel': ((), (7,), (7,))}
  assert _axes(params) == known


AXES_NNX = {
  'Linear': (
    lambda r: nnx.Linear(7, 3, rngs=r),
    {'kernel': ((), (7,), (3,))},
  ),
  'Conv': (
    lambda r: nnx.Conv(7, 3, (2, 2), rngs=r),
    {'kernel': ((), (7,), (3,))},
  ),
  'ConvTranspose': (
    lambda r: nnx.ConvTranspose(7, 3, (2, 2), rngs=r),
    {'kernel': ((), (7,), (3,))},
  ),
  'MultiHeadAttention': (
    lambda r: nnx.MultiHeadAttention(
      5, 7, qkv_features=30, out_features=3, rngs=r
    ),
    {
      'query/kernel': ((), (7,), (5, 6)),
      'key/kernel': ((), (7,), (5, 6)),
      'value/kernel': ((), (7,), (5, 6)),
      'out/kernel': ((), (5, 6), (3,)),
    },
  ),
  'convolution with the name of a projection': (
    lambda r: nnx.Dict(out=nnx.Conv(7, 3, (2, 2), rngs=r)),
    {'out/kernel': ((), (7,), (3,))},
  ),
  'GRUCell': (
    lambda r: nnx.GRUCell(7, 3, rngs=r),
    {'dense_i/kernel': ((), (7,), (9,)), 'dense_h/kernel': ((), (3,), (9,))},
  ),
}


@pytest.mark.parametrize('name', AXES_NNX)
def test_axes_of_flax_nnx(name):
  make, expected = AXES_NNX[name]
  module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  state = nnx.state(module, nnx.Param)
  assert _axes(state) == expected
  assert _axes(nnx.to_pure_dict(state)) == expected
  assert _axes(module) == expected


def test_axes_of_stacked_flax_nnx():
  make = nnx.vmap(lambda key: nnx.Linear(7, 3, rngs=nnx.Rngs(key)))
  module = make(jax.random.split(KEY, 4))
  expected = {'kernel': ((4,), (7,), (3,))}
  assert _axes(module) == expected  # By its class, which a state lacks:
  assert _axes(nnx.state(module, nnx.Param), stacked='') == expected


AXES_EQUINOX = {
  'Linear': (
    lambda k: eqx.nn.Linear(7, 3, key=k),
    {'weight': ((), (7,), (3,))},
  ),
  'Conv1d': (
    lambda k: eqx.nn.Conv1d(7, 3, 2, key=k),
    {'weight': ((), (7,), (3,))},
  ),
  'Conv2d of groups': (
    lambda k: eqx.nn.Conv2d(14, 4, 2, groups=2, key=k),
    {'weight': ((), (7,), (4,))},
  ),
  'ConvTranspose2d': (
    lambda k: eqx.nn.ConvTranspose2d(7, 3, 2, key=k),
    {'weight': ((), (7,), (3,))},
  ),
  'LSTMCell': (
    lambda k: eqx.nn.LSTMCell(7, 3, key=k),
    {'weight_ih': ((), (7,), (12,)), 'weight_hh': ((), (3,), (12,))},
  ),
  'GRUCell': (
    lambda k: eqx.nn.GRUCell(7, 3, key=k),
    {'weight_ih': ((), (7,), (9,)), 'weight_hh': ((), (3,), (9,))},
  ),
  'MultiheadAttention': (
    lambda k: eqx.nn.MultiheadAttention(
      num_heads=2,
      query_size=6,
      key_size=5,
      value_size=7,
      output_size=9,
      key=k,
    ),
    {
      'query_proj/weight': ((), (6,), (6,)),
      'key_proj/weight': ((), (5,), (6,)),
      'value_proj/weight': ((), (7,), (6,)),
      'output_proj/weight': ((), (6,), (9,)),
    },
  ),
}


@pytest.mark.parametrize('name', AXES_EQUINOX)
def test_axes_of_equinox(name):
  make, expected = AXES_EQUINOX[name]
  assert _axes(eqx.filter_eval_shape(make, KEY)) == expected
  # The classes say that it is an ensemble.
  ensemble = eqx.filter_eval_shape(
    eqx.filter_vmap(make), jax.random.split(KEY, 4)
  )
  assert _axes(ensemble) == {
    path: ((4,), inputs, outputs)
    for path, (_, inputs, outputs) in expected.items()
  }


def test_axes_of_the_general_convolution_of_equinox():
  conv = eqx.filter_eval_shape(lambda: eqx.nn.Conv(2, 7, 3, 2, key=KEY))
  assert _axes(conv) == {'weight': ((), (7,), (3,))}


def test_axes_of_other_leaves():
  tables = {
    'embed': {'embeddings': np.ones((5, 3))},
    'scan': {'embedding': np.ones((4, 5, 3))},
    'equinox': eqx.nn.Embedding(5, 3, key=KEY),
  }
  with_embeddings = functools.partial(leaves.is_weight, embeddings=True)
  found = leaves.map_with_path(leaves.axes, tables)
  assert leaves.weight_mask(tables, with_embeddings)['embed']['embeddings']
  assert found['embed']['embeddings'] == ((), (0,), (1,))
  assert found['scan']['embedding'] == ((0,), (1,), (2,))
  assert found['equinox'].weight == ((), (0,), (1,))
  # Biases and scalars have axes too, as an is_weight may choose them.
  assert leaves.axes('linear/b', np.ones(3)) == ((), (), (0,))
  assert leaves.axes('linear/w', np.ones(3)) == ((), (), (0,))
  assert leaves.axes('__layer_stack/linear/b', np.ones((4, 3))) == (
    *((0,), (), (1,)),
  )
  assert leaves.axes('temperature', np.ones(())) == ((), (), ())


def test_leaves_by_path():
  params = {'a': {'w': jnp.ones(2), 'b': jnp.zeros(1)}, 'c': {'w': jnp.ones(3)}}
  assert list(leaves.by_path(params)) == ['a/b', 'a/w', 'c/w']
  assert list(leaves.by_path(params, ['c/w', 'a/w'])) == ['a/w', 'c/w']
  found = leaves.put(params, {'a/w': jnp.full(2, 7.0), 'other': 0})
  np.testing.assert_array_equal(found['a']['w'], [7, 7])
  assert found['c']['w'] is params['c']['w']


def test_two_leaves_of_one_path():
  with pytest.raises(ValueError, match='same path'):
    leaves.by_path({'a': {'b': 1}, 'a/b': 2})


def test_rows_of_trees_with_other_leaves():
  params = {'linear': {'w': np.ones((2, 3)), 'b': np.ones(3)}}
  masks = {'linear': {'w': np.ones((2, 3), bool), 'b': None}}
  with pytest.raises(ValueError, match='same leaves.* they have 2, 1 leaves'):
    leaves.weight_rows(params, leaves.is_weight, masks)

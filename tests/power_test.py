"""Tests of the power map and of its transforms of trees."""

import contextlib
import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import transforms

ALPHAS = (1.0, 1.25, 1.375, 1.5, 1.7, 2.0, 2.5, 3.0, 4.0, 5.0)
DTYPES = ('float32', 'bfloat16', 'float16', 'float64')
POWERS = ALPHAS[1:]
BAD_ALPHAS = (0.999, 0.0, -1.0, float('nan'), float('inf'), -float('inf'))


def _x64_for(dtype):
  return (
    jax.enable_x64(True) if dtype == 'float64' else contextlib.nullcontext()
  )


def _inputs(dtype):
  # In this range every result is a normal number of float16.
  x = np.geomspace(0.2, 8.0, 101)
  return jnp.asarray(np.concatenate([x, -x]), dtype)


def _rtol(dtype):
  eps = float(jnp.finfo(dtype).eps)
  # Half precision is computed in float32 and rounded once, by half an ulp.
  return 0.51 * eps if dtype in ('bfloat16', 'float16') else 16 * eps


def _psi(x, alpha):
  return x * np.abs(x) ** (alpha - 1)


def _inverse(x, alpha):
  return np.sign(x) * np.abs(x) ** (1 / alpha)


def _derivative(x, alpha):
  return alpha * np.abs(x) ** (alpha - 1)


FUNCTIONS = {
  'psi': (power.psi, _psi),
  'psi_inverse': (power.psi_inverse, _inverse),
  'psi_derivative': (power.psi_derivative, _derivative),
}


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('alpha', ALPHAS)
@pytest.mark.parametrize('name', FUNCTIONS)
def test_values(name, alpha, dtype):
  f, expected = FUNCTIONS[name]
  with _x64_for(dtype):
    x = _inputs(dtype)
    y = f(x, alpha)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    np.testing.assert_allclose(
      np.asarray(y, np.float64),
      expected(np.asarray(x, np.float64), alpha),
      rtol=_rtol(dtype),
    )


@pytest.mark.parametrize('alpha', POWERS)
@pytest.mark.parametrize('name', FUNCTIONS)
def test_values_of_small_and_large_inputs(name, alpha):
  f, expected = FUNCTIONS[name]
  x = jnp.asarray(np.geomspace(1e-6, 1e6, 301), jnp.float32)
  np.testing.assert_allclose(
    f(x, alpha), expected(np.asarray(x, np.float64), alpha), rtol=1e-5
  )


@pytest.mark.parametrize('alpha', ALPHAS)
def test_extreme_inputs(alpha):
  x = jnp.asarray([1e-45, 1e-39, 1e-30, 3e38, jnp.inf], jnp.float32)
  for f in (power.psi, power.psi_inverse, power.psi_derivative):
    y = np.asarray(f(x, alpha))
    assert not np.isnan(y).any()
    assert (y >= 0).all()
    assert (y[1:] >= y[:-1]).all()
    sign = 1 if f is power.psi_derivative else -1
    np.testing.assert_array_equal(f(-x, alpha), sign * y)
  assert power.psi(x, alpha)[-1] == jnp.inf
  assert power.psi_inverse(x, alpha)[-1] == jnp.inf
  assert np.isnan(power.psi(jnp.asarray(jnp.nan), alpha))
  assert np.isnan(power.psi_inverse(jnp.asarray(jnp.nan), alpha))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('alpha', ALPHAS)
def test_odd_and_zero_at_zero(alpha, dtype):
  with _x64_for(dtype):
    x = _inputs(dtype)
    zeros = jnp.asarray([0.0, -0.0], dtype)
    for f in (power.psi, power.psi_inverse):
      np.testing.assert_array_equal(f(-x, alpha), -f(x, alpha))
      np.testing.assert_array_equal(f(zeros, alpha), zeros)


@pytest.mark.parametrize('dtype', ('float32', 'float64'))
@pytest.mark.parametrize('alpha', ALPHAS)
def test_round_trip(alpha, dtype):
  with _x64_for(dtype):
    x = _inputs(dtype)
    tolerance = 16 * float(jnp.finfo(dtype).eps)
    back = power.psi(power.psi_inverse(x, alpha), alpha)
    np.testing.assert_allclose(back, x, rtol=tolerance)
    back = power.psi_inverse(power.psi(x, alpha), alpha)
    np.testing.assert_allclose(back, x, rtol=tolerance)


@pytest.mark.parametrize('alpha', ALPHAS)
def test_derivative_is_that_of_finite_differences(alpha):
  with jax.enable_x64(True):
    x = _inputs('float64')
    h = 1e-5 * jnp.abs(x)
    for f in (power.psi, power.psi_inverse):
      slope = (f(x + h, alpha) - f(x - h, alpha)) / (2 * h)
      grad = jax.vmap(jax.grad(f), (0, None))(x, alpha)
      np.testing.assert_allclose(grad, slope, rtol=1e-8)
      if f is power.psi:
        np.testing.assert_allclose(
          power.psi_derivative(x, alpha), slope, rtol=1e-8
        )


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('alpha', ALPHAS)
def test_derivative_is_exact_at_zero(alpha, dtype):
  with _x64_for(dtype):
    zeros = jnp.asarray([0.0, -0.0], dtype)
    expected = np.full(2, 1.0 if alpha == 1 else 0.0)

    def f(x):
      return power.psi(x, alpha)

    def derivatives(x):
      ones = jnp.ones_like(x)
      return {
        'formula': power.psi_derivative(x, alpha),
        'jvp': jax.jvp(f, (x,), (ones,))[1],
        'vjp': jax.vjp(f, x)[1](ones)[0],
        'grad': jax.grad(lambda x: jnp.sum(f(x)))(x),
        'vmap of grad': jax.vmap(jax.grad(f))(x),
      }

    found = jax.jit(derivatives)(zeros)
    found['not compiled'] = jax.grad(lambda x: jnp.sum(f(x)))(zeros)
    for name, derivative in found.items():
      assert derivative.dtype == zeros.dtype, name
      np.testing.assert_array_equal(
        np.asarray(derivative, np.float64), expected, err_msg=name
      )


@pytest.mark.parametrize('alpha', ALPHAS)
def test_second_derivative_away_from_zero(alpha):
  with jax.enable_x64(True):
    x = np.asarray(_inputs('float64'))
    expected = alpha * (alpha - 1) * np.abs(x) ** (alpha - 2) * np.sign(x)

    def f(y):
      return power.psi(y, alpha)

    @jax.jit
    def seconds(x):
      grad = jax.grad(f)
      return [jax.vmap(g(grad))(x) for g in (jax.grad, jax.jacfwd)]

    for second in seconds(np.append(x, 0.0)):
      np.testing.assert_allclose(second[:-1], expected, rtol=1e-12, atol=0)
      # It is finite at zero too, where it exists.
      assert second[-1] == 0.0 or 1 < alpha < 2


@pytest.mark.parametrize('alpha', ALPHAS)
def test_jit_and_vmap_give_the_same(alpha):
  x = _inputs('float32')
  functions = [f for f, _ in FUNCTIONS.values()]
  mapped = jax.jit(jax.vmap(lambda row: [f(row, alpha) for f in functions]))
  for f, y in zip(functions, mapped(x.reshape(2, -1))):
    np.testing.assert_allclose(y.ravel(), f(x, alpha), rtol=1e-6)


def test_alpha_one_is_no_computation():
  phi = {'linear': {'w': jnp.asarray([0.3, -0.0, jnp.nan]), 'b': jnp.ones(2)}}
  transform = power.power_transform(1.0)
  w = phi['linear']['w']
  assert power.psi(w, 1.0) is w
  assert power.psi_inverse(w, 1.0) is w
  for f in (
    transform.to_theta,
    transform.to_phi,
    lambda x: transform.scale_by_jacobian(x, x),
  ):
    assert jax.make_jaxpr(f)(phi).eqns == []
    out = f(phi)
    assert out['linear']['w'] is w
  grad = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(power.psi(x, 1.0))))(w)
  plain = jax.make_jaxpr(jax.grad(jnp.sum))(w)
  assert str(grad) == str(plain)


@pytest.mark.parametrize('alpha', BAD_ALPHAS)
def test_bad_alpha_is_an_error(alpha):
  x = jnp.ones(2)
  phi = {'linear': {'w': x}}
  for f in (
    power.check_alpha,
    power.power_transform,
    lambda a: power.psi(x, a),
    lambda a: power.psi_inverse(x, a),
    lambda a: power.psi_derivative(x, a),
    lambda a: power.describe(phi, a),
    lambda a: power.power_transform(lambda path, leaf: a).to_theta(phi),
    lambda a: power.power_transform(lambda path, leaf: a).to_phi(phi),
  ):
    with pytest.raises(ValueError, match=f'alpha must be .* got {alpha}'):
      f(alpha)


def _tree():
  values = jnp.asarray([0.5, -2.0, 0.0, 1.5])
  return {
    'linear': {'w': values, 'b': values + 1},
    'conv': {'w': values.reshape(1, 1, 2, 2)},
    'norm': {'scale': values + 2, 'offset': values},
    'embed': {'embeddings': values.reshape(2, 2)},
    'steps': {'w': jnp.arange(3)},
  }


def _alpha_by_path(path, leaf):
  assert hasattr(leaf, 'shape')
  return {'linear/w': 3.0, 'conv/w': 1.5}[path]


def test_transform_maps_weights_and_nothing_else():
  phi = _tree()
  for alpha in (2.0, _alpha_by_path):
    a, b = (2.0, 2.0) if alpha == 2.0 else (3.0, 1.5)
    transform = power.power_transform(alpha)
    theta = transform.to_theta(phi)
    assert jax.tree.structure(theta) == jax.tree.structure(phi)
    for key, name, leaf_alpha in (('linear', 'w', a), ('conv', 'w', b)):
      x = np.asarray(phi[key][name])
      np.testing.assert_allclose(
        theta[key][name], _psi(x, leaf_alpha), rtol=1e-6
      )
    back = transform.to_phi(theta)
    for tree in (theta, back):
      for key, name in (
        ('linear', 'b'),
        ('norm', 'scale'),
        ('norm', 'offset'),
        ('embed', 'embeddings'),
        ('steps', 'w'),
      ):
        assert tree[key][name] is phi[key][name]
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), back, phi
    )


def test_transform_takes_another_choice_of_weights():
  phi = _tree()
  transform = power.power_transform(2.0, lambda path, leaf: path == 'linear/b')
  theta = transform.to_theta(phi)
  np.testing.assert_allclose(
    theta['linear']['b'], _psi(np.asarray(phi['linear']['b']), 2.0), rtol=1e-6
  )
  assert theta['linear']['w'] is phi['linear']['w']


def test_scale_by_jacobian():
  phi = _tree()
  updates = jax.tree.map(lambda x: jnp.full(x.shape, -0.5), phi)
  scaled = power.power_transform(_alpha_by_path).scale_by_jacobian(updates, phi)
  for key, alpha in (('linear', 3.0), ('conv', 1.5)):
    x = np.asarray(phi[key]['w'])
    np.testing.assert_allclose(
      scaled[key]['w'], -0.5 * _derivative(x, alpha), rtol=1e-6
    )
  assert scaled['linear']['w'][2] == 0.0
  assert scaled['linear']['b'] is updates['linear']['b']
  assert scaled['steps']['w'] is updates['steps']['w']


@pytest.mark.parametrize('phi_dtype', ('float32', 'bfloat16'))
@pytest.mark.parametrize('dtype', ('float32', 'bfloat16', 'float16'))
def test_scale_by_jacobian_keeps_the_dtype_of_the_update(dtype, phi_dtype):
  phi = {'w': jnp.asarray([0.5, -2.0], phi_dtype)}
  updates = {'w': jnp.ones(2, dtype)}
  scaled = power.power_transform(3.0).scale_by_jacobian(updates, phi)['w']
  assert scaled.dtype == dtype
  np.testing.assert_array_equal(np.asarray(scaled, float), [0.75, 12.0])


def test_leaves_that_are_no_arrays_pass():
  tree = {'w': 'placeholder', 'linear': {'w': jnp.asarray([2.0]), 'b': None}}
  transform = power.power_transform(2.0)
  theta = transform.to_theta(tree)
  assert theta['w'] == 'placeholder'
  assert theta['linear']['b'] is None
  assert theta['linear']['w'][0] == 4.0
  assert power.exponents(tree, 2.0) == {
    'w': 1.0,
    'linear': {'w': 2.0, 'b': None},
  }


def _net(x):
  init = hk.initializers.RandomUniform(-0.3, 0.3)  # Fast to compile.
  x = jax.nn.relu(hk.Linear(64, w_init=init)(x))
  return hk.Linear(3, w_init=init)(hk.LayerNorm(-1, True, True)(x))


@pytest.mark.parametrize('old, new', [(1.0, 3.0), (2.0, 1.375)])
def test_change_alpha_preserves_the_function(old, new):
  f = hk.without_apply_rng(hk.transform(_net))
  x = jax.random.normal(jax.random.key(0), (5, 16))
  theta = f.init(jax.random.key(1), x)
  before = power.power_transform(old)
  after = power.power_transform(new)
  phi = before.to_phi(theta)
  changed = power.change_alpha(phi, before, after)
  # A root and its power round each weight by a few units in the last place.
  np.testing.assert_allclose(
    f.apply(after.to_theta(changed), x), f.apply(theta, x), 1e-6, 1e-6
  )
  assert not np.allclose(changed['linear']['w'], phi['linear']['w'])


def test_descriptions():
  phi = {
    'embed': {'embeddings': jnp.ones((5, 2))},
    'linear': {'b': jnp.zeros(3), 'w': jnp.ones((2, 3))},
    'output': {'w': jnp.zeros((3, 1))},
  }
  rows = power.descriptions(phi, lambda path, leaf: 2.5)
  assert rows == [
    ('embed/embeddings', (5, 2), False, 1.0, False, 'embedding'),
    ('linear/b', (3,), False, 1.0, True, "'b' is not the name of a weight"),
    ('linear/w', (2, 3), True, 2.5, False, 'Haiku weight'),
    ('output/w', (3, 1), True, 2.5, True, 'Haiku weight'),
  ]
  # Values that are not known do not count as zero.
  abstract = power.descriptions(jax.eval_shape(lambda: phi), 2.5)
  assert abstract == [row._replace(zero=False) for row in rows]
  traced = []
  jax.jit(lambda x: traced.extend(power.descriptions(x, 2.5)))(phi)
  assert traced == abstract


def test_random_keys_in_the_state_of_a_model_are_described():
  (row,) = power.descriptions({'rngs': {'key': jax.random.key(0)}})
  assert row[:5] == ('rngs/key', (), False, 1.0, False)


def test_describe_is_a_table(capsys):
  phi = {'linear': {'b': jnp.zeros(3), 'w': jnp.ones((2, 3))}}
  text = power.describe(phi, 2.5)
  assert capsys.readouterr().out == ''
  head, rule, *lines = text.splitlines()
  assert head.split() == [
    *('leaf', 'shape', 'weight', 'alpha', 'all', 'zero', 'why')
  ]
  assert set(rule) == {'-', ' '}
  assert [' '.join(line.split()) for line in lines] == [
    "linear/b (3,) no 1 yes 'b' is not the name of a weight",
    'linear/w (2, 3) yes 2.5 no Haiku weight',
  ]


def test_describe_says_when_the_default_was_overruled():
  phi = {'linear': {'b': jnp.ones(3), 'w': jnp.ones((2, 3))}}
  arguments = phi, 2.0, lambda path, leaf: path == 'linear/b'
  rows = power.descriptions(*arguments)
  assert [(r.weight, r.alpha) for r in rows] == [(True, 2.0), (False, 1.0)]
  assert all('is_weight chose otherwise' in r.why for r in rows)
  assert power.describe(*arguments).count('is_weight chose otherwise') == 2


def test_descriptions_agree_with_the_weights_of_leaves():
  tree = _tree()
  chosen = [row.weight for row in power.descriptions(tree)]
  assert chosen == jax.tree.leaves(leaves.weight_mask(tree))


# Trees with nothing to reparameterise, and weights that cannot be trained.

_OTHER_NAMES = {'layer': {'W': jnp.full((2, 3), 0.5), 'b': jnp.ones(3)}}


@pytest.mark.parametrize('alpha', [2.0, lambda path, leaf: 1.0])
def test_transforms_refuse_trees_without_a_weight(alpha):
  transform = power.power_transform(alpha)
  for f in (
    transform.to_theta,
    transform.to_phi,
    transform.powers,
    jax.jit(transform.to_theta),
    lambda tree: transform.scale_by_jacobian(tree, tree),
    lambda tree: power.change_alpha(tree, transform, transform),
  ):
    with pytest.raises(ValueError, match='There is no weight') as error:
      f(_OTHER_NAMES)
    # The error has the table of leaves.
    assert power.describe(_OTHER_NAMES) in str(error.value)


@pytest.mark.parametrize('alpha', [2.0, lambda path, leaf: 2.0])
def test_flattened_trees_are_refused(alpha):
  params = {'linear': {'w': jnp.ones((2, 3)), 'b': jnp.ones(3)}}
  for tx in (
    transforms.powerprop(optax.sgd(0.1), alpha),
    transforms.target_propagation(optax.sgd(0.1), power.power_transform(alpha)),
    transforms.decay_phi(0.1),
  ):
    with pytest.raises(ValueError, match='or put `optax.flatten` inside'):
      optax.flatten(tx).init(params)
  inside = transforms.powerprop(optax.flatten(optax.adam(0.1)), alpha)
  outside = transforms.powerprop(optax.adam(0.1), alpha)
  found, expected = (
    tx.update(params, tx.init(params), params)[0] for tx in (inside, outside)
  )
  chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_transforms_of_trees_in_which_nothing_has_to_be_a_weight():
  baseline, transform = power.power_transform(1.0), power.power_transform(2.0)
  w = _OTHER_NAMES['layer']['W']
  assert baseline.to_theta(_OTHER_NAMES)['layer']['W'] is w
  biases = {'linear': {'b': jnp.ones(3)}, 'norm': {'scale': jnp.ones(())}}
  assert transform.to_theta(biases)['linear']['b'] is biases['linear']['b']
  assert transform.to_theta({}) == {}
  chosen = power.power_transform(2.0, lambda path, leaf: path == 'layer/W')
  np.testing.assert_array_equal(
    chosen.to_theta(_OTHER_NAMES)['layer']['W'], 0.25
  )


def test_known_zeros_are_found_while_a_function_is_traced():
  zeros, ones = ({'w': f((2, 2))} for f in (jnp.zeros, jnp.ones))
  power.check_not_zero(ones, {'w': 2.0})
  jax.eval_shape(lambda: power.check_not_zero(ones, {'w': 2.0}))
  with pytest.raises(ValueError, match='All values of'):
    jax.eval_shape(lambda: power.check_not_zero(zeros, {'w': 2.0}))


def test_check_not_zero():
  params = {
    'a': {'w': jnp.zeros((2, 2)), 'b': jnp.zeros(2)},
    'b': {'w': jnp.zeros((2, 2)).at[1, 1].set(-1e-30)},
    'c': {'w': np.zeros((2, 2), np.float32)},
    'd': {'w': jnp.zeros((0, 2))},
  }

  def check(params, alpha):
    power.check_not_zero(params, power.exponents(params, alpha))

  with pytest.raises(
    ValueError, match='initialiser.*is_weight.*alpha = 1.*floor'
  ) as e:
    check(params, 2.0)
  assert "['a/w', 'c/w']" in str(e.value)
  check(params, 1.0)
  check(params, lambda path, leaf: 1.0 if path in ('a/w', 'c/w') else 2.0)
  with pytest.raises(ValueError, match=r"\['c/w'\]"):
    check(params, lambda path, leaf: 1.0 if path == 'a/w' else 2.0)
  # The values of these are not known.
  check(jax.eval_shape(lambda: params), 2.0)
  jax.jit(lambda params: check(params, 2.0))(params)


def test_pruned_networks_still_change_their_power():
  """Whole layers of zeros are no error after training has started."""
  phi = {'linear': {'w': jnp.zeros((2, 2))}, 'last': {'w': jnp.ones((2, 2))}}
  two, three = map(power.power_transform, (2.0, 3.0))
  changed = power.change_alpha(phi, two, three)
  np.testing.assert_array_equal(changed['linear']['w'], 0.0)


@pytest.mark.parametrize('alpha', ['2', 'two'])
def test_texts_are_no_powers(alpha):
  with pytest.raises(
    ValueError, match=f"alpha must be a number, got '{alpha}'"
  ):
    power.power_transform(alpha)


def test_nats():
  """By hand, and by the share that is left of a weight without gradient."""
  assert power.nats(2.0, 0.01, 50) == pytest.approx(1.0)
  linear = optax.linear_schedule(0.1, 0.0, 10)  # 0.1 + 0.09 + ... + 0.01.
  assert power.nats(3.0, linear, 10) == pytest.approx(3 * 0.55)
  assert power.nats(3.0, linear, 100) == pytest.approx(3 * 0.55)
  assert power.nats(2.0, optax.constant_schedule(0.01), 50) == pytest.approx(1)
  assert power.nats(1.0, linear, 0) == 0.0
  rising = optax.piecewise_constant_schedule(1.5, {5: 2.0})
  assert power.nats(rising, 0.1, 10) == pytest.approx(0.5 * (1.5 + 3.0))
  assert power.nats(rising, linear, 10) == pytest.approx(1.5 * 0.4 + 3 * 0.15)
  left = power.psi(0.7 * (1 - 1e-4) ** 5_000, 3.0) / power.psi(0.7, 3.0)
  assert float(left) == pytest.approx(
    np.exp(-power.nats(3.0, 1e-4, 5_000)), rel=1e-3
  )
  with pytest.raises(ValueError, match='got 0.5'):
    power.nats(0.5, 0.01, 10)


def test_schedules_are_told_from_powers_by_path():
  for schedule in (
    optax.linear_schedule(1.0, 2.0, 5),
    optax.piecewise_constant_schedule(1.0, {2: 2.0}),
    jax.jit(lambda count: 1.0 + count),
    functools.partial(lambda scale, count: scale * count, 2.0),
    lambda count, *, offset=0: 1.0,
  ):
    assert power.is_schedule(schedule)
    with pytest.raises(ValueError, match='change_alpha'):
      power.power_transform(schedule)
  for by_path in (
    lambda path, leaf: 2.0,
    lambda *_: 2.0,
    lambda path, leaf=None: 2.0,
    functools.partial(lambda a, path, leaf: a, 2.0),
    2.0,
    np.float32(2.0),
  ):
    assert not power.is_schedule(by_path)

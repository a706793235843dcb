"""Tests of the optimisers that settings ask for."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest

from experiments.support import optimisers

_PHI: Any = {'linear': {'w': np.array([2.0, -0.5], np.float32)}}
_GRADS: Any = {'linear': {'w': np.array([1.0, 3.0], np.float32)}}


def _update(steps=1, **flag_values):
  rule = flag_values.pop('update_rule', 'target_propagation')
  settings = optimisers.Settings(**flag_values)
  _, tx = optimisers.make(settings, 2.0, steps=100, update_rule=rule)
  updates: Any = None
  state = tx.init(_PHI)
  for _ in range(steps):
    updates, state = tx.update(_GRADS, state, _PHI)
  assert updates is not None
  return np.asarray(updates['linear']['w'])


def test_weight_decay_acts_on_theta():
  # theta = (4, -0.25), and the Jacobian 2 |phi| = (4, 1).
  np.testing.assert_allclose(
    _update(weight_decay=0.5), [-0.1 * (1 + 2) * 4, -0.1 * (3 - 0.125)], 1e-6
  )


@pytest.mark.parametrize(
  ('schedule', 'factors'),
  [
    ('constant', [1, 1, 1, 1, 1]),
    ('steps', [1, 0.1, 0.1, 0.01, 0.001]),
    ('cosine', (1 + np.cos(np.pi * np.array([29, 30, 50, 75, 80]) / 100)) / 2),
  ],
)
def test_the_rate_falls(schedule, factors):
  settings = optimisers.Settings(schedule=schedule, warmup_steps=10)
  rate = optimisers.learning_rate(settings, 100)
  found = [rate(t) for t in (29, 30, 50, 75, 80)]
  np.testing.assert_allclose(found, 0.1 * np.array(factors), 1e-5)


def test_the_rate_warms_up():
  updates = _update(3, schedule='steps', warmup_steps=10)
  np.testing.assert_allclose(updates, -0.1 * 0.3 * np.array([4, 3]), 1e-5)


@pytest.mark.parametrize(
  ('schedule', 'step', 'factor'),
  [
    ('constant', 80, 1.0),
    ('cosine', 51, 0.5),
    ('0.7', 70, 1.0),
    ('0.7', 71, 0.0),
  ],
)
def test_phi_decay_acts_on_phi(schedule, step, factor):
  plain = np.array([-0.1 * 4, -0.1 * 3])
  updates = _update(step, phi_decay=1e-2, phi_decay_schedule=schedule)
  expected = plain - factor * 1e-2 * np.array([2.0, -0.5])
  np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.parametrize(('norm', 'factor'), [(1.0, 0.1**0.5), (4.0, 1.0)])
def test_gradients_are_clipped_at_theta(norm, factor):
  updates = _update(clip_norm=norm, phi_decay=1e-2)
  decay = 1e-2 * np.array([2.0, -0.5])
  expected = -0.1 * factor * np.array([4.0, 3.0]) - decay
  np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.parametrize(('step', 'factor'), [(1, 0.1), (5, 0.5), (11, 1.0)])
def test_phi_decay_warms_up(step, factor):
  plain = np.array([-0.1 * 4, -0.1 * 3])
  updates = _update(step, phi_decay=1e-2, phi_decay_warmup_steps=10)
  expected = plain - factor * 1e-2 * np.array([2.0, -0.5])
  np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_l1_decay_of_phi_stops_at_zero():
  plain = np.array([-0.1 * 4, -0.1 * 3])
  updates = _update(phi_decay=1.0, phi_decay_norm='l1')
  np.testing.assert_allclose(updates, plain - [1.0, -0.5], rtol=1e-6)


def test_decay_of_a_power_of_phi():
  plain = np.array([-0.1 * 4, -0.1 * 3])
  updates = _update(phi_decay=0.1, phi_decay_norm='0.5')
  sizes = np.array([2.0, 0.5]) ** 1.5
  expected = plain - np.array([2.0, -0.5]) * 0.05 / (sizes + 0.05)
  np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ('step', 'norm'), [(1, '0.5'), (25, '0.5'), (26, 'l1'), (51, 'l2')]
)
def test_the_norm_of_the_decay_changes_during_a_run(step, norm):
  several = _update(step, phi_decay=0.1, phi_decay_norm='0.5,l1:0.25,l2:0.5')
  alone = _update(step, phi_decay=0.1, phi_decay_norm=norm)
  np.testing.assert_allclose(several, alone, rtol=1e-6)
  other = 'l1' if norm == 'l2' else 'l2'
  other = _update(step, phi_decay=0.1, phi_decay_norm=other)
  assert np.abs(several - other).max() > 1e-3


def test_layers_can_have_a_phi_decay_of_their_own():
  plain = np.array([-0.1 * 4, -0.1 * 3])
  scale = ['line.r/w=2', 'linear=7']
  updates = _update(phi_decay=1e-2, phi_decay_scale=scale)
  np.testing.assert_allclose(updates, plain - [4e-2, -1e-2], rtol=1e-5)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'phi_decay_scale': ['linear']}, "must be pattern=factor.* 'linear'"),
    ({'phi_decay_schedule': 'banana'}, '=banana: must be constant, cosine'),
    ({'phi_decay_schedule': 'nan'}, '=nan: must be constant, cosine'),
    ({'phi_decay_schedule': '1.5'}, '=1.5: must be constant, cosine'),
    ({'nesterov': True}, '--nesterov=True: there is no momentum'),
    ({'optimizer': 'adam', 'momentum': 0.9}, 'adam takes no momentum'),
    ({'learning_rate': float('inf')}, '--learning_rate=inf: must be a finite'),
    ({'clip_norm': float('nan')}, '--clip_norm=nan: must be a finite'),
    ({'weight_decay': -1.0}, '--weight_decay=-1: must be at least 0'),
    ({'momentum': 1.5}, '--momentum=1.5: must be between 0 and 1'),
    ({'warmup_steps': 100}, '--warmup_steps=100 must be below the 100 steps'),
    (
      {'update_rule': 'chain_rule', 'weight_decay': 0.1},
      'chain_rule does not see',
    ),
    (
      {'update_rule': 'chain_rule', 'alpha_steps': ['3:0.5']},
      'chain_rule does not see',
    ),
    ({'update_rule': 'chain_rule', 'floor': 0.1}, 'chain_rule does not see'),
    ({'alpha_steps': ['3']}, 'must be alpha:fraction'),
    ({'alpha_steps': ['x:0.5']}, 'must be alpha:fraction'),
    ({'alpha_steps': ['3:1']}, 'must be alpha:fraction'),
    ({'alpha_steps': ['3:nan']}, 'must be alpha:fraction'),
    ({'alpha_steps': ['0.5:0.5']}, 'alpha must be a finite number >= 1'),
    ({'alpha_steps': ['2:0.5', '3:0.5']}, '2:0.5,3:0.5: the fractions must'),
    (
      {'alpha_steps': ['3:0.5'], 'phi_decay': 0.1, 'phi_decay_norm': 'l1'},
      '--phi_decay_norm=l1 is another penalty',
    ),
    ({'phi_decay_norm': 'l3'}, '--phi_decay_norm=l3: must be l1, l2 or a'),
    ({'phi_decay_norm': '2.5'}, '--phi_decay_norm=2.5: must be l1, l2 or a'),
    ({'phi_decay_norm': 'l1,l2'}, '=l1,l2: must be norm,norm:fraction'),
    ({'phi_decay_norm': 'l1,l2:1'}, '=l1,l2:1: must be norm,norm:fraction'),
    ({'phi_decay_norm': 'l1,3:0.5'}, '=l1,3:0.5: must be l1, l2 or a number'),
    (
      {'phi_decay_norm': 'l1,l2:0.996'},
      'in a run of 100 steps one of the norms has no step',
    ),
    # A wrong option of the decay is found also if there is no decay.
    ({'phi_decay_warmup_steps': 100}, '--phi_decay_warmup_steps=100 must be'),
  ],
)
def test_impossible_settings(values, message):
  with pytest.raises(ValueError, match=message):
    _update(**values)


def test_a_pattern_for_no_layer_is_refused():
  optimisers.check_scale(optimisers.Settings(phi_decay_scale=('lin=2',)), _PHI)
  with pytest.raises(
    ValueError, match="=lin=2,conv=3: the pattern 'conv' matc"
  ):
    optimisers.check_scale(
      optimisers.Settings(phi_decay_scale=('lin=2', 'conv=3')), _PHI
    )


def test_chain_rule_gives_the_optimiser_the_gradient_at_phi():
  adam = optax.adam(0.1)
  at_phi = {'linear': {'w': np.array([4.0, 3.0], np.float32)}}
  expected, _ = adam.update(at_phi, adam.init(_PHI), _PHI)
  updates = _update(update_rule='chain_rule', optimizer='adam')
  np.testing.assert_allclose(updates, expected['linear']['w'], rtol=1e-6)


@pytest.mark.parametrize('optimizer', sorted(optimisers.OPTIMISERS))
def test_every_optimiser_can_be_built_with_decay(optimizer):
  assert np.isfinite(_update(optimizer=optimizer, weight_decay=1e-3)).all()


def _train(first_alphas, **flag_values):
  """theta after ten steps from each of the first alphas, one after another.

  The first weight has a gradient and the second has none.
  """
  settings = optimisers.Settings(momentum=0.9, clip_norm=3.0, **flag_values)
  theta: Any = {'linear': {'w': np.array([0.8, -0.3], np.float32)}}
  state = None
  for alpha in first_alphas:
    transform, tx = optimisers.make(settings, alpha, steps=100)
    phi = transform.to_phi(theta)
    state = tx.init(phi) if state is None else state
    update = jax.jit(tx.update)
    for _ in range(10):
      w: Any = transform.to_theta(phi)
      grads = {'linear': {'w': (w['linear']['w'] - 0.4) * np.array([1.0, 0.0])}}
      updates, state = update(grads, state, phi)
      phi = optax.apply_updates(phi, updates)
    theta = transform.to_theta(phi)
  return np.asarray(theta['linear']['w'])


def test_powers_change_at_their_steps():
  settings = optimisers.Settings(alpha_steps=('2:0.1', '3:0.2'))
  assert settings.powers(1.5, 100) == {0: 1.5, 10: 2.0, 20: 3.0}
  assert optimisers.last_alpha(settings, 1.5) == 3.0
  assert optimisers.last_alpha(optimisers.Settings(), 1.5) == 1.5
  steps = {'alpha_steps': settings.alpha_steps}
  decay = {'phi_decay': 1e-3, 'phi_decay_schedule': 'cosine'}
  # Decay takes the same from phi and from theta to first order, and meets the
  # step of the optimiser in another place.
  for options, rtol in (({'floor': 0.05}, 1e-5), (decay, 2e-3)):
    found = _train([1.5] * 3, **steps, **options)
    expected = _train([1.5, 2.0, 3.0], **options)
    np.testing.assert_allclose(found[0], expected[0], rtol=rtol)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)
    others = _train([1.5, 2.0, 2.0], **options)
    assert abs(others[0] / expected[0] - 1) > 1e-2
  assert abs(others[1] / expected[1] - 1) > 5e-3  # There is less decay.


@pytest.mark.parametrize('steps', [4, 100])
def test_every_power_has_steps(steps):
  settings = optimisers.Settings(alpha_steps=('2:0.5', '3:0.51', '4:0.999'))
  with pytest.raises(ValueError, match=f'of {steps} steps one of the powers'):
    optimisers.make(settings, 1.5, steps=steps)
  assert len(settings.powers(1.5, 10_000)) == 4


def test_nats_of_a_run():
  settings = optimisers.Settings(phi_decay=1e-3)
  assert optimisers.nats(settings, 2.0, 1_000) == pytest.approx(2.0)
  rising = dataclasses.replace(settings, alpha_steps=('2:0.25', '3:0.5'))
  found = optimisers.nats(rising, 1.0, 1_000)
  assert found == pytest.approx(0.25 * 1 + 0.25 * 2 + 0.5 * 3)
  l1 = dataclasses.replace(settings, phi_decay_norm='l1')
  assert optimisers.nats(l1, 2.0, 1_000) is None


def test_a_floor_moves_a_weight_at_zero():
  phi: Any = {'linear': {'w': np.array([1.0, 0.0], np.float32)}}
  _, tx = optimisers.make(optimisers.Settings(floor=0.5), 2.0, steps=100)
  grads: Any = {'linear': {'w': np.ones(2, np.float32)}}
  updates: Any = tx.update(grads, tx.init(phi), phi)[0]
  # theta moves by -0.1 / 2, of which phi is the root.
  np.testing.assert_allclose(updates['linear']['w'][1], -(0.05**0.5), 1e-6)

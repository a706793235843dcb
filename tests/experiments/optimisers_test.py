"""Tests of the optimisers that settings ask for."""

import dataclasses

import numpy as np
import optax
import pytest

from experiments.support import optimisers
from powerprop_jax import power


@dataclasses.dataclass(frozen=True)
class _Settings(optimisers.Optimiser, optimisers.Decay):
  """Both groups."""


_PHI = {'linear': {'w': np.array([2.0, -0.5], np.float32)}}
_GRADS = {'linear': {'w': np.array([1.0, 3.0], np.float32)}}


def _update(steps=1, **flag_values):
  rule = flag_values.pop('update_rule', 'target_propagation')
  settings = _Settings(**flag_values)
  tx = optimisers.make_tx(
    power.power_transform(2.0), settings, settings, steps=100, update_rule=rule
  )
  state, updates = tx.init(_PHI), None
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
    # A wrong decay is found out also where there is none.
    ({'phi_decay_warmup_steps': 100}, '--phi_decay_warmup_steps=100 must be'),
  ],
)
def test_impossible_settings(values, message):
  with pytest.raises(ValueError, match=message):
    _update(**values)


def test_a_pattern_for_no_layer_is_refused():
  optimisers.check_scale(_Settings(phi_decay_scale=('lin=2',)), _PHI)
  with pytest.raises(
    ValueError, match="=lin=2,conv=3: the pattern 'conv' matc"
  ):
    optimisers.check_scale(_Settings(phi_decay_scale=('lin=2', 'conv=3')), _PHI)


def test_chain_rule_gives_the_optimiser_the_gradient_at_phi():
  adam = optax.adam(0.1)
  at_phi = {'linear': {'w': np.array([4.0, 3.0], np.float32)}}
  expected, _ = adam.update(at_phi, adam.init(_PHI), _PHI)
  updates = _update(update_rule='chain_rule', optimizer='adam')
  np.testing.assert_allclose(updates, expected['linear']['w'], rtol=1e-6)


@pytest.mark.parametrize('optimizer', sorted(optimisers.OPTIMISERS))
def test_every_optimiser_can_be_built_with_decay(optimizer):
  assert np.isfinite(_update(optimizer=optimizer, weight_decay=1e-3)).all()

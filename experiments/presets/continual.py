"""Presets of `continual_learning`."""

from typing import Any

# Ten tasks of permuted digits. The rate and the decay of every method were
# chosen on validation data; LOG.md has the trials.
_TEN_TASKS = {
  'dataset': 'mnist',
  'tasks': 10,
  'seeds': 3,
  'steps_per_task': 3_000,
  'retrain_steps': 1_000,
  'evaluate_every': 10,
}


def _baseline(method: str, rate: float, **others: Any) -> dict[str, Any]:
  own = {'method': [method], 'alpha': ['1'], 'learning_rate': rate}
  return {**_TEN_TASKS, 'phi_decay': 0.0, **own, **others}


def _epn(
  alpha: str, rate: float, decay: float, **others: Any
) -> dict[str, Any]:
  own = {'method': ['epn'], 'alpha': [alpha], 'learning_rate': rate}
  own |= {'phi_decay': decay, 'gamma': 0.995, 'infer_tasks': ['10']}
  return {**_TEN_TASKS, **own, **others}


_L1 = {'phi_decay_norm': 'l1'}
_ACCURATE = {'gamma': 0.998, 'omit_first_layer': True}
# A hundred tasks, of which each may take 0.8 % of the weights: at 1 % the last
# ones have too few to choose from.
_HUNDRED = {
  'tasks': 100,
  'steps_per_task': 2_000,
  'evaluate_every': 25,
  'infer_tasks': [],
}
_CAPPED = {**_HUNDRED, 'cap': 0.008, 'omit_first_layer': True}
PRESETS = {
  'finetune': _baseline('finetune', 0.03),
  'ewc': _baseline('ewc', 0.1, ewc_strength=300.0),
  'independent': _baseline('independent', 0.1),
  'packnet': _baseline('packnet', 0.1, phi_decay=3e-4),
  'epn-1': _epn('1', 0.1, 1e-3),
  'epn-1-l1': _epn('1', 0.1, 1.2e-4, **_L1),
  'epn-1.5': _epn('1.5', 0.3, 7e-4),
  'epn-2': _epn('2', 0.3, 7e-4),
  'epn-3': _epn('3', 0.1, 3e-4),
  'epn-1-l1-omit': _epn('1', 0.1, 6e-5, **_L1, **_ACCURATE),
  'epn-1.5-omit': _epn('1.5', 0.3, 7e-4, **_ACCURATE),
  'hundred-packnet': _baseline('packnet', 0.1, phi_decay=3e-4, **_HUNDRED),
  'hundred-epn-1': _epn('1', 0.1, 1.8e-4, **_L1, **_CAPPED),
  'hundred-epn-2': _epn('2', 0.3, 1.05e-3, **_CAPPED),
}

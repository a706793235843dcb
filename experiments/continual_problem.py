"""A run of continual learning, built from its flags: functions, compiled once.

Everything that differs between tasks is an argument of the compiled functions:
data, masks, counts and anchors. A hundred tasks compile what one does.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import continual_pruning
from experiments import optimiser_flags
from experiments import runner
from powerprop_jax import continual
from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax import training
from powerprop_jax.continual import ewc
from powerprop_jax.continual import layouts
from powerprop_jax.data import augment
from powerprop_jax.models import networks
from powerprop_jax.training import classification
from powerprop_jax.training import devices

METHODS = ('epn', 'packnet', 'finetune', 'independent', 'ewc')
_CHUNK = 500  # Steps between two looks at the loss.
_FISHER_EXAMPLES = 500


class Job(NamedTuple):
  """One run: a network to be taken through all tasks."""

  method: str
  alpha: float
  seed: int

  @property
  def name(self) -> str:
    return f'{self.method}-alpha={self.alpha}-seed={self.seed}'


class Problem(NamedTuple):
  """What the runs of one method and alpha share.

  Attributes:
    layout: how every leaf is kept.
    transform: between phi and theta.
    omit: paths of which earlier tasks' weights are left out.
    fresh: maps a key to (phi, model_state) of a new network.
    train: (memory, masks, anchors, data, key, index, retraining, report) -> the
      memory after training on (images, labels), of which the last may be -1.
    choose: what `continual.learn_task` takes.
    accuracy: (theta, model_state, split) -> the accuracy of a network.
    logits: (theta, model_state, images) -> the logits.
    recall: (memory, task) -> (theta, model_state) of its network.
    anchor: (memory, anchors, split, key) -> what EWC holds the next task to;
      with the memory alone, before the first. None for other methods.
  """

  layout: layouts.Layout
  transform: power.PowerTransform
  omit: list[str]
  fresh: Callable[[jax.Array], tuple[Any, Any]]
  train: Callable[..., continual.Memory]
  choose: continual.Choose | None
  accuracy: Callable[..., float]
  logits: Callable[..., jax.Array]
  recall: Callable[..., tuple[Any, Any]]
  anchor: Callable[..., Any]


def _layout(settings, method: str, params) -> layouts.Layout:
  """What the method keeps of the network, and how."""
  kinds = {'task': 'private', 'shared': 'shared', 'frozen': 'frozen'}
  chosen: dict[str, Any] = {
    name: kinds[settings[name]] for name in ('heads', 'biases', 'norm')
  }
  if method == 'independent':
    chosen = {'weights': 'private', 'biases': 'private', 'norm': 'private'}
  elif method in ('finetune', 'ewc'):
    chosen |= {'weights': 'shared', 'biases': 'shared', 'norm': 'shared'}
  return layouts.make_layout(params, **chosen)


def _make_tx(settings, transform, steps: int, *, retraining: bool):
  """The optimiser; decay of phi makes sparse, and has no place afterwards."""
  options = {name: settings[name] for name in optimiser_flags.NAMES}
  if retraining:
    options |= {'warmup_steps': 0, 'phi_decay': 0.0}
    options['learning_rate'] = settings['retrain_learning_rate']
  return optimiser_flags.make_tx(
    transform, steps=steps, update_rule='target_propagation', **options
  )


def _make_train(settings, make_loss, transform, layout, axis):
  """The `train` of a `Problem`."""
  steps = {False: settings['steps_per_task'], True: settings['retrain_steps']}
  if not layouts.paths_of(layout, 'masked'):
    # Methods that do not prune take the steps of both at once.
    steps = {False: sum(steps.values()), True: 0}
  txs = {
    retraining: _make_tx(settings, transform, n, retraining=retraining)
    for retraining, n in steps.items()
    if n
  }

  @functools.cache
  def run_steps(retraining, frozen_norm):
    def run(state, anchors, data, indices):
      penalty = None if anchors is None else ewc.penalty(*anchors)
      step = training.make_train_step(
        make_loss(frozen_norm), txs[retraining], transform, axis, penalty
      )
      return training.make_run_steps(step)(state, data, indices)

    return devices.on_devices(run, axis)

  tx_init = {retraining: jax.jit(tx.init) for retraining, tx in txs.items()}

  def train(memory, chosen, anchors, data, key, index, retraining, report):
    size, home = int(jnp.sum(data[1] >= 0)), data[1].device
    state_key, data_key = jax.random.split(key)
    # Copies, as compiled steps overwrite their state.
    state = training.TrainState(
      phi=jax.tree.map(jnp.copy, memory.phi),
      model_state=jax.tree.map(jnp.copy, memory.model_state),
      opt_state=tx_init[retraining](memory.phi),
      masks=jax.tree.map(jnp.copy, chosen),
      step=jnp.zeros([], jnp.int32),
      key=state_key,
    )
    state, data, anchors = devices.replicate((state, data, anchors), axis)
    run = run_steps(retraining, layout.state == 'frozen' and index > 0)
    for start in range(0, steps[retraining], _CHUNK):
      count = min(_CHUNK, steps[retraining] - start)
      indices = training.batch_indices(
        data_key, start, count, settings['batch_size'], size
      )
      indices = devices.shard(indices, axis, dim=1)
      state, metrics = run(state, anchors, data, indices)
      metrics = jax.device_get(devices.unreplicate(metrics, axis))
      finite = np.isfinite(metrics['loss'])
      if not finite.all():
        raise runner.Diverged(
          f'the loss became {metrics["loss"][np.argmin(finite)]} in step'
          f' {start + int(np.argmin(finite))} of task {index}'
        )
      report(count, {k: float(np.mean(x)) for k, x in metrics.items()})
    if axis is not None:  # What is chosen from all devices still lies on all.
      state = jax.device_put(devices.unreplicate(state, axis), home)
    return memory._replace(phi=state.phi, model_state=state.model_state)

  return train


def _make_anchor(settings, logits, transform, layout):
  """The `anchor` of a `Problem`, for EWC."""
  shared = layouts.paths_of(layout, 'shared')

  @jax.jit
  def add(memory, anchors, images, key):
    theta = transform.to_theta(memory.phi)
    information = ewc.fisher(
      lambda theta, x: logits(theta, memory.model_state, x),
      theta,
      images,
      key=key,
    )
    held = leaves.put(
      jax.tree.map(lambda _: False, theta), dict.fromkeys(shared, True)
    )
    strength = settings['ewc_strength']
    return ewc.add_task(anchors, information, theta, strength, held)

  def anchor(memory, anchors=None, split=None, key=None):
    if split is None:
      return ewc.no_anchor(memory.phi)
    return add(memory, anchors, split.images[:_FISHER_EXAMPLES], key)

  return anchor


class _Functions(NamedTuple):
  """What training and searches are made of.

  Attributes:
    make_loss: maps whether normalisation is frozen to a loss.
    accuracy: of (theta, model_state, images, labels).
    logits: of (theta, model_state, images).
    mean_loss: of (theta, model_state, (images, labels)).
  """

  make_loss: Callable[[bool], Any]
  accuracy: Callable[..., jax.Array]
  logits: Callable[..., jax.Array]
  mean_loss: Callable[..., jax.Array]


def _make_functions(
  network_apply: Callable[..., Any], prepare: augment.Prepare
) -> _Functions:
  """The functions of a network; labels of -1 are padding and do not count."""

  def make_loss(frozen_norm):
    def apply(theta, model_state, key, x, is_training):
      # Frozen statistics normalise in training too: else the network that is
      # trained were another than the one that is evaluated.
      return network_apply(
        theta, model_state, key, x, is_training and not frozen_norm
      )

    return classification.make_loss(apply, prepare)

  accuracy = classification.make_accuracy(network_apply, prepare)

  def logits(theta, model_state, images):
    return network_apply(
      theta, model_state, None, prepare(None, images, False), False
    )[0]

  def mean_loss(theta, model_state, batch):
    images, labels = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits(theta, model_state, images), jnp.maximum(labels, 0)
    )
    # Padding counts nothing, also where a batch is nothing else.
    count = jnp.maximum(jnp.sum(labels >= 0), 1)
    return jnp.sum(losses, where=labels >= 0) / count

  return _Functions(make_loss, accuracy, logits, mean_loss)


def make_problem(
  settings: dict[str, Any],
  method: str,
  alpha: float,
  input_shape: tuple[int, ...],
  num_classes: int,
) -> Problem:
  """Builds the functions of a method; nothing is compiled yet.

  Args:
    settings: the flags.
    method: one of `METHODS`.
    alpha: the power.
    input_shape: of an image, (height, width, channels).
    num_classes: of a task.

  Returns:
    A `Problem`.

  Raises:
    ValueError: if the settings are impossible.
  """
  axis = devices.axis_name() if settings['data_parallel'] else None
  if settings['data_parallel']:
    devices.check_batch_size(settings['batch_size'])
  network = networks.build(
    settings['network'], num_classes, cross_replica_axis=axis
  )
  transform = power.power_transform(alpha)
  images = jnp.zeros((1, *input_shape))

  def fresh(key):
    theta, model_state = network.init(key, images, True)
    return transform.to_phi(theta), model_state

  params = jax.eval_shape(fresh, jax.random.key(0))[0]
  layout = _layout(settings, method, params)
  masked = layouts.paths_of(layout, 'masked')
  omit = [p for p in masked if 'initial' in p and settings['omit_first_layer']]
  prepare = augment.usual(settings['dataset'], axis)
  functions = _make_functions(network.apply, prepare)
  evaluate = jax.jit(functions.accuracy)
  choose = continual_pruning.make_choose(
    settings, method, functions.accuracy, functions.mean_loss, transform, omit
  )
  return Problem(
    layout=layout,
    transform=transform,
    omit=omit,
    fresh=jax.jit(fresh),
    train=_make_train(settings, functions.make_loss, transform, layout, axis),
    choose=choose,
    accuracy=lambda theta, state, split: float(evaluate(theta, state, *split)),
    logits=functions.logits,
    recall=jax.jit(functools.partial(continual.recall, transform=transform)),
    anchor=_make_anchor(settings, functions.logits, transform, layout)
    if method == 'ewc'
    else lambda *args: None,
  )

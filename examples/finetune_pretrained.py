"""Fine-tuning: a pretrained network is converted, trained further and pruned.

  python -m examples.finetune_pretrained

Any weights theta are those of some phi, so that Powerpropagation can take over
a network that was trained without. Here one was trained on the digits 0 to 4
and is fine-tuned on all ten; a decay of phi, which is a strong sparsifier for
alpha > 1, prepares it for pruning.
"""

import jax
import jax.numpy as jnp
import optax

import powerprop_jax
from powerprop_jax import training
from powerprop_jax.data import in_memory
from powerprop_jax.models import networks
from powerprop_jax.sparse import pruning
from powerprop_jax.training import classification

NETWORK = networks.build('lenet_300_100', 10)


def train(theta, transform, decay, split, steps, learning_rate):
  """Trains a network further from weights theta; returns its new theta."""
  schedule = optax.cosine_decay_schedule(learning_rate, steps)
  tx = powerprop_jax.target_propagation(
    optax.sgd(schedule, momentum=0.9), transform
  )
  if decay:  # Of phi, which ends before training: phi -= decay(t) * phi.
    rate = optax.cosine_decay_schedule(-decay, round(0.8 * steps))
    shrink = optax.inject_hyperparams(
      optax.add_decayed_weights, static_args='mask'
    )(rate, mask=powerprop_jax.weight_mask)
    tx = optax.chain(tx, shrink)
  loss_fn = classification.make_loss(NETWORK.apply)
  step = training.make_train_step(loss_fn, tx, transform)
  key = jax.random.key(1)
  state = training.init_state(key, theta, {}, tx, transform)
  rows = training.batch_indices(key, 0, steps, 60, len(split.labels))
  run = jax.jit(training.make_run_steps(step), donate_argnums=0)
  state, _ = run(state, jax.device_put((split.images, split.labels)), rows)
  return transform.to_theta(state.phi)


def main(steps: int = 4000, density: float = 0.02) -> dict[str, list[float]]:
  """Prints and returns test accuracies, dense and pruned, at both alphas."""
  data = in_memory.load('mnist_5k')
  few = data.train.labels < 5
  half = in_memory.Split(data.train.images[few], data.train.labels[few])
  images = jnp.zeros((1, *data.train.images.shape[1:]))
  theta, _ = NETWORK.init(jax.random.key(0), images, True)
  ordinary = powerprop_jax.power_transform(1.0)
  pretrained = train(theta, ordinary, 0.0, half, steps // 4, 0.05)
  accuracy = jax.jit(classification.make_accuracy(NETWORK.apply))
  results = {}
  for name, alpha, decay in (('as before', 1, 0), ('powerprop', 2, 1e-3)):
    transform = powerprop_jax.power_transform(alpha)
    tuned = train(pretrained, transform, decay, data.train, steps, 0.05)
    mask = pruning.prune(tuned, density, density_scale={'logits': 2.0})
    results[name] = [
      float(accuracy(weights, {}, *data.test))
      for weights in (tuned, powerprop_jax.apply_mask(tuned, mask))
    ]
    print(
      f'{name}: test accuracy {results[name][0]:.1%}, {results[name][1]:.1%}'
      f' with {density:.0%} of the weights'
    )
  return results


if __name__ == '__main__':
  main()

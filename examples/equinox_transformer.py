"""Equinox: a weight-sparse transformer that reads characters.

  python -m examples.equinox_transformer

prunes each matrix to its largest weights after every step of AdamW. The share
kept falls from 1 to 1/50 along a cubic, and what is cut stays cut. The text is
Python's own manual; alpha = 1 is the ordinary network. Changes are numbered."""

from pydoc_data import topics

import equinox as eqx
from equinox import nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax
from powerprop_jax.sparse import distributions
from powerprop_jax.sparse import schedules
from powerprop_jax.sparse import updaters

# The best of 0.003, 0.005, 0.01 and 0.02 at 1, and of 0.01, 0.02, 0.03 at 2.
RATES = {1.0: 1e-2, 2.0: 2e-2}


class Transformer(eqx.Module):
  embedding: nn.Embedding
  attention: list[nn.MultiheadAttention]
  mlp: list[nn.MLP]
  output: nn.Linear

  def __init__(self, keys):
    self.embedding = nn.Embedding(128, 64, key=keys[0])
    self.attention = [nn.MultiheadAttention(4, 64, key=k) for k in keys[1:3]]
    self.mlp = [nn.MLP(64, 64, 256, 1, key=k) for k in keys[3:5]]
    self.output = nn.Linear(64, 128, key=keys[5])

  def __call__(self, text):
    waves = jnp.outer(jnp.arange(48), 0.8 ** jnp.arange(64))
    x = jax.vmap(self.embedding)(text) + jnp.sin(waves)
    for attention, mlp in zip(self.attention, self.mlp):
      y = jax.nn.standardize(x)
      x = x + attention(y, y, y, jnp.tri(48, dtype=bool))
      x = x + jax.vmap(mlp)(jax.nn.standardize(x))
    return jax.vmap(self.output)(x)


@eqx.filter_jit
def bits(model, tx, state, text):
  """Bits per character; text is [rows, 49], of which 48 are inputs."""
  params, rest = eqx.partition(model, eqx.is_array)  # 1
  model = eqx.combine(tx.weights(params, state), rest)  # 2
  logits = jax.nn.log_softmax(jax.vmap(model)(text[:, :-1])) / jnp.log(2.0)
  return -jnp.take_along_axis(logits, text[:, 1:, None], axis=-1).mean()


@eqx.filter_jit(donate='all')
def step(model, state, tx, batch):
  grads = eqx.filter_grad(bits)(model, tx, state, batch)
  updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
  return eqx.apply_updates(model, updates), state


def train(text, order, rate, alpha, density, cut, spread):
  model = cut(Transformer(jax.random.split(jax.random.key(0), 6)))
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.cosine_decay_schedule(rate, len(order))),
  )
  method = updaters.magnitude(  # 3
    distributions.uniform(1 - density), schedules.cubic(0, 3 * len(order) // 4)
  )
  tx, key = powerprop_jax.powerprop(tx, alpha), jax.random.key(1)
  due = schedules.every(1)  # 4
  tx = powerprop_jax.sparsify(tx, method, key=key, due=due)  # 5
  state = tx.init(eqx.filter(model, eqx.is_array))
  for rows in order:
    model, state = step(model, state, tx, spread(text[rows]))
  return round(float(bits(model, tx, state, text[-400:])), 2)


def main(steps=800, density=0.02, cut=lambda x: x, spread=lambda x: x):
  """Prints and returns bits per character; `sharded` cuts the arrays."""
  text = ''.join(topics.topics.values()).encode('ascii', 'replace')
  text = np.resize(np.frombuffer(text, np.uint8), (len(text) // 49, 49))
  order = np.random.default_rng(0).integers(len(text) - 400, size=(steps, 32))
  results = {}
  for alpha, rate in RATES.items():
    results[alpha] = train(text, order, rate, alpha, density, cut, spread)
    print(
      f'alpha = {alpha:g}: {results[alpha]} bits per character with'
      f' {density:.0%} of each matrix'
    )
  return results


if __name__ == '__main__':
  main()

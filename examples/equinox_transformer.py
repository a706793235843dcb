"""Equinox: a small transformer that reads characters, with an alpha a layer.

  python -m examples.equinox_transformer

The text is Python's own manual. alpha = 1 is the ordinary network."""

from pydoc_data import topics

import equinox as eqx
from equinox import nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax
from powerprop_jax.sparse import pruning


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
def bits(model, text):
  """Bits a character; rows of text hold 48 and the one after."""
  logits = jax.nn.log_softmax(jax.vmap(model)(text[:, :-1])) / jnp.log(2.0)
  return -jnp.take_along_axis(logits, text[:, 1:, None], axis=-1).mean()


@eqx.filter_jit
def step(model, tx, state, batch):
  grads = eqx.filter_grad(bits)(model, batch)
  updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
  return eqx.apply_updates(model, updates), state


def main(steps: int = 400, density: float = 0.1) -> dict[str, list[float]]:
  """Prints and returns bits a character, dense and pruned, of each alpha."""
  text = ''.join(topics.topics.values()).encode('ascii', 'replace')
  text = np.resize(np.frombuffer(text, np.uint8), (len(text) // 49, 49))
  order = np.random.default_rng(0).integers(len(text) - 400, size=(steps, 32))
  # A higher power for the hidden layers, which hold most of the weights.
  powers = {'1': 1.0, '1.5 and 2': lambda p, _: 2.0 if 'mlp' in p else 1.5}
  results = {}
  for name, alpha in powers.items():
    model = Transformer(jax.random.split(jax.random.key(0), 6))
    tx = powerprop_jax.powerprop(optax.adam(2e-3), alpha)
    state = tx.init(eqx.filter(model, eqx.is_array))
    for rows in order:
      model, state = step(model, tx, state, text[rows])
    params, rest = eqx.partition(model, eqx.is_array)
    params = powerprop_jax.apply_mask(params, pruning.prune(params, density))
    found = [bits(m, text[-400:]) for m in (model, eqx.combine(params, rest))]
    results[name] = [round(float(x), 2) for x in found]
    print(f'alpha = {name}: bits a character, dense and pruned', results[name])
  return results


if __name__ == '__main__':
  main()

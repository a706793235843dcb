"""Methods that choose which weights a sparse network has, and change them.

Section 1 of the paper combines Powerpropagation with weight pruning and with
sparse-to-sparse training. Each method is a `MaskUpdater`: a pair of pure
functions, as an optax transformation is, that choose masks at the start and
change them now and then. They see the weights theta and the gradient at theta,
and know nothing of phi: the scores of a method are the same functions with and
without Powerpropagation. (RigL grows by |dL/dtheta|; |dL/dphi| is zero at
phi = 0.)

The caller gives the values from which grown weights start. They must not be
zero, which is a critical point for alpha > 1 (section 2): such a weight would
never move.

References:
  Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_,
  2017 (iterative magnitude pruning).
  Lee et al, `SNIP <https://arxiv.org/abs/1810.02340>`_, 2019.
  Mocanu et al, `Scalable training of artificial neural networks with adaptive
  sparse connectivity <https://arxiv.org/abs/1707.04780>`_, 2018 (SET).
  Evci et al, `Rigging the lottery <https://arxiv.org/abs/1911.11134>`_, 2020
  (RigL).
  Jayakumar et al, `Top-KAST <https://arxiv.org/abs/2106.03517>`_, 2020.
  Peste et al, `AC/DC <https://arxiv.org/abs/2106.12379>`_, 2021.
"""

from powerprop_jax.sparse.updaters.acdc import acdc
from powerprop_jax.sparse.updaters.given import dense
from powerprop_jax.sparse.updaters.given import given
from powerprop_jax.sparse.updaters.given import random
from powerprop_jax.sparse.updaters.given import snip
from powerprop_jax.sparse.updaters.magnitude import magnitude
from powerprop_jax.sparse.updaters.protocol import MaskUpdater
from powerprop_jax.sparse.updaters.top_kast import exploration_penalty
from powerprop_jax.sparse.updaters.top_kast import top_kast
from powerprop_jax.sparse.updaters.trading import rigl
from powerprop_jax.sparse.updaters.trading import set_

__all__ = (
  'MaskUpdater',
  'acdc',
  'dense',
  'exploration_penalty',
  'given',
  'magnitude',
  'random',
  'rigl',
  'set_',
  'snip',
  'top_kast',
)

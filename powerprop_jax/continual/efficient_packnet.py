"""EfficientPackNet: every task takes the weights it needs, and shares them.

This module has lines 5 to 11 of Algorithm 1 (section 4 of the paper). After a
task has been trained, its network with all weights, the dense one, has the
performance P on validation data. The network is pruned to the lowest density at
which its performance is still at least gamma P. All weights are ranked
together, those of earlier tasks included, so that tasks share weights, and a
task takes as many new weights as it needs. The sparser the solutions are, as
with Powerpropagation, the more tasks fit.

Algorithm 1 leaves some decisions open, or prints them otherwise. In this module
they are:

  * TopK(phi) ranks by |theta|. Where all weights have one alpha, the order is
    that of |phi|; where they have several, only theta can be compared.
  * s_l is the fraction that is kept; fractions are tried from the largest down.
    The loop as printed ends one step after the target is missed; here the last
    mask that met it counts (see `search`). A performance equal to the target
    meets it.
  * If no density meets the target, the largest is taken.

References:
  Schwarz et al, `Powerpropagation: A sparsity inducing weight
  reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021,
  section 4.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import leaves
from powerprop_jax import power
from powerprop_jax.continual import memory as memory_lib
from powerprop_jax.continual import search as search_lib
from powerprop_jax.sparse import masks

#: How the candidate densities are searched.
Search = Literal['linear', 'binary', 'taylor']


class Choice(NamedTuple):
  """The density that was chosen for a task, and how it was found.

  Attributes:
    density: the density that was chosen, the fraction of all masked weights
      that the task may use. With `cap` or `omit` it may use fewer.
    met: whether its performance reached gamma times that of the dense network.
    performance: the performance at that density.
    dense: the performance of the dense network, P in Algorithm 1.
    evaluated: (density, performance) of every density that was evaluated, in
      the order of evaluation.
  """

  density: float
  met: bool
  performance: float
  dense: float
  evaluated: list[tuple[float, float]]


class _Compiled(NamedTuple):
  """The functions that make a choice, compiled once for all tasks.

  Attributes:
    rank: (phi, owners) -> (theta, ranking): the only sort.
    prune: (theta, ranking, count, max_new) -> theta, zero outside of the mask.
    predict: (theta, model_state, ranking, counts, max_new, valid) -> the rise
      of the loss at each count but the last, which is the number of all
      weights.
    select: `search.select`.
  """

  rank: Callable[..., tuple[Any, search_lib.Ranking]]
  prune: Callable[..., Any]
  predict: Callable[..., jax.Array]
  select: Callable[..., Any]


def _compile(
  transform: power.PowerTransform,
  omit: Collection[str],
  loss: Callable[..., jax.Array] | None,
  loss_batch_size: int,
) -> _Compiled:
  def rank(phi, owners):
    theta = transform.to_theta(phi)
    weights = leaves.by_path(theta, owners)
    return theta, search_lib.rank(weights, owners, omit)

  def prune(theta, ranking, count, max_new):
    mask = search_lib.select(ranking, count, max_new)
    weights = leaves.by_path(theta, mask)
    return leaves.put(theta, masks.apply_mask(weights, mask))

  def predict(theta, model_state, ranking, counts, max_new, valid):
    size = counts[-1]
    dense = prune(theta, ranking, size, size)
    n = max(len(jax.tree.leaves(valid)[0]) // loss_batch_size, 1)
    batches = jax.tree.map(
      lambda x: x[: n * loss_batch_size].reshape(n, -1, *x.shape[1:]), valid
    )
    assert loss is not None  # `_check` refuses the search without it.
    saliency = search_lib.make_saliency(loss)(dense, model_state, batches)
    found = leaves.by_path(saliency, ranking.place)
    return search_lib.predicted_rise(found, ranking, counts[:-1], max_new)

  return _Compiled(*map(jax.jit, (rank, prune, predict, search_lib.select)))


def _check(
  search: str,
  search_steps: int | None,
  gamma: float,
  cap: float,
  loss: Callable[..., jax.Array] | None,
  loss_batch_size: int,
) -> None:
  """Raises ValueError if arguments of `efficient_packnet` are impossible."""
  if search not in get_args(Search):
    raise ValueError(
      f'search must be among {", ".join(get_args(Search))}, got {search!r}.'
    )
  if search_steps is not None and search_steps < 0:
    raise ValueError(f'search_steps must be 0 or more, got {search_steps}.')
  if not 0 <= gamma <= 1:
    raise ValueError(
      f'gamma must be in [0, 1], got {gamma}: it is the share of the dense'
      ' performance that pruning has to leave.'
    )
  if not 0 <= cap <= 1:
    raise ValueError(
      f'cap must be in [0, 1], got {cap}: it is the largest share of all'
      ' weights that a task may be the first to use.'
    )
  if search == 'taylor' and loss is None:
    raise ValueError(
      "search='taylor' predicts the rise of a loss. Pass loss, a function of"
      ' (theta, model_state, batch), or use another search.'
    )
  if loss_batch_size < 1:
    raise ValueError(
      f'loss_batch_size must be at least 1, got {loss_batch_size}.'
    )


def efficient_packnet(
  evaluate: Callable[..., Any],
  transform: power.PowerTransform | None = None,
  *,
  densities: Sequence[float],
  gamma: float,
  search: Search = 'binary',
  search_steps: int | None = None,
  loss: Callable[..., jax.Array] | None = None,
  loss_batch_size: int = 20,
  min_density: float = 0.0,
  max_density: float = 1.0,
  cap: float = 1.0,
  omit: Collection[str] = (),
) -> memory_lib.Choose:
  """Makes the function by which EfficientPackNet chooses masks of tasks.

  `learn_task` takes that function as `choose`. It does lines 5 to 11 of
  Algorithm 1 (section 4 of the paper): it measures the performance of the dense
  network, and searches for the lowest density that keeps gamma of it.
  Weights are sorted once per task, and what is compiled is compiled once for
  all tasks. If `evaluate` is to be compiled once too, let it be a jitted
  function that takes the validation data as arguments, of one shape for all
  tasks, and give these data to `learn_task` as `valid`.

  Args:
    evaluate: maps (theta, model_state, *valid) to the performance of a network
      on validation data, such as its accuracy: a number that is never negative,
      and larger for a better network. It may be any Python function.
    transform: the `power.power_transform` of the network, with which `theta` is
      made of the parameters in the memory; None if they are theta themselves.
    densities: the candidates, fractions of the weights to keep in (0, 1],
      rising from one to the next. They should reach up to 1: late in a
      sequence the largest weights are mostly those of earlier tasks.
    gamma: the share of the dense performance that pruning has to leave, in
      [0, 1].
    search: 'linear' tries the candidates from the largest down, until one
      misses the target, as Algorithm 1 does; 'binary' halves them; 'taylor'
      predicts the loss at all of them from gradients, evaluates the one that it
      picks, and tries larger ones if that misses the target.
    search_steps: how many times the binary search halves the candidates, with
      one evaluation each; None halves them until one is left.
    loss: a function that the search 'taylor' needs, and no other: it maps
      (theta, model_state, batch) to the mean loss of a batch, which is a tuple
      of rows of the validation data.
    loss_batch_size: over how many examples each gradient of the loss is taken.
    min_density: the least density that a task may have.
    max_density: the largest density that a task may have.
    cap: the largest share of all weights that a task may be the first to use,
      in [0, 1]; the smallest of its new weights are left out beyond that. This
      is not in the paper.
    omit: the paths of leaves of which a task takes only free weights. They have
      to be given to `learn_task` too. This is not in the paper.

  Returns:
    A function of (memory, index, *valid) that returns the mask of the task, one
    boolean array per masked leaf by its path, and a `Choice`.

  Raises:
    ValueError: if an argument is impossible; and, when the function is called,
      if no weights are masked, if the search 'taylor' is given no validation
      data, or if the performance is negative or NaN.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax import continual, power
  >>> phi = {'w': jnp.array([1.0, -4.0, 2.0, 3.0])}
  >>> memory = continual.Memory(phi, {}, {'w': jnp.zeros(4, jnp.uint8)})
  >>> def evaluate(theta, model_state):  # The share of the sum that is left.
  ...   return jnp.sum(jnp.abs(theta['w'])) / 30
  >>> choose = continual.efficient_packnet(
  ...     evaluate, power.power_transform(2.0),
  ...     densities=[0.25, 0.5, 0.75, 1.0], gamma=0.8, search='linear')
  >>> mask, choice = choose(memory, 0)
  >>> mask['w']
  Array([False,  True, False,  True], dtype=bool)
  >>> [density for density, _ in choice.evaluated]
  [1.0, 0.75, 0.5, 0.25]
  >>> choice.density, choice.met
  (0.5, True)
  """
  _check(search, search_steps, gamma, cap, loss, loss_batch_size)
  candidates = search_lib.check_densities(densities, min_density, max_density)
  if search_steps is None:
    search_steps = (len(candidates) - 1).bit_length()
  if transform is None:
    transform = power.power_transform(1.0)
  compiled = _compile(transform, omit, loss, loss_batch_size)

  def find(performance, target, predictions):
    if search == 'linear':
      return search_lib.linear(performance, candidates, target)
    if search == 'binary':
      return search_lib.binary(performance, candidates, target, search_steps)
    tolerance = search_lib.loss_tolerance(gamma)
    return search_lib.taylor(
      performance, candidates, target, predictions(), tolerance
    )

  def choose(memory, index, *valid):
    size = sum(owner.size for owner in memory.owners.values())
    if not size:
      raise ValueError(
        'No weights are masked, so that EfficientPackNet has none to choose'
        " from. Make the layout with weights='masked', or learn without choose."
      )
    if search == 'taylor' and not jax.tree.leaves(valid):
      raise ValueError(
        "search='taylor' takes gradients on validation data, and got none. Pass"
        ' valid to learn_task.'
      )
    max_new = masks.floor_multiply(cap, size)
    theta, ranking = compiled.rank(memory.phi, memory.owners)

    def performance(count, limit):
      pruned = compiled.prune(theta, ranking, count, limit)
      found = float(evaluate(pruned, memory.model_state, *valid))
      if not found >= 0:
        raise ValueError(
          f'evaluate returned {found} for task {index}. A performance, of which'
          ' pruning is to keep a share, must not be negative or NaN. Return the'
          ' accuracy, and check whether training diverged.'
        )
      return found

    def predictions():
      counts = [masks.num_kept(p, size) for p in candidates]
      counts = jnp.asarray([*counts, size], jnp.int32)
      rise = compiled.predict(
        theta, memory.model_state, ranking, counts, max_new, valid
      )
      return np.asarray(rise).tolist()

    dense = performance(size, size)
    found = find(
      lambda p: performance(masks.num_kept(p, size), max_new),
      # Less by the rounding of two performances in single precision: 19 of 20
      # right are 0.95 of all right.
      gamma * dense * (1 - 2**-23),
      predictions,
    )
    count = masks.num_kept(found.density, size)
    mask = compiled.select(ranking, count, max_new)
    choice = Choice(
      found.density, found.met, found.performance, dense, found.evaluated
    )
    return mask, choice

  return choose

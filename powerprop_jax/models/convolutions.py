"""Convolutions and maxima whose gradients are fast on CPUs inside of loops.

A step of training is compiled into a loop over steps, and there XLA for CPUs
has a fast convolution for one layout only: images [n, h, w, c], a kernel
[h, w, in, out] and an output like the images. The gradients that JAX derives
are convolutions of other layouts, which XLA rewrites outside of loops but not
inside (jax issue 12868), where they take ten times as long or more.

A convolution is linear in its images and in its kernel, and a gradient is the
transpose of a linear map. `conv2d` therefore has two tangents of its own. Each
is written as a convolution in an unusual layout, chosen such that its
*transpose* has the layout that is fast; a reverse pass never computes the
tangent itself. Everything is made of ordinary operations, so that forward mode,
higher derivatives, vmap and checkpointing work as ever, and the output is that
of `jax.lax.conv_general_dilated`. The cases are:

- a kernel of 1 x 1: the gradients are matrix products;
- a kernel of 5 x 5 or more, stride 1, no padding: one matrix product for each
  row of the kernel, of images next to their neighbours (im2col along the
  width). The transposed convolution would compute as many outputs as there are
  pixels, which is 2.25 times as many in LeNet-5;
- a stride s above 1, for the gradient of the images: a convolution of stride 1
  with s^2 times the channels, which are interleaved;
- all others: plain convolutions.

The gradient of a maximum, on CPUs, is taken by comparison rather than by XLA's
select-and-scatter, which handles one number at a time.

On other backends both functions compute as Haiku does. LOG.md has the times.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
from typing import Any, TypeAlias

import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp

#: 'SAME', 'VALID', or the zeros (before, after) the rows and the columns.
Padding: TypeAlias = str | Sequence[tuple[int, int]]

# The dimensions at which a layout has batch (or outputs), channels (or inputs),
# height and width: those of images [n, h, w, c] and a kernel [h, w, in, out].
_IMAGES = (0, 3, 1, 2)
_KERNEL = (3, 2, 0, 1)


def _plain(images, kernel, strides, padding):
  """XLA's convolution, in the layout that is fast on CPUs."""
  numbers = lax.ConvDimensionNumbers(_IMAGES, _KERNEL, _IMAGES)
  return lax.conv_general_dilated(
    images, kernel, strides, padding, dimension_numbers=numbers
  )


def _trimmed(images, kernel, strides, padding):
  """Images without rows and columns that no window reaches, and new padding."""
  rest = []
  for axis, (low, high) in enumerate(padding):
    size, stride = images.shape[1 + axis], strides[axis]
    surplus = (low + size + high - kernel.shape[axis]) % stride
    cut = max(surplus - high, 0)
    images = lax.slice_in_dim(images, 0, size - cut, axis=1 + axis)
    rest.append((low, high - surplus + cut))
  return images, rest


def _every(x, axis, start, count, stride):
  stop = start + (count - 1) * stride + 1
  return lax.slice_in_dim(x, start, stop, stride, axis)


def _by_rows(images, kernel, strides, padding):
  """A convolution without padding by one matrix product per kernel row."""
  del padding
  rows, columns, inputs, outputs = kernel.shape
  height, width = (
    (images.shape[1 + axis] - kernel.shape[axis]) // strides[axis] + 1
    for axis in (0, 1)
  )
  x = jnp.concatenate(
    [_every(images, 2, j, width, strides[1]) for j in range(columns)], axis=-1
  )
  products = [
    _every(x, 1, i, height, strides[0]).reshape(-1, columns * inputs)
    @ kernel[i].reshape(-1, outputs)
    for i in range(rows)
  ]
  out = functools.reduce(jnp.add, products)
  return out.reshape(len(images), height, width, outputs)


def _blocks(x, sizes):
  """Blocks of dimensions 1 and 2 of x as further channels of one pixel."""
  n, h, w, *rest = x.shape
  s, t = sizes
  x = x.reshape(n, h // s, s, w // t, t, *rest)
  return jnp.moveaxis(x, 2, 3).reshape(n, h // s, w // t, s * t * rest[0])


def _of_images(images, kernel, strides, padding):
  """A convolution that is fast to transpose with respect to the images."""
  if strides != (1, 1):
    images, padding = _trimmed(images, kernel, strides, padding)
    taps = [-(-k // s) * s for k, s in zip(kernel.shape, strides)]
    grown = [(0, t - k) for t, k in zip(taps, kernel.shape)]
    # Windows of `taps` pixels need some more pixels at the end.
    padding = [(low, high + g) for (low, high), (_, g) in zip(padding, grown)]
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    images = _blocks(images, strides)
    kernel = jnp.pad(kernel, (*grown, (0, 0), (0, 0)))
    kernel = _blocks(jnp.moveaxis(kernel, -1, 0), strides)
    kernel = jnp.moveaxis(kernel, 0, -1)
    padding = [(0, 0), (0, 0)]
  # Inputs and outputs of the kernel change places in the transpose.
  numbers = lax.ConvDimensionNumbers(_IMAGES, (2, 3, 0, 1), _IMAGES)
  return lax.conv_general_dilated(
    images, kernel.swapaxes(2, 3), (1, 1), padding, dimension_numbers=numbers
  )


def _of_kernel(images, kernel, strides, padding):
  """A convolution that is fast to transpose with respect to the kernel.

  The transpose sees channels as a batch of images, whose channels are the
  examples, and the gradient of the output as a kernel.
  """
  images, padding = _trimmed(images, kernel, strides, padding)
  numbers = lax.ConvDimensionNumbers((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))
  out = lax.conv_general_dilated(
    images.transpose(3, 1, 2, 0),
    kernel.transpose(2, 0, 1, 3),
    strides,
    padding,
    dimension_numbers=numbers,
  )
  return out.transpose(2, 0, 1, 3)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _on_cpu(images, kernel, strides, padding):
  return _plain(images, kernel, strides, padding)


@functools.partial(_on_cpu.defjvp, symbolic_zeros=True)
def _on_cpu_jvp(strides, padding, primals, tangents):
  images, kernel = primals
  unpadded = not any(low or high for low, high in padding)
  taps = kernel.shape[:2]
  of_images, of_kernel = _of_images, _of_kernel
  if unpadded and (taps == (1, 1) or (min(taps) > 4 and strides == (1, 1))):
    of_images = of_kernel = _by_rows
  parts = []
  if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
    parts.append(of_images(tangents[0], kernel, strides, padding))
  if not isinstance(tangents[1], jax.custom_derivatives.SymbolicZero):
    parts.append(of_kernel(images, tangents[1], strides, padding))
  return _on_cpu(images, kernel, strides, padding), sum(parts)


def conv2d(
  images: jax.Array,
  kernel: jax.Array,
  stride: int | Sequence[int] = 1,
  padding: Padding = 'SAME',
) -> jax.Array:
  """A convolution in two dimensions, whose gradients are fast on CPUs too.

  Args:
    images: floats of shape [n, h, w, inputs].
    kernel: floats of shape [rows, columns, inputs, outputs].
    stride: the stride of both dimensions, or one for each.
    padding: 'SAME', 'VALID', or numbers of zeros (before, after) the rows and
      (before, after) the columns.

  Returns:
    Floats of shape [n, h', w', outputs]: to the last bit what
    `jax.lax.conv_general_dilated` returns.

  Raises:
    ValueError: if images or kernel have another rank, or their channels differ.

  >>> import jax.numpy as jnp
  >>> from powerprop_jax.models import convolutions
  >>> images, kernel = jnp.ones([1, 4, 4, 1]), jnp.ones([3, 3, 1, 1])
  >>> convolutions.conv2d(images, kernel, padding='VALID').squeeze((0, 3))
  Array([[9., 9.],
         [9., 9.]], dtype=float32)
  """
  if images.ndim != 4 or kernel.ndim != 4:
    raise ValueError(
      'Images have shape [n, h, w, inputs] and a kernel [rows, columns, inputs,'
      f' outputs], got shapes {images.shape} and {kernel.shape}.'
    )
  if images.shape[3] != kernel.shape[2]:
    raise ValueError(
      f'Images have {images.shape[3]} channels, and the kernel takes'
      f' {kernel.shape[2]}.'
    )
  strides = (stride, stride) if isinstance(stride, int) else tuple(stride)
  if isinstance(padding, str):
    taps = kernel.shape[:2]
    padding = lax.padtype_to_pads(images.shape[1:3], taps, strides, padding)
  pads = tuple((int(low), int(high)) for low, high in padding)
  on_cpu = jax.default_backend() == 'cpu' and min(map(min, pads)) >= 0
  return (_on_cpu if on_cpu else _plain)(images, kernel, strides, pads)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_on_cpu(images, side):
  return _windows(images, side).max((2, 4))


@_max_on_cpu.defjvp
def _max_on_cpu_jvp(side, primals, tangents):
  (images,), (tangent,) = primals, tangents
  x = _windows(images, side)
  largest = x[:, :, 0, :, 0]
  first = jnp.zeros(largest.shape, jnp.int32)
  for place in range(1, side * side):
    i, j = divmod(place, side)
    other = x[:, :, i, :, j]
    first = jnp.where(other > largest, place, first)
    largest = jnp.maximum(largest, other)
  # The choice is a number per window, which is spread when it is used.
  places = jnp.arange(side * side).reshape(1, 1, side, 1, side, 1)
  chosen = first[:, :, None, :, None] == places
  tangent = jnp.where(chosen, _windows(tangent, side), 0)
  return largest, tangent.sum((2, 4))


def _windows(images, side):
  """Images cut into windows, [n, h', side, w', side, c], without the rest."""
  n, h, w, c = images.shape
  h, w = h // side, w // side
  images = images[:, : h * side, : w * side]
  return images.reshape(n, h, side, w, side, c)


def max_pool(images: jax.Array, side: int) -> jax.Array:
  """The maxima over squares that do not overlap.

  Args:
    images: floats of shape [n, h, w, c].
    side: height and width of a square, and the distance to the next. Rows and
      columns that do not fill one at the end are left out.

  Returns:
    Floats of shape [n, h // side, w // side, c]. Among equal values the
    gradient goes to the first, in the order of rows, as that of Haiku does.

  Raises:
    ValueError: if the images have another rank, or no square fits into them.

  >>> import jax
  >>> from powerprop_jax.models import convolutions
  >>> images = jax.numpy.arange(16.0).reshape(1, 4, 4, 1)
  >>> convolutions.max_pool(images, 2).squeeze((0, 3))
  Array([[ 5.,  7.],
         [13., 15.]], dtype=float32)
  """
  if images.ndim != 4 or not 1 <= side <= min(images.shape[1:3]):
    raise ValueError(
      'Maxima are taken over squares of images [n, h, w, c] that are at least'
      f' as large, got shape {images.shape} and a side of {side}.'
    )
  if jax.default_backend() == 'cpu':
    return _max_on_cpu(images, side)
  window = (side, side, 1)
  return hk.max_pool(images, window, window, 'VALID')


def _intercept(
  next_call: Callable[..., Any],
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
  context: hk.MethodContext,
) -> Any:
  """Computes an `hk.Conv2D` by `conv2d`, if it is one that `conv2d` can do."""
  module = context.module
  if (
    type(module) is not hk.Conv2D
    or context.method_name != '__call__'
    or hk.running_init()  # The parameters are made by Haiku.
    or kwargs
    or args[0].ndim != 4
    or module.channel_index != -1
    or module.mask is not None
    or module.feature_group_count != 1
    or module.kernel_dilation != (1, 1)
  ):
    return next_call(*args, **kwargs)
  (images,) = args
  shape = (*module.kernel_shape, images.shape[3], module.output_channels)
  kernel = hk.get_parameter('w', shape, images.dtype)
  out = conv2d(images, kernel, module.stride, module.padding)
  if module.with_bias:
    bias = hk.get_parameter('b', shape[-1:], images.dtype)
    out += jnp.broadcast_to(bias, out.shape)
  return out


def in_haiku() -> contextlib.AbstractContextManager[None]:
  """A context in which `hk.Conv2D` computes by `conv2d`.

  Names, shapes and initial values of parameters are made by Haiku and do not
  change. Modules that are dilated, masked or grouped, that have channels first,
  or that see a single image without a batch dimension are left alone.

  Returns:
    A context manager, for use inside of a function that Haiku transforms.

  >>> import haiku as hk, jax
  >>> from powerprop_jax.models import convolutions
  >>> def network(images):
  ...   with convolutions.in_haiku():
  ...     return hk.Conv2D(8, 3)(images)
  >>> init, apply = hk.transform(network)
  >>> images = jax.numpy.ones([1, 4, 4, 1])
  >>> apply(init(jax.random.key(0), images), None, images).shape
  (1, 4, 4, 8)
  """
  return hk.intercept_methods(_intercept)

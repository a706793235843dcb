"""Packages that only some rooms need, and how to get them.

`pip install .` brings what the method itself needs: jax, numpy, optax, chex and
Haiku, with what these bring. Data sets, figures, checkpoints and files are
rooms of their own, whose packages `setup.py` lists as extras: `data`, `plots`
and `experiments`, which has all of them. A room imports them where it is
entered, inside of `needed`.
"""

from collections.abc import Iterator
import contextlib


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
  """Says how to install what an import inside of the block misses.

  The command works where the package itself is installed, whether from a clone
  or from the address of a repository: pip reads the extras of what it finds
  installed, and asks no index for it.

  Args:
    extra: the extra of `setup.py` that brings what is imported.

  Yields:
    Nothing.

  Raises:
    ModuleNotFoundError: if a module is missing; it names the extra's command.

  >>> with needed('data'):
  ...   import no_such_module
  Traceback (most recent call last):
  ModuleNotFoundError: The package 'no_such_module' is not installed. Run: ...
  """
  try:
    yield
  except ModuleNotFoundError as error:
    package = (error.name or 'unknown').partition('.')[0]
    if package == __name__.partition('.')[0]:
      raise
    raise ModuleNotFoundError(
      f'The package {package!r} is not installed. Run: pip install'
      f" 'powerprop_jax[{extra}]' (in a clone that is not installed itself: pip"
      f" install -e '.[{extra}]').",
      name=error.name,
    ) from error

"""Packages that only some modules need, and how to install them.

`pip install .` brings what the method itself needs: jax, numpy, optax, chex and
Haiku, with what these bring. Data sets, figures, checkpoints and exported files
need further packages, which `setup.py` lists as extras: `data`, `plots` and
`experiments`, which contains the other two. A module that needs such packages
imports them inside of `needed`.
"""

from collections.abc import Iterator
import contextlib
import importlib.metadata
import json

#: The address from which pip installs the package without a clone, such as
#: 'git+https://HOST/OWNER/powerprop_jax'; None while there is no public
#: address. Every message takes it from here, and a test compares the notebook
#: with it.
REPOSITORY: str | None = None


def _installed_from() -> str | None:
  """The repository from which pip has installed the package, if it was one."""
  try:
    found = importlib.metadata.distribution('powerprop_jax')
  except importlib.metadata.PackageNotFoundError:
    return None  # The clone may be only on the path of Python.
  # Pip writes this file when it installs from an address (PEP 610).
  origin = json.loads(found.read_text('direct_url.json') or '{}')
  vcs = origin.get('vcs_info')
  return vcs and f'{vcs["vcs"]}+{origin["url"]}@{vcs["commit_id"]}'


def command(extra: str) -> str:
  """The command that installs an extra; the package is on no package index.

  >>> print(command('data'))
  pip install -e '.[data]' (in a clone of the repository)

  Args:
    extra: a name among the extras of `setup.py`.

  Returns:
    The command for a clone; or that for the address of a repository, if the
    package was installed from one or `REPOSITORY` names one.
  """
  address = _installed_from() or REPOSITORY
  if address is None:
    return f"pip install -e '.[{extra}]' (in a clone of the repository)"
  return f"pip install 'powerprop_jax[{extra}] @ {address}'"


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
  """Says how to install a package that an import in its block does not find.

  Args:
    extra: the extra of `setup.py` that brings what is imported.

  Yields:
    Nothing.

  Raises:
    ModuleNotFoundError: if a module is missing. The message has the command
      that installs the extra, unless the module is one of this package.

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
      f'The package {package!r} is not installed. Run: {command(extra)}',
      name=error.name,
    ) from error

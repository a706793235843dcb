"""Where files lie: in local folders, in the home folder, or in buckets.

Paths are resolved in one place, so that `~` never becomes a folder of that
name, nor `gs://bucket` a local folder `gs:`. Remote files are read and written
by `etils.epath`, which needs a further package for each kind of bucket.
"""

import os
import re

from powerprop_jax import extras

with extras.needed('data'):
  from etils import epath

Path = epath.Path


def resolve(path: str | os.PathLike[str]) -> epath.Path:
  """Makes a path from what a user has written.

  Args:
    path: a local path, which may start with `~`, or the address of a bucket,
      such as `gs://bucket/folder` or `s3://bucket/folder`.

  Returns:
    A path of etils, which has the methods of pathlib's paths.

  Raises:
    ValueError: if the address is of an unknown kind or has one slash after the
      colon, if the package that reads this kind is not installed, or if there
      is no such home folder.

  >>> resolve('runs/first').name
  'first'
  """
  text = os.fspath(path)
  if re.match(r'[A-Za-z][A-Za-z0-9+.-]+:/(?!/)', text):
    # Pathlib makes this of an address; it would be a local folder `gs:`.
    raise ValueError(
      f'{text!r} has one slash after the colon. Pass text with two.'
    )
  try:
    found = epath.Path(text).expanduser()
    if '://' in text:
      found.exists()  # Imports the package that reads this kind of address.
  except KeyError as error:
    raise ValueError(
      f'{text!r} is an address of an unknown kind. Use a local path, or an'
      ' address that starts with gs:// or s3://.'
    ) from error
  except ImportError as error:
    raise ValueError(f'{text!r} cannot be read. {error}.') from error
  if os.fspath(found).startswith('~'):
    raise ValueError(f'{text!r}: there is no such user, hence no home folder.')
  return found

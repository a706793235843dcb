"""What the binaries share: parsing of flags, output files, errors."""

from collections.abc import Callable, Mapping, Sequence
import importlib.metadata
import json
import os
import pathlib
import re
import sys
from typing import Any, NoReturn

from absl import flags
from absl import logging
import jax


def parse_numbers(
  values: Sequence[Any], flag: str, check: Callable[[float], float] = float
) -> list[float]:
  """Parses the numbers of a list flag.

  Args:
    values: of the flag.
    flag: its name.
    check: raises ValueError if a number is impossible.

  Returns:
    The numbers.

  Raises:
    ValueError: if a value is no number or impossible; it names the flag.
  """
  try:
    return [check(float(value)) for value in values]
  except ValueError as e:
    raise ValueError(f'--{flag}={",".join(map(str, values))}: {e}') from e


def parse_factors(values: Sequence[str], flag: str) -> dict[str, float]:
  """Parses `pattern=factor` items of a flag."""
  factors = {}
  for value in values:
    pattern, _, factor = value.rpartition('=')
    try:
      factors[pattern] = float(factor)
      re.compile(pattern)
    except (ValueError, re.error) as e:
      raise ValueError(
        f'--{flag} takes pattern=factor,..., got {value!r}: {e}.'
      ) from e
  return factors


def apply_preset(values: flags.FlagValues, preset: Mapping[str, Any]) -> None:
  """Sets the flags of a preset, except those given on the command line."""
  for name, value in preset.items():
    if not values[name].present:
      values[name].value = value


def check_no_arguments(argv: Sequence[str]) -> None:
  """Refuses what is no flag, and keeps the logs of libraries out of the way."""
  if len(argv) > 1:
    fail(f'unexpected arguments: {" ".join(argv[1:])}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)


def fail(message: object, code: int = 2) -> NoReturn:
  """Ends the program with an error: 2 about its input, 1 about its run."""
  print(f'error: {message}', file=sys.stderr)
  sys.exit(code)


def environment() -> dict[str, Any]:
  """Versions and devices, for config.json."""
  packages = ('jax', 'jaxlib', 'dm-haiku', 'optax', 'numpy')
  return {
    'versions': {p: importlib.metadata.version(p) for p in packages},
    'python': sys.version.split()[0],
    'devices': [d.device_kind for d in jax.devices()],
  }


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a file at once or not at all."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  temporary.write_text(json.dumps(content, indent=1) + '\n')
  os.replace(temporary, path)


def prepare_out_dir(out_dir: str, settings: Mapping[str, Any]) -> pathlib.Path:
  """Makes the folder of results; a started experiment may be continued in it.

  Args:
    out_dir: path of the folder.
    settings: the flags that decide the results, JSON-serialisable.

  Returns:
    The folder, with a config.json.

  Raises:
    ValueError: if it can't be written to, or holds an experiment with other
      settings; the message lists the differences.
  """
  path = pathlib.Path(out_dir)
  config = path / 'config.json'
  try:
    path.mkdir(parents=True, exist_ok=True)
    if config.exists():
      found = json.loads(config.read_text())['settings']
      wanted = json.loads(json.dumps(settings))
      differences = [
        f'{k}: {found.get(k)} there, {wanted.get(k)} now'
        for k in sorted(found.keys() | wanted.keys())
        if found.get(k) != wanted.get(k)
      ]
      if differences:
        raise ValueError(
          f'{path} holds an experiment with other settings. Choose another'
          ' --out_dir. The differences are: ' + '; '.join(differences)
        )
    write_json(config, {'settings': settings, **environment()})
  except (OSError, json.JSONDecodeError, KeyError) as e:
    raise ValueError(f'--out_dir={out_dir} can not be used: {e!r}') from e
  return path

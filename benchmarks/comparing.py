"""Trials of recipes by the binaries: what the scripts of evidence share."""

from collections.abc import Sequence
from importlib import metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

_RESULTS = pathlib.Path(__file__).parent.parent / 'experiments' / 'results'


def train(
  binary: str, flags: Sequence[str], out_dir: pathlib.Path
) -> dict[str, Any] | None:
  """What a binary writes to summary.json, which is kept if it is there.

  Args:
    binary: its name, such as 'mnist_pruning'.
    flags: its flags, without --out_dir.
    out_dir: the folder of its results.

  Returns:
    The summary, or None if the binary failed, as it does where a run diverges.
  """
  path = out_dir / 'summary.json'
  if not path.exists():
    # A process for each, which gives back the memory of what it compiled.
    command = ['-m', f'experiments.{binary}', *flags, f'--out_dir={out_dir}']
    subprocess.run([sys.executable, *command], check=False)
  return json.loads(path.read_text()) if path.exists() else None


def write(name: str, source: dict[str, Any], numbers: dict[str, Any]) -> None:
  """Writes a file of experiments/results/.

  Args:
    name: the name of the file, without '.json'.
    source: the commands, and whatever else says where the numbers come from.
    numbers: what was found.
  """
  machine = (
    f'{os.cpu_count()} CPU cores, Python {platform.python_version()}, jax'
    f' {metadata.version("jax")}'
  )
  content = {'source': source | {'machine': machine}, **numbers}
  text = json.dumps(content, indent=1)
  (_RESULTS / f'{name}.json').write_text(text + '\n')

"""Runs of the programs that several benchmarks of recipes share."""

from collections.abc import Sequence
import dataclasses
from importlib import metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

from experiments.support import config

_RESULTS = pathlib.Path(__file__).parent.parent / 'experiments' / 'results'

# What recipes for networks that are trained on full MNIST have in common.
COMMON = (
  '--dataset=mnist',
  '--batch_size=60',
  '--momentum=0.9',
  '--schedule=cosine',
  '--phi_decay_schedule=cosine',
)


@dataclasses.dataclass(frozen=True)
class Settings(config.Settings):
  """Where the data lie."""

  data_dir: str = config.flag('', 'The folder in which the TFDS sets lie.')

  def data(self) -> list[str]:
    """The flag of a binary that says where the data lie, if it is known."""
    return [f'--data_dir={self.data_dir}'] if self.data_dir else []


def train(
  binary: str, flags: Sequence[str], out_dir: pathlib.Path
) -> dict[str, Any] | None:
  """Runs a binary, unless it has ended before with the same flags.

  Args:
    binary: its name, such as 'mnist_pruning'.
    flags: its flags, without --out_dir.
    out_dir: the folder of its results.

  Returns:
    What it wrote to summary.json, or None if it wrote nothing because no run
    ended, as where it diverged.

  Raises:
    config.Refused: if the folder has the results of other flags.
  """
  path, kept = out_dir / 'summary.json', out_dir / 'flags.json'
  asked = json.dumps([binary, *flags], indent=1)
  if kept.exists() and kept.read_text() != asked:
    raise config.Refused(
      f'{out_dir} has results of other flags. Choose another --out_dir.'
    )
  if not path.exists():
    out_dir.mkdir(parents=True, exist_ok=True)
    kept.write_text(asked)
    # A process for each, which gives back the memory of what it compiled.
    command = ['-m', f'experiments.{binary}', *flags, f'--out_dir={out_dir}']
    subprocess.run([sys.executable, *command], check=False)
  return json.loads(path.read_text()) if path.exists() else None


def read(name: str) -> dict[str, Any]:
  """Reads a file of experiments/results/.

  Args:
    name: the name of the file, without '.json'.

  Returns:
    Its content, which is empty if there is no such file.
  """
  path = _RESULTS / f'{name}.json'
  return json.loads(path.read_text()) if path.exists() else {}


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

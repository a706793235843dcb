"""Records the results of short commands of every program, for `golden_test`.

  python tests/golden/record.py tests/golden/golden.json

runs the commands of `ENTRIES` on the CPU, one after another, and writes one
JSON file of their results; `--only=NAME` records a single entry. Only the
command line and the files that a program writes are used, and nothing of the
package itself, so that recordings outlive a change of every module. Every flag
that decides a result is given, so that a new default changes no command.

  python tests/golden/record.py tests/golden/old_help.json --flags

records the flags of the binaries instead: names, types, defaults and choices.

The variable GOLDEN_ROOT names another checkout whose binaries are to run.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple
import xml.etree.ElementTree

import numpy as np
import safetensors

ROOT = pathlib.Path(
  os.environ.get('GOLDEN_ROOT') or pathlib.Path(__file__).resolve().parents[2]
)
BINARIES = (
  'mnist_pruning',
  'sparse_training',
  'sparse_sweep',
  'continual_learning',
  'continual_compare',
  'export_model',
)
# Flags that name places, or that only other data sets use.
PLACES = {
  'checkpoint',
  'coordinator',
  'data_dir',
  'image_size',
  'init_from',
  'num_processes',
  'num_workers',
  'out',
  'out_dir',
  'preset',
  'process_index',
  'runs',
}
# Threads within an operation would make the order of sums depend on the cores.
# The compiler optimises as it does for everybody: at a lower level it rounds
# the same operations in another way where other operations stand beside them.
XLA_FLAGS = '--xla_cpu_multi_thread_eigen=false'

Result = dict[str, Any]


class Entry(NamedTuple):
  """A command whose results are recorded.

  Attributes:
    binary: the module in `experiments`.
    flags: by name; '{tmp}/NAME' is the folder of results of another entry.
    needs: entries that have to run before it.
    devices: how many devices the CPU is divided into.
    ranked: whether the values of weights decide how many each layer keeps, so
      that the counts are only equal where every bit is.
  """

  binary: str
  flags: Mapping[str, Any]
  needs: tuple[str, ...] = ()
  devices: int = 1
  ranked: bool = False


_OPTIMISER = {
  'optimizer': 'sgd',
  'learning_rate': 0.05,
  'schedule': 'constant',
  'warmup_steps': 0,
  'momentum': 0.9,
  'nesterov': False,
  'clip_norm': 0,
  'weight_decay': 0,
  'phi_decay': 0,
  'phi_decay_norm': 'l2',
  'phi_decay_schedule': 'constant',
  'phi_decay_warmup_steps': 0,
  'phi_decay_scale': '',
}
_L1_DECAY = {
  'phi_decay': 5e-5,
  'phi_decay_norm': 'l1',
  'phi_decay_schedule': 0.75,
  'phi_decay_warmup_steps': 20,
  'phi_decay_scale': 'logits=4,linear_1=2',
}
_L2_DECAY = {
  'phi_decay': 1e-3,
  'phi_decay_norm': 'l2',
  'phi_decay_schedule': 'cosine',
}

_MNIST = {
  **_OPTIMISER,
  'dataset': 'mnist_5k',
  'alphas': '1,2',
  'seeds': 1,
  'steps': 100,
  'batch_size': 20,
  'max_shift': 0,
  'update_rule': 'target_propagation',
  'scope': 'layer,global',
  'kept': '0.1,0.3,1',
}
_SPARSE = {
  **_OPTIMISER,
  'method': 'rigl',
  'alpha': 1.5,
  'sparsity': 0.9,
  'backward_sparsity': 0.8,
  'distribution': 'erk',
  'dense_layers': '',
  'scope': 'layer',
  'update_every': 25,
  'update_start': 25,
  'update_stop': 75,
  'drop_fraction': 0.3,
  'drop_schedule': 'cosine',
  'regrow': 'init',
  'regrow_dropped': False,
  'exploration_penalty': 1e-4,
  'gradient_batches': 1,
  'on_collapse': 'error',
  'network': 'lenet_300_100',
  'dataset': 'mnist_5k',
  'steps': 100,
  'steps_multiplier': 1,
  'batch_size': 20,
  'label_smoothing': 0,
  'bfloat16': False,
  'seed': 3,
  # Segments of one length for all methods, which compile the same program.
  'checkpoint_every': 25,
}
_SWEEP = {
  **_OPTIMISER,
  'methods': 'dense,static,snip,set,rigl,top_kast,magnitude',
  'alphas': '1.5',
  'learning_rates': '0.05',
  'phi_decays': '2e-4',
  'clip_norms': '0',
  'sparsities': '0.9',
  'distributions': 'erk',
  'seeds': 1,
  'network': 'lenet_300_100',
  'dataset': 'mnist_5k',
  'steps': 100,
  'batch_size': 20,
  'update_every': 25,
  'drop_fraction': 0.3,
  'exploration_penalty': 1e-4,
}
_CONTINUAL = {
  **_OPTIMISER,
  **_L2_DECAY,
  'method': 'epn',
  'alpha': '1.5',
  'seeds': 1,
  'benchmark': 'permuted',
  'dataset': 'mnist_5k',
  'tasks': 2,
  'classes_per_task': 2,
  'network': 'lenet_300_100',
  'steps_per_task': 100,
  'retrain_steps': 40,
  'retrain_learning_rate': 0.03,
  'batch_size': 20,
  'gamma': 0.95,
  'search': 'binary',
  'search_steps': 4,
  'densities': '0.05,0.1,0.15,0.2,0.3,0.4,0.5,0.6,0.8,1',
  'min_density': 0,
  'max_density': 1,
  'cap': 1,
  'omit_first_layer': False,
  'heads': 'task',
  'biases': 'task',
  'norm': 'task',
  'ewc_strength': 10,
  'infer_tasks': '',
  'evaluate_every': 1,
  'data_parallel': False,
}
_EXPORT = {'density_scale': '', 'scope': 'layer', 'values': 'float32'}


def _sparse(method: str, **flags: Any) -> dict[str, Any]:
  return {**_SPARSE, 'method': method, **flags}


def _without_decay(method: str, **flags: Any) -> dict[str, Any]:
  return {**_CONTINUAL, 'method': method, 'phi_decay': 0, **flags}


_COMPARED = ('packnet', 'ewc', 'finetune', 'independent')
ENTRIES: dict[str, Entry] = {
  'mnist_pruning-l2': Entry('mnist_pruning', {**_MNIST, **_L2_DECAY}),
  'mnist_pruning-l1-adam-shifted': Entry(
    'mnist_pruning',
    {
      **_MNIST,
      **_L1_DECAY,
      'alphas': '1.7',
      'optimizer': 'adam',
      'learning_rate': 2e-3,
      'momentum': 0,
      'update_rule': 'target_propagation,chain_rule',
      'max_shift': 1,
    },
  ),
  'mnist_pruning-clipped': Entry(
    'mnist_pruning', {**_MNIST, 'alphas': '2', 'scope': 'layer', 'clip_norm': 1}
  ),
  'sparse_training-dense': Entry(
    'sparse_training', _sparse('dense', alpha=1, sparsity=0)
  ),
  'sparse_training-static': Entry(
    'sparse_training',
    _sparse('static', alpha=1, distribution='uniform', dense_layers='logits'),
  ),
  'sparse_training-snip': Entry(
    'sparse_training', _sparse('snip', scope='global'), ranked=True
  ),
  'sparse_training-set': Entry(
    'sparse_training',
    _sparse(
      'set', regrow='keep', regrow_dropped=True, drop_schedule='constant'
    ),
  ),
  'sparse_training-rigl': Entry('sparse_training', _sparse('rigl', alpha=2)),
  'sparse_training-top_kast': Entry('sparse_training', _sparse('top_kast')),
  'sparse_training-magnitude': Entry(
    'sparse_training',
    _sparse(
      'magnitude', nesterov=True, schedule='steps', weight_decay=1e-4, alpha=1
    ),
  ),
  'sparse_training-magnitude-global': Entry(
    'sparse_training',
    _sparse(
      'magnitude',
      scope='global',
      schedule='cosine',
      warmup_steps=10,
      steps=80,
      steps_multiplier=1.25,
      update_start=20,
      update_stop=60,
      **(_L1_DECAY | {'phi_decay_warmup_steps': 16}),
    ),
    ranked=True,
  ),
  'sparse_training-lenet_5': Entry(
    'sparse_training',
    _sparse('static', network='lenet_5', alpha=1, steps=50, batch_size=10),
  ),
  'sparse_training-two-devices': Entry(
    'sparse_training',
    _sparse('rigl', gradient_batches=2, label_smoothing=0.1),
    devices=2,
  ),
  'sparse_training-init_from': Entry(
    'sparse_training',
    _sparse(
      'rigl', alpha=2, init_from='{tmp}/sparse_training-dense/checkpoints'
    ),
    needs=('sparse_training-dense',),
  ),
  'sparse_training-clipped': Entry(
    'sparse_training', _sparse('rigl', clip_norm=1)
  ),
  'sparse_sweep-all': Entry('sparse_sweep', _SWEEP),
  'sparse_sweep-clipped': Entry(
    'sparse_sweep',
    {**_SWEEP, 'methods': 'rigl', 'clip_norm': 1, 'clip_norms': '1'},
  ),
  'continual_learning-binary': Entry(
    'continual_learning', {**_CONTINUAL, 'infer_tasks': 2}, ranked=True
  ),
  'continual_learning-linear': Entry(
    'continual_learning',
    {
      **_CONTINUAL,
      'search': 'linear',
      'benchmark': 'rotated',
      'cap': 0.2,
      'omit_first_layer': True,
      'heads': 'shared',
      'biases': 'frozen',
      'norm': 'frozen',
    },
    ranked=True,
  ),
  'continual_learning-taylor': Entry(
    'continual_learning',
    {**_CONTINUAL, 'search': 'taylor', 'benchmark': 'split'},
    ranked=True,
  ),
  'continual_learning-packnet': Entry(
    'continual_learning', _without_decay('packnet', phi_decay=3e-4)
  ),
  'continual_learning-ewc': Entry('continual_learning', _without_decay('ewc')),
  'continual_learning-finetune': Entry(
    'continual_learning', _without_decay('finetune', evaluate_every=2)
  ),
  'continual_learning-independent': Entry(
    'continual_learning', _without_decay('independent')
  ),
  'continual_learning-data_parallel': Entry(
    'continual_learning',
    _without_decay('packnet', data_parallel=True),
    devices=2,
  ),
  'continual_learning-clipped': Entry(
    'continual_learning', _without_decay('packnet', clip_norm=1)
  ),
  'continual_compare': Entry(
    'continual_compare',
    {'runs': ','.join(f'{{tmp}}/continual_learning-{x}' for x in _COMPARED)},
    needs=tuple(f'continual_learning-{x}' for x in _COMPARED),
  ),
  'export_model-mnist_pruning': Entry(
    'export_model',
    {
      **_EXPORT,
      'checkpoint': '{tmp}/mnist_pruning-l2/runs/'
      'alpha=2.0-target_propagation-seed=0.safetensors',
      'density': 0.1,
      'density_scale': 'logits=2',
    },
    needs=('mnist_pruning-l2',),
  ),
  'export_model-rigl': Entry(
    'export_model',
    {**_EXPORT, 'checkpoint': '{tmp}/sparse_training-rigl'},
    needs=('sparse_training-rigl',),
  ),
  'export_model-magnitude-global': Entry(
    'export_model',
    {
      **_EXPORT,
      'checkpoint': '{tmp}/sparse_training-magnitude-global',
      'density': 0.05,
      'scope': 'global',
      'values': 'float16',
    },
    needs=('sparse_training-magnitude-global',),
    ranked=True,
  ),
  'export_model-tasks': Entry(
    'export_model',
    {
      **_EXPORT,
      'checkpoint': '{tmp}/continual_learning-binary/checkpoints/'
      'epn-alpha=1.5-seed=0',
    },
    needs=('continual_learning-binary',),
    ranked=True,
  ),
}


def versions() -> dict[str, str]:
  """The versions on which every bit of a result depends."""
  packages = ('jax', 'jaxlib', 'numpy', 'optax', 'dm-haiku')
  return {name: importlib.metadata.version(name) for name in packages}


def machine() -> dict[str, Any]:
  """The machine on which every bit of a result depends."""
  cpu, vectors = platform.processor(), []
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    lines = (line.partition(':') for line in info.read_text().splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines}
    cpu = found.get('model name', cpu)
    sets = re.findall(r'\b(?:avx|fma|amx|sse4)\w*', found.get('flags', ''))
    vectors = sorted(set(sets))
  return {
    'machine': platform.machine(),
    'cpu': cpu,
    'vectors': vectors,
    'cores': os.cpu_count(),
    'python': platform.python_version(),
  }


def _digest(*parts: bytes) -> str:
  digest = hashlib.sha256()
  for part in parts:
    digest.update(part)
  return digest.hexdigest()


def _digest_json(content: Any) -> str:
  return _digest(json.dumps(content, sort_keys=True).encode())


def _read_json(path: pathlib.Path) -> Any:
  return json.loads(path.read_text())


def _environment(tmp: pathlib.Path, devices: int) -> dict[str, str]:
  """The variables of a program: the CPU, and no JAX settings of the caller."""
  flags = XLA_FLAGS
  if devices > 1:
    flags += f' --xla_force_host_platform_device_count={devices}'
  kept = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('JAX_', 'XLA_'))
  }
  return kept | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': flags,
    'PYTHONPATH': str(ROOT),
    # A program uses what another has compiled.
    'JAX_COMPILATION_CACHE_DIR': str(tmp / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }


def _run(
  tmp: pathlib.Path, binary: str, flags: Iterable[str], devices: int = 1
) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', f'experiments.{binary}', *flags],
    cwd=ROOT,
    env=_environment(tmp, devices),
    capture_output=True,
    text=True,
  )


def _cpu_seconds() -> float:
  """The seconds of a core that all commands so far have taken."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def _losses(out_dir: pathlib.Path) -> Result:
  """The last line with a loss in metrics.jsonl, of every run."""
  lines = (out_dir / 'metrics.jsonl').read_text().splitlines()
  found = {}
  for line in map(json.loads, lines):
    if 'loss' in line:
      found[line.pop('run', 'run')] = line
  return dict(sorted(found.items()))


def _mask_of_code(
  code: np.ndarray, size: int, kept: int, rice: int
) -> np.ndarray:
  """Decodes the Rice code of the positions of a mask."""
  inverted = 2 * kept > size
  number = size - kept if inverted else kept
  bits = np.unpackbits(code)
  planes = bits[: number * rice].reshape(rice, number).astype(np.int64)
  unary = np.flatnonzero(bits[number * rice :])
  gaps = (np.diff(unary, prepend=-1) - 1) << rice
  for bit, plane in enumerate(planes):
    gaps += plane << bit
  mask = np.full(size, inverted)
  mask[np.cumsum(gaps + 1) - 1] = not inverted
  return mask


def read_leaves(path: pathlib.Path) -> dict[str, Result]:
  """The leaves of a file of `export_model` or of `mnist_pruning`.

  Args:
    path: the file, a safetensors container.

  Returns:
    By section and path of the leaf, dicts of the shape; of the number of
    weights kept and the SHA-256 of the packed mask, if it is pruned; and of the
    SHA-256 of the values, if it has any.
  """
  found = {}
  with safetensors.safe_open(path, framework='np') as file:
    metadata = json.loads(file.metadata()['powerprop_jax'])
    rounded = metadata['values']
    for prefix, rows in metadata['leaves'].items():
      taken: dict[str, int] = {}

      def take(name, count, prefix=prefix, taken=taken):
        start = taken.get(name, 0)
        taken[name] = start + count
        return file.get_tensor(prefix + name)[start : start + count]

      for name, dtype, shape, *pruned in rows:
        size = count = math.prod(shape)
        leaf: Result = {'shape': shape}
        if pruned:
          count, _, rice, num_bytes = pruned
          mask = _mask_of_code(take('masks', num_bytes), size, count, rice)
          leaf |= {'kept': count, 'mask': _digest(np.packbits(mask).tobytes())}
        if dtype is not None:
          stored = rounded if pruned and rounded else dtype
          leaf['values'] = _digest(take(stored, count).tobytes())
        found[prefix + name] = leaf
  return found


def _split_leaves(leaves: dict[str, Result]) -> tuple[Result, Result]:
  """Fingerprints, which depend on every bit, and the counts of kept weights."""
  kept = {path: leaf['kept'] for path, leaf in leaves.items() if 'kept' in leaf}
  bits = {
    path: {name: x for name, x in leaf.items() if name != 'kept'}
    for path, leaf in leaves.items()
  }
  return bits, kept


def _read_mnist_pruning(out_dir: pathlib.Path, out: str) -> Result:
  fingerprints, accuracies = {}, {}
  for path in sorted((out_dir / 'runs').glob('*.json')):
    run = _read_json(path)
    accuracies[path.stem] = {
      name: run[name] for name in ('valid_accuracy', 'test_accuracy')
    }
    leaves = read_leaves(path.with_suffix('.safetensors'))
    fingerprints[path.stem] = {
      'theta': _split_leaves(leaves)[0],
      'overlap': _digest_json(run['overlap']),
      'initial': _digest_json(run['weights']['initial']),
      'survives': _digest_json(run['weights']['survives']),
    }
  return {
    'fingerprints': fingerprints,
    'accuracies': accuracies,
    'kept': _read_json(out_dir / 'summary.json')['kept'],
    'losses': _losses(out_dir),
  }


def _read_sparse_training(out_dir: pathlib.Path, out: str) -> Result:
  summary = _read_json(out_dir / 'summary.json')
  others = ('dead_units', 'explored', 'inference_flops', 'training_flops')
  return {
    'fingerprints': summary['fingerprint'],
    'accuracies': {
      name: summary[name] for name in ('valid_accuracy', 'test_accuracy')
    },
    'kept': {'sparsity': summary['sparsity']},
    'losses': _losses(out_dir),
    'others': {name: summary[name] for name in others},
  }


def _read_sparse_sweep(out_dir: pathlib.Path, out: str) -> Result:
  runs = {
    path.stem: _read_json(path) for path in (out_dir / 'runs').glob('*.json')
  }

  def of_runs(*names):
    return {
      key: {name: run[name] for name in names}
      for key, run in sorted(runs.items())
    }

  return {
    'accuracies': of_runs('valid_accuracy', 'test_accuracy'),
    'losses': _losses(out_dir),
    'others': of_runs('inference_flops', 'training_flops'),
  }


def _without_seconds(content: Any) -> Any:
  if isinstance(content, dict):
    return {
      name: _without_seconds(value)
      for name, value in content.items()
      if 'seconds' not in name
    }
  if isinstance(content, list):
    return [_without_seconds(value) for value in content]
  return content


def _read_continual_learning(out_dir: pathlib.Path, out: str) -> Result:
  accuracies, kept, others = {}, {}, {}
  for path in sorted((out_dir / 'runs').glob('*.json')):
    run = _without_seconds(_read_json(path))
    names = ('accuracy_matrix', 'valid_accuracy')
    accuracies[path.stem] = {name: run.pop(name) for name in names}
    names = ('layers', 'new_weights', 'layer_density', 'density')
    kept[path.stem] = {name: run.pop(name) for name in names if name in run}
    others[path.stem] = run
  return {
    'accuracies': accuracies,
    'kept': kept,
    'losses': _losses(out_dir),
    'others': others,
  }


def _read_continual_compare(out_dir: pathlib.Path, out: str) -> Result:
  table, _, _ = out.partition('\nIn ')
  figures = sorted(path.name for path in out_dir.iterdir())
  return {'others': {'table': table.splitlines(), 'figures': figures}}


def _read_export_model(out_dir: pathlib.Path, out: str) -> Result:
  bits, kept = _split_leaves(read_leaves(out_dir / 'model.safetensors'))
  table, _, _ = out.partition('\nIn ')
  lines = table.strip().splitlines()
  percent = [re.findall(r'(\w+) ([\d.]+) %', line) for line in lines]
  return {
    'fingerprints': bits,
    # The name of a network fills its column.
    'accuracies': {
      line[:10].strip(): {name: float(x) / 100 for name, x in found}
      for line, found in zip(lines, percent)
      if found
    },
    'kept': kept,
    'others': {'table': lines},
  }


_READERS: dict[str, Callable[[pathlib.Path, str], Result]] = {
  'mnist_pruning': _read_mnist_pruning,
  'sparse_training': _read_sparse_training,
  'sparse_sweep': _read_sparse_sweep,
  'continual_learning': _read_continual_learning,
  'continual_compare': _read_continual_compare,
  'export_model': _read_export_model,
}


class Recorder:
  """Runs entries, and those that they need, once each.

  Attributes:
    seconds: the seconds of a core that each entry took, by name.
  """

  def __init__(self, tmp: pathlib.Path):
    self._tmp = tmp
    self._found: dict[str, Result] = {}
    self.seconds: dict[str, float] = {}

  def record(self, name: str) -> Result:
    """The results of an entry.

    Args:
      name: one of `ENTRIES`.

    Returns:
      A dict of some of 'fingerprints', 'accuracies', 'kept', 'losses' and
      'others': everything but 'accuracies' and 'kept' is only equal where every
      bit is, and for `ranked` entries so is 'kept'.

    Raises:
      RuntimeError: if a command fails, with the end of what it wrote.
    """
    if name not in self._found:
      for needed in ENTRIES[name].needs:
        self.record(needed)
      begin = _cpu_seconds()
      self._found[name] = self._run(name)
      self.seconds[name] = _cpu_seconds() - begin
    return self._found[name]

  def _run(self, name: str) -> Result:
    entry, out_dir = ENTRIES[name], self._tmp / name
    place = 'out_dir', out_dir
    if entry.binary == 'export_model':
      out_dir.mkdir()
      place = 'out', out_dir / 'model.safetensors'
    flags = dict([*entry.flags.items(), place])
    done = _run(
      self._tmp,
      entry.binary,
      [
        f'--{flag}={value}'.replace('{tmp}', str(self._tmp))
        for flag, value in flags.items()
      ],
      entry.devices,
    )
    if done.returncode:
      raise RuntimeError(f'{name} failed:\n{done.stderr[-2000:]}')
    return _READERS[entry.binary](out_dir, done.stdout)


# What takes long to import is imported once, by the process that the binaries
# are forked from.
_HELP = """
import os
import runpy
import sys
import haiku, jax, matplotlib.pyplot, optax, powerprop_jax
for path in sys.argv[1:]:
  if process := os.fork():
    os.waitpid(process, 0)
  else:
    sys.argv = [path, '--helpxml']
    runpy.run_path(path, run_name='__main__')
    os._exit(0)
"""


def _flags_of_help(text: str) -> dict[str, Result]:
  """The flags in what a binary writes of itself."""
  found = {}
  for flag in xml.etree.ElementTree.fromstring(text).iter('flag'):
    text_of = functools.partial(flag.findtext, default='')
    own = ('experiments', 'powerprop_jax', str(ROOT))
    if text_of('file').startswith(own):
      found[text_of('name')] = {
        'type': text_of('type'),
        # The value of a flag that is not given; <default> has no text for None.
        'default': text_of('current'),
        'choices': [choice.text for choice in flag.iter('enum_value')],
      }
  return dict(sorted(found.items()))


def flags() -> dict[str, dict[str, Result]]:
  """By binary the flags that it defines itself: type, default and choices."""
  paths = [str(ROOT / 'experiments' / f'{name}.py') for name in BINARIES]
  with tempfile.TemporaryDirectory() as tmp:
    done = subprocess.run(
      [sys.executable, '-c', _HELP, *paths],
      cwd=ROOT,
      env=_environment(pathlib.Path(tmp), 1),
      capture_output=True,
      text=True,
    )
  start = '<?xml'
  before, *found = done.stdout.split(start)
  if before or len(found) != len(BINARIES):
    raise RuntimeError(f'A binary has no help:\n{done.stderr[-2000:]}')
  return {
    name: _flags_of_help(start + text) for name, text in zip(BINARIES, found)
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('out', type=pathlib.Path, help='The file to write.')
  parser.add_argument(
    '--only', choices=list(ENTRIES), help='The only entry to record.'
  )
  parser.add_argument(
    '--flags', action='store_true', help='Record the flags of the binaries.'
  )
  args = parser.parse_args()
  if args.flags:
    content: Any = flags()
  else:
    names = [args.only] if args.only else list(ENTRIES)
    entries = {}
    with tempfile.TemporaryDirectory() as tmp:
      recorder = Recorder(pathlib.Path(tmp))
      for name in names:
        entries[name] = recorder.record(name)
        print(f'{name}: {recorder.seconds[name]:.1f} s of a core', flush=True)
    print(f'In all {sum(recorder.seconds.values()):.0f} s of a core.')
    content = {
      'machine': machine(),
      'versions': versions(),
      'entries': entries,
    }
  args.out.write_text(json.dumps(content, indent=1) + '\n')


if __name__ == '__main__':
  main()

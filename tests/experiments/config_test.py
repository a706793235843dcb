"""Tests of the settings of programs and of their flags."""

import dataclasses
import json
import subprocess
import sys

from absl import flags
import pytest

from experiments.support import config


def _check_even(value):
  if value % 2:
    raise ValueError('must be even')


@dataclasses.dataclass(frozen=True)
class _Shared(config.Settings):
  """Settings that several programs share."""

  rate: float = config.flag(0.5, 'The rate.', low=0.0)
  kind: str = config.flag('a', 'The kind.', choices=('a', 'b'))
  quiet: bool = config.flag(False, 'Whether to be quiet.', decides=False)


@dataclasses.dataclass(frozen=True)
class _Settings(_Shared):
  """The settings of the program that is tested."""

  rate: float = config.like(_Shared, 'rate', 0.25)
  steps: int = config.flag(10, 'The steps.', low=1, high=100)
  even: int = config.flag(2, 'An even number.', check=_check_even)
  alphas: tuple[float, ...] = config.flag((1.0, 2.0), 'The powers.', low=1.0)
  layers: tuple[str, ...] = config.flag((), 'Some layers.')
  cap: float | None = config.flag(None, 'The cap.', low=0.0, high=1.0)

  def __post_init__(self):
    super().__post_init__()
    if self.cap is not None and self.cap > self.rate:
      raise ValueError(f'--cap={self.cap:g} must not be above --rate.')


_PRESETS = {'fast': {'steps': 3, 'alphas': [3], 'quiet': True}}


def _parse(*arguments):
  return config.parse(_Settings, arguments, _PRESETS)


def test_values_have_the_types_of_their_fields():
  found = _parse('--alphas=1,2.5', '--rate=1', '--cap=0', '--layers=a,"b,c"')
  assert found == _Settings(
    alphas=(1.0, 2.5), rate=1.0, cap=0.0, layers=('a', 'b,c')
  )
  assert [type(x) for x in (found.rate, found.cap)] == [float, float]
  assert _parse() == _Settings()
  assert _parse('--quiet').quiet
  assert not _parse('--preset=fast', '--noquiet').quiet


def test_a_preset_yields_to_what_is_given():
  assert _parse('--preset=fast') == _Settings(
    steps=3, alphas=(3.0,), quiet=True
  )
  assert _parse('--steps=10', '--preset=fast').steps == 10


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--steps=0', '--steps=0: must be between 1 and 100'),
    ('--steps=1.5', '--steps=1.5: must be a whole number'),
    ('--steps=1000000000000', 'must be between 1 and 100'),
    ('--rate=nan', '--rate=nan: must be a finite number'),
    ('--rate=inf', '--rate=inf: must be a finite number'),
    ('--rate=-1', '--rate=-1: must be at least 0'),
    ('--rate=', '--rate=: must be a number'),
    ('--kind=c', '--kind=c: value should be one of <a|b>'),
    ('--even=3', '--even=3: must be even'),
    ('--alphas=', '--alphas=: must not be empty'),
    ('--alphas=1,nan', '--alphas=1,nan: must be a finite number'),
    ('--alphas=1,,2', '--alphas=1,,2: must be a number'),
    ('--alphas=0.5', '--alphas=0.5: must be at least 1'),
    ('--cap=0.3', '--cap=0.3 must not be above --rate.'),
    ('--quiet=perhaps', '--quiet=perhaps: must be true or false'),
    ('--preset=slow', '--preset=slow: value should be one of <fast>'),
    ('--stepps=1', "Unknown command line flag 'stepps'. Did you mean: steps"),
    ('left', "not flags: ['left']"),
  ],
)
def test_impossible_values(argument, message):
  with pytest.raises(ValueError) as e:
    _parse(argument)
  assert message in str(e.value)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'rate': float('nan')}, '--rate=nan: must be a finite number'),
    ({'steps': 2.0}, '--steps=2: must be a whole number'),
    ({'steps': True}, '--steps=True: must be a whole number'),
    ({'alphas': 2.0}, '--alphas=2: must be a list'),
    ({'kind': None}, '--kind=None: must be text'),
  ],
)
def test_values_are_checked_wherever_they_come_from(values, message):
  with pytest.raises(ValueError, match=message):
    _Settings(**values)
  with pytest.raises(ValueError, match=message):
    config.parse(_Settings, ['--preset=p'], {'p': values})


def test_what_decides_survives_json():
  settings = _Settings(alphas=(1.5,), quiet=True, cap=0.1)
  found = config.deciding(settings)
  assert found.keys() == {
    'rate',
    'kind',
    'steps',
    'even',
    'alphas',
    'layers',
    'cap',
  }
  found = json.loads(json.dumps(found))
  assert found == config.deciding(settings)
  assert config.restored(_Settings, found, quiet=True) == settings


def test_help_shows_every_flag_under_its_subject():
  text = config.help_text(_Settings, 'A program.', _PRESETS)
  parts = text.split('\n\n')
  assert parts[0] == 'A program.'
  own, shared, presets = parts[2:5]
  assert own.startswith(
    'The settings of the program that is tested.\n  --steps=10\n      The'
  )
  assert '--alphas=1,2\n      The powers. At least 1.' in own
  assert shared.startswith(
    'Settings that several programs share.\n  --rate=0.25\n      The rate. In'
    ' other programs it is 0.5 by default. At least 0.'
  )
  assert '--kind=a\n      The kind. One of a, b.' in shared
  assert 'One of fast.' in presets
  for field in dataclasses.fields(_Settings):
    assert f'  --{field.name}=' in text
  assert max(map(len, text.splitlines())) <= 80


def test_defaults_survive_absl():
  values = flags.FlagValues()
  config.define(_Settings, values, _PRESETS)
  values(['program'])
  assert values.alphas == (1.0, 2.0)
  assert values['alphas'].default_as_str == "'1,2'"


def test_factors():
  assert config.factors(['a=b=2', 'c.*=0.5']) == {'a=b': 2.0, 'c.*': 0.5}
  for bad in ('a', 'a=x', 'a=nan', 'a=-1', '(=1'):
    with pytest.raises(ValueError, match='pattern=factor|regular expression'):
      config.factors([bad])


_PROGRAM = '''
"""A program."""
import dataclasses
from experiments.support import config
from powerprop_jax.training import loop

@dataclasses.dataclass(frozen=True)
class Settings(config.Settings):
  """All."""

  steps: int = config.flag(1, 'The steps.', low=0)

def main(settings):
  with config.refusing():
    if settings.steps == 2:
      raise ValueError('not two')
  if settings.steps == 3:
    raise loop.Diverged('not three')
  if settings.steps == 4:
    raise OSError(28, 'No space left on device')
  if settings.steps == 5:
    raise KeyboardInterrupt

config.run(main, Settings)
'''


# Starts it once for each argument, in forks: what it imports takes most of the
# time of a start.
_STARTS = """
import os
import sys
from experiments.support import config
from powerprop_jax.training import loop
program, folder, *arguments = sys.argv[1:]
for i, argument in enumerate(arguments):
  if not os.fork():
    for descriptor, name in ((1, 'out'), (2, 'err')):
      file = os.open(f'{folder}/{name}_{i}', os.O_CREAT | os.O_WRONLY)
      os.dup2(file, descriptor)
    sys.argv = ['program', argument]
    exec(program, vars(sys.modules['__main__']))
    os._exit(99)
  print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
_ENDINGS = {
  '--steps=1': (0, ''),
  '--steps=-1': (2, 'error: --steps=-1: must be at least 0\n'),
  '--unknown': (2, "error: Unknown command line flag 'unknown'\n"),
  '--verbosity=x': (2, 'error: --verbosity=x: '),
  '--steps=2': (2, 'error: not two\n'),
  '--steps=3': (1, 'error: not three\n'),
  '--steps=4': (1, 'error: [Errno 28] No space left on device\n'),
  '--steps=5': (130, 'error: interrupted'),
  '--help': (0, ''),
}


@pytest.fixture(scope='module')
def endings(tmp_path_factory):
  """The exit code, the output and the errors by argument."""
  folder = tmp_path_factory.mktemp('endings')
  done = subprocess.run(
    [sys.executable, '-c', _STARTS, _PROGRAM, folder, *_ENDINGS],
    capture_output=True,
    text=True,
    check=True,
  )
  codes = map(int, done.stdout.splitlines())
  return {
    argument: (
      code,
      *((folder / f'{name}_{i}').read_text() for name in ('out', 'err')),
    )
    for i, (argument, code) in enumerate(zip(_ENDINGS, codes, strict=True))
  }


@pytest.mark.slow
@pytest.mark.parametrize('argument', _ENDINGS)
def test_a_program_ends_with_one_line_and_a_code(endings, argument):
  code, message = _ENDINGS[argument]
  found, out, err = endings[argument]
  assert found == code, err
  assert err.startswith(message)
  assert len(err.splitlines()) == bool(message)
  if argument == '--help':
    assert out.startswith('A program.\n\nFlags')

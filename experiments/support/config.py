"""The settings of a binary: one frozen dataclass, from which flags are made.

  @dataclasses.dataclass(frozen=True)
  class Settings(config.Settings):
    '''What is trained.'''

    steps: int = config.flag(1_000, 'The number of training steps.', low=1)

  config.run(main, Settings)

makes the flag --steps, its entry in --help, its checks, its entry in
config.json, and the comparison with that entry when a run goes on. The first
line of the docstring of the class that introduces a field is the heading under
which --help shows it, so groups that several binaries share are classes to
inherit from. The types of fields are int, float, str and bool; optional fields
have types such as `float | None`, and lists such as `tuple[float, ...]`.

A value is checked wherever it comes from, be it the command line, a preset or a
checkpoint, when the dataclass is made: NaN and infinity are refused everywhere.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import csv
import dataclasses
import functools
import inspect
import math
import re
import sys
import textwrap
import types
import typing
from typing import Any, NoReturn, TypeVar

from absl import app
from absl import flags
from absl import logging

from powerprop_jax.training import loop

T = TypeVar('T')
Presets = Mapping[str, Mapping[str, Any]]
_HELP = ('--help', '-help', '-h', '--helpshort', '-helpshort')


@dataclasses.dataclass(frozen=True)
class _Flag:
  """What a field says of its flag besides its type and its default."""

  help: str
  low: float | None
  high: float | None
  choices: Collection[str] | None
  check: Callable[[Any], Any] | None
  decides: bool


def flag(
  default: T,
  help: str,
  *,
  low: float | None = None,
  high: float | None = None,
  choices: Collection[str] | None = None,
  check: Callable[[Any], Any] | None = None,
  decides: bool = True,
) -> T:
  """Makes a field of a settings dataclass, which becomes a flag.

  The limits, the choices and the check hold for every item of a list.

  Args:
    default: the value if none is given. A list that is empty by default may be
      empty, others may not.
    help: what the flag is, in full sentences.
    low: the smallest possible value.
    high: the largest possible value.
    choices: the possible values.
    check: a function that raises ValueError for an impossible value.
    decides: whether results depend on it. A field that does not decide is
      neither written nor compared, and may change when a run goes on.

  Returns:
    A field of `dataclasses`.
  """
  options = _Flag(help, low, high, choices, check, decides)
  return typing.cast(
    T, dataclasses.field(default=default, metadata={'flag': options})
  )


def like(
  cls: type,
  name: str,
  default: Any = dataclasses.MISSING,
  *,
  more: str = '',
  decides: bool = True,
  own: bool = False,
) -> Any:
  """Makes the field that another class has, possibly with another default.

  Args:
    cls: the settings class that has the field.
    name: the name of the field.
    default: another default; the help then says what the other class has.
    more: text that is added to the help.
    decides: whether results depend on it, if they do in the other class.
    own: whether every class has a default of its own, so that the help has no
      need to name that of `cls`.

  Returns:
    A field of `dataclasses`.
  """
  (there,) = (f for f in dataclasses.fields(cls) if f.name == name)
  options: _Flag = there.metadata['flag']
  added = [options.help, more]
  if default is dataclasses.MISSING:
    default = there.default
  elif default != there.default and not own:
    added.append(f'In other programs it is {_shown(there.default)} by default.')
  options = dataclasses.replace(
    options,
    help=' '.join(filter(None, added)),
    decides=options.decides and decides,
  )
  return dataclasses.field(default=default, metadata={'flag': options})


def _shown(value: Any) -> str:
  """A value as it would be given on the command line."""
  if isinstance(value, tuple):
    return ','.join(map(_shown, value)) or "''"
  return f'{value:g}' if isinstance(value, float) else str(value)


class _Kind(typing.NamedTuple):
  """The type of a field: its items, and whether it is a list or optional."""

  item: type
  is_list: bool
  is_optional: bool


def _kind(annotation: Any) -> _Kind:
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    (inner,) = set(typing.get_args(annotation)) - {type(None)}
    return _kind(inner)._replace(is_optional=True)
  if typing.get_origin(annotation) is tuple:
    return _Kind(typing.get_args(annotation)[0], True, False)
  return _Kind(annotation, False, False)


def _in_words(item: type) -> str:
  return {int: 'a whole number', float: 'a number', bool: 'true or false'}.get(
    item, 'text'
  )


def _limits(options: _Flag) -> str:
  """The values that are possible, in words; '' if all are."""
  low, high = options.low, options.high
  if low is None:
    return '' if high is None else f'at most {_shown(high)}'
  if high is None:
    return f'at least {_shown(low)}'
  return f'between {_shown(low)} and {_shown(high)}'


def _check_item(item: type, options: _Flag, value: Any) -> Any:
  """Checks a value, or item of a list, and returns it with its type."""
  if item is float and type(value) is int:
    value = float(value)
  if type(value) is not item:
    raise ValueError(f'must be {_in_words(item)}')
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError('must be a finite number')
  low, high = options.low, options.high
  too_low = low is not None and value < low
  if too_low or (high is not None and value > high):
    raise ValueError(f'must be {_limits(options)}')
  if options.choices is not None and value not in options.choices:
    raise ValueError(f'must be one of {", ".join(options.choices)}')
  if options.check is not None:
    options.check(value)
  return value


def _read_item(item: type, text: str) -> Any:
  """Turns text into a value of a type."""
  try:
    return item(text)
  except ValueError:
    raise ValueError(f'must be {_in_words(item)}') from None


class _Field(typing.NamedTuple):
  """A field of a settings class, with what its flag is made of."""

  name: str
  default: Any
  kind: _Kind
  options: _Flag

  def check(self, value: Any) -> Any:
    """Checks a value, and returns it as the dataclass holds it."""
    if value is None and self.kind.is_optional:
      return None
    if not self.kind.is_list:
      return _check_item(self.kind.item, self.options, value)
    if not isinstance(value, list | tuple):
      raise ValueError('must be a list')
    if not value and self.default:
      raise ValueError('must not be empty')
    check = functools.partial(_check_item, self.kind.item, self.options)
    return tuple(map(check, value))

  def parse(self, text: str) -> Any:
    """The value that a text on the command line stands for."""
    if not self.kind.is_list:
      return self.check(_read_item(self.kind.item, text))
    try:
      items = next(csv.reader([text], strict=True), [])
    except csv.Error as e:
      raise ValueError(f'is no list: {e}') from e
    read = functools.partial(_read_item, self.kind.item)
    return self.check([read(item.strip()) for item in items])


@functools.cache
def _fields(cls: type) -> tuple[_Field, ...]:
  hints = typing.get_type_hints(cls)
  return tuple(
    _Field(f.name, f.default, _kind(hints[f.name]), f.metadata['flag'])
    for f in dataclasses.fields(cls)
  )


@dataclasses.dataclass(frozen=True)
class Settings:
  """The base class of the settings of binaries.

  A class that has to compare fields with one another overrides
  `__post_init__`, calls that of `super()` first, and raises ValueError with
  the flag, its value and a remedy.
  """

  def __post_init__(self):
    for field in _fields(type(self)):
      value = getattr(self, field.name)
      try:
        object.__setattr__(self, field.name, field.check(value))
      except ValueError as e:
        raise ValueError(f'--{field.name}={_shown(value)}: {e}') from e


def deciding(settings: Settings) -> dict[str, Any]:
  """The settings that decide the result, for config.json and checkpoints.

  Args:
    settings: the settings of a binary.

  Returns:
    The values by name, which are the same after JSON has held them.
  """
  return {
    field.name: list(value) if isinstance(value, tuple) else value
    for field in _fields(type(settings))
    if field.options.decides
    for value in [getattr(settings, field.name)]
  }


def restored(cls: type[T], config: Mapping[str, Any], **others: Any) -> T:
  """Makes settings from what `deciding` returned.

  Args:
    cls: the settings class.
    config: returned by `deciding`; entries that are not fields are left out.
    **others: the values of fields that decide no result.

  Returns:
    The settings.

  Raises:
    ValueError: if a value is impossible.
  """
  names = {field.name for field in _fields(cls)}
  kept = {name: value for name, value in config.items() if name in names}
  return cls(**(kept | others))


class _Parser(flags.ArgumentParser):
  """Lets absl read and check a value as the dataclass does."""

  def __init__(self, *, field: _Field):
    self._field = field
    self.syntactic_help = ''

  def parse(self, argument: Any) -> Any:
    if isinstance(argument, str):
      return self._field.parse(argument)
    return self._field.check(argument)

  def flag_type(self) -> str:
    if self._field.kind.is_list:
      return 'comma separated list of strings'  # As absl calls its lists.
    item = self._field.kind.item
    return 'string' if item is str else item.__name__


class _Serializer(flags.ArgumentSerializer):
  """Writes a value as `_Parser` reads it."""

  def serialize(self, value: Any) -> str:
    return _shown(value)


def define(
  cls: type[Settings],
  values: flags.FlagValues,
  presets: Presets | None = None,
) -> None:
  """Defines the flags of a settings class, and --preset if there are any.

  Args:
    cls: the settings class.
    values: the flags to which they are added.
    presets: values of fields by the name of the preset.
  """
  for field in _fields(cls):
    name, default, options = field.name, field.default, field.options
    if field.kind.item is bool:
      flags.DEFINE_bool(name, default, options.help, flag_values=values)
    elif options.choices is not None and not field.kind.is_list:
      flags.DEFINE_enum(
        name, default, [*options.choices], options.help, flag_values=values
      )
    else:
      flags.DEFINE(
        _Parser(field=field),
        name,
        default,
        options.help,
        flag_values=values,
        serializer=_Serializer(),
      )
  if presets:
    flags.DEFINE_enum(
      'preset', None, sorted(presets), _PRESET_HELP, flag_values=values
    )


_PRESET_HELP = (
  'A named set of values for several flags. Flags that are given on the command'
  ' line take precedence over it.'
)


def parse(
  cls: type[T], arguments: Sequence[str], presets: Presets | None = None
) -> T:
  """Makes settings from arguments, as a binary reads its command line.

  Args:
    cls: the settings class.
    arguments: such as ['--steps=10'].
    presets: values of fields by the name of the preset.

  Returns:
    The settings.

  Raises:
    ValueError: if they are impossible; it names the flag and its value.
  """
  values = flags.FlagValues()
  define(typing.cast(type[Settings], cls), values, presets)
  return _parsed(cls, values, ['program', *arguments], presets)


def _parsed(
  cls: type[T],
  values: flags.FlagValues,
  argv: Sequence[str],
  presets: Presets | None,
) -> T:
  try:
    rest = values(argv)
  except flags.Error as e:
    # Absl writes `flag --steps=0: must be at least 1`, sometimes on two lines.
    message = ' '.join(str(e).split())
    message = re.sub(r"\('Non-boolean.*", 'must be true or false', message)
    raise ValueError(re.sub(r'^flag (?=--)', '', message)) from e
  if len(rest) > 1:
    raise ValueError(f'There are arguments that are not flags: {rest[1:]}.')
  fields = _fields(cls)
  given = {
    f.name: values[f.name].value for f in fields if values[f.name].present
  }
  preset = presets[values.preset] if presets and values.preset else {}
  return cls(**{**preset, **given})


def _heading(cls: type, name: str) -> type:
  """The class that introduces a field: the most basic class that has it."""
  return [c for c in cls.__mro__ if name in inspect.get_annotations(c)][-1]


def _entry(name: str, shown: str, text: str) -> str:
  lines = textwrap.wrap(text, 74)
  return '\n'.join([f'  --{name}={shown}', *(f'      {x}' for x in lines)])


def _describe(field: _Field) -> str:
  options = field.options
  if options.choices is not None:
    start = 'A list of' if field.kind.is_list else 'One of'
    return f'{options.help} {start} {", ".join(options.choices)}.'
  limits = _limits(options)
  return options.help + (f' {limits[0].upper()}{limits[1:]}.' if limits else '')


def help_text(
  cls: type[Settings], doc: str, presets: Presets | None = None
) -> str:
  """The text of --help, with all flags of a binary, grouped by subject.

  Args:
    cls: the settings class.
    doc: the docstring of the binary.
    presets: values of fields by the name of the preset.

  Returns:
    Text of several lines.
  """
  groups: dict[type, list[str]] = {c: [] for c in cls.__mro__}
  for field in _fields(cls):
    shown = '' if field.default is None else _shown(field.default)
    entry = _entry(field.name, shown, _describe(field))
    groups[_heading(cls, field.name)].append(entry)
  parts = [doc.strip(), 'Flags, with their defaults:']
  for group, entries in groups.items():
    if entries:
      title = (group.__doc__ or '').strip().splitlines()[0]
      parts.append('\n'.join([title, *entries]))
  if presets:
    names = f'{_PRESET_HELP} One of {", ".join(sorted(presets))}.'
    parts.append('\n'.join(['Presets.', _entry('preset', '', names)]))
  parts.append('--helpfull also shows the flags of the libraries.')
  return '\n\n'.join(parts)


def fail(message: object, code: int = 2) -> NoReturn:
  """Ends the program with one line that says why.

  Args:
    message: what went wrong.
    code: the exit code: 2 if the settings are wrong, 1 if the run cannot go on.
  """
  print(f'error: {message}', file=sys.stderr)
  sys.exit(code)


class Refused(ValueError):
  """What the settings ask for cannot be done; the exit code is 2."""


@contextlib.contextmanager
def refusing() -> Iterator[None]:
  """Refuses settings that turn out to be impossible.

  This context is for what is done before training, where a ValueError, an error
  about files or a package that is missing is due to the settings.

  Raises:
    Refused: with the text of such an error.
  """
  try:
    yield
  except (ValueError, OSError, ImportError) as e:
    raise Refused(str(e)) from e


def run(
  main: Callable[[Any], None],
  cls: type[Settings],
  presets: Presets | None = None,
) -> NoReturn:
  """Runs a binary: reads its flags and calls `main` with the settings.

  The exit code is 2 if a flag is wrong, 1 if the run cannot go on, and 130 if
  it was interrupted; one line on stderr says why.

  Args:
    main: a function of the settings.
    cls: the settings class.
    presets: values of fields by the name of the preset.
  """
  define(cls, flags.FLAGS, presets)
  doc = sys.modules['__main__'].__doc__ or ''

  def parse_argv(argv):
    if any(argument in _HELP for argument in argv):
      print(help_text(cls, doc, presets))
      sys.exit(0)
    try:
      settings = _parsed(cls, flags.FLAGS, argv, presets)
    except ValueError as e:
      fail(e)
    return settings

  def guarded(settings):
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # Libraries log a great deal.
    try:
      main(settings)
    except Refused as e:
      fail(e)
    except KeyboardInterrupt:
      fail('interrupted before training began', 130)
    except (loop.Diverged, OSError) as e:
      fail(e, 1)

  app.run(guarded, flags_parser=parse_argv)  # pyright: ignore
  sys.exit(0)


def check_pattern(text: str) -> None:
  """Raises ValueError if a text is not a regular expression.

  Args:
    text: an item of a list flag.

  Raises:
    ValueError: with the reason.
  """
  try:
    re.compile(text)
  except re.error as e:
    raise ValueError(f'{text!r} is no regular expression: {e}') from e


def number(text: str) -> float:
  """The number that a text stands for, or NaN, which is in no interval."""
  try:
    return float(text)
  except ValueError:
    return math.nan


def factors(items: Sequence[str]) -> dict[str, float]:
  """Reads the factors of layers from the items of a list flag.

  Args:
    items: texts, each `pattern=factor`.

  Returns:
    The factors by pattern, in the same order.

  Raises:
    ValueError: if an item is not of this form.
  """
  found = {}
  for item in items:
    pattern, equals, factor = item.rpartition('=')
    value = number(factor)
    if not equals or not 0 <= value < math.inf:
      raise ValueError(
        'items must be pattern=factor with a factor of at least 0, got'
        f' {item!r}'
      )
    check_pattern(pattern)
    found[pattern] = value
  return found

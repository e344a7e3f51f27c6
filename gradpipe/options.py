"""Options: what a config says of each of its fields, and all that follows from it.

A config is a frozen dataclass whose fields are annotated with an `Option`: help, flag, what it may
be. The command's parameters (`gradpipe.cli`), the checks of each value alone, the flags in messages
and the command that outputs record are made from these.

A default is not the same as nothing: `--alpha 100` asks for what `--method wanda` has no use for,
and is refused. So defaults are marked by `unasked`: equal to what they hold, and still to be told
from it by `is_given`.
"""

import dataclasses
import re
import shlex
import textwrap
import typing
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from gradpipe.errors import InputError, did_you_mean

T = TypeVar("T")
_TOO_MANY = 2**31  # a store records counts below it


class _Unasked:
    """A value that nobody asked for."""

    __slots__ = ()


class _Text(_Unasked, str):
    __slots__ = ()


class _Count(_Unasked, int):
    __slots__ = ()


class _Number(_Unasked, float):
    __slots__ = ()


class _Names(_Unasked, tuple[str, ...]):
    __slots__ = ()


_UNASKED: dict[type, Any] = {str: _Text, int: _Count, float: _Number, tuple: _Names}


def unasked(value: T) -> T:
    """`value` as a default: the same in all, but that `is_given` knows that nobody gave it."""
    kind = next(kind for kind in _UNASKED if isinstance(value, kind))
    return typing.cast("T", _UNASKED[kind](value))


def number(text: str, flag: str, expected: str) -> float:
    """A number as the user wrote it, whose range is a config's to check; InputError for none."""
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{flag} {text}: expected {expected}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a field is on the command line; beside it in `Annotated`."""

    help: str  # `{choices}` in it stands for their names
    flag: str | None = None  # where it is not the field's name
    is_argument: bool = False  # given by its place, without a flag
    default: str | None = None  # in words, where the field's default is None or empty
    choices: Collection[str] = ()  # what it may be
    least: int | None = None  # the lowest count that it may be
    accepts: Callable[[Any], bool] | None = None  # what else it may be, and that
    expected: str = ""  # in words
    is_regex: bool = False
    is_recorded: bool = True  # in the command that outputs hold: it shapes them
    is_path: bool = False  # recorded by its last part: an output is the same in any folder
    separator: str | None = None  # between several values in one
    parse: Callable[[str], Any] | None = None  # from the command line's text
    metavar: str | None = None  # what stands for it in help, where its type does not say it
    otherwise: Callable[[], Any] | None = None  # what the command takes where it is not given


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionField:
    """A field of a config, with its option."""

    name: str
    kind: Any  # its type
    default: Any  # `dataclasses.MISSING` if it must be given
    option: Option

    @classmethod
    def of(cls, name: str, hint: Any, default: Any) -> Self:
        """The field behind an annotation."""
        kind, option = typing.get_args(hint)
        return cls(name=name, kind=kind, default=default, option=option)

    @property
    def flag(self) -> str:
        """`--num-samples`."""
        return "--" + (self.option.flag or self.name.replace("_", "-"))

    @property
    def shown_default(self) -> str | None:
        """What help says of it; None if there is nothing to say."""
        if self.option.default is not None:
            return self.option.default
        if isinstance(self.default, tuple):
            return ",".join(self.default) or None
        is_plain = self.default is not dataclasses.MISSING and self.default is not False
        return None if not is_plain or self.default is None else str(self.default)

    @property
    def help(self) -> str:
        """The option's help, and its default."""
        text = self.option.help.replace("{choices}", ", ".join(self.option.choices))
        shown = self.shown_default
        return text if shown is None else f"{text}  [default: {shown}]"

    def declared(self, value: Any) -> Any:
        """What was given as what the field is declared as; InputError for what cannot be that."""
        if isinstance(value, _Unasked) or value is self.default:
            return value
        if typing.get_origin(self.kind) is not tuple:
            return self._one(value, _kinds(self.kind))
        is_one = isinstance(value, str) or not isinstance(value, Iterable)
        kinds = _kinds(typing.get_args(self.kind)[0])
        return tuple(self._one(item, kinds) for item in ((value,) if is_one else value))

    def _one(self, value: Any, kinds: tuple[Any, ...]) -> Any:
        found = _as_declared(value, kinds)
        if not isinstance(found, kinds):
            names = " or ".join(x.__name__ for x in kinds if x is not type(None))
            raise InputError(f"{self.flag} {_shown(value)}: expected {names}")
        return found

    def check(self, value: Any) -> None:
        """Refuse what it may not be, seen alone."""
        option, got = self.option, f"{self.flag} {value}"
        if option.choices and value not in option.choices:
            near = did_you_mean(str(value), option.choices)
            raise InputError(f"{got}: expected one of {', '.join(option.choices)}{near}")
        if option.least is not None and not option.least <= value < _TOO_MANY:
            expected = f"at least {option.least}" if value < option.least else "less than 2³¹"
            raise InputError(f"{got}: expected {expected}")
        if option.accepts is not None and not option.accepts(value):
            raise InputError(f"{got}: expected {option.expected}")
        is_name = isinstance(self.default, _Names)
        if value == "" and not is_name:  # a shell's variable that is not set
            raise InputError(f"{self.flag} '': expected a value: give one, or leave it out")
        if option.is_regex:
            try:
                re.compile(value)
            except re.error as error:
                raise InputError(
                    f"{self.flag} {value!r}: not a regular expression: {error}"
                ) from error


@lru_cache
def option_fields(config: type) -> dict[str, OptionField]:
    """By name, a config's fields that are options of their own (a config in it has its own)."""
    hints = typing.get_type_hints(config, include_extras=True)
    return {
        field.name: OptionField.of(field.name, hints[field.name], field.default)
        for field in dataclasses.fields(config)
        if typing.get_origin(hints[field.name]) is Annotated
    }


def fields_of(config: Any) -> dict[str, OptionField]:
    """As `option_fields`, of a config's own class."""
    kind: Any = type(config)
    return option_fields(kind)


@lru_cache
def _configs_in(config: type) -> dict[str, type]:
    """By name, a config's fields that are configs themselves."""
    hints = typing.get_type_hints(config).items()
    return {x: kind for x, kind in hints if isinstance(kind, type) and is_dataclass(kind)}


def check_options(config: Any) -> None:
    """Raises InputError for a field whose value can be meant in no combination.

    The field gets what it is declared as: a path for text, text for a path, a tuple for a list or
    for one of its values, Python's own number for NumPy's, a float for an int.
    """
    own: Any = type(config)
    for name, kind in _configs_in(own).items():
        if not isinstance(value := getattr(config, name), kind):
            raise InputError(f"{name} {_shown(value)}: expected a {kind.__name__}")
    for field in fields_of(config).values():
        value = field.declared(getattr(config, field.name))
        object.__setattr__(config, field.name, value)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None:
                field.check(item)


def _shown(value: object) -> str:
    """A value of another type in one short line."""
    return textwrap.shorten(repr(value), 80, placeholder=" …")


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types that `int | None` is of."""
    return typing.get_args(hint) or (hint,)


def _as_declared(value: Any, kinds: tuple[Any, ...]) -> Any:
    """What was meant by a value, if it is not of these types, and can be of one."""
    if getattr(value, "ndim", None) == 0:  # one of NumPy's numbers
        value = value.item()
    if isinstance(value, str) and Path in kinds and str not in kinds:
        return Path(value)
    if type(value) is int and float in kinds and int not in kinds:
        return float(value)
    if str not in kinds or isinstance(value, (*kinds, int, float)):
        return value
    is_word = isinstance(value, Path) or re.fullmatch(r"[\w.:]{1,40}", str(value))
    return str(value) if is_word else value  # as of a torch.device


def is_given(config: Any, name: str) -> bool:
    """Whether a field's value was asked for, even if it is the default."""
    value, default = getattr(config, name), fields_of(config)[name].default
    assert isinstance(default, _Unasked) or not default, f"{name}: its default is not marked"
    return (
        value is not None and value is not False and value != () and not isinstance(value, _Unasked)
    )


def spelled(config: Any, name: str) -> str:
    """A field as the command line has it: `--seed 1`, `--finalize`."""
    return " ".join(words(fields_of(config)[name].flag, getattr(config, name)))


def refuse_given(config: Any, names: Collection[str], why: str) -> None:
    """Raises InputError if one of these fields was given: it would be ignored, and `why`."""
    for name in names:
        if is_given(config, name):
            raise InputError(f"{spelled(config, name)}: {why}: leave it out")


def recorded_options(config: Any) -> dict[str, Any]:
    """By flag, the options that shape a result and differ from their defaults."""
    found = {}
    for field in fields_of(config).values():
        value = getattr(config, field.name)
        if field.option.is_recorded and value != field.default:
            is_path = field.option.is_path and value is not None
            found[field.flag] = Path(value).name if is_path else value
    return found


def recorded_command(verb: str, arguments: tuple[str, ...], options: dict[str, Any]) -> str:
    """`pipe VERB ARGUMENTS FLAG VALUE …`, less options that are None, False or empty.

    Paths of outputs are placeholders among the arguments: the same work gives the same bytes
    anywhere.
    """
    given = (word for flag, value in options.items() for word in words(flag, value))
    return shlex.join(["pipe", *verb.split(), *arguments, *given])


def words(flag: str, value: Any) -> Iterator[str]:
    """An option as the command line has it; of a dict, which it cannot hold, its flag."""
    if value is True or isinstance(value, dict):
        yield flag
    elif isinstance(value, tuple | list):
        for item in value:
            yield from (flag, str(item))
    elif value is not None and value is not False:
        yield from (flag, str(value))

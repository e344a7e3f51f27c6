"""Commands made of functions of configs: a command's options are its configs' fields.

typer reads a command's options off a function's signature. Here the signature is made: a parameter
that is a config becomes an option for each of its fields (`gradpipe.options`), any other one is an
option itself.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gradpipe.help import Command
from gradpipe.options import OptionField, option_fields

Place = tuple[str, ...]  # a function's parameter, its field, that one's field
_METAVARS = {str: "TEXT", int: "INTEGER", float: "FLOAT", Path: "PATH"}  # what stands for values


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One option of a command, and where its value goes."""

    path: Place
    field: OptionField

    @property
    def name(self) -> str:
        """What typer calls it."""
        return self.field.flag.removeprefix("--").replace("-", "_")

    @property
    def metavar(self) -> str | None:
        """What stands for its value in help: `TEXT`; None for a flag, which has none."""
        option, kind = self.field.option, self.field.kind
        if option.is_argument:
            return self.name.upper()
        kinds = (kind, *typing.get_args(kind))  # `int`, of `int | None` or of `tuple[int, ...]`
        usual = next((shown for kind, shown in _METAVARS.items() if kind in kinds), None)
        return option.metavar or ("REGEX" if option.is_regex else usual)

    @property
    def completions(self) -> Callable[[str], list[str]] | None:
        """What a shell offers for its value: what it may be; None if that is not a few names."""
        choices = self.field.option.choices
        if not choices:
            return None
        return lambda incomplete: [x for x in choices if x.startswith(incomplete)]  # typer's word

    def for_typer(self) -> inspect.Parameter:
        """As a function would have it, with None for what nobody gave: a config has defaults."""
        option, kind = self.field.option, self.field.kind
        is_several = typing.get_origin(kind) is tuple
        if option.parse is not None:
            kind = list[str] if is_several else str
        elif is_several:
            kind = list[typing.get_args(kind)[0]]  # type: ignore[misc]
        make = typer.Argument if option.is_argument else typer.Option
        spec = make(
            *(() if option.is_argument else (self.field.flag,)),
            help=self.field.help,
            metavar=self.metavar,
            show_default=False,
            autocompletion=self.completions,
        )
        default: Any = False if kind is bool else None
        if self.field.default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        elif kind is not bool:
            kind |= None
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, spec],
        )

    def value(self, given: Any) -> Any:
        """What its field takes, None if that was not given."""
        option = self.field.option
        is_several = isinstance(given, list | tuple)
        if given is None or given is False or (is_several and not given):
            return None if option.otherwise is None else option.otherwise()
        if not is_several:
            return given if option.parse is None else option.parse(given)
        if option.separator is not None:
            given = [part.strip() for text in given for part in text.split(option.separator)]
        return tuple(given if option.parse is None else map(option.parse, given))


def command(group: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], None]:
    """Make a function of configs and options a command of `group`."""

    def register(function: Callable[..., None]) -> None:
        """Give the group a function with a parameter for each option."""
        parameters = tuple(_parameters(function))

        def run(**given: Any) -> None:
            function(**_arguments(function, parameters, given))

        made = [parameter.for_typer() for parameter in parameters]
        run.__doc__, run.__name__ = function.__doc__, function.__name__
        run.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in made}
        group.command(name, cls=Command)(run)

    return register


def _parameters(function: Callable[..., None]) -> Iterator[Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            yield from _of_config(hints[name], (name,))
        else:
            is_required = parameter.default is inspect.Parameter.empty
            default = dataclasses.MISSING if is_required else parameter.default
            yield Parameter(path=(name,), field=OptionField.of(name, hints[name], default))


def _of_config(config: Any, path: Place, defaults: Any = None) -> Iterator[Parameter]:
    """A config's fields, those of a config in it in its place, with that one's own `defaults`."""
    own, hints = option_fields(config), typing.get_type_hints(config)
    for name in hints:
        if name not in own:
            yield from _of_config(hints[name], (*path, name), _default(config, name))
        elif defaults is None:
            yield Parameter(path=(*path, name), field=own[name])
        else:
            field = dataclasses.replace(own[name], default=getattr(defaults, name))
            yield Parameter(path=(*path, name), field=field)


def _default(config: Any, name: str) -> Any:
    """What a config holds where a config in it is not given."""
    field: Any = next(field for field in dataclasses.fields(config) if field.name == name)
    return field.default_factory()


def _arguments(
    function: Callable[..., None], parameters: tuple[Parameter, ...], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The configs and options that a function takes, of what was given by name."""
    tree: dict[str, Any] = {}
    for parameter in parameters:
        value = parameter.value(given[parameter.name])
        *branches, leaf = parameter.path
        branch = tree
        for name in branches:
            branch = branch.setdefault(name, {})
        if value is not None:
            branch[leaf] = value
    hints = typing.get_type_hints(function)
    return {name: _config(hints[name], x) if isinstance(x, dict) else x for name, x in tree.items()}


def _config(config: Any, given: dict[str, Any]) -> Any:
    """A config of the fields given; those of one in it change what it is by default."""
    values = {
        name: dataclasses.replace(_default(config, name), **x) if isinstance(x, dict) else x
        for name, x in given.items()
    }
    return config(**values)

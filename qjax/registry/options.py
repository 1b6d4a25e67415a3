"""Options of a constructor: names, defaults and the values that each of them takes, read from its annotations."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import pathlib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qjax.errors import InputError
from qjax.registry.ranges import OneOf, Range

__all__ = [
    "ANY",
    "REQUIRED",
    "Kind",
    "Option",
    "Options",
    "build",
    "check_options",
    "described",
    "kind_of",
    "options_of",
    "plain",
]

REQUIRED = "???"
"""The default of an option that must be given, as OmegaConf writes it."""

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}
_LISTS = (tuple, list, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping)


@dataclasses.dataclass(frozen=True)
class Kind:
    """The values that an option takes.

    Attributes:
      types: their types in YAML (int, float, bool, str, list, dict, NoneType); None takes everything.
      choices: the texts that there are, None for any.
      limits: the range of its numbers, None for any.
      elements: the kind of a list's elements.
      fields: the options of a mapping that stands for a dataclass; None for a mapping with keys of the user's own.
    """

    types: frozenset[type] | None
    choices: tuple[Any, ...] | None = None
    limits: Range | None = None
    elements: Kind | None = None
    fields: Options | None = None

    def takes(self, value: Any) -> bool:
        """Whether `value` is of one of the types; its range, choice and contents are for `refusal`."""
        if self.types is None:
            return True
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return type(value) in self.types or (type(value) is int and float in self.types)

    def words(self) -> str:
        """`a whole number or null`, for a message."""
        types_ = self.types or frozenset()
        shown = [text for kind, text in _WORDS.items() if kind in types_ and not (kind is int and float in types_)]
        return " or ".join(shown)

    def refusal(self, name: str, value: Any) -> str | None:
        """What is wrong with the value of the option called `name`, in a sentence; None where nothing is."""
        if not self.takes(value):
            return f"{name} is {value!r}; expected is {self.words()}"
        if isinstance(value, list | tuple) and self.elements is not None:
            if not all(self.elements.takes(item) for item in value):
                return f"{name} is {value!r}; expected is a list, each {self.elements.words()}"
            return next(filter(None, (self.elements.refusal(name, item) for item in value)), None)
        if isinstance(value, bool) or value is None:
            return None
        if self.limits is not None and isinstance(value, int | float) and not self.limits.holds(value):
            return f"{name} is {value}; it is {self.limits.words}"
        if self.choices is not None and isinstance(value, str) and value not in self.choices:
            return f"{name} is {value!r}; allowed are: {', '.join(map(str, self.choices))}"
        return None


ANY = Kind(None)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a constructor.

    Attributes:
      name: as it is written in Python and in a configuration.
      default: as a YAML value; `REQUIRED` where there is none.
      kind: the values that it takes.
      doc: its description.
    """

    name: str
    default: Any
    kind: Kind
    doc: str = ""


@dataclasses.dataclass(frozen=True)
class Options(Mapping[str, Option]):
    """The options of a constructor by name.

    Attributes:
      known: the options.
      open: whether there may be others, which the constructor checks itself (`**options`).
      doc: the first paragraph of the constructor's docstring.
    """

    known: Mapping[str, Option]
    open: bool = False
    doc: str = ""

    def __getitem__(self, name: str) -> Option:
        return self.known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)

    def defaults(self) -> dict[str, Any]:
        """The default of every option, as YAML values."""
        return {name: plain(option.default) for name, option in self.known.items()}

    def without(self, *names: str) -> Options:
        """The others."""
        return dataclasses.replace(self, known={key: value for key, value in self.known.items() if key not in names})


def plain(value: Any) -> Any:
    """A default as a YAML value: tuples become lists, dataclasses mappings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def kind_of(annotation: Any, fields: Callable[[Any], Options | None] = lambda annotation: None) -> Kind:
    """The kind that a type stands for. `fields`: the options of a dataclass, None for what is none."""
    if annotation is None or annotation is type(None):
        return Kind(frozenset({type(None)}))
    if annotation in (int, float, bool, str):
        return Kind(frozenset({annotation}))
    if annotation is pathlib.Path:
        return Kind(frozenset({str}))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        limits = next((extra for extra in arguments[1:] if isinstance(extra, Range)), None)
        choices = next((extra.choices for extra in arguments[1:] if isinstance(extra, OneOf)), None)
        return dataclasses.replace(kind_of(arguments[0], fields), limits=limits, choices=choices)
    if origin in (typing.Union, types.UnionType):
        return _joined([kind_of(argument, fields) for argument in arguments])
    if origin is typing.Literal:
        return Kind(frozenset(map(type, arguments)), choices=tuple(item for item in arguments if item is not None))
    if (origin or annotation) in _LISTS:
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return Kind(frozenset({list}), elements=_joined([kind_of(one, fields) for one in inner]) if inner else None)
    if (origin or annotation) in _MAPPINGS:
        return Kind(frozenset({dict}))
    if (inner := fields(annotation)) is not None:
        return Kind(frozenset({dict}), fields=inner)
    return ANY


def _joined(kinds: list[Kind]) -> Kind:
    """The union of kinds; each part of it comes from the one that has it."""
    if any(kind.types is None for kind in kinds):
        return ANY

    def first(name: str) -> Any:
        return next((getattr(kind, name) for kind in kinds if getattr(kind, name) is not None), None)

    together = frozenset().union(*(kind.types or () for kind in kinds))
    several = [kind for kind in kinds if kind.types and str in kind.types and kind.choices is None]
    choices = None if several else first("choices")  # any other text is taken as well
    return Kind(together, choices, first("limits"), first("elements"), first("fields"))


def check_options(made: Any, group: str) -> None:
    """Raises InputError for a field of the dataclass `made` whose value is of another kind, `group.field is …`."""
    for name, option in options_of(type(made)).items():
        if (wrong := option.kind.refusal(f"{group}.{name}", plain(getattr(made, name)))) is not None:
            raise InputError(wrong)


@functools.cache
def options_of(constructor: Callable[..., Any]) -> Options:
    """The options of a class or function that is there, from its signature and annotations."""
    try:
        hints = typing.get_type_hints(_annotated(constructor), include_extras=True)
    except Exception:  # annotations of another module's own names: their values are then left to the constructor
        hints = {}
    known, takes_others, told = {}, False, {}
    for one in reversed(constructor.__mro__) if isinstance(constructor, type) else [constructor]:
        told |= described(inspect.cleandoc(one.__doc__ or ""))
    for parameter in inspect.signature(constructor).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            takes_others = True
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            default = _default(constructor, parameter)
            kind = kind_of(hints.get(parameter.name, Any), _fields)
            known[parameter.name] = Option(parameter.name, default, kind, told.get(parameter.name, ""))
    return Options(known, takes_others, inspect.getdoc(constructor) or "")


def _annotated(constructor: Callable[..., Any]) -> Any:
    own = isinstance(constructor, type) and not dataclasses.is_dataclass(constructor)
    return constructor.__init__ if own else constructor


def _default(constructor: Any, parameter: inspect.Parameter) -> Any:
    """The default as a YAML value; that of a field with a factory is made."""
    if parameter.default is inspect.Parameter.empty:
        return REQUIRED
    if dataclasses.is_dataclass(constructor):
        field = next((field for field in dataclasses.fields(constructor) if field.name == parameter.name), None)
        if field is not None and field.default_factory is not dataclasses.MISSING:
            return plain(field.default_factory())
    return plain(parameter.default)


def _fields(annotation: Any) -> Options | None:
    return options_of(annotation) if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else None


def build(constructor: Callable[..., Any], options: Mapping[str, Any], *given: Any) -> Any:
    """`constructor(*given, **options)` of YAML values: lists become tuples, mappings the dataclasses they stand for.

    Raises InputError for an option that does not exist, and what the constructor raises.
    """
    known = options_of(constructor)
    try:
        hints = typing.get_type_hints(_annotated(constructor), include_extras=True)
    except Exception:
        hints = {}
    unknown = [name for name in options if name not in known]
    if unknown and not known.open:
        raise InputError(f"there is no option {', '.join(unknown)}; there is: {', '.join(known)}")
    return constructor(*given, **{name: _typed(value, hints.get(name, Any)) for name, value in options.items()})


def _typed(value: Any, annotation: Any) -> Any:
    """A YAML value as the type that its option asks for."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [part for part in arguments if kind_of(part, _fields).takes(value)]
        return _typed(value, kinds[0]) if kinds else value
    if isinstance(value, Mapping) and isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return build(annotation, value)
    if isinstance(value, list) and (typing.get_origin(annotation) or annotation) in (tuple, collections.abc.Sequence):
        inner = arguments[0] if arguments else Any
        return tuple(_typed(item, inner) for item in value)
    return value


def described(doc: str) -> dict[str, str]:
    """What a docstring says of each option, under "Attributes:" or "Args:"."""
    part = re.search(r"^(?:Attributes|Args):\n((?:[ \t]+.*\n?|\n)+)", doc, re.M)
    if part is None:
        return {}
    lines = [line for line in part.group(1).splitlines() if line.strip()]
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        begun = re.match(r"([\w, ]+): (.*)", line[indent:])
        if begun and not line[indent:].startswith(" "):
            current = [begun.group(2).strip()]
            found |= dict.fromkeys((name.strip() for name in begun.group(1).split(",")), current)
        else:
            current.append(line.strip())
    return {name: " ".join(text) for name, text in found.items()}

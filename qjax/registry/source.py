"""Registered names and their options, read from the source files: importing them would start JAX first.

What cannot be read this way (a default that is computed) is `Unreadable`, and the caller imports the module instead.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import functools
import pathlib
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from qjax.registry import ranges
from qjax.registry.options import ANY, REQUIRED, Kind, Option, Options, described, kind_of

__all__ = ["Unreadable", "found_in", "options_at"]

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_TYPES: Mapping[str, Any] = {
    **{name: getattr(ranges, name) for name in ranges.__all__},
    **{kind.__name__: kind for kind in (int, float, bool, str, list, dict, tuple)},
    **{name: getattr(collections.abc, name) for name in ("Mapping", "Sequence", "Iterable")},
    "Annotated": typing.Annotated,
    "Any": Any,
    "Path": pathlib.Path,
    "Literal": typing.Literal,
    "None": None,
}
Node = ast.ClassDef | ast.FunctionDef


class Unreadable(Exception):
    """A definition that only importing its module can tell."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """A definition in a module's source."""

    module: str
    node: Node


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module's source, parsed.

    Attributes:
      defined: its classes and functions by name.
      imported: where a name comes from, as (module, name there).
      values: the expressions of its constants.
    """

    name: str
    defined: Mapping[str, Node]
    imported: Mapping[str, tuple[str, str]]
    values: Mapping[str, ast.expr]


def _file(module: str) -> pathlib.Path | None:
    """The file of a module of this package, None for another's."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    place = PACKAGE.joinpath(*parts[1:])
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


@functools.cache
def _parsed(module: str) -> _Module | None:
    file = _file(module)
    if file is None:
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    defined: dict[str, Node] = {}
    imported: dict[str, tuple[str, str]] = {}
    values: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined[node.name] = node
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            values[node.target.id] = node.value
    return _Module(module, defined, imported, values)


def found_in(room: str, registry: str) -> dict[str, tuple[str, str]]:
    """(module, name of the definition) of everything that a room's files register in the variable `registry`."""
    return dict(_registrations(room, registry))


@functools.cache
def _registrations(room: str, registry: str) -> tuple[tuple[str, tuple[str, str]], ...]:
    mark = re.compile(rf"^@{registry}\.register\(", re.M)
    found = []
    for file in sorted(PACKAGE.joinpath(*room.split(".")[1:]).glob("*.py")):
        if mark.search(file.read_text(encoding="utf-8")) is None:
            continue
        module = f"{room}.{file.stem}"
        parsed = _parsed(module)
        assert parsed is not None
        for name, node in parsed.defined.items():
            found += [(key, (module, name)) for key in _registered(node, registry)]
    return tuple(found)


def _registered(node: Node, registry: str) -> Iterator[str]:
    for call in node.decorator_list:
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and isinstance(call.func.value, ast.Name)
            and (call.func.value.id, call.func.attr) == (registry, "register")
        ):
            yield ast.literal_eval(call.args[0])


@functools.cache
def options_at(module: str, name: str) -> Options:
    """The options of the class or function `name` of a module. Raises Unreadable."""
    place = _resolved(module, name)
    if place is None:
        raise Unreadable(f"{module}.{name} is not defined in this package's source")
    return _options(place)


def _resolved(module: str, name: str) -> _Place | None:
    """The definition that a name stands for in a module, through imports."""
    parsed = _parsed(module)
    if parsed is None:
        return None
    if name in parsed.defined:
        return _Place(module, parsed.defined[name])
    if name in parsed.imported:
        return _resolved(*parsed.imported[name])
    return None


def _options(place: _Place) -> Options:
    node, doc = place.node, ast.get_docstring(place.node) or ""
    told = described(doc)
    if isinstance(node, ast.FunctionDef):
        known, takes_others = _arguments(place.module, node)
    else:
        known, takes_others = _members(place)
    known = {key: dataclasses.replace(option, doc=told.get(key, option.doc)) for key, option in known.items()}
    return Options(known, takes_others, doc)


def _members(place: _Place) -> tuple[dict[str, Option], bool]:
    """The fields of a dataclass, those of its bases first; the arguments of another class's `__init__`."""
    node = place.node
    assert isinstance(node, ast.ClassDef)
    known: dict[str, Option] = {}
    for base in node.bases:
        inner = _resolved(place.module, base.id) if isinstance(base, ast.Name) else None
        if inner is not None and isinstance(inner.node, ast.ClassDef):
            known |= _options(inner).known
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return _arguments(place.module, statement)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ast.unparse(statement.annotation)
            name = statement.target.id
            if text.startswith("ClassVar"):
                continue
            default = REQUIRED if statement.value is None else _field_default(place.module, statement.value)
            inherited = known[name].doc if name in known else ""
            known[name] = Option(name, default, _kind(place.module, statement.annotation), inherited)
    return known, False


def _arguments(module: str, node: ast.FunctionDef) -> tuple[dict[str, Option], bool]:
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    missing = [None] * (len(positional) - len(given.defaults))
    pairs = [*zip(positional, [*missing, *given.defaults], strict=True)]
    pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    known = {
        argument.arg: Option(
            argument.arg,
            REQUIRED if default is None else _value(module, default),
            ANY if argument.annotation is None else _kind(module, argument.annotation),
        )
        for argument, default in pairs
        if argument.arg != "self"
    }
    return known, given.kwarg is not None


def _field_default(module: str, value: ast.expr) -> Any:
    """The default of a field, also of `dataclasses.field(default_factory=…)`."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("dataclasses.field", "field", "struct.field"):
        given = {word.arg: word.value for word in value.keywords}
        if "default" in given:
            return _value(module, given["default"])
        factory = given.get("default_factory")
        if factory is None:
            return REQUIRED
        if isinstance(factory, ast.Lambda):
            return _value(module, factory.body)
        empty = {"dict": {}, "list": [], "tuple": []}
        text = ast.unparse(factory)
        return empty[text] if text in empty else _value(module, ast.Call(factory, [], []))
    return _value(module, value)


def _value(module: str, node: ast.expr) -> Any:
    """A default as a YAML value. Raises Unreadable for what must be computed."""
    try:
        return _plain(ast.literal_eval(node))
    except ValueError:
        pass
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(module, item) for item in node.elts]
    if isinstance(node, ast.Name):
        parsed = _parsed(module)
        if parsed is not None and node.id in parsed.values:
            return _value(module, parsed.values[node.id])
        if parsed is not None and node.id in parsed.imported:
            where, name = parsed.imported[node.id]
            inner = _parsed(where)
            if inner is not None and name in inner.values:
                return _value(where, inner.values[name])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        place = _resolved(module, node.func.id)
        if place is not None:  # a dataclass: its options with those that are given
            made = _options(place).defaults()
            made |= dict(zip(made, (_value(module, item) for item in node.args), strict=False))
            return made | {word.arg: _value(module, word.value) for word in node.keywords if word.arg is not None}
    raise Unreadable(f"{module}: {ast.unparse(node)}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class _Names(dict[str, Any]):
    """The names of an annotation: built-in types, ranges, constants and dataclasses; anything else takes all values."""

    def __init__(self, module: str):
        super().__init__()
        self.module = module

    def __missing__(self, name: str) -> Any:
        if name in _TYPES:
            return _TYPES[name]
        parsed = _parsed(self.module)
        if parsed is not None and name in parsed.values:  # an alias such as `Paths = str | Sequence[str]`
            return _evaluated(parsed.values[name], self)
        if parsed is not None and name in parsed.imported:
            where, other = parsed.imported[name]
            inner = _parsed(where)
            if inner is not None and other in inner.values:
                return _evaluated(inner.values[other], _Names(where))
        place = _resolved(self.module, name)
        return Any if place is None or isinstance(place.node, ast.FunctionDef) else _stand_in(place)


@functools.cache
def _stand_in(place: _Place) -> type:
    """A type that carries the place of a dataclass, so that it can be an argument of generic types."""
    return type(place.node.name, (), {"place": place})


def _evaluated(annotation: ast.expr, names: _Names) -> Any:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    try:
        return eval(compile(ast.Expression(annotation), "<annotation>", "eval"), {"__builtins__": {}}, names)
    except Exception:  # not one of the types that options have
        return Any


def _kind(module: str, annotation: ast.expr) -> Kind:
    def fields(type_: Any) -> Options | None:
        place = getattr(type_, "place", None)
        if place is None or not any("dataclass" in ast.unparse(mark) for mark in place.node.decorator_list):
            return None
        return _options(place)

    return kind_of(_evaluated(annotation, _Names(module)), fields)

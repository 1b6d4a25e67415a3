"""Settings against the options of what is registered: what does not exist or does not fit is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qjax.configuration.groups import ENTRIES, GROUPS, Group, options_of_entry
from qjax.errors import InputError, listed
from qjax.registry.options import REQUIRED, Option, Options
from qjax.registry.table import nearest

__all__ = ["Mistyped", "check"]


class Mistyped(InputError):
    """A key or a value that is wrong with any other; in a sweep it is a failure, not an impossible combination."""


def check(settings: Mapping[str, Any], entry: str) -> None:
    """Refuse what no option takes.

    `settings`: resolved plain values of the entry point. Raises Mistyped for the first key that does not exist (with
    those that do), for a name that is not registered, a key that a group lacks, a value of another kind, and a number
    out of its range.
    """
    groups = {name: GROUPS[name] for name in ENTRIES[entry].groups}
    own = dict(options_of_entry(entry).known)
    for group in groups.values():
        if group.flat and group.key is not None:
            own |= _flat(group, settings)
    nested = {name: group for name, group in groups.items() if not group.flat}
    for key, value in settings.items():
        if key in nested:
            _group(nested[key], value)
        elif key in own:
            _value(key, value, own[key])
        else:
            raise Mistyped(f"{key}={value!r}: {_no_such(str(key), '', [*nested, *own])}")


def _flat(group: Group, settings: Mapping[str, Any]) -> dict[str, Option]:
    """The settings at the top level that the chosen option of a flat group has."""
    assert group.key is not None
    name = _name(group, settings)
    return {group.key: Option(group.key, REQUIRED, options_of_entry("bench")["out"].kind), **group.options(name).known}


def _group(group: Group, node: Any) -> None:
    if not isinstance(node, Mapping):
        raise Mistyped(f"{group.name} is {node!r}; expected is a mapping: choose {group.name}=<option>")
    known = group.options("" if group.key is None else _name(group, node))
    named = [] if group.key is None else [group.key]
    for key, value in node.items():
        if key in named:
            continue
        if key in known:
            _value(f"{group.name}.{key}", value, known[key])
        elif not known.open:
            raise Mistyped(f"{group.name}.{key}={value!r}: {_no_such(str(key), group.name, [*named, *known])}")
    if missing := [key for key in known if key not in node]:
        raise Mistyped(f"{group.name} is {dict(node)!r}, which lacks {listed(missing)}; choose {group.name}=<option>")


def _name(group: Group, node: Mapping[str, Any]) -> str:
    """The registered name in a group's settings."""
    assert group.key is not None
    names, setting = group.names(), group.key if group.flat else f"{group.name}.{group.key}"
    if group.key not in node:
        raise Mistyped(f"{group.name} is {dict(node)!r}, which lacks {group.key}; choose {group.name}=<option>")
    name = node[group.key]
    if not isinstance(name, str):
        raise Mistyped(f"{setting} is {name!r}; expected is text")
    if name not in names:
        raise Mistyped(f"{setting} is {name!r}{nearest(name, names)}; there is: {listed(names)}")
    return name


def _value(name: str, value: Any, option: Option) -> None:
    if (wrong := option.kind.refusal(name, value)) is not None:
        raise Mistyped(wrong)
    if isinstance(value, Mapping) and option.kind.fields is not None:
        _mapping(name, value, option.kind.fields)


def _mapping(name: str, value: Mapping[str, Any], fields: Options) -> None:
    for key, inner in value.items():
        if key not in fields:
            raise Mistyped(f"{name}.{key}={inner!r}: {_no_such(str(key), name, list(fields))}")
        _value(f"{name}.{key}", inner, fields[key])
    if lacking := [key for key, field in fields.items() if field.default == REQUIRED and key not in value]:
        example = ", ".join(f"{key}: …" for key in lacking)
        raise Mistyped(f"{name} is {dict(value)!r}, which lacks {listed(lacking)}; as in {name}='{{{example}}}'")


def _no_such(key: str, parent: str, known: list[str]) -> str:
    inside = f" in {parent}" if parent else ""
    return f"there is no {key!r}{inside}{nearest(key, known)}; there is: {listed(known)}"

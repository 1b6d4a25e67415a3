"""All options of a group of settings from a name or from some of them: the defaults are the command line's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import yaml

from qjax.configuration.groups import GROUPS
from qjax.configuration.store import CONFIGS
from qjax.errors import InputError, listed, suggested

__all__ = ["named_options", "names"]

_STREAMS = {"quantized": "sequential"}  # whose group of Hessians has another name


def names(group: str) -> tuple[str, ...]:
    """The options of a group: what is registered, and the files."""
    registered = GROUPS[group].names() if group in GROUPS else []
    return tuple(sorted({*registered, *(file.stem for file in (CONFIGS / group).glob("*.yaml"))}))


@functools.cache
def _filed(group: str, name: str) -> Mapping[str, Any] | None:
    """What a file of `configs/` says deviates; None where there is no such file."""
    file = CONFIGS / group / f"{name}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None


def _defaults(group: str, name: str) -> dict[str, Any]:
    """All settings of an option: those of what it is based on, and what its file says of its own."""
    own = _filed(group, name)
    if own is None:
        return GROUPS[group].node(name)
    whole: dict[str, Any] = {}
    for base in own.get("defaults", ()):
        whole |= {} if base == "_self_" else _defaults(group, base)
    return whole | {key: value for key, value in own.items() if key != "defaults"}


def named_options(group: str, value: Any) -> dict[str, Any]:
    """All options of a group, for a name, or `{"name": …, **options}` where some are other than the name's own.

    Hessians are known without a name too, by their "estimator" and "stream". Raises InputError for a name or option
    that does not exist, with the nearest, and for another type.
    """
    given = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    name = given.get("name")
    if name is None and group == "hessian" and given:
        estimator, stream = given.get("estimator", "input"), given.get("stream", "quantized")
        name = _STREAMS.get(stream, stream) if estimator == "input" else estimator
        name = name if name in names(group) else "sequential"  # what is wrong with it the check of the values says
    if not isinstance(name, str):
        raise InputError(
            f"{group} is {value!r} ({type(value).__name__}); it is a name ({listed(names(group))}) or a mapping "
            "{'name': …, …options}"
        )
    if name not in names(group):
        raise InputError(
            f"{group} is {name!r}; there is no such name{suggested(name, names(group))}: {listed(names(group))}"
        )
    defaults = _defaults(group, name)
    for option in given:
        if option not in (known := {"name", *defaults}):
            raise InputError(
                f"{group} has no option {option!r}{suggested(option, known)}; its options are: {listed(known)}"
            )
    whole = {**defaults, **given}
    if group == "hessian":
        whole.pop("name", None)
    return whole

"""All options of a group of settings from a name or from some of them: the defaults are the command line's."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from qjax.errors import InputError, listed, suggested

__all__ = ["CONFIGS", "named_options", "names"]

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
_STREAMS = {"quantized": "sequential"}  # whose group of Hessians has another name


@functools.cache
def names(group: str) -> tuple[str, ...]:
    """The options of a group."""
    return tuple(sorted(file.stem for file in (CONFIGS / group).glob("*.yaml")))


@functools.cache
def _defaults(group: str, name: str) -> Mapping[str, Any]:
    return yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())


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
    known = {"name"}.union(*(_defaults(group, other) for other in names(group)))
    for option in given:
        if option not in known:
            raise InputError(
                f"{group} has no option {option!r}{suggested(option, known)}; its options are: {listed(known)}"
            )
    whole = {**_defaults(group, name), **given}
    if group == "hessian":
        whole.pop("name", None)
    return whole

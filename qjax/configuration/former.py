"""Keys that were called otherwise: `recipe=` and `method=` are presets now."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

__all__ = ["METHODS", "SUCCESSORS", "renewed"]

SUCCESSORS = {"recipe": "preset", "method": "preset"}
"""Groups that have another name now."""

METHODS = {
    "gptq": "gptq_original",
    "ldlq": "ldlq_plain",
    "quip": "quip_original",
    "qtip": "qtip_mul1",
    "yaqa": "yaqa_mul1",
}
"""What a `method=` is called as a preset, where `recipe=` had another of its name."""


def renewed(arguments: Sequence[str]) -> list[str]:
    """The command line with presets in place of recipes and methods; says so once for each."""
    return [_renewed(argument) for argument in arguments]


def _renewed(argument: str) -> str:
    mark = argument[: len(argument) - len(argument.lstrip("+"))]
    key, equals, value = argument.lstrip("+").partition("=")
    if not equals or key not in SUCCESSORS:
        return argument
    names = [METHODS.get(name, name) if key == "method" else name for name in value.split(",")]
    new = f"{mark}{SUCCESSORS[key]}={','.join(names)}"
    warnings.warn(f"{key}= is now {SUCCESSORS[key]}=: {argument} means {new}", FutureWarning, stacklevel=2)
    return new

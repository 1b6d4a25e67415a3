"""Rotary embeddings as configurations state them, of transformers 4 and 5."""

from __future__ import annotations

import math
from typing import Any

from qjax.errors import ModelFileError
from qjax.models.config import Dynamic, Linear, LongRope, RopeScaling, Scaling, Yarn
from qjax.models.families.fields import Fields

__all__ = ["rope", "rope_of_layers", "rotary_dim"]

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope(fields: Fields, positions: int, dims: int, theta: float = 10_000.0) -> tuple[float, Scaling | None]:
    """(theta, scaling) of either layout: `rope_theta` beside `rope_scaling`, or both inside `rope_parameters`.

    `dims` values of a head are rotated, `positions` is the model's limit. Raises ModelFileError for another type, for
    parameters that differ between layers (see `rope_of_layers`), and for numbers that contradict each other.
    """
    raw = fields.table.get("rope_parameters") or fields.table.get("rope_scaling") or {}
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise ModelFileError(
            f"{fields.where}: rope parameters that differ between layers are not of this family, found {raw!r}"
        )
    return _rope(Fields(raw, f"{fields.where}, rope parameters"), fields, positions, dims, theta)


def rope_of_layers(fields: Fields, kind: str, positions: int, dims: int, theta: float) -> tuple[float, Scaling | None]:
    """As `rope`, for the layers of one `kind` ("full_attention", …), where every kind has parameters of its own."""
    raw = fields.table.get("rope_parameters") or fields.table.get("rope_scaling") or {}
    own = raw.get(kind, raw if not any(isinstance(value, dict) for value in raw.values()) else {})
    return _rope(Fields(own, f"{fields.where}, rope parameters of {kind}"), fields, positions, dims, theta)


def rotary_dim(fields: Fields, head_dim: int, default: float = 1.0) -> int | None:
    """The leading values of a head that are rotated, `int(head_dim · factor)`; None for all."""
    raw = fields.table.get("rope_parameters") or fields.table.get("rope_scaling") or {}
    inner = Fields(raw if isinstance(raw, dict) else {}, f"{fields.where}, rope parameters")
    factor = inner.number("partial_rotary_factor", fields.number("partial_rotary_factor", default))
    dims = int(head_dim * factor)
    if factor > 1 or dims < 2 or dims % 2:
        raise ModelFileError(
            f"{fields.where}: partial_rotary_factor {factor:g} of heads of {head_dim} rotates {dims} values; an even "
            "number of at least 2 is expected"
        )
    return None if dims == head_dim else dims


def _rope(inner: Fields, fields: Fields, positions: int, dims: int, theta: float) -> tuple[float, Scaling | None]:
    base = inner.number("rope_theta", fields.number("rope_theta", theta))
    kind = inner.table.get("rope_type", inner.table.get("type")) or "default"
    if kind == "su":  # the name of the first Phi-3 files
        kind = "longrope"
    if kind not in _KINDS:
        raise ModelFileError(f"{fields.where}: rope scaling of type {kind!r} is not supported; there is {_KINDS}")
    return base, None if kind == "default" else _SCALINGS[kind](inner, fields, positions, dims)


def _linear(inner: Fields, fields: Fields, positions: int, dims: int) -> Scaling | None:
    factor = inner.number("factor")
    return None if factor == 1.0 else Linear(factor)


def _dynamic(inner: Fields, fields: Fields, positions: int, dims: int) -> Scaling:
    return Dynamic(inner.number("factor"), inner.integer("original_max_position_embeddings", positions))


def _llama3(inner: Fields, fields: Fields, positions: int, dims: int) -> Scaling:
    scaling = RopeScaling(
        factor=inner.number("factor"),
        low_freq_factor=inner.number("low_freq_factor"),
        high_freq_factor=inner.number("high_freq_factor"),
        original_max_positions=inner.integer("original_max_position_embeddings", positions),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelFileError(f"{fields.where}: rope scaling needs high_freq_factor > low_freq_factor, found {scaling}")
    return scaling


def _yarn(inner: Fields, fields: Fields, positions: int, dims: int) -> Scaling:
    factor = inner.number("factor")

    def strength(times: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * times * math.log(factor) + 1

    table = inner.table
    if table.get("attention_factor") is not None:
        attention = inner.number("attention_factor")
    elif table.get("mscale") and table.get("mscale_all_dim"):
        attention = strength(inner.number("mscale")) / strength(inner.number("mscale_all_dim"))
    else:
        attention = strength(1.0)
    return Yarn(
        factor,
        inner.number("beta_fast", 32.0),
        inner.number("beta_slow", 1.0),
        inner.integer("original_max_position_embeddings", positions),
        attention,
        inner.flag("truncate", True),
    )


def _longrope(inner: Fields, fields: Fields, positions: int, dims: int) -> Scaling:
    outer = fields.table.get("original_max_position_embeddings")
    original = inner.integer("original_max_position_embeddings", outer or positions)
    if inner.table.get("attention_factor") is not None:
        attention = inner.number("attention_factor")
    else:
        factor = positions / original if outer else inner.number("factor", positions / original)
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRope(_factors(inner, "short_factor", dims), _factors(inner, "long_factor", dims), original, attention)


def _factors(inner: Fields, key: str, dims: int) -> tuple[float, ...]:
    value: Any = inner.table.get(key)
    usable = isinstance(value, list) and all(type(x) in (int, float) and 0 < x < math.inf for x in value)
    if not usable or len(value) != dims // 2:
        found = f"{len(value)} entries" if isinstance(value, list) else repr(value)
        raise ModelFileError(f"{inner.where}: {key} has {found}; {dims // 2} positive numbers are expected")
    return tuple(float(x) for x in value)


_SCALINGS = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}

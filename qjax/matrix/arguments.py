"""Short forms of arguments: a name, a number or a plain array where it means one thing, refused in words elsewhere.

codebook      "e8p" (one width), ("half_integer", 2), {"name": "trellis", "bits": 2, "L": 8}
rounding      "ldlq", {"name": "ldlq", "passes": 3}
incoherence   "hadamard", {"name": "block_hadamard", "block": 64}, None
scale         "search", 0.9 (the RMS that the codebook sees), {"method": "rms", "granularity": "row"}, None
Hessian       an array [in, in]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qjax import codebooks
from qjax.codebooks.base import CODEBOOKS, Codebook
from qjax.codebooks.scaling import ScaleRule
from qjax.errors import InputError, listed, suggested
from qjax.incoherence.families import INCOHERENCE, Incoherence
from qjax.linalg.kronecker import Hessian
from qjax.matrix.magnitude import exponent, scaled
from qjax.registry import Registry
from qjax.rounding.base import ROUNDINGS, Rounding
from qjax.typing import brief

__all__ = [
    "Short",
    "check_numbers",
    "codebook_of",
    "hessian_of",
    "incoherence_of",
    "mesh_of",
    "named",
    "rounding_of",
    "scale_of",
    "weight_of",
]

Short: TypeAlias = Any
"""An object, or a short form of it; whatever else is refused here, in words, so no type checker needs to."""

_METHODS = ("auto", "rms", "search", "minmax")


def named(value: Any, names: Registry[Any], what: str) -> dict[str, Any]:
    """`{"name": …, **options}` of a name or of such a mapping. Raises InputError for unknown names and other types."""
    options = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    name = options.get("name")
    if not isinstance(name, str):
        raise InputError(
            f"{what} is {_shown(value)}; it is a name ({listed(names)}), a mapping {{'name': …, …options}}, or an "
            "object that was made"
        )
    if name not in names:
        raise InputError(f"{what} is {name!r}; there is no such name{suggested(name, names)}: {listed(names)}")
    return options


def _shown(value: Any) -> str:
    """A value for a message, with its type."""
    text = brief(value)
    return f"{text if len(text) <= 80 else text[:77] + '…'} ({type(value).__name__})"


def codebook_of(value: Any) -> Codebook:
    """The codebook of a name that has one bit width, of (name, bits), or of {"name", "bits", …}; itself else.

    Raises InputError for a name of several widths alone, and whatever the codebook refuses.
    """
    if isinstance(value, Codebook):
        return value
    if isinstance(value, tuple) and len(value) == 2:
        value = {"name": value[0], "bits": value[1]}
    options = named(value, CODEBOOKS, "codebook")
    if "bits" not in options:
        options["bits"] = _only_width(options)
    return codebooks.make(**options)


def _only_width(options: Mapping[str, Any]) -> int:
    """The one number of bits that a codebook exists for."""
    found = []
    for bits in range(1, 9):
        try:
            codebooks.make(bits=bits, **options)
        except InputError:
            continue
        found.append(bits)
        if len(found) == 2:
            name = options["name"]
            raise InputError(
                f"codebook is {name!r}, which exists for {found[0]}, {found[1]} … bits per weight; say which: "
                f"codebook=({name!r}, {found[-1]})"
            )
    if not found:
        codebooks.make(bits=2, **options)  # says what is wrong with the options
    return found[0]


def rounding_of(value: Any) -> Rounding:
    """The algorithm of a name or of {"name", …}; itself else. Raises InputError as `named`."""
    if isinstance(value, Rounding) and not isinstance(value, type):
        return value
    return ROUNDINGS.build(named(value, ROUNDINGS, "rounding"))


def incoherence_of(value: Any) -> Incoherence:
    """The processing of a name or of {"name", …}, None for none; itself else. Raises InputError as `named`."""
    if isinstance(value, Incoherence):
        return value
    return INCOHERENCE.build(named("none" if value is None else value, INCOHERENCE, "incoherence"))


def scale_of(value: Any) -> float | ScaleRule | None:
    """The rule of a method's name or of {"method", …}; numbers, rules and None as they are.

    "auto" is None, the codebook's own. Raises InputError for other names and types, and for numbers that are not
    positive.
    """
    if value is None or isinstance(value, ScaleRule):
        return value
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        if not value > 0:
            raise InputError(f"scale is {value}; it is the RMS that the codebook sees, a positive number")
        return float(value)
    options = {"method": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    method = options.get("method")
    if method not in _METHODS:
        raise InputError(
            f"scale is {_shown(value)}{suggested(method, _METHODS)}; it is {', '.join(_METHODS)}, a positive number "
            "(the RMS that the codebook sees), a mapping {'method': …, …}, a ScaleRule, or None"
        )
    if method == "auto":
        return None
    whole: dict[str, Any] = {key: tuple(entry) if isinstance(entry, list) else entry for key, entry in options.items()}
    try:
        return ScaleRule(**whole)
    except TypeError:
        known = ScaleRule.__dataclass_fields__
        other = [key for key in options if key not in known]
        near = suggested(other[0], known) if other else ""
        raise InputError(f"scale has no option {listed(other)}{near}; its options are: {listed(known)}") from None


def weight_of(value: Any, name: str = "matrix") -> Any:
    """An array of real numbers as it is. Raises InputError for anything else."""
    if not isinstance(value, jax.Array | np.ndarray) or not (
        jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    ):
        raise InputError(f"layer {name}: the weight is {_shown(value)}; it is an array [out, in] of real numbers")
    return value


def mesh_of(value: Any) -> Mesh | None:
    """A mesh, or None for one device. Raises InputError for anything else."""
    if not (value is None or isinstance(value, Mesh)):
        raise InputError(f"mesh is {_shown(value)}; it is a jax.sharding.Mesh, or None for one device")
    return value


def check_numbers(name: Any, **numbers: Any) -> None:
    """Raises InputError for a layer's name that is no text, and for numbers that are not finite or negative."""
    if not isinstance(name, str):
        raise InputError(f"name is {_shown(name)}; it is the layer's name, a text")
    for what, value in numbers.items():
        scalar = isinstance(value, jax.Array) and value.ndim == 0
        number = scalar or (isinstance(value, int | float | np.number) and not isinstance(value, bool))
        if not number or not 0 <= value < float("inf"):
            raise InputError(f"layer {name}: {what} is {_shown(value)}; it is a finite number, not negative")


def hessian_of(value: Any, name: str = "matrix") -> Hessian:
    """A Hessian as it is, or one whose input factor is an array [in, in]. Raises InputError for anything else."""
    if isinstance(value, Hessian):
        for part in (value.input, *(x for x in (value.output, value.cross) if x is not None)):
            if not isinstance(part, jax.Array | np.ndarray):
                raise InputError(f"layer {name}: a factor of the Hessian is {_shown(part)}; it is an array")
        return value
    if not isinstance(value, jax.Array | np.ndarray) or value.ndim != 2 or value.shape[0] != value.shape[1]:
        raise InputError(
            f"layer {name}: the Hessian is {_shown(value)}; it is a qjax.Hessian or an array [in, in], E[x xᵀ] of the "
            "layer's inputs"
        )
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        value = scaled(value, -exponent(value)).astype(np.float32)  # its scale has no meaning
    return Hessian(cast(Any, value))

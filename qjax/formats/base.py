"""The contract of number formats: rounding of any array to the values of a format, kept as float32."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float32, Shaped, UInt32

from qjax.errors import InputError, suggested
from qjax.formats.rounding import ROUNDINGS
from qjax.registry import Registry, check_options
from qjax.typing import HostOrDevice

__all__ = ["FORMATS", "NumberFormat", "blocked", "padded_size", "unblocked"]

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class NumberFormat(abc.ABC):
    """Base class of formats: frozen, hashable, pure; `quantize` works under jit, vmap and grad on every backend.

    A subclass is a frozen dataclass with `name` and its options as fields; it adds `bits`, `bits_of`, `keeps` and
    `_rounded`.
    """

    def __post_init__(self) -> None:
        """Check the options. Raises InputError for a value of another kind or out of its range."""
        check_options(self, f"format {self.title!r}")

    @property
    def title(self) -> str:
        """The registered name, for messages."""
        return getattr(self, "name", type(self).__name__)

    @property
    @abc.abstractmethod
    def bits(self) -> float:
        """Stored bits per value, scales included where blocks divide the array."""

    def bits_of(self, shape: tuple[int, ...]) -> int:
        """Stored bits of an array, padding to whole blocks and scales counted."""
        return round(self.bits * math.prod(shape))

    @property
    def keeps(self) -> bool:
        """Whether the format has a code for NaN."""
        return False

    @abc.abstractmethod
    def _rounded(self, x: Array, rounding: str, words: Array | None) -> Array:
        """x, float32, rounded; `words` are uint32 of the shape of x for "stochastic"."""

    def quantize(
        self,
        x: Shaped[Array, "*shape"] | np.ndarray,
        rounding: str = "nearest",
        key: Array | None = None,
        *,
        name: str = "x",
    ) -> Float32[Array, "*shape"]:
        """x rounded to the format, float32.

        The derivative is that of the identity (straight through), wherever x lies.

        Args:
          x: float32, bfloat16 or float16.
          rounding: "nearest" (ties to even), "nearest_away" and "nearest_down" (ties away from and towards zero),
            "toward_zero", or "stochastic": unbiased between the two neighbours (within 2^−32 of their distance; exactly
            where at most 32 bits are discarded).
          key: of "stochastic".
          name: of the tensor, for messages.

        Raises InputError for another dtype, an unknown rounding, a missing key; and, where x is no traced array, for
        NaN and infinities in a format without a code for NaN. Under jit NaN stays NaN (in a format of blocks the whole
        block becomes NaN), and infinities saturate there.
        """
        dtype = str(getattr(x, "dtype", type(x).__name__))
        if dtype not in _DTYPES:
            raise InputError(
                f"{name} is {dtype}; format {self.title!r} rounds {', '.join(_DTYPES)}: convert it first "
                "(from float64 that rounds once before)"
            )
        if rounding not in ROUNDINGS:
            raise InputError(f"rounding is {rounding!r}{suggested(rounding, ROUNDINGS)}; it is {', '.join(ROUNDINGS)}")
        if rounding == "stochastic" and key is None:
            raise InputError(
                f"rounding=stochastic of {name} draws random bits and needs key=jax.random.key(seed); "
                "the other roundings need none"
            )
        if not isinstance(x, Tracer):
            self._check(x, name)
        return _quantize(self, rounding, x, key if rounding == "stochastic" else None)

    def _check(self, x: HostOrDevice, name: str) -> None:
        """Raises InputError for values that the format cannot hold."""
        if self.keeps or x.size == 0 or bool(_all_finite(x)):
            return
        host = np.asarray(x).astype(np.float32)
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(host))[0])
        raise InputError(
            f"{name} holds {host[where]} at {where}, and format {self.title!r} has no code for it; "
            f"mend {name}, or use a format with NaN (e4m3, e5m2, bfloat16, float16)"
        )


@jax.jit
def _all_finite(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantize(form: NumberFormat, rounding: str, x: Any, key: Array | None) -> Array:
    words = None if key is None else jax.random.bits(key, x.shape, jnp.uint32)
    return _straight_through(form, rounding, _float32(x), words)


def _float32(x: Array) -> Array:
    """The same numbers as float32; those of bfloat16 by their bits, for a conversion may flush its subnormals."""
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)

    @jax.custom_jvp
    def widened(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    @widened.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        return widened(*primals), tangents[0].astype(jnp.float32)

    return widened(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _straight_through(form: NumberFormat, rounding: str, x: Array, words: UInt32[Array, "..."] | None) -> Array:
    return form._rounded(x, rounding, words)


@_straight_through.defjvp
def _identity(form: NumberFormat, rounding: str, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _straight_through(form, rounding, *primals), tangents[0]


def padded_size(size: int, block: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // block) * block


def blocked(x: Array, block: int) -> Array:
    """`[*shape, n]` -> `[*shape, blocks, block]`, filled up with zeros."""
    fill = padded_size(x.shape[-1], block) - x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)]) if fill else x
    return x.reshape(*x.shape[:-1], -1, block)


def unblocked(x: Array, size: int) -> Array:
    """The inverse of `blocked` for a last axis of `size`."""
    return x.reshape(*x.shape[:-2], -1)[..., :size]


FORMATS: Registry[NumberFormat] = Registry("format", "qjax.formats.FORMATS")

"""Rounding that ignores the Hessian: nearest codeword, or stochastic."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling, identity
from qjax.errors import InputError
from qjax.linalg.kronecker import Hessian
from qjax.rounding.base import ROUNDINGS, Rounded, check_shapes, finish, require_key, spec_of

__all__ = ["Nearest", "Stochastic"]


@ROUNDINGS.register("nearest")
@dataclasses.dataclass(frozen=True)
class Nearest:
    """`Ŵ = Q(W)`: every tile to its nearest codeword."""

    @property
    def independent_rows(self) -> bool:
        """Rows may be rounded apart."""
        return True

    def __call__(
        self,
        weight: Float[Array, "out in"],
        hessian: Hessian,
        codebook: Codebook,
        *,
        scaling: Scaling | None = None,
        damping: Array | float = 0.0,
        key: Array | None = None,
    ) -> Rounded:
        """Round `weight`; the Hessian is not used."""
        check_shapes(weight, hessian, codebook)
        codes = codebook.quantize((scaling or identity()).normalize(weight))
        return finish(codes, codebook, scaling, weight.dtype)

    def spec(self) -> dict[str, Any]:
        """Arguments of `make`."""
        return spec_of("nearest", self)


@ROUNDINGS.register("stochastic")
@dataclasses.dataclass(frozen=True)
class Stochastic:
    """`Ŵ = floor(W + u)`, u ~ U[0, 1): unbiased rounding to one of the two neighbouring levels (scalar codebooks)."""

    def __call__(
        self,
        weight: Float[Array, "out in"],
        hessian: Hessian,
        codebook: Codebook,
        *,
        scaling: Scaling | None = None,
        damping: Array | float = 0.0,
        key: Array | None = None,
    ) -> Rounded:
        """Round `weight` with the randomness of `key`; the Hessian is not used."""
        check_shapes(weight, hessian, codebook)
        key = require_key(key, "rounding=stochastic")
        codes = stochastic_codes((scaling or identity()).normalize(weight), codebook, key)
        return finish(codes, codebook, scaling, weight.dtype)

    def spec(self) -> dict[str, Any]:
        """Arguments of `make`."""
        return spec_of("stochastic", self)


def stochastic_codes(x: Array, codebook: Codebook, key: Array) -> Array:
    """Stochastic codes of a scalar codebook. Raises InputError for a codebook without neighbouring levels."""
    stochastic = getattr(codebook, "quantize_stochastic", None)
    if stochastic is None:
        raise InputError(
            "stochastic rounding needs a scalar codebook (grid, half_integer, quip_grid, lloyd_max), "
            f"not {codebook.spec()['name']!r}; use one of these, or rounding=nearest"
        )
    return stochastic(x, key)

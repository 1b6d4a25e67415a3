"""Rounding that ignores the Hessian: nearest codeword, or stochastic."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtyping import Array

from qjax.codebooks.base import Codebook
from qjax.errors import InputError
from qjax.rounding.base import ROUNDINGS, Coded, Problem, RoundingAlgorithm

__all__ = ["Nearest", "Stochastic", "stochastic_codes"]


@ROUNDINGS.register("nearest")
@dataclasses.dataclass(frozen=True)
class Nearest(RoundingAlgorithm):
    """`Ŵ = Q(W)`: every tile to its nearest codeword."""

    name: ClassVar[str] = "nearest"

    @property
    def independent_rows(self) -> bool:
        """Rows may be rounded apart."""
        return True

    def round(self, problem: Problem) -> Coded:
        """Nearest codewords; the Hessian is not used."""
        return Coded(problem.codebook.quantize(problem.scaling.to_codebook_units(problem.weight)))


@ROUNDINGS.register("stochastic")
@dataclasses.dataclass(frozen=True)
class Stochastic(RoundingAlgorithm):
    """`Ŵ = floor(W + u)`, u ~ U[0, 1): unbiased rounding to one of the two neighbouring levels (scalar codebooks)."""

    name: ClassVar[str] = "stochastic"

    @property
    def randomised_by(self) -> str:
        """The algorithm itself."""
        return "rounding=stochastic"

    def round(self, problem: Problem) -> Coded:
        """Stochastic codes; the Hessian is not used."""
        assert problem.key is not None
        return Coded(stochastic_codes(problem.scaling.to_codebook_units(problem.weight), problem.codebook, problem.key))


def stochastic_codes(x: Array, codebook: Codebook, key: Array) -> Array:
    """Stochastic codes of a scalar codebook. Raises InputError for a codebook without neighbouring levels."""
    stochastic = getattr(codebook, "quantize_stochastic", None)
    if stochastic is None:
        raise InputError(
            "stochastic rounding needs a scalar codebook (grid, half_integer, quip_grid, lloyd_max), "
            f"not {codebook.spec()['name']!r}; use one of these, or rounding=nearest"
        )
    return stochastic(x, key)

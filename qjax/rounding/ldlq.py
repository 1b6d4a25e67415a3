"""LDLQ: adaptive rounding with linear feedback from the LDL factor of the Hessian."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling
from qjax.linalg.damping import damped_factor
from qjax.registry import Count, Natural, OneOf
from qjax.rounding.base import ROUNDINGS, Coded, Problem, RoundingAlgorithm
from qjax.rounding.columns import column_block, encode_columns, place, reorder
from qjax.rounding.descent import damped, descend
from qjax.rounding.nearest import stochastic_codes
from qjax.rounding.sweep import Sweep, merge_codes, sweep, widths

__all__ = ["LDLQ", "feedback_codes"]


@ROUNDINGS.register("ldlq")
@dataclasses.dataclass(frozen=True)
class LDLQ(RoundingAlgorithm):
    """Block LDLQ: `Ŵ_k = Q(W_k + Σ_{j>k} (W_j − Ŵ_j) L_jk)`, right to left, `H = L D Lᵀ` with L unit block-lower.

    With nearest rounding it is optimal among linear-feedback roundings: `tr(E H Eᵀ) = tr(η D ηᵀ)`, η = E L the
    elementwise residual (QuIP, 2307.13304, Theorem 1; block form QuIP#, 2402.04396, section 4.2).

    Attributes:
      block: columns rounded together (g); None means the codebook's tile width.
      order: "natural", or "ascending": columns permuted so that diag(H) ascends and the largest is rounded first
        (QuIP's LDLQ-RG).
      stochastic: round stochastically instead of to the nearest (scalar codebooks; needs a key).
      passes: the most passes of coordinate descent that follow, see `descend` (QuIP: 1 to 9; QuIP#: 10).
    """

    name: ClassVar[str] = "ldlq"
    block: Count | None = None
    order: Annotated[str, OneOf("natural", "ascending")] = "natural"
    stochastic: bool = False
    passes: Natural = 0

    @property
    def independent_rows(self) -> bool:
        """Whether rows may be rounded apart; the random numbers of stochastic rounding are drawn for whole columns."""
        return not self.stochastic

    @property
    def randomised_by(self) -> str | None:
        """The option `stochastic`."""
        return "rounding.stochastic" if self.stochastic else None

    def round(self, problem: Problem) -> Coded:
        """Codes by feedback, then by passes. Raises InputError for a block or an order that does not fit."""
        weight, codebook, scaling = problem.weight, problem.codebook, problem.scaling
        columns = weight.shape[1]
        block = column_block(codebook, self.block, columns)
        h = problem.input_hessian
        order = None
        if self.order == "ascending":
            order = jnp.argsort(jnp.diagonal(h))
            weight, h = reorder(weight, h, order)
        factor = damped_factor(h, problem.damping, block)
        index, permutation = place(order, columns, codebook, scaling)
        codes = feedback_codes(weight, factor.lower, codebook, scaling, block=block, index=index, key=problem.key)

        def placed(codes: Array) -> Array:
            codes = merge_codes(codes)
            return codes if order is None or permutation is not None else jnp.take(codes, jnp.argsort(order), axis=1)

        start = None
        if self.passes:
            start, h = placed(codes), damped(h, factor.damping)
            codes = descend(weight, codes, h, codebook, scaling, passes=self.passes, index=index)
        return Coded(placed(codes), factor.damping, factor.ok, permutation=permutation, start=start)


def feedback_codes(
    weight: Float[Array, "m n"],
    lower: Float[Array, "n n"],
    codebook: Codebook,
    scaling: Scaling,
    *,
    block: int,
    index: Int[Array, " n"],
    key: Array | None = None,
) -> Array:
    """Codes `[blocks, m/rows, g/cols, ...]` of `Ŵ_k = Q(W_k + Σ_{j>k} (W_j − Ŵ_j) L_jk)`, right to left.

    `index`: which column of the original order each column is, for scales per group. With a key rounding is stochastic.
    """

    def leaf(part: Array, target: Array, start: Array, context: None) -> tuple[Array, Array]:
        scale, zero = scaling.at(jax.lax.dynamic_slice_in_dim(index, start, block), part.dtype)
        if key is None:
            values, codes = encode_columns(target.T, codebook, scale, zero)
        else:
            codes = stochastic_codes(target.T / scale + zero, codebook, jax.random.fold_in(key, start))
            values = (codebook.dequantize(codes).astype(part.dtype) - zero) * scale
        return part - values.T, codes

    return sweep(Sweep(leaf, reverse=True), widths(weight.shape[1], block), weight, lower)[0]

"""LDLQ: adaptive rounding with linear feedback from the LDL factor of the Hessian."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling, identity
from qjax.errors import InputError
from qjax.linalg.damping import damped_factor
from qjax.linalg.kronecker import Hessian
from qjax.rounding.base import (
    ROUNDINGS,
    Rounded,
    check_shapes,
    column_block,
    encode_columns,
    finish,
    reorder,
    require_key,
    spec_of,
)
from qjax.rounding.descent import check_passes, damped, descend
from qjax.rounding.nearest import stochastic_codes
from qjax.rounding.sweep import Sweep, merge_codes, sweep, widths

__all__ = ["LDLQ", "feedback_codes", "place"]


@ROUNDINGS.register("ldlq")
@dataclasses.dataclass(frozen=True)
class LDLQ:
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

    block: int | None = None
    order: str = "natural"
    stochastic: bool = False
    passes: int = 0

    def __post_init__(self) -> None:
        if self.order not in ("natural", "ascending"):
            raise InputError(f"rounding.order is {self.order!r}; allowed for ldlq are natural, ascending")
        check_passes(self.passes, 0)

    @property
    def independent_rows(self) -> bool:
        """Whether rows may be rounded apart; the random numbers of stochastic rounding are drawn for whole columns."""
        return not self.stochastic

    def __call__(
        self,
        weight: Float[Array, "out in"],
        hessian: Hessian,
        codebook: Codebook,
        *,
        scaling: Scaling | None = None,
        damping: Array | float = 0.01,
        key: Array | None = None,
    ) -> Rounded:
        """Round `weight` [out, in]. Raises InputError for shapes that are not whole tiles or blocks."""
        check_shapes(weight, hessian, codebook)
        columns = weight.shape[1]
        block = column_block(codebook, self.block, columns)
        key = require_key(key, "rounding.stochastic") if self.stochastic else None
        scaling = identity() if scaling is None else scaling
        h = hessian.input.astype(weight.dtype)
        order = None
        if self.order == "ascending":
            order = jnp.argsort(jnp.diagonal(h))
            weight, h = reorder(weight, h, order)
        factor = damped_factor(h, damping, block)
        index, permutation = place(order, columns, codebook, scaling)
        codes = feedback_codes(weight, factor.lower, codebook, scaling, block=block, index=index, key=key)

        def placed(codes: Array) -> Array:
            codes = merge_codes(codes)
            return codes if order is None or permutation is not None else jnp.take(codes, jnp.argsort(order), axis=1)

        start = None
        if self.passes:
            start, h = placed(codes), damped(h, factor.damping)
            codes = descend(weight, codes, h, codebook, scaling, passes=self.passes, index=index)
        return finish(placed(codes), codebook, scaling, weight.dtype, permutation, factor.damping, factor.ok, start)

    def spec(self) -> dict[str, Any]:
        """Arguments of `make`."""
        return spec_of("ldlq", self)


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


def place(order: Array | None, columns: int, codebook: Codebook, scaling: Scaling) -> tuple[Array, Array | None]:
    """(column index for scales, permutation to store) of codes made in `order` (None: natural).

    Codes of a tile one column wide are put back into the natural order afterwards, so nothing is stored; wider tiles
    keep their order. Raises InputError for wide tiles with scales per column group, which would need both
    orders at once.
    """
    if order is None:
        return jnp.arange(columns), None
    if codebook.tile[1] == 1:
        return order, None
    if scaling.group is not None:
        raise InputError(
            f"scale.granularity=group cannot be combined with a column order for the {codebook.tile} tiles "
            "of this codebook; "
            "use rounding.order=natural or one scale per row or matrix"
        )
    return order, order.astype(jnp.uint16 if columns <= 2**16 else jnp.uint32)

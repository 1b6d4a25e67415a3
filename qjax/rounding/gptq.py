"""GPTQ: optimal brain surgeon updates through the Cholesky factor of the inverse Hessian."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.codebooks.scaling import ScaleRule, Scaling, fit
from qjax.errors import InputError
from qjax.linalg.cholesky import invert_lower
from qjax.linalg.damping import damped_factor
from qjax.registry import OneOf
from qjax.rounding.base import ROUNDINGS, Coded, Problem, RoundingAlgorithm
from qjax.rounding.columns import compact, encode_columns, place, reorder
from qjax.rounding.sweep import Sweep, merge_codes, sweep, widths

__all__ = ["GPTQ", "inverse_factor"]


def inverse_factor(hessian: Float[Array, "n n"], damping: Array | float) -> tuple[Array, Array, Array]:
    """(U, damping used, ok): the upper Cholesky factor of the inverse of the damped, normalised H, `H⁻¹ = Uᵀ U`.

    H is factored from its last corner, `H = R Rᵀ` with R upper triangular, so `U = R⁻¹` needs no explicit inverse of H.
    """
    factor = damped_factor(jnp.flip(hessian), damping, 1)
    root = factor.lower * jnp.sqrt(factor.diagonal.reshape(1, -1))
    return jnp.flip(invert_lower(root)), factor.damping, factor.ok


@ROUNDINGS.register("gptq")
@dataclasses.dataclass(frozen=True)
class GPTQ(RoundingAlgorithm):
    """GPTQ: left to right, `q_i = Q(w_i)`, `e = (w_i − q_i) / U_ii`, `w_j ← w_j − e U_ij` for j > i.

    Source: GPTQ (2210.17323), algorithm 1.

    Attributes:
      order: "natural", or "descending": columns in descending order of diag(H) (the paper's activation order).
      static_groups: with a scale per group, fit all groups on the original weights before rounding; otherwise a group
        is fitted on the weights as compensated when its first column is reached (in the activation order, which is then
        stored).
      rule: how group scales are fitted when they are not static; set by `quantize_matrix`.
    """

    name: ClassVar[str] = "gptq"
    order: Annotated[str, OneOf("natural", "descending")] = "natural"
    static_groups: bool = False
    rule: ScaleRule | None = None

    @property
    def independent_rows(self) -> bool:
        """Whether rows may be rounded apart: RMS scales fitted group by group look at the scales of other rows."""
        grouped = self.rule is not None and self.rule.granularity == "group" and self.rule.method != "minmax"
        return self.static_groups or not grouped

    def round(self, problem: Problem) -> Coded:
        """Codes of a codebook with tiles one column wide. Raises InputError for wider ones."""
        weight, codebook, scaling = problem.weight, problem.codebook, problem.scaling
        if codebook.tile[1] != 1:
            raise InputError(
                f"rounding=gptq rounds column by column and the tiles of this codebook are {codebook.tile}; "
                "use rounding=ldlq"
            )
        columns, rule = weight.shape[1], self.rule
        group = scaling.group if rule is not None and not self.static_groups else None
        if group is not None and group >= columns:
            group = None  # the only one is reached before anything is compensated: it has been fitted already
        if group is not None and columns % group:
            raise InputError(
                f"scale.group_size is {group} and the matrix has {columns} columns; "
                "choose a divisor, or rounding.static_groups=true"
            )
        h = problem.input_hessian
        order = None
        if self.order == "descending":
            order = jnp.argsort(-jnp.diagonal(h))
            weight, h = reorder(weight, h, order)
        upper, used, ok = inverse_factor(h, problem.damping)
        pivot, unit, scales = jnp.diagonal(upper), scaling.unit, scaling.at
        index, _ = place(order, columns, codebook, scaling)

        def leaf(part: Array, target: Array, start: Array, context: Any) -> tuple[Array, Array]:
            if group is None:
                context = scales(jax.lax.dynamic_slice_in_dim(index, start, 1), part.dtype)
            values, codes = encode_columns(target.T, codebook, *context)
            return (target - values.T) / jax.lax.dynamic_slice_in_dim(pivot, start, 1)[:, None], codes

        def enter(part: Array, target: Array, start: Array) -> tuple[Array, Array]:
            assert rule is not None and group is not None  # `enter` is only called with groups
            by_row = dataclasses.replace(rule, granularity="row", group_size=None)
            fitted = fit(target.T, codebook, by_row, unit=unit)
            return fitted.at(jnp.zeros(1, jnp.int32), part.dtype)

        plan = Sweep(leaf, reverse=False, enter_width=group, enter=None if group is None else enter)
        codes, groups = sweep(plan, widths(columns, 1, group), weight, -upper)
        codes = merge_codes(codes)
        if group is not None:  # the scales found on the way replace the ones fitted beforehand
            scale, zero = (jnp.moveaxis(x[..., 0], 0, 1) for x in groups)
            zero = None if scaling.zero is None else zero.astype(jnp.uint8)
            scaling = Scaling(scaling.unit, (scale / scaling.unit.astype(scale.dtype)).astype(jnp.float16), zero, group)
            return Coded(codes, used, ok, permutation=None if order is None else compact(order), scaling=scaling)
        if order is not None:
            codes = jnp.take(codes, jnp.argsort(order), axis=1)
        return Coded(codes, used, ok)

    def spec(self) -> dict[str, Any]:
        """Arguments of `make` (the scale rule is the run's, not the algorithm's)."""
        spec = super().spec()
        spec.pop("rule")
        return spec

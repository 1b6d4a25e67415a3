"""One linear of a block by its plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from qjax.hessian.experts import ExpertFactor
from qjax.linalg.kronecker import Hessian
from qjax.matrix.quantize import MatrixReport, program, quantize_matrix, splits_rows
from qjax.matrix.quantized import QuantizedMatrix
from qjax.pipeline.recipe import LayerPlan
from qjax.rounding.base import Rounding
from qjax.rounding.nearest import Nearest, Stochastic
from qjax.runtime.ahead import waited

__all__ = ["layer_program", "quantize_layer", "suspicious"]


def quantize_layer(
    weight: Any,
    hessian: Hessian,
    plan: LayerPlan,
    name: str,
    key: jax.Array,
    correction: float,
    mesh: Mesh | None = None,
    expert: int | None = None,
    experts: ExpertFactor = ExpertFactor(),  # noqa: B008  (frozen)
) -> tuple[QuantizedMatrix, MatrixReport]:
    """The layer `name` with this weight by its plan, with its rows over the devices of `mesh`.

    `expert`: the number of the expert whose it is; `experts` then says how its Hessian is made.

    Where feedback pushed the error into directions that matter, or lost the matrix, plain rounding is tried as well,
    and kept when it is better; the report says so.
    """
    tokens = None if hessian.pooled is None else hessian.tokens
    hessian = experts(hessian, name)

    def by(rounding: Rounding) -> tuple[QuantizedMatrix, MatrixReport]:
        split = mesh if splits_rows(rounding, plan.codebook, plan.scale) else None
        matrix, report = quantize_matrix(weight, hessian, **_options(plan, rounding, name, key, correction), mesh=split)
        return matrix, dataclasses.replace(report, tokens=tokens, expert=expert)

    run, arguments, options = layer_program(weight, hessian, plan, name, key, correction)
    waited(run, *arguments, **options)
    matrix, report = by(plan.rounding)
    if not isinstance(plan.rounding, (Nearest, Stochastic)) and suspicious(report):
        plain, other = by(Nearest())
        if other.proxy_loss < report.proxy_loss:
            return plain, dataclasses.replace(other, fallback="nearest")
    return matrix, report


def layer_program(
    weight: Any, hessian: Hessian, plan: LayerPlan, name: str, key: jax.Array, correction: float
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The first program of `quantize_layer` on one device, as `qjax.matrix.quantize.program`."""
    return program(weight, hessian, **_options(plan, plan.rounding, name, key, correction))


def _options(plan: LayerPlan, rounding: Rounding, name: str, key: jax.Array, correction: float) -> dict[str, Any]:
    return {
        "codebook": plan.codebook,
        "rounding": rounding,
        "incoherence": plan.incoherence,
        "damping": plan.damping,
        "scale": plan.scale,
        "correction": correction,
        "key": key,
        "name": name,
    }


def suspicious(report: MatrixReport) -> bool:
    """Whether feedback did harm: an error that H sees more than a white one of its size, or one as large as W."""
    return report.proxy_loss > 0 and (report.proxy_loss >= 1 or (report.alignment or 0) > 1)

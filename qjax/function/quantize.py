"""The linears of a traced function quantised by a recipe, a matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.errors import InputError, listed, suggested
from qjax.function.sites import LinearSite
from qjax.linalg.kronecker import Hessian
from qjax.linalg.prng import root_key, seed_of
from qjax.matrix.quantize import MatrixReport
from qjax.matrix.stacked import stack
from qjax.pipeline.layer import quantize_layer
from qjax.pipeline.presets import given_recipe

__all__ = ["quantized"]


def quantized(
    sites: Mapping[str, LinearSite],
    leaves: Sequence[Any],
    hessians: Mapping[str, Any],
    recipe: Any,
    bits: float | None,
    key: Any,
    on_layer: Callable[[MatrixReport], None] | None,
) -> tuple[dict[str, Any], list[MatrixReport]]:
    """(operators by linear, reports of all matrices). Raises InputError for what does not fit."""
    recipe = given_recipe(recipe, bits)
    if recipe.finetune is not None:
        raise InputError(
            f"the recipe tunes by {recipe.finetune['name']!r}, which a traced function does not have; give "
            "dataclasses.replace(recipe, finetune=None) and train what traced(params, ...) computes with"
        )
    plans = recipe.plan([name for site in sites.values() for name in site.matrices])
    root = root_key(seed_of(key))
    if other := [name for name in hessians if name not in sites]:
        raise InputError(f"Hessians: there is no linear {other[0]!r}{suggested(other[0], sites)}: {listed(sites)}")
    operators: dict[str, Any] = {}
    reports: list[MatrixReport] = []
    for site in sites.values():
        own = [plans[name] for name in site.matrices]
        skipped = [plan is None for plan in own]
        if all(skipped):
            continue
        if any(skipped):
            raise InputError(
                f"rules skip {site.matrices[skipped.index(True)]} and not {site.matrices[skipped.index(False)]}, which "
                f"are one stack, {site.name}; give a rule that matches all of it or nothing"
            )
        hessian = _hessian(site, hessians)
        matrices = np.asarray(site.matrix(leaves[site.leaf])).reshape(-1, *site.shape)
        made = []
        for index, (name, plan) in enumerate(zip(site.matrices, own, strict=True)):
            assert plan is not None
            operator, report = quantize_layer(matrices[index], _entry(site, hessian, index), plan, name, root, 1.0)
            made.append(operator)
            reports.append(report)
            if on_layer is not None:
                on_layer(report)
        operators[site.name] = stack(made, site.stack) if site.stack else made[0]
    return operators, reports


def _hessian(site: LinearSite, hessians: Mapping[str, Any]) -> Hessian:
    if site.name not in hessians:
        raise InputError(f"there is no Hessian of {site.name}; give one, or skip the linear by a rule of the recipe")
    found = hessians[site.name]
    hessian = found if isinstance(found, Hessian) else Hessian(found)
    sizes = {"input": site.shape[1], "output": site.shape[0]}
    for factor, size in sizes.items():
        matrix = getattr(hessian, factor)
        if matrix is not None and tuple(np.shape(matrix)) != (*site.stack, size, size):
            raise InputError(
                f"the {factor} factor of {site.name}'s Hessian is {list(np.shape(matrix))}; it is "
                f"{[*site.stack, size, size]}"
            )
    return hessian


def _entry(site: LinearSite, hessian: Hessian, index: int) -> Hessian:
    if not site.stack:
        return hessian
    parts = {
        factor: None if (whole := getattr(hessian, factor)) is None else whole.reshape(-1, *whole.shape[-2:])[index]
        for factor in ("input", "output")
    }
    return Hessian(parts["input"], parts["output"], hessian.tokens)

"""Coordinate descent on the proxy loss: passes over the columns that improve codes found by another rounding."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling, identity
from qjax.errors import InputError
from qjax.hessian.statistics import Hessian
from qjax.linalg.damping import damped_factor, normalise
from qjax.rounding.base import (
    ROUNDINGS,
    Rounded,
    check_shapes,
    column_block,
    decode,
    encode_columns,
    finish,
    precise,
    spec_of,
)
from qjax.rounding.sweep import Sweep, merge_codes, sweep, widths

__all__ = ["Greedy", "check_passes", "coupling", "descend"]


def check_passes(passes: int, least: int) -> None:
    """Raise InputError unless `passes` is a whole number, at least `least`."""
    if passes != int(passes) or passes < least:
        raise InputError(f"rounding.passes is {passes}; it is a whole number of coordinate-descent passes, at least {least}")


def coupling(hessian: Float[Array, "n n"], block: int) -> tuple[Float[Array, "n n"], Float[Array, "blocks g g"]]:
    """(F, C): `F = H·blockdiag(H_kk⁻¹) − I`, and the lower Cholesky factors of the diagonal blocks, `H_kk = C_k C_kᵀ`.

    Column block k of F says how the errors of the other blocks move the best value of block k. Diagonal blocks of F are exactly 0.
    """
    n = hessian.shape[0]
    count = n // block
    index = jnp.arange(count)
    factor = jnp.linalg.cholesky(hessian.reshape(count, block, count, block)[index, :, index, :])
    columns = hessian.reshape(n, count, block).transpose(1, 0, 2)
    half = jax.lax.linalg.triangular_solve(factor, columns, left_side=False, lower=True, transpose_a=True)
    solved = jax.lax.linalg.triangular_solve(factor, half, left_side=False, lower=True)
    matrix = solved.transpose(1, 0, 2).reshape(n, n)
    place = jnp.arange(n) // block
    return jnp.where(place.reshape(n, 1) == place.reshape(1, n), 0, matrix), factor


def descend(
    weight: Float[Array, "m n"],
    codes: Shaped[Array, "..."],
    hessian: Float[Array, "n n"],
    codebook: Codebook,
    scaling: Scaling,
    *,
    passes: int,
    block: int,
    index: Int[Array, " n"],
    accept: bool = True,
) -> Shaped[Array, "..."]:
    """Codes after `passes` passes of block coordinate descent, right to left, on `tr(E H Eᵀ)`.

    `Ŵ_k ← Q(Ŵ_k + E H_{:,k} H_kk⁻¹) = Q(W_k + Σ_{j≠k} E_j F_jk)` with E = W − Ŵ kept current.
    """
    n = weight.shape[1]
    matrix, factor = coupling(hessian, block)
    place = jnp.arange(n) // block
    earlier = jnp.where(place.reshape(n, 1) > place.reshape(1, n), matrix, 0)
    later = matrix - earlier
    levels = widths(n, block)
    transposed = weight.T

    def values_of(codes: Array) -> Array:
        scale, zero = scaling.at(index, weight.dtype)
        return (codebook.dequantize(codes).astype(weight.dtype) - zero) * scale

    def one(codes: Array, _: None) -> tuple[Array, None]:
        values = values_of(codes)
        error = weight - values
        pieces = [
            weight[:, s : s + levels[0]]
            + jnp.matmul(error[:, : s + levels[0]], later[: s + levels[0], s : s + levels[0]], precision=precise)
            for s in range(0, n, levels[0])
        ]
        base = jnp.concatenate(pieces, axis=1)
        old_codes = codes.reshape(codes.shape[0], n // block, -1, *codes.shape[2:])
        old_values = values.T

        def leaf(part: Array, target: Array, start: Array, context: None) -> tuple[Array, Array]:
            scale, zero = scaling.at(jax.lax.dynamic_slice_in_dim(index, start, block), part.dtype)
            new, code = encode_columns(target.T, codebook, scale, zero)
            new = new.T
            if accept:
                c = jax.lax.dynamic_index_in_dim(factor, start // block, keepdims=False)
                old = jax.lax.dynamic_slice_in_dim(old_values, start, block)
                cost = lambda v: jnp.sum(jnp.square(jnp.matmul(c.T, target - v, precision=precise)), axis=0)  # noqa: E731
                keep = (cost(new) >= cost(old)).reshape(1, -1)
                new = jnp.where(keep, old, new)
                oc = jax.lax.dynamic_index_in_dim(old_codes, start // block, 1, keepdims=False)
                code = jnp.where(keep.reshape(-1, 1), oc, code)
            return jax.lax.dynamic_slice_in_dim(transposed, start, block) - new, code

        codes, _ = sweep(Sweep(leaf, reverse=True), levels, base, earlier)
        return merge_codes(codes), None

    return jax.lax.scan(one, codes, None, length=passes)[0]

"""Rounding with the rows of a matrix split over devices: rows without feedback between them need no exchange."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling
from qjax.linalg.kronecker import Hessian
from qjax.rounding.base import Rounded, Rounding
from qjax.runtime.mesh import EACH, WHOLE

__all__ = ["gathered", "independent", "over_rows", "round_rows"]

_UNIT = 16
"""Rows per device come in multiples of this: a matrix product of very few rows sums in another order."""


def independent(rounding: Rounding) -> bool:
    """Whether every row (of tiles) is rounded as if alone: the algorithm's `independent_rows`, False without."""
    return bool(getattr(rounding, "independent_rows", False))


def gathered(tree: Any, mesh: Mesh) -> Any:
    """The arrays of a tree, whole on every device (under jit)."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, WHOLE)), tree)


def over_rows(function: Callable[..., Any], mesh: Mesh, each: Any, whole: Any, unit: int = _UNIT) -> Any:
    """`function(each, whole)` on every device with its part of the rows of `each`; returns (each, whole) likewise.

    `each` is a tree of arrays with the same number of rows; they are padded with zeros to whole multiples of `unit` on
    every device, and what comes back keeps the padding. `whole` is the same on every device. Nothing is communicated.
    """
    rows = jax.tree.leaves(each)[0].shape[0]
    lack = -rows % (mesh.size * unit)

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, lack), *((0, 0) for _ in x.shape[1:])))

    split = jax.shard_map(function, mesh=mesh, in_specs=(EACH, WHOLE), out_specs=(EACH, WHOLE), check_vma=False)
    # What leads here must not be split as well: its sums (scales) would come out in another order.
    each, whole = gathered((each, whole), mesh)
    return split(jax.tree.map(padded, each), whole)


def _parted(scaling: Scaling, rows: int) -> tuple[tuple[Array | None, Array | None], Scaling]:
    """(relative scales and zeros with a row for every row of the matrix, None for others; the rest)."""
    own = [x if x is not None and x.shape[0] == rows else None for x in (scaling.relative, scaling.zero)]
    relative, zero = own
    return (relative, zero), dataclasses.replace(
        scaling, relative=scaling.relative if relative is None else None, zero=scaling.zero if zero is None else None
    )


def _joined(own: tuple[Array | None, Array | None], rest: Scaling) -> Scaling:
    relative, zero = own
    return dataclasses.replace(
        rest, relative=rest.relative if relative is None else relative, zero=rest.zero if zero is None else zero
    )


def round_rows(
    rounding: Rounding,
    weight: Float[Array, "out in"],
    hessian: Hessian,
    codebook: Codebook,
    *,
    scaling: Scaling,
    damping: Array | float,
    mesh: Mesh,
) -> Rounded:
    """`rounding(weight, hessian, codebook, ...)` of an independent rounding with the rows over all devices of `mesh`.

    Every device factors H and rounds its rows; the result, the same code for code as on one device, is whole on every
    device. H_out is not used (an independent rounding does not).
    """
    rows, height = weight.shape[0], codebook.tile[0]
    own, rest = _parted(scaling, rows)

    def part(each: Any, whole: Any) -> Any:
        weight, (relative, zero) = each
        h, codebook, rest, damping = whole
        if relative is not None:  # the rows of zeros that fill up
            relative = jnp.where(relative > 0, relative, 1)
        scaling = _joined((relative, zero), rest)
        done = rounding(weight, Hessian(h), codebook, scaling=scaling, damping=damping)
        own, rest = _parted(done.scaling, weight.shape[0])
        return (done.values, done.codes, done.ok.reshape(1), done.start, own), (rest, done.permutation, done.damping)

    each, (rest, permutation, used) = over_rows(
        part,
        mesh,
        (weight, own),
        (hessian.input, codebook, rest, jnp.asarray(damping, weight.dtype)),
        math.lcm(height, _UNIT),
    )
    values, codes, ok, start, own = each
    cut = lambda tree, count: gathered(jax.tree.map(lambda x: x[:count], tree), mesh)  # noqa: E731
    scaling = _joined(cut(own, rows), rest)
    codes, ok = cut(codes, rows // height), jnp.all(ok)
    return Rounded(cut(values, rows), codes, scaling, permutation, used, ok, cut(start, rows))

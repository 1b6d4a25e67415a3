"""One or two rows of a product on a GPU: a weight is decoded in registers and multiplied at once, in float32.

The sums of a program are `[words down the inputs, outputs]`, and are added over the inputs at the end. The words of the
next block are under way while one is decoded. A tile is read in strips of outputs, which share what a thread has of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.dequant_matmul import trellis
from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS, SLABS, PackedMatrix, planes
from pallas_kernels.dequant_matmul.triton.program import Program
from pallas_kernels.triton import Instructions

__all__ = ["Sums", "code", "grid"]


def _line_ends(weight: PackedMatrix, rows: int, k: int) -> bool:
    """Whether the scale changes after step k of `rows` inputs: with a group's or a block's end."""
    end = rows * (k + 1)
    return end == BLOCK or end % min(BLOCK, weight.group or BLOCK) == 0 or (weight.group or BLOCK) < rows


Sums = list[list[Array]]
"""By strip and row, `[words down the inputs, lanes]`."""


def _add(sums: list[Array], code: Array, x: Sequence[Array], ops: Instructions) -> list[Array]:
    """`sums + code · x`, x by row `[words down the inputs]`."""
    return [ops.multiply_add(code, own[:, None], total) for own, total in zip(x, sums, strict=True)]


def _zeros(own: Program, rows: int, words: int) -> Sums:
    return [[jnp.zeros((words, own.lanes), jnp.float32)] * rows for _ in range(own.strips)]


def grid(x_ref: Any, own: Program) -> Sums:
    """`x Wᵀ` of a scalar grid, float32 `[1, lanes]` by strip and row; scales are applied here too."""
    weight, ops, rows = own.weight, own.ops, x_ref.shape[0]
    widths, grouped = planes(weight.bits), weight.group is not None

    def plane(n: int, words: list[Array], sums: Sums, inputs: list[Array], block: Array) -> tuple[Sums, list[Array]]:
        down = ROWS * widths[n]
        kept: list[dict[int, Array]] = [{} for _ in words]
        parts = _zeros(own, rows, down) if grouped else sums
        for k in range(SLABS // widths[n]):
            at = pl.ds(block * BLOCK + down * k, down)
            x = [x_ref[row, at].astype(jnp.float32) for row in range(rows)]
            if n == 0:  # what offsets are multiplied with
                inputs = [a + b for a, b in zip(inputs, x, strict=True)]
            for strip, word in enumerate(words):
                code = own.decoder.code_at(word, widths[n] * k, widths[n], kept[strip])
                parts[strip] = _add(parts[strip], code, x, ops)
            if not grouped or not _line_ends(weight, down, k):
                continue
            for strip in range(own.strips):
                scale = own.scale(0, block, down * k, down, strip) * np.float32(2.0 ** sum(widths[:n]))
                sums[strip] = [ops.multiply_add(a, scale, b) for a, b in zip(parts[strip], sums[strip], strict=True)]
                if n == 0:
                    sums[strip] = _add(sums[strip], own.scale(1, block, down * k, down, strip), inputs, ops)
            inputs = [jnp.zeros_like(a) for a in inputs] if n == 0 else inputs
            parts = _zeros(own, rows, down)
        return (sums if grouped else parts), inputs

    def load(block: Array) -> Any:
        return [list(some) for some in zip(*(own.planes(block, strip) for strip in range(own.strips)), strict=True)]

    def step(block: Array, carry: Any) -> Any:
        totals, inputs, words = carry
        following = load(jnp.minimum(block + 1, own.end - 1))
        found = []
        for n in range(len(widths)):
            sums, inputs = plane(n, words[n], [list(some) for some in totals[n]], inputs, block)
            found.append(sums)
        return found, inputs, following

    zeros = [_zeros(own, rows, ROWS * width) for width in widths]
    start = (zeros, [jnp.zeros(ROWS * widths[0], jnp.float32)] * rows, load(own.first))
    totals, inputs, _ = jax.lax.fori_loop(own.first, own.end, step, start)
    found = []
    for strip in range(own.strips):
        own_rows = []
        for row in range(rows):
            y = jnp.sum(totals[0][strip][row], axis=0, keepdims=True)
            for n in range(1, len(widths)):
                factor = np.float32(1.0 if grouped else 2.0 ** sum(widths[:n]))
                y = y + jnp.sum(totals[n][strip][row], axis=0, keepdims=True) * factor
            if not grouped:
                scale, offset = (own.scale(which, jnp.int32(0), 0, 1, strip) for which in (0, 1))
                y = y * scale + jnp.sum(inputs[row]) * offset
            own_rows.append(y)
        found.append(own_rows)
    return found


def code(x_ref: Any, own: Program) -> Sums:
    """`x Wᵀ` of a trellis or a lattice, likewise."""
    weight, ops, rows = own.weight, own.ops, x_ref.shape[0]
    inputs = jax.lax.broadcasted_iota(jnp.int32, (ROWS,), 0) * SLABS

    def load(block: Array) -> Any:
        return [own.pieces(block, strip) for strip in range(own.strips)]

    def step(block: Array, carry: Any) -> Any:
        sums, words = [list(some) for some in carry[0]], carry[1]
        following = load(jnp.minimum(block + 1, own.end - 1))

        def x_of(j: int) -> list[Array]:
            return [x_ref[row, block * BLOCK + inputs + j].astype(jnp.float32) for row in range(rows)]

        if weight.code == "e8p":
            for q in range(4):
                codes = [w[q // 2] >> np.uint32(16) if q % 2 else w[q // 2] for w in words]
                terms = [own.decoder.e8p_terms(code) for code in codes]
                whole = [jnp.zeros(ROWS, jnp.float32)] * rows
                for coordinate in range(8):
                    x = [a * np.float32(0.5) for a in x_of(8 * q + coordinate)]
                    whole = [a + b for a, b in zip(whole, x, strict=True)]
                    for strip, (term, _) in enumerate(terms):
                        sums[strip] = _add(sums[strip], term[coordinate], x, ops)
                for strip, (_, constant) in enumerate(terms):
                    sums[strip] = _add(sums[strip], constant * np.float32(2), whole, ops)
            return sums, following
        values = [own.decoder.slabs(own_words, weight) for own_words in words]
        for j in range(SLABS):
            x = x_of(j)
            for strip, value in enumerate(values):
                sums[strip] = _add(sums[strip], value(j), x, ops)
        return sums, following

    sums, _ = jax.lax.fori_loop(own.first, own.end, step, (_zeros(own, rows, ROWS), load(own.first)))
    unit = np.float32(trellis.unit(weight.code) if weight.code and weight.table is None else 1.0)
    scales = [own.scale(0, jnp.int32(0), 0, 1, strip) * unit for strip in range(own.strips)]
    return [
        [jnp.sum(total, axis=0, keepdims=True) * scale for total in some]
        for some, scale in zip(sums, scales, strict=True)
    ]

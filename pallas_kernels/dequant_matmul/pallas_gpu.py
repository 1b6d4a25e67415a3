"""Streaming dequantise-and-multiply on a GPU: every program owns a tile of outputs and reads its packed words once.

One or two rows: a weight is decoded in registers and multiplied at once, by multiply-adds in float32.
The sums of a program are `[words down the inputs, outputs]`, and are added over the inputs at the end. The words of the
next block are under way while one is decoded. A tile is read in strips of outputs, which share what a thread has of x.
3 to 16 rows: weights go to the tensor cores, 16 inputs in a product.

Where tiles are too few to fill the device the inputs are split too; the partial sums, a tenth of the weights' bytes at
most, are added by XLA. Scales of whole rows are applied to the sums, not to weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import tuned
from pallas_kernels.dequant_matmul import trellis
from pallas_kernels.dequant_matmul.decode import by_slabs, static
from pallas_kernels.dequant_matmul.gpu_values import CENTRE, Decoder
from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS, SLABS, PackedMatrix, planes
from pallas_kernels.triton import Instructions, parameters, unavailable

__all__ = ["DEFAULT", "MULTIPLIED", "candidates", "key", "matmul", "obstacle", "rows_of"]

DEFAULT = {"tile": 128, "strips": 2, "warps": 8, "stages": 3, "programs": 264}
"""Outputs of a program, strips of a tile, warps, pipeline stages, programs to aim for: two per multiprocessor."""
ROWS_DEFAULT = {"tile": 64, "strips": 1, "warps": 4, "stages": 3, "programs": 528}
"""The same for 3 to 16 rows."""
MULTIPLIED = 2
"""Rows up to which weights are multiplied by multiply-adds: with more the tensor cores are faster (measured, H200)."""
CANDIDATES = tuple(
    {"tile": tile, "strips": strips, "warps": warps, "programs": programs}
    for programs in (264, 528, 132)
    for tile, strips, warps in ((128, 4, 8), (128, 2, 8), (64, 2, 8), (128, 2, 16), (64, 1, 8), (32, 1, 4), (64, 2, 4))
)
"""What tuning tries for few rows."""
ROWS_CANDIDATES = tuple(
    {"tile": tile, "warps": warps, "stages": stages, "programs": programs}
    for programs in (264, 528)
    for tile, warps in ((64, 4), (32, 4), (32, 2), (128, 4), (128, 8))
    for stages in (3, 2)
)
"""The same for 3 to 16 rows."""


def key(batch: int, weight: PackedMatrix) -> str:
    """Under which tuned blocks are kept: code, bits, rows, tiles of 1024 outputs and inputs."""
    shape = "x".join(str(-(-n // 1024)) for n in weight.padded)
    rows = {1: "one row", 16: "16 rows"}.get(rows_of(batch), "2 rows")
    return f"{weight.code or 'grid'} {weight.bits} bits, {rows}, {shape}"


def candidates(batch: int) -> tuple[dict[str, int], ...]:
    """What tuning tries for so many rows."""
    return CANDIDATES if batch <= MULTIPLIED else ROWS_CANDIDATES


def rows_of(batch: int) -> int:
    """The rows that a program computes for `batch`: as many, or those of a tensor core's product."""
    return batch if batch <= MULTIPLIED else 16


def obstacle(batch: int, weight: PackedMatrix) -> str | None:
    """Why the product with `batch` rows cannot run, None when it can."""
    if batch > 16:
        return f"it streams the weights for at most 16 rows, found {batch}"
    return unavailable()


def _blocks_of_program(rows: int, weight: PackedMatrix, tile: int, programs: int) -> int:
    """Blocks of inputs of a program: few for enough programs, and for partial sums of a tenth of the weights' bytes."""
    out, padded = weight.padded
    blocks = padded // BLOCK
    parts = max(1, min(programs // (out // tile), weight.nbytes // (10 * 4 * rows * out), blocks))
    return -(-blocks // parts)


class _Program:
    """What the bodies share: where the words of this program are, and how they are read."""

    def __init__(
        self, words: Any, scales: Any, table: Any, weight: PackedMatrix, ops: Instructions, strips: int, blocks: int
    ) -> None:
        self.words, self.scales, self.weight, self.ops = words, scales, weight, ops
        # entries of a table come from the first cache
        self.decoder = Decoder(ops, lambda first, _, index: table[index.astype(jnp.int32) + first])
        self.tile, self.strips = words.shape[2], strips
        self.lanes = self.tile // strips
        self.first = pl.program_id(1) * blocks
        self.end = jnp.minimum(self.first + blocks, words.shape[0])

    def piece(self, block: Array, first: int, rows: int, strip: int) -> Array:
        """Words `[rows, lanes]` of a strip of a block."""
        return self.words[block, first : first + rows, strip * self.lanes : (strip + 1) * self.lanes]

    def pieces(self, block: Array, strip: int) -> tuple[Array, ...]:
        """A block's pieces of 16 rows and, of a trellis, the next row of every tile."""
        found = tuple(self.piece(block, i * ROWS, ROWS, strip) for i in range(self.weight.bits))
        if self.weight.L:  # in the first cache by now
            row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, self.lanes), 0)
            lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, self.lanes), 1) + strip * self.lanes
            found += (self.words[block, row, (lane & -16) | ((lane + 1) & 15)],)
        return found

    def planes(self, block: Array, strip: int) -> tuple[Array, ...]:
        """The planes of a scalar grid, `[16 width, lanes]`."""
        widths = planes(self.weight.bits)
        return tuple(self.piece(block, ROWS * sum(widths[:n]), ROWS * width, strip) for n, width in enumerate(widths))

    def scale(self, which: int, block: Array, first: int, rows: int, strip: int | None = None) -> Array:
        """Scales (0) or offsets (1) of `rows` inputs from `first` of a block, float32 `[rows or 1, lanes]`.

        Of the whole tile without a strip.
        """
        ref, weight = self.scales[which], self.weight
        start, lanes = (0, self.tile) if strip is None else (strip * self.lanes, self.lanes)
        group = jax.lax.div(block, jnp.int32(weight.blocks_per_scale))
        lines = weight.scale.shape[1]
        if rows <= BLOCK // lines:
            line = first * lines // BLOCK
            return ref[group, line : line + 1, start : start + lanes].astype(jnp.float32)
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 1) + start
        return ref[group, jax.lax.div(first + row, jnp.int32(BLOCK // lines)), lane].astype(jnp.float32)


def _line_ends(weight: PackedMatrix, rows: int, k: int) -> bool:
    """Whether the scale changes after step k of `rows` inputs: with a group's or a block's end."""
    end = rows * (k + 1)
    return end == BLOCK or end % min(BLOCK, weight.group or BLOCK) == 0 or (weight.group or BLOCK) < rows


Sums = list[list[Array]]
"""By strip and row, `[words down the inputs, lanes]`."""


def _add(sums: list[Array], code: Array, x: Sequence[Array], ops: Instructions) -> list[Array]:
    """`sums + code · x`, x by row `[words down the inputs]`."""
    return [ops.multiply_add(code, own[:, None], total) for own, total in zip(x, sums, strict=True)]


def _zeros(own: _Program, rows: int, words: int) -> Sums:
    return [[jnp.zeros((words, own.lanes), jnp.float32)] * rows for _ in range(own.strips)]


def _grid_few_rows(x_ref: Any, own: _Program) -> Sums:
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


def _code_few_rows(x_ref: Any, own: _Program) -> Sums:
    """The same of a trellis or a lattice."""
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


def _dot(x: Array, weights: Array) -> Array:
    return jax.lax.dot(x, weights, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _grid_rows(x_ref: Any, own: _Program) -> Array:
    """As `_grid_few_rows` for 16 rows, float32 `[16, tile]`. With groups W is scaled and rounded to the dtype of x."""
    weight, dtype = own.weight, x_ref.dtype
    widths, grouped, rows = planes(weight.bits), weight.group is not None, x_ref.shape[0]

    def step(block: Array, carry: Any) -> Any:
        totals, inputs = list(carry[0]), carry[1]
        pieces, kept = own.pieces(block, 0), [{} for _ in range(weight.bits)]
        for j in range(SLABS):
            x = x_ref[:, pl.ds(block * BLOCK + ROWS * j, ROWS)]
            code = None
            for n, width in enumerate(widths):
                piece = sum(widths[:n]) + j % width
                part = own.decoder.code_at(pieces[piece], j - j % width, width, kept[piece])
                factor = jnp.full(part.shape, 2.0 ** sum(widths[:n]), jnp.float32)
                code = part if code is None else own.ops.multiply_add(part, factor, code)
            assert code is not None
            if grouped:
                scale, offset = (own.scale(which, block, ROWS * j, ROWS) for which in (0, 1))
                code = own.ops.multiply_add(code, scale, offset)
            else:  # the sums of x, in all columns
                inputs = inputs + _dot(x, jnp.ones((ROWS, 16), dtype))
            totals[0] = totals[0] + _dot(x, code.astype(dtype))
        return tuple(totals), inputs

    zeros = (jnp.zeros((rows, own.tile), jnp.float32),)
    totals, inputs = jax.lax.fori_loop(own.first, own.end, step, (zeros, jnp.zeros((rows, 16), jnp.float32)))
    if grouped:
        return totals[0]
    whole = jnp.max(inputs, axis=1, keepdims=True)
    return totals[0] * own.scale(0, jnp.int32(0), 0, 1) + whole * own.scale(1, jnp.int32(0), 0, 1)


def _code_rows(x_ref: Any, own: _Program) -> Array:
    """As `_code_few_rows` for 16 rows; values are rounded to the dtype of x, mul1's to bfloat16 directly."""
    weight, rows, dtype = own.weight, x_ref.shape[1], x_ref.dtype
    centred = weight.code == "mul1" and dtype == jnp.bfloat16

    def step(block: Array, carry: Any) -> Any:
        total, inputs = carry
        value = own.decoder.slabs(own.pieces(block, 0), weight, centred)
        for j in range(SLABS):
            x = x_ref[block, :, j * ROWS : (j + 1) * ROWS]
            if centred:
                # before the product with weights: after it Triton has every warp decode all of them
                inputs = inputs + _dot(x, jnp.ones((ROWS, 16), dtype))
            total = total + _dot(x, value(j).astype(dtype))
        return total, inputs

    start = (jnp.zeros((rows, own.tile), jnp.float32), jnp.zeros((rows, 16), jnp.float32))
    total, inputs = jax.lax.fori_loop(own.first, own.end, step, start)
    unit = trellis.unit(weight.code) if weight.code and weight.table is None else 1.0
    if centred:
        unit, shift = trellis.MUL1
        total = total + jnp.max(inputs, axis=1, keepdims=True) * np.float32(CENTRE + 1024 + shift / unit)
    return total * (own.scale(0, jnp.int32(0), 0, 1) * np.float32(unit))


def _kernel(*refs: Any, weight: PackedMatrix, ops: Instructions, strips: int, blocks: int) -> None:
    x_ref, words_ref, scale_ref, offset_ref, *table, y_ref = refs
    scales, entries = (scale_ref, offset_ref), table[0] if table else None
    own = _Program(words_ref, scales, entries, weight, ops, strips, blocks)
    if y_ref.shape[0] > MULTIPLIED:
        y_ref[...] = (_grid_rows if weight.code is None else _code_rows)(x_ref, own).astype(y_ref.dtype)
        return
    found = (_grid_few_rows if weight.code is None else _code_few_rows)(x_ref, own)
    for strip, some in enumerate(found):
        for row, y in enumerate(some):
            y_ref[row : row + 1, strip * own.lanes : (strip + 1) * own.lanes] = y.astype(y_ref.dtype)


def _inputs(x: Array, weight: PackedMatrix, rows: int) -> Array:
    """x as the bodies read it: padded, and for 16 rows of a code by slabs. Few rows are read as they are."""
    if rows > MULTIPLIED and weight.code is not None:
        return by_slabs(x, weight, rows)
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, weight.padded[1] - x.shape[1])))


def matmul(
    x: Float[Array, "batch in"], weight: PackedMatrix, interpret: Any = False, blocks: Mapping[str, int] | None = None
) -> Float[Array, "batch out"]:
    """`x Wᵀ` in the dtype of x, summed in float32; see `obstacle`.

    W is not rounded for few rows, nor for scalar grids with scales of whole rows; else it is, to the dtype of x.
    `blocks` is as DEFAULT; None takes what was tuned for the device.
    """
    batch, out = x.shape[0], weight.padded[0]
    rows = rows_of(batch)
    default = DEFAULT if rows <= MULTIPLIED else ROWS_DEFAULT
    own = tuned.blocks("dequant_matmul", key(batch, weight), default) if blocks is None else {**default, **blocks}
    tile = own["tile"]
    each = _blocks_of_program(rows, weight, tile, own["programs"])
    parts = -(-weight.words.shape[0] // each)
    scales = pl.BlockSpec((*weight.scale.shape[:2], tile), lambda n, s: (0, 0, n))
    table = [] if weight.table is None else [weight.table.reshape(-1)]
    inputs = _inputs(x, weight, rows)
    y = pl.pallas_call(
        functools.partial(
            _kernel,
            weight=static(weight),
            ops=Instructions(interpret),
            strips=own["strips"] if rows <= MULTIPLIED else 1,
            blocks=each,
        ),
        grid=(out // tile, parts),
        in_specs=[
            pl.BlockSpec(inputs.shape, lambda n, s: (0,) * inputs.ndim),
            pl.BlockSpec((*weight.words.shape[:2], tile), lambda n, s: (0, 0, n)),
            scales,
            scales,
            *(pl.BlockSpec(t.shape, lambda n, s: (0,)) for t in table),
        ],
        out_specs=pl.BlockSpec((None, rows, tile), lambda n, s: (s, 0, n)),
        out_shape=jax.ShapeDtypeStruct((parts, rows, out), x.dtype if parts == 1 else jnp.float32),
        compiler_params=parameters(warps=own["warps"], stages=own["stages"] if rows > MULTIPLIED else 1),
        interpret=interpret,
        name="dequant_matmul",
    )(inputs, weight.words, weight.scale, weight.offset, *table)
    y = y[0] if parts == 1 else jnp.sum(y, axis=0).astype(x.dtype)
    return y[:batch, : weight.shape[0]]

"""Streaming dequantise-and-multiply on Hopper through Mosaic GPU: words by TMA, decoded in registers, wgmma.

A program owns 128 outputs and a part of the inputs. A block's words arrive in shared memory while the one before is
decoded. Decoded weights are the *left* operand, `[128 outputs, inputs]`, in shared memory (two buffers: one is
multiplied while the next is filled); 16 columns of x are the right one. So up to 16 rows cost the same as one, and a
decoded weight costs one conversion and one store beside its decoding.

Where scales belong to whole rows, weights stay as they are stored, whole numbers or the float16 values of a trellis:
exact in float16. x is brought to float16 by an exact power of two per row, float32 as a sum of two float16, and
products are summed in float32: W is not rounded at all. Scales and offsets are applied to the sums. With groups, W is
scaled in float32 and rounded to the dtype of x, as in the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import tuned
from pallas_kernels.dequant_matmul.layout import BLOCK, LANES, ROWS, SLABS, PackedMatrix, slab_values
from pallas_kernels.dequant_matmul.rows import AFTER, RowMatrix, outputs_in_order, to_rows
from pallas_kernels.dequant_matmul.trellis import half_values, unit
from pallas_kernels.mosaic_gpu import multiprocessors, parameters, plgpu, tiled, unavailable

__all__ = ["CANDIDATES", "DEFAULT", "decoder", "key", "matmul", "obstacle"]

COLUMNS = 16
"""Of x in a product: the least that lie in shared memory with the inputs down the rows."""
DEFAULT = {"slabs": 8, "stages": 3, "programs": 4}
"""Slabs decoded before a product is issued, blocks of words under way, programs per multiprocessor to aim for."""
CANDIDATES = tuple(
    {"slabs": slabs, "stages": stages, "programs": programs}
    for slabs in (4, 8)
    for stages in (2, 3, 4)
    for programs in (2, 4, 8)
)
"""The blocks that tuning tries."""
_SHARED = 200 << 10
"""Bytes of shared memory that a program may take."""


def key(batch: int, weight: PackedMatrix | RowMatrix) -> str:
    """Key of the tuned blocks: code, bits, one row or several, tiles of 1024 outputs and inputs."""
    shape = "x".join(str(-(-n // 1024)) for n in weight.padded)
    return f"{weight.code or 'grid'} {weight.bits} bits, {'one row' if batch == 1 else '16 rows'}, {shape}"


def cannot(batch: int, dtype: Any, weight: PackedMatrix | RowMatrix) -> str | None:
    """The reason why this kernel does not compute the product, on any device; None when it does."""
    if isinstance(weight, PackedMatrix) and weight.table is not None:
        return f"code {weight.code!r} looks values up, and Mosaic GPU has no gather; the Triton kernel has"
    if batch > COLUMNS:
        return f"it streams the weights for at most {COLUMNS} rows, found {batch}"
    if weight.group is not None and dtype == jnp.float32:
        return "groups are scaled before they are rounded to 16 bits, which float32 does not allow"
    return None


def obstacle(batch: int, dtype: Any, weight: PackedMatrix | RowMatrix) -> str | None:
    """The reason why the product with `batch` rows of `dtype` cannot run here, None when it can."""
    return cannot(batch, dtype, weight) or unavailable()


def _columns(x: Array, weight: RowMatrix) -> tuple[Array, Array]:
    """(x as `[blocks, terms, 512, 16]`, inputs in the order of slabs; float32 `[batch, 1]` to multiply sums with)."""
    blocks, batch = weight.blocks, x.shape[0]
    x = jnp.pad(x, ((0, COLUMNS - batch), (0, blocks * BLOCK - x.shape[1])))
    terms, factor = [x], jnp.ones((COLUMNS, 1), jnp.float32)
    if weight.group is None:
        wide = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), axis=1, keepdims=True)
        # the power of two at or below the largest value: its bits without the fraction
        power = jax.lax.bitcast_convert_type(
            jax.lax.bitcast_convert_type(largest, jnp.uint32) & np.uint32(0x7F800000), jnp.float32
        )
        factor = jnp.clip(power, np.float32(2.0**-100), np.float32(2.0**127)) * np.float32(2.0**-14)
        wide = wide / factor
        terms = [wide.astype(jnp.float16)]
        if x.dtype == jnp.float32:
            # not a conversion there and back, which XLA takes out where it may be more precise than asked for
            terms.append((wide - jax.lax.reduce_precision(wide, 5, 10)).astype(jnp.float16))
    order = (ROWS, SLABS) if weight.code is not None else (SLABS, ROWS)
    columns = jnp.stack(terms).reshape(len(terms), COLUMNS, blocks, *order)
    if weight.code is not None:
        columns = columns.swapaxes(3, 4)
    return columns.reshape(len(terms), COLUMNS, blocks, BLOCK).transpose(2, 0, 3, 1), factor[:batch]


def decoder(first: Any, rest: Any, weight: RowMatrix, half: Array) -> Callable[[int], Array]:
    """The function from t to slab `16 half + t` of the block whose words are in shared memory, `[128, 16]`."""
    parts = [first[:LANES], *(rest[i] for i in range(weight.bits - 1))]
    shift = (half * 16).astype(jnp.uint32)
    if weight.code is None:
        return lambda t: slab_values(parts, weight.bits, t, shift)
    code, following = weight.code, first[AFTER:]
    kept: dict[int, Array] = {}

    def unit_of(i: int) -> Array:
        return ((parts[i] if i < weight.bits else following) >> shift) & np.uint32(0xFFFF)

    def value(t: int) -> Array:
        i, start = divmod(t * weight.bits, 16)
        if i not in kept:
            kept.clear()  # the window of 32 bits that begins at a unit serves all states that begin in it
            kept[i] = (unit_of(i) << np.uint32(16)) | unit_of(i + 1)
        return half_values(code, (kept[i] >> np.uint32(32 - start - weight.L)) & np.uint32(2**weight.L - 1))

    return value


def _body(*refs: Any, weights_smem: Any, y_smem: Any, weight: RowMatrix, sizes: Mapping[str, int]) -> None:
    x_gmem, first_gmem, *others, y_gmem = refs
    blocks, terms, slabs, stages = (sizes[name] for name in ("blocks", "terms", "slabs", "stages"))
    rest_gmem = others.pop(0) if weight.bits > 1 else None
    scales_gmem = others
    tile, part = jax.lax.axis_index("tile"), jax.lax.axis_index("part")
    start = part * blocks
    swizzled = tiled(4, ROWS)

    def spec(block: tuple[int | None, ...], index: Any, transforms: Any = ()) -> Any:
        return plgpu.BlockSpec(block, index, transforms=transforms)

    specs = [
        spec((None, terms, BLOCK, COLUMNS), lambda k: (start + k, 0, 0, 0), tiled(2, COLUMNS)),
        spec((None, None, first_gmem.shape[2], ROWS), lambda k: (tile, start + k, 0, 0), swizzled),
    ]
    if rest_gmem is not None:
        own = (None, None, weight.bits - 1, LANES, ROWS)
        specs.append(spec(own, lambda k: (tile, start + k, 0, 0, 0), swizzled))
    if scales_gmem:
        per = weight.blocks_per_scale
        line = (None, weight.scale.shape[1], LANES)
        specs += [spec(line, lambda k: (jax.lax.div(start + k, jnp.int32(per)), 0, tile))] * 2

    def product(acc: Any) -> Array:
        def step(_: Any, x: Any, first: Any, *others: Any) -> None:
            rest, *own = others if weight.bits > 1 else (None, *others)

            def decode(half: Array, _: None) -> None:
                value = decoder(first, rest, weight, half)
                for chunk in range(ROWS // slabs):
                    buffer = weights_smem.at[chunk % 2]
                    for i in range(slabs):
                        t = chunk * slabs + i
                        decoded = _scaled(value(t), own, half, t, weight) if own else value(t)
                        buffer[:, i * ROWS : (i + 1) * ROWS] = decoded.astype(weights_smem.dtype)
                    plgpu.commit_smem()
                    inputs = pl.ds((half * ROWS + chunk * slabs) * ROWS, slabs * ROWS)
                    for term in range(terms):
                        plgpu.wgmma(acc, buffer, x.at[term, inputs])
                    plgpu.wgmma_wait(terms)  # the chunk before is done: its buffer is free

            jax.lax.fori_loop(0, SLABS // ROWS, decode, None)
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()  # a barrier: no warp still reads the block when it is overwritten

        pipeline = plgpu.emit_pipeline(step, grid=(blocks,), in_specs=specs, max_concurrent_steps=stages)
        pipeline(x_gmem, first_gmem, *([] if rest_gmem is None else [rest_gmem]), *scales_gmem)
        return acc[...]

    total = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((LANES, COLUMNS), jnp.float32))
    y_smem[...] = jnp.sum(total, axis=1) if len(y_smem.shape) == 1 else total  # all columns but one are zero
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[part, tile])
    plgpu.wait_smem_to_gmem(0)


def _scaled(codes: Array, scales: Sequence[Any], half: Array, t: int, weight: RowMatrix) -> Array:
    """`scale · code + offset` of slab `16 half + t`, float32, by the line of scales that is its own."""
    lines = weight.scale.shape[1]
    line = t * lines // SLABS + (half * (lines // 2) if lines > 1 else 0)
    scale, offset = (jax.lax.broadcast_in_dim(ref[line].astype(jnp.float32), (LANES, ROWS), (0,)) for ref in scales)
    return codes * scale + offset


def _parts(batch: int, weight: RowMatrix, programs: int) -> int:
    """Parts of the inputs: enough programs, equal parts, partial sums at most 8% of the weights."""
    tiles, columns = weight.first.shape[0], 1 if batch == 1 else COLUMNS
    most = min(-(-programs // tiles), weight.nbytes // (12 * 4 * columns * tiles * LANES))
    return max([s for s in range(1, weight.blocks + 1) if weight.blocks % s == 0 and s <= most], default=1)


def matmul(
    x: Float[Array, "batch in"],
    weight: PackedMatrix | RowMatrix,
    interpret: Any = None,
    blocks: Mapping[str, int] | None = None,
    processors: int | None = None,
) -> Float[Array, "batch out"]:
    """`x Wᵀ` in the dtype of x, summed in float32; see `obstacle`. A `PackedMatrix` is rearranged first, every time.

    `blocks` is as DEFAULT; None takes what was tuned for the device. `processors` is the device's multiprocessors.
    Raises NotImplementedError for a code with a table, more than 16 rows, and groups with float32.
    """
    batch = x.shape[0]
    reason = cannot(batch, x.dtype, weight)
    if reason is not None:
        raise NotImplementedError(f"dequant_matmul: mosaic_gpu: {reason}")
    own = tuned.blocks("dequant_matmul mosaic_gpu", key(batch, weight), DEFAULT) if blocks is None else blocks
    own = {**DEFAULT, **own}
    weight = to_rows(weight) if isinstance(weight, PackedMatrix) else weight
    columns, factor = _columns(x, weight)
    terms, grouped = columns.shape[1], weight.group is not None
    parts = _parts(batch, weight, own["programs"] * (multiprocessors() if processors is None else processors))
    tiles, one = weight.first.shape[0], batch == 1
    kind = x.dtype if grouped else jnp.float16
    stage = 4 * ROWS * (weight.first.shape[2] + (weight.bits - 1) * LANES) + 2 * terms * BLOCK * COLUMNS
    buffers = 2 * 2 * LANES * ROWS * own["slabs"]
    shape = (LANES,) if one else (LANES, COLUMNS)
    y = plgpu.kernel(
        functools.partial(
            _body,
            weight=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weight),
            sizes={
                "blocks": weight.blocks // parts,
                "terms": terms,
                "slabs": own["slabs"],
                "stages": max(1, min(own["stages"], (_SHARED - buffers) // stage)),
            },
        ),
        out_type=jax.ShapeDtypeStruct((parts, tiles, *shape), jnp.float32),
        grid=(tiles, parts),
        grid_names=("tile", "part"),
        scratch_types={
            "weights_smem": plgpu.SMEM((2, LANES, own["slabs"] * ROWS), kind, transforms=tiled(2, ROWS)),
            "y_smem": plgpu.SMEM(shape, jnp.float32),
        },
        compiler_params=parameters(),
        interpret=interpret,
        kernel_name="dequant_matmul",
    )(
        columns,
        weight.first,
        *([] if weight.rest is None else [weight.rest]),
        *([weight.scale, weight.offset] if grouped else []),
    )
    return _finished(jnp.sum(y, axis=0), x, weight, factor)


def _finished(sums: Array, x: Array, weight: RowMatrix, factor: Array) -> Array:
    """The kernel's sums as y: outputs in order, padding away, the scales of whole rows and the factor of x applied."""
    y = outputs_in_order(sums.reshape(weight.padded[0], -1).T[: x.shape[0]], weight)
    if weight.group is None:
        scale = weight.scale[0].astype(jnp.float32) * np.float32(unit(weight.code) if weight.code else 1.0)
        y = y * factor * scale
        if weight.code is None:
            whole = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
            y = y + whole * weight.offset[0].astype(jnp.float32)
    return y[:, : weight.shape[0]].astype(x.dtype)

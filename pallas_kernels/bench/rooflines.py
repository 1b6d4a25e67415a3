"""Upper limits of the device, measured in the same run: bytes per second, integer operations per second."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.timing import chained
from pallas_kernels.dequant_matmul import pallas_gpu
from pallas_kernels.dequant_matmul.decode import block_weights
from pallas_kernels.dequant_matmul.layout import BLOCK, LANES, ROWS, PackedMatrix
from pallas_kernels.dequant_matmul.pallas_mosaic_gpu import decoder
from pallas_kernels.dequant_matmul.rows import to_rows

__all__ = ["ROUND_OPS", "Rooflines", "decode_ops", "integer_rounds", "kernel_ops", "measure", "row_ops"]

_ROUNDS = 64
ROUND_OPS = 3
"""Integer operations of a round: a shift, an exclusive or, a multiplication."""
_INTEGER = {
    "shift_right_logical",
    "shift_left",
    "and",
    "or",
    "xor",
    "add",
    "sub",
    "mul",
    "select_n",
    "population_count",
}
_COUNTED = {*_INTEGER, "convert_element_type", "mul", "max", "min", "lt", "gt", "eq", "ge", "le", "ne", "gather"}
_INNER = ("jaxpr", "call_jaxpr")


@dataclasses.dataclass(frozen=True)
class Rooflines:
    """Rates of this device and run.

    Attributes:
      bytes_per_second: read and written by `y = x + 1` over an array beyond the caches.
      integer_ops_per_second: shifts, exclusive ors and 32-bit multiplications of a long dependent string of each.
      chain_seconds: the cost, per call, of making calls dependent on each other.
    """

    bytes_per_second: float
    integer_ops_per_second: float
    chain_seconds: float

    def seconds(self, nbytes: float, ops: float) -> float:
        """The least seconds for so many bytes and integer operations, whichever takes longer."""
        return max(nbytes / self.bytes_per_second, ops / self.integer_ops_per_second)


def integer_rounds(x: jax.Array) -> jax.Array:
    """`_ROUNDS` rounds `x ← (x XOR x >> 15) · c mod 2³²`: no two of them fold into one."""
    for _ in range(_ROUNDS):
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    return x


def measure(copy_bytes: int, integers: int) -> Rooflines:
    """Measure with an array of `copy_bytes` and one of `integers` values."""
    x = jnp.zeros((1, 1), jnp.float32)

    def copied(x: Any, w: Any) -> Any:
        return w + x[0, 0]

    big = [jnp.zeros((copy_bytes // 8,), jnp.float32), jnp.ones((copy_bytes // 8,), jnp.float32)]
    copy = chained(copied, x, big, expected=copy_bytes / 2e12)
    words = [jnp.arange(integers, dtype=jnp.uint32), jnp.arange(1, integers + 1, dtype=jnp.uint32)]

    def rounds(x: Any, w: Any) -> Any:
        return integer_rounds(w + x[0, 0].astype(jnp.uint32)).astype(jnp.float32)

    ops = ROUND_OPS * _ROUNDS * integers
    integer = chained(rounds, x, words, expected=ops / 1e13)
    chain = chained(lambda x, w: x, jnp.zeros((1, 8192), jnp.bfloat16), [x, x + 1], expected=2e-6)
    return Rooflines(copy_bytes / copy.median, ops / integer.median, chain.median)


def decode_ops(weight: PackedMatrix) -> dict[str, float]:
    """Operations per weight that decoding and scaling take, counted in the traced program: of integers, and all others.

    Counted before any compiler: a pair such as shift-and-mask may become one instruction. Look-ups are `gather`.
    """
    lanes = 128
    shapes = dataclasses.replace(weight)
    tree = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes)
    parts = [jax.ShapeDtypeStruct((ROWS, lanes), jnp.uint32)] * weight.bits
    line = jax.ShapeDtypeStruct((1, lanes), jnp.float32)

    def block(parts: Any, following: Any, scale: Any, offset: Any, table: Any) -> Any:
        lookup = None if table is None else lambda first, _, index: table.reshape(-1)[index.astype(jnp.int32) + first]
        return list(block_weights(parts, following, tree, lambda _: (scale, offset), lookup))

    return _counted(jax.make_jaxpr(block)(parts, parts[0], line, line, tree.table), ROWS * lanes, BLOCK * lanes)


def kernel_ops(x: Any, weight: PackedMatrix) -> dict[str, float]:
    """Operations per weight of the Triton kernel's loop over blocks: decoding, scaling and multiplying.

    Each row of an instruction named in PTX counts as one, but moves; `pallas_gpu` must be the kernel that runs.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, weight))
    closed = jax.make_jaxpr(pallas_gpu.matmul)(*shapes)
    kernel = next(e for e in closed.eqns if e.primitive.name == "pallas_call")
    tile = kernel.params["grid_mapping"].block_mappings[1].block_shape[2]
    lanes = int(getattr(tile, "block_size", tile))
    loops = [e for e in kernel.params["jaxpr"].eqns if e.primitive.name in ("while", "scan")]
    body = loops[0].params["body_jaxpr" if loops[0].primitive.name == "while" else "jaxpr"]
    return _counted(body, ROWS * 16, BLOCK * lanes)


def row_ops(weight: PackedMatrix) -> dict[str, float]:
    """Operations per weight of the Mosaic GPU kernel's own decoder, which scales sums unless there are groups."""
    rows = jax.eval_shape(to_rows, weight)
    first = jax.ShapeDtypeStruct((rows.first.shape[2], ROWS), jnp.uint32)
    rest = jax.ShapeDtypeStruct((weight.bits - 1, LANES, ROWS), jnp.uint32)

    def half(first: Any, rest: Any, half: Any) -> Any:
        value = decoder(first, rest, rows, half)
        return [value(t).astype(jnp.float16) for t in range(ROWS)]

    closed = jax.make_jaxpr(half)(first, rest, jax.ShapeDtypeStruct((), jnp.int32))
    return _counted(closed, LANES * ROWS, LANES * ROWS * ROWS)


def _counted(closed: Any, least: int, weights: int) -> dict[str, float]:
    """Operations by kind, of arrays of at least `least` values, over the number of weights."""
    found: collections.Counter[str] = collections.Counter()

    def count(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            inner = [equation.params[name] for name in _INNER if name in equation.params]
            for one in inner:
                count(getattr(one, "jaxpr", one))
            name = equation.primitive.name
            if not equation.outvars:
                continue
            out = equation.outvars[0].aval
            if name.startswith("elementwise_inline_asm") and out.size >= least:
                for line in equation.params["asm"].split(";"):
                    words = line.strip(" {}").split()
                    if words and not words[0].startswith((".reg", "mov")):
                        found["integer" if words[0].startswith(("lop3", "dp4a")) else "other"] += out.size
                continue
            if inner or name not in _COUNTED or out.size < least:
                continue
            integer = jnp.issubdtype(equation.invars[-1].aval.dtype, jnp.integer) and name in _INTEGER
            found["gather" if name == "gather" else "integer" if integer else "other"] += out.size

    count(closed.jaxpr)
    return {f"{name}_ops_per_weight": found[name] / weights for name in ("integer", "gather", "other")}

"""The Pallas Triton backend in one place: whether this jax has it, its parameters, and some instructions by name.

Every operation has a kernel for it: Triton finds the layouts of arrays itself, runs on GPUs before Hopper too, and can
look values up in a table, which Pallas' other GPU backend, Mosaic (`mosaic_gpu.py`), cannot. The trellis search changes
axes between two steps, for which Mosaic has no layout. Triton is deprecated from jax 0.11 on; where it is gone,
operations fall back to Mosaic, then to XLA.

XLA compiles Triton's programs without contracting `a · b + c`, its compiler does not know sums of bytes, writes a
constant out again wherever an instruction takes two, and changes no layout across a cast of bits, which operands of a
product need. What is most frequent in a kernel that decodes weights is therefore named in PTX. The interpreter has no
PTX; there, and only there, the same values are computed by operations.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas import triton
except ImportError:  # a jax without it
    triton = None

__all__ = ["Instructions", "parameters", "unavailable"]


def unavailable() -> str | None:
    """The reason why no Triton kernel can run with this jax, None when one can."""
    return "this jax has no Pallas Triton backend" if triton is None else None


def parameters(warps: int, stages: int = 1) -> Any:
    """Compiler parameters of a kernel of `32 warps` threads."""
    assert triton is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return triton.CompilerParams(num_warps=warps, num_stages=stages)


class Instructions:
    """Elementwise operations of one instruction each. Arrays are broadcast to one shape; constants are in the text."""

    def __init__(self, interpret: Any) -> None:
        self._interpret = bool(interpret)

    def _asm(self, text: str, constraints: str, dtype: Any, *args: Array) -> Array:
        assert triton is not None
        shape = jnp.broadcast_shapes(*(a.shape for a in args))
        args = tuple(jnp.broadcast_to(a, shape) for a in args)
        result = jax.ShapeDtypeStruct(shape, dtype)
        return triton.elementwise_inline_asm(
            text, args=args, constraints=constraints, pack=1, result_shape_dtypes=[result]
        )[0]

    def multiply_add(self, a: Array, b: Array, c: Array) -> Array:
        """`a · b + c` in float32, rounded once (the interpreter: twice)."""
        if self._interpret:
            return a * b + c
        return self._asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", jnp.float32, a, b, c)

    def code(self, words: Array, mask: int, exponent: int) -> Array:
        """The number with bits `(words AND mask) OR exponent` less the one with the bits `exponent`, float32."""
        less = np.uint32(exponent).view(np.float32)
        if self._interpret:
            return jax.lax.bitcast_convert_type((words & np.uint32(mask)) | np.uint32(exponent), jnp.float32) - less
        negative = (-less).view(np.uint32)
        text = (
            f"{{ .reg .b32 t; .reg .f32 f; lop3.b32 t, $1, {mask:#x}, {exponent:#x}, 0xEA;"
            f" mov.b32 f, t; add.rn.f32 $0, f, 0f{negative:08X}; }}"
        )
        return self._asm(text, "=f,r", jnp.float32, words)

    def byte_sum(self, x: Array, start: int) -> Array:
        """`start +` the sum of the four bytes of every word, uint32."""
        if self._interpret:
            pairs = (x & np.uint32(0x00FF00FF)) + ((x >> np.uint32(8)) & np.uint32(0x00FF00FF))
            return (pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16)) + np.uint32(start)
        # Triton has no unsigned types: results of instructions are declared signed
        total = self._asm(f"dp4a.u32.u32 $0, $1, 0x01010101, {start:#x};", "=r,r", jnp.int32, x)
        return jax.lax.bitcast_convert_type(total, jnp.uint32)

    def half_multiply_add(self, bits: Array, factor: int, addend: int) -> Array:
        """`float32(h · factor + addend)`, rounded once to float16; `h` in the low bits of a word, constants as bits."""
        if self._interpret:
            h, f, a = (jax.lax.bitcast_convert_type(jnp.asarray(v).astype(jnp.uint16), jnp.float16) for v in (
                bits, np.uint32(factor), np.uint32(addend)))  # fmt: skip
            wide = h.astype(jnp.float32) * f.astype(jnp.float32) + a.astype(jnp.float32)  # the product is exact
            return wide.astype(jnp.float16).astype(jnp.float32)
        text = (
            "{ .reg .b16 h, f, a, n; .reg .b32 c;"
            f" mov.b32 {{h, n}}, $1; mov.b32 c, {factor | addend << 16:#x}; mov.b32 {{f, a}}, c;"
            " fma.rn.f16 h, h, f, a; cvt.f32.f16 $0, h; }"
        )
        return self._asm(text, "=f,r", jnp.float32, bits)

    def half_sum(self, words: Array, mask: int, flip: int) -> Array:
        """`float32(low + high)` of the two float16 in `(words AND mask) XOR flip`, rounded once to float16."""
        if self._interpret:
            pair = (words & np.uint32(mask)) ^ np.uint32(flip)
            low, high = (
                jax.lax.bitcast_convert_type(h.astype(jnp.uint16), jnp.float16) for h in (pair, pair >> np.uint32(16))
            )
            return (low.astype(jnp.float32) + high.astype(jnp.float32)).astype(jnp.float16).astype(jnp.float32)
        text = (
            f"{{ .reg .b16 l, h; .reg .b32 t; lop3.b32 t, $1, {mask:#x}, {flip:#x}, 0x6A;"
            " mov.b32 {l, h}, t; add.rn.f16 l, l, h; cvt.f32.f16 $0, l; }"
        )
        return self._asm(text, "=f,r", jnp.float32, words)

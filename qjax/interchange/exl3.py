"""Import of a linear layer of a published EXL3 checkpoint (1 to 8 bits), on the host, and the inverse packing.

A tile of 16 inputs × 16 outputs is a circular string of `256 K` bits, most significant bit first in 32-bit words that
are stored as two 16-bit numbers, the low half first. State t is the 16-bit window that *ends* at bit `(t + 1) K`.

Value t of a tile lies where the tensor-core instruction mma.m16n8k16 wants it in the register file: thread `t // 8` of
the warp holds eight values, four of each of two 16×8 operands B; value i of thread l is at row
`2 (l mod 4) + i mod 2 + 8 [i ≥ 2]` and column `l // 4` of its operand.

The weight is `W[in, out] = diag(suh) · H · Q · H · diag(svh)`, H the block-diagonal orthonormal Sylvester-Hadamard
matrix of 128 points. A scalar beside the trellis tells the code of the states: `mcg` or `mul1`, int32, the multiplier
of that code; without either it is QTIP's 3INST.

Sources: the PTX manual, "Matrix Fragments for mma.m16n8k16" (element order); the documentation and tensor inventory of
the exllamav3 project (names, types and markers of the tensors, order of the two diagonals and transforms).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float16, Int16, Shaped, UInt8, UInt16

from qjax.codebooks.trellis_codes import state_values
from qjax.errors import InputError, ModelFileError
from qjax.linalg.hadamard import block_hadamard_transform

__all__ = ["MARKERS", "Exl3Layer", "pack_states", "read_layer", "unpack_states"]

_SIDE, _WEIGHTS, _STATE, _BLOCK = 16, 256, 16, 128
MARKERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
"""The multipliers that the marker tensors of the two codes hold."""


@dataclasses.dataclass(frozen=True)
class Exl3Layer:
    """One imported layer with weight `[out, in]`.

    Attributes:
      states: the 16-bit states of every tile, in stored order.
      bits: K.
      code: "3inst", "mcg" or "mul1" (see `trellis_codes`).
      input_scale: suh, signs times scales of the inputs.
      output_scale: svh, of the outputs.
      bias: of the layer, or None.
    """

    states: UInt16[np.ndarray, "input_tiles output_tiles 256"]
    bits: int
    code: str
    input_scale: Float16[np.ndarray, " inputs"]
    output_scale: Float16[np.ndarray, " outputs"]
    bias: Float[np.ndarray, " outputs"] | None = None

    def symbols(self) -> UInt8[np.ndarray, "input_tiles output_tiles 256"]:
        """The top K bits of every state: what `Trellis(bits=K, L=16, V=1).states` makes the same states of."""
        return (self.states >> np.uint16(_STATE - self.bits)).astype(np.uint8)

    def rotated(self) -> Float[np.ndarray, "outputs inputs"]:
        """Qᵀ: the decoded weight in the rotated basis, float32."""
        rows, columns = self.states.shape[:2]
        tiles = np.empty((rows, columns, _WEIGHTS), np.float32)
        tiles[..., _positions()] = _values(self.code)[self.states]
        tiles = tiles.reshape(rows, columns, _SIDE, _SIDE)
        return np.ascontiguousarray(tiles.transpose(1, 3, 0, 2).reshape(columns * _SIDE, rows * _SIDE))

    def dequantize(self) -> Float[np.ndarray, "outputs inputs"]:
        """The dense weight `Wᵀ = diag(svh) · H · Qᵀ · H · diag(suh)`, float32."""
        half = np.asarray(block_hadamard_transform(jnp.asarray(self.rotated()), _BLOCK))
        whole = np.asarray(block_hadamard_transform(jnp.asarray(half.T), _BLOCK)).T
        return self.output_scale.astype(np.float32)[:, None] * whole * self.input_scale.astype(np.float32)


@functools.cache
def _positions() -> np.ndarray:
    """Row-major position in the 16×16 tile (inputs × outputs) of every value."""
    thread, value = np.divmod(np.arange(_WEIGHTS), 8)
    operand, i = np.divmod(value, 4)
    row = 2 * (thread % 4) + i % 2 + 8 * (i // 2)
    return row * _SIDE + thread // 4 + 8 * operand


@functools.cache
def _values(code: str) -> np.ndarray:
    return np.asarray(state_values(code, jnp.arange(2**_STATE, dtype=jnp.uint32)))[:, 0]


def unpack_states(
    trellis: Shaped[np.ndarray, "..."], name: str = "layer"
) -> UInt16[np.ndarray, "input_tiles output_tiles 256"]:
    """The states of all tiles of a stored trellis `[in/16, out/16, 16 K]`, int16.

    Raises ModelFileError for another type, rank or width.
    """
    if trellis.dtype != np.int16 or trellis.ndim != 3:
        raise ModelFileError(
            f"{name}: the trellis is {trellis.dtype} with {trellis.ndim} dimensions; EXL3 stores int16 "
            "[in/16, out/16, 16 K]: the tensor is of another format"
        )
    bits, rest = divmod(trellis.shape[2], 16)
    if rest or not 1 <= bits <= 8:
        half = "; half-integer widths (16 K + 8) cannot be imported" if rest == 8 else ""
        raise ModelFileError(
            f"{name}: the trellis has {trellis.shape[2]} numbers per tile; allowed are 16 K for K = 1 to 8 bits{half}"
        )
    pairs = np.ascontiguousarray(trellis).view(np.uint16).reshape(*trellis.shape[:2], 8 * bits, 2)
    words = pairs[..., ::-1].reshape(trellis.shape).astype(np.uint32)
    start = ((np.arange(_WEIGHTS) + 1) * bits - _STATE) % (_WEIGHTS * bits)
    word, offset = np.divmod(start, 16)
    window = words[..., word] << np.uint32(16) | words[..., (word + 1) % (16 * bits)]
    return (window >> (16 - offset).astype(np.uint32)).astype(np.uint16)


def pack_states(
    states: UInt16[np.ndarray, "input_tiles output_tiles 256"], bits: int
) -> Int16[np.ndarray, "input_tiles output_tiles words"]:
    """The inverse of `unpack_states`: tiles of `16 K` int16.

    Raises InputError unless bits is 1 to 8 and the states of every tile are a closed walk through the trellis.
    """
    if not 1 <= bits <= 8:
        raise InputError(f"EXL3 stores 1 to 8 bits per weight, found {bits}")
    string = np.unpackbits(states.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
    words = np.packbits(string.reshape(*states.shape[:2], -1), axis=-1).view(">u2").astype(np.uint16)
    pairs = words.reshape(*states.shape[:2], 8 * bits, 2)[..., ::-1]
    packed = np.ascontiguousarray(pairs.reshape(words.shape)).view(np.int16)
    if not np.array_equal(unpack_states(packed), states):
        raise InputError(
            f"the states are not closed walks of {bits} bits per step, in which every state is the "
            "16-bit window that ends with its own symbol; take states of a trellis with L=16 and V=1, in EXL3's order"
        )
    return packed


def read_layer(tensors: Mapping[str, np.ndarray], name: str = "layer") -> Exl3Layer:
    """A layer from its tensors `trellis`, `suh`, `svh`, and where they exist `mcg` or `mul1`, and `bias`.

    Signs that are packed 16 to an int16 (`su`, `sv`, first files of the format; a set bit is −1) stand for suh, svh.

    Raises ModelFileError for tensors that are missing, of another type, of sizes that do not agree, or not finite.
    """
    if "trellis" not in tensors:
        raise ModelFileError(f"{name}: there is no tensor 'trellis'; an EXL3 layer has trellis, suh and svh")
    states = unpack_states(np.asarray(tensors["trellis"]), name)
    inputs, outputs = (_SIDE * count for count in states.shape[:2])
    if not inputs or not outputs or inputs % _BLOCK or outputs % _BLOCK:
        raise ModelFileError(
            f"{name}: the trellis stands for {inputs} inputs and {outputs} outputs; both are multiples of {_BLOCK}"
        )
    bias = None
    if "bias" in tensors:
        bias = np.asarray(tensors["bias"])
        if bias.shape != (outputs,) or not np.issubdtype(bias.dtype, np.floating) or not np.isfinite(bias).all():
            raise ModelFileError(
                f"{name}: bias is {bias.dtype}{list(bias.shape)}; it holds {outputs} finite floats, one per output"
            )
    return Exl3Layer(
        states,
        tensors["trellis"].shape[2] // 16,
        _code(tensors, name),
        _diagonal(tensors, "suh", inputs, name),
        _diagonal(tensors, "svh", outputs, name),
        bias,
    )


def _code(tensors: Mapping[str, np.ndarray], name: str) -> str:
    found = [code for code in MARKERS if code in tensors]
    if len(found) > 1:
        raise ModelFileError(f"{name}: has the markers of two codes, mcg and mul1; a layer has at most one")
    if not found:
        return "3inst"
    marker = np.asarray(tensors[found[0]])
    value = int(marker.reshape(-1)[0]) % 2**32 if marker.size == 1 and marker.dtype.kind in "iu" else None
    if value != MARKERS[found[0]]:
        shown = f"{marker.dtype}{list(marker.shape)}" if value is None else hex(value)
        raise ModelFileError(
            f"{name}: the marker {found[0]} is {shown}; only the multiplier {hex(MARKERS[found[0]])} (a 32-bit "
            "integer) can be imported, another one makes other values of the same states"
        )
    return found[0]


def _diagonal(tensors: Mapping[str, np.ndarray], tensor: str, size: int, name: str) -> np.ndarray:
    packed = tensor[:2]  # su for suh, sv for svh
    if tensor in tensors:
        values = np.asarray(tensors[tensor])
        if values.dtype != np.float16 or values.shape != (size,):
            raise ModelFileError(
                f"{name}: {tensor} is {values.dtype}{list(values.shape)}; by the trellis it is float16[{size}]"
            )
        if not np.isfinite(values).all():
            raise ModelFileError(f"{name}: {tensor} has a value that is not finite; the file is damaged")
        return values
    if packed not in tensors:
        raise ModelFileError(f"{name}: there is no tensor {tensor!r}; an EXL3 layer has trellis, suh and svh")
    words = np.asarray(tensors[packed])
    if words.dtype != np.int16 or words.shape != (size // 16,):
        raise ModelFileError(
            f"{name}: {packed} is {words.dtype}{list(words.shape)}; by the trellis it is int16[{size // 16}]"
        )
    bits = np.unpackbits(words.astype("<i2").view(np.uint8), bitorder="little")
    return (1 - 2 * bits.astype(np.int8)).astype(np.float16)

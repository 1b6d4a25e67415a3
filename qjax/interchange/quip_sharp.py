"""Import of a linear layer of a published QuIP# checkpoint (2 bits, codebook "E8P12", format version 1), on the host.

A 64-bit word holds the four codes of two rows and two groups of eight columns, in the order (row 0, group 0),
(row 1, group 0), (row 0, group 1), (row 1, group 1): their table indices are the four low bytes, and bit j of the sign
byte of code i is bit `32 + 4j + i`. The words of 16 rows × 64 columns, 8 × 4 in row-major order, lie together; these
blocks are in row-major order.

The weight is `W = diag(SV) · Had_m · (Wscale · q) · Had_nᵀ · diag(SU)` with `Had = (M_K ⊗ H_{2^p}) / √(K·2^p)`, H of
Sylvester's kind and M_K from a table of the authors (K = 1 for a power of two).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped, UInt16

from qjax.codebooks.e8p import TABLE_VERSION, e8p
from qjax.errors import InputError, ModelFileError
from qjax.linalg.hadamard import hadamard_transform

__all__ = ["QuipSharpLayer", "check_parameters", "decode_words", "read_layer"]

_TILE_ROWS, _TILE_COLUMNS = 16, 64
_TENSORS = ("Qidxs", "SU", "SV", "Wscale")
_REFUSED = {"rescale_WH": False, "outlier_channel_split": False, "lora_rank": 0}


@dataclasses.dataclass(frozen=True)
class QuipSharpLayer:
    """One imported layer `[m, n]`.

    Attributes:
      codes: E8P codes `[m, n/8]`, as `E8P.dequantize` takes them.
      scale: what a codeword is multiplied by.
      input_signs: `[n]`, ±1 or trained real values (SU).
      output_signs: `[m]`, likewise (SV).
    """

    codes: UInt16[np.ndarray, "m groups"]
    scale: float
    input_signs: Float[np.ndarray, " n"]
    output_signs: Float[np.ndarray, " m"]

    def rotated(self) -> Float[np.ndarray, "m n"]:
        """`Wscale · q`: the weight in the rotated basis, float32."""
        return np.asarray(_decode(self.codes)) * np.float32(self.scale)

    def dequantize(self, bases: Mapping[int, np.ndarray] | None = None) -> Float[np.ndarray, "m n"]:
        """The dense weight in the original basis, float32.

        Args:
          bases: the ±1 matrix M_K `[K, K]` of every dimension of the layer that is not a power of two; the authors'
            tables are not part of qjax and differ from its own Hadamard matrices.

        Raises InputError when a base is missing or does not fit.
        """
        rotated = _apply_hadamard(self.rotated(), bases or {})
        return self.output_signs[:, None] * _apply_hadamard(rotated.T, bases or {}).T * self.input_signs


def check_parameters(parameters: Mapping[str, Any], name: str) -> None:
    """Check the `quip_params` of a checkpoint's `config.json`.

    Raises ModelFileError for another codebook, another version of its table, or an option that changes the weights.
    """
    codebook = parameters.get("codebook")
    if codebook != "E8P12":
        raise ModelFileError(
            f"{name}: quip_params.codebook is {codebook!r}; only the 2-bit codebook 'E8P12' can be imported"
        )
    version = parameters.get("codebook_version", 0)
    if version != TABLE_VERSION:
        raise ModelFileError(
            f"{name}: the codes were made for version {version} of the codebook table, and qjax has version "
            f"{TABLE_VERSION}; they would decode to wrong weights: take a newer revision of the checkpoint, or "
            "quantise the model again"
        )
    for option, allowed in _REFUSED.items():
        if parameters.get(option, allowed) != allowed:
            raise ModelFileError(
                f"{name}: quip_params.{option} is {parameters[option]!r}; only {allowed!r} can be imported"
            )


def decode_words(
    words: Shaped[np.ndarray, "..."], shape: tuple[int, int], name: str = "layer"
) -> UInt16[np.ndarray, "m groups"]:
    """The codes `[m, n/8]` of a layer of `shape` (m, n) from its `m·n/32` words in the stored order.

    Raises ModelFileError when m is not a multiple of 16, n not one of 64, or the number or type of the words is wrong.
    """
    m, n = shape
    if m % _TILE_ROWS or n % _TILE_COLUMNS or not m or not n:
        raise ModelFileError(f"{name}: a packed layer has a multiple of 16 rows and of 64 columns, found {m}×{n}")
    if words.dtype not in (np.dtype(np.int64), np.dtype(np.uint64)):
        raise ModelFileError(f"{name}: the packed codes are {words.dtype}; format version 1 has 64-bit integers")
    if words.size != m * n // 32:
        raise ModelFileError(f"{name}: {m}×{n} weights have {m * n // 32} packed words, found {words.size}")
    tiles = words.view(np.uint64).reshape(m // _TILE_ROWS, n // _TILE_COLUMNS, 8, 4)
    grid = tiles.transpose(0, 2, 1, 3).reshape(m // 2, n // 16)
    codes = np.zeros((m // 2, 2, n // 16, 2), np.uint64)
    for i in range(4):
        code = (grid >> np.uint64(8 * i) & np.uint64(255)) << np.uint64(8)
        for j in range(8):
            code |= (grid >> np.uint64(32 + 4 * j + i) & np.uint64(1)) << np.uint64(j)
        codes[:, i % 2, :, i // 2] = code
    return codes.reshape(m, n // 8).astype(np.uint16)


def read_layer(tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any], name: str = "layer") -> QuipSharpLayer:
    """A layer from its tensors `Qidxs`, `SU`, `SV`, `Wscale` and the checkpoint's `quip_params`.

    Raises ModelFileError for a missing tensor, parameters that cannot be imported, or sizes that do not agree.
    """
    check_parameters(parameters, name)
    missing = [tensor for tensor in _TENSORS if tensor not in tensors]
    if missing:
        raise ModelFileError(f"{name}: tensors {', '.join(missing)} are missing; a layer has {', '.join(_TENSORS)}")
    scale, input_signs, output_signs = (
        np.asarray(tensors[tensor], np.float32).reshape(-1) for tensor in ("Wscale", "SU", "SV")
    )
    if scale.size != 1:
        raise ModelFileError(f"{name}: Wscale has {scale.size} values; a layer has one")
    for tensor, values in (("Wscale", scale), ("SU", input_signs), ("SV", output_signs)):
        if not np.isfinite(values).all():
            raise ModelFileError(f"{name}: {tensor} has a value that is not finite; the file is damaged")
    codes = decode_words(np.asarray(tensors["Qidxs"]), (output_signs.size, input_signs.size), name)
    return QuipSharpLayer(codes, float(scale[0]), input_signs, output_signs)


@jax.jit
def _decode(codes: jax.Array) -> jax.Array:
    return e8p().dequantize(codes)


def _apply_hadamard(x: np.ndarray, bases: Mapping[int, np.ndarray]) -> np.ndarray:
    """`Had_n v` for every row v of x."""
    n = x.shape[-1]
    base = np.asarray(bases.get(n, np.ones((1, 1))), np.float32)
    k = base.shape[0]
    if base.shape != (k, k) or n % k or (n // k) & (n // k - 1):
        raise InputError(
            f"a dimension of {n} needs a K×K Hadamard matrix with {n} / K a power of two, found {base.shape}; "
            f"pass the checkpoint's own as bases={{{n}: matrix}}"
        )
    if not np.array_equal(base @ base.T, k * np.eye(k, dtype=np.float32)):
        raise InputError(f"the base for a dimension of {n} is not a Hadamard matrix of ±1 with orthogonal rows")
    blocks = np.asarray(hadamard_transform(x.reshape(-1, k, n // k)))
    return (np.einsum("ij,bjc->bic", base, blocks) / math.sqrt(k)).reshape(x.shape)

"""Trellis-coded quantisation: 16×16 tiles, each one closed walk through a bitshift trellis (QTIP, 2406.11235)."""

from __future__ import annotations

import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt32

from pallas_kernels.viterbi import chosen
from qjax.codebooks.base import CODEBOOKS
from qjax.codebooks.tail_biting import one_pass_tail_biting, tail_biting
from qjax.codebooks.trellis_codes import COMPUTED, RMS, TABLES, gaussian_table, hybrid_table, state_values
from qjax.codebooks.vector import check_bits, check_rms
from qjax.errors import InputError, listed
from qjax.registry import Count, Natural, OneOf, Positive
from qjax.typing import Leaf, pytree, static

__all__ = ["Trellis", "trellis"]

SIDE = 16
WEIGHTS = SIDE * SIDE
_SEARCHES = {"two_pass": tail_biting, "one_pass": one_pass_tail_biting}
_GAIN = {1: 1.05, 2: 1.0, 3: 0.95, 4: 0.9}
"""Input RMS over RMS of the code that gives a Gaussian the least error, by bits; 0.9 from 4 bits on."""


@pytree
class Trellis:
    """A bitshift trellis (L, K, V) over tiles of 16×16 weights, row-major; K bits per weight, V weights per step.

    A code holds the `T/V` symbols of a tile, K·V bits each: symbol t is the top K·V bits of state t, and state t is the
    L-bit window that begins at bit t·K·V of the tile's circular string of `256 K` bits, most significant bit first.

    Attributes:
      name: the registered name.
      bits: K.
      rms: the input RMS.
      L: bits of a state.
      V: weights per step.
      code: the name of the map from states to values (see `trellis_codes`).
      Q: log₂ of the entries of HYB's table.
      seed: of a table.
      overlap: steps on either side of the seam that the first pass of tail-biting reads; None is all of them.
      budget_mib: memory for the back-pointers of a batch of tiles; a GPU kernel uses 32 times as much.
      search: "two_pass" (QTIP's algorithm 4) or "one_pass" (see `viterbi`).
      table: HYB's or the random code's values, None for a computed code.
    """

    name: str = static()
    bits: int = static()
    rms: float = static()
    L: int = static()
    V: int = static()
    code: str = static()
    Q: int = static()
    seed: int = static()
    overlap: int | None = static()
    budget_mib: int = static()
    search: str = static()
    table: Leaf = None

    @property
    def tile(self) -> tuple[int, int]:
        """16 rows, 16 columns."""
        return (SIDE, SIDE)

    @property
    def step_bits(self) -> int:
        """K·V: new bits per step."""
        return self.bits * self.V

    @property
    def steps(self) -> int:
        """Steps per tile."""
        return WEIGHTS // self.V

    @property
    def code_dtype(self) -> np.dtype:
        """The smallest unsigned integer that holds a symbol."""
        return np.dtype(np.min_scalar_type(2**self.step_bits - 1))

    @property
    def batch(self) -> int:
        """The most tiles that are searched at once: what the back-pointers' memory allows, 8 to 64 of them.

        A GPU kernel searches one tile per multiprocessor, and takes 32 times the memory and up to 1024 tiles.
        """
        pointers = self.steps * 2 ** (self.L - self.step_bits) * self.code_dtype.itemsize
        more = 1 if chosen(2**self.L, self.step_bits) == "xla" else 32
        return int(np.clip(more * (self.budget_mib << 20) // pointers // 8 * 8, 8, 64 if more == 1 else 1024))

    def values(self) -> Float[Array, "states V"]:
        """The values of all `2^L` states."""
        return state_values(self.code, jnp.arange(2**self.L, dtype=jnp.uint32), self.table)

    def quantize(self, x: Float[Array, "m n"]) -> Integer[Array, "rows columns steps"]:
        """Symbols `[m/16, n/16, 256/V]` of the path that `search` finds. Raises InputError for broken tiles."""
        if x.ndim != 2 or x.shape[0] % SIDE or x.shape[1] % SIDE:
            shape = "×".join(map(str, x.shape)) or "a scalar"
            raise InputError(
                f"codebook {self.name!r} codes tiles of {SIDE}×{SIDE}, found a matrix of {shape}; "
                f"pad both dimensions to multiples of {SIDE} (qjax.quantize_matrix does)"
            )
        rows, columns = x.shape[0] // SIDE, x.shape[1] // SIDE
        tiles = x.reshape(rows, SIDE, columns, SIDE).transpose(0, 2, 1, 3).reshape(rows * columns, WEIGHTS)
        count = rows * columns
        parts = -(-count // self.batch)
        batch = -(-count // parts // 8) * 8  # equal parts, in whole vectors
        tiles = jnp.pad(tiles, ((0, -count % batch), (0, 0))).reshape(-1, batch, self.steps, self.V)
        lut = self.values().astype(x.dtype)
        closed = _SEARCHES[self.search]

        def search(part: Array) -> Array:
            states = closed(part.transpose(1, 2, 0), lut, self.step_bits, self.overlap)
            return (states >> (self.L - self.step_bits)).astype(self.code_dtype).T

        symbols = search(tiles[0])[None] if tiles.shape[0] == 1 else jax.lax.map(search, tiles)
        return symbols.reshape(-1, self.steps)[:count].reshape(rows, columns, self.steps)

    def states(self, codes: Integer[Array, "rows columns steps"]) -> Integer[Array, "rows columns steps"]:
        """State t: the L-bit circular window that begins with symbol t."""
        word = codes.astype(jnp.uint32)
        window = jnp.zeros_like(word)
        for i in range(-(-self.L // self.step_bits)):
            shift = self.L - (i + 1) * self.step_bits
            later = jnp.roll(word, -i, axis=-1)
            window = window | (later << shift if shift >= 0 else later >> -shift)
        return window

    def dequantize(self, codes: Integer[Array, "rows columns steps"]) -> Float[Array, "m n"]:
        """The values of every tile's states."""
        rows, columns = codes.shape[:2]
        tiles = state_values(self.code, self.states(codes), self.table).reshape(rows, columns, SIDE, SIDE)
        return tiles.transpose(0, 2, 1, 3).reshape(rows * SIDE, columns * SIDE)

    def pack(self, codes: Integer[Array, "rows columns steps"]) -> UInt32[Array, " words"]:
        """QTIP's tiles of `16 K` 16-bit words, row-major: two to a 32-bit word, the first in its low half.

        Bit j of a tile's string is bit `15 − j mod 16` of its 16-bit word `j // 16`.
        """
        b = self.step_bits
        symbols = codes.reshape(-1, self.steps).astype(jnp.uint32)
        period, words = 16 * b // math.gcd(16, b) // b, b // math.gcd(16, b)  # symbols and words that end together
        groups = symbols.reshape(-1, period)
        out = [jnp.zeros(groups.shape[0], jnp.uint32) for _ in range(words)]
        for i in range(period):
            for w in range(i * b // 16, ((i + 1) * b - 1) // 16 + 1):
                shift = 16 * (w + 1) - (i + 1) * b
                part = groups[:, i] << shift if shift >= 0 else groups[:, i] >> -shift
                out[w] = out[w] | (part & np.uint32(0xFFFF))
        halves = jnp.stack(out, axis=1).reshape(-1, 2)
        return halves[:, 0] | (halves[:, 1] << 16)

    def unpack(self, packed: UInt32[Array, " words"], shape: tuple[int, int]) -> Integer[Array, "rows columns steps"]:
        """The inverse of `pack`. Raises InputError when the number of words is not that of `shape`."""
        b = self.step_bits
        rows, columns = shape[0] // SIDE, shape[1] // SIDE
        needed = rows * columns * WEIGHTS * self.bits // 32
        if packed.shape[0] != needed or shape[0] % SIDE or shape[1] % SIDE:
            raise InputError(
                f"a trellis stream of a {shape[0]}×{shape[1]} matrix at {self.bits} bits has {needed} words of 32 "
                f"bits, found {packed.shape[0]}; the codes belong to another shape (multiples of {SIDE}) or bit width"
            )
        halves = jnp.stack([packed & np.uint32(0xFFFF), packed >> 16], axis=1)
        period, words = 16 * b // math.gcd(16, b) // b, b // math.gcd(16, b)
        groups = halves.reshape(-1, words)
        symbols = []
        for i in range(period):
            symbol = jnp.zeros(groups.shape[0], jnp.uint32)
            for w in range(i * b // 16, ((i + 1) * b - 1) // 16 + 1):
                shift = 16 * (w + 1) - (i + 1) * b
                symbol = symbol | (groups[:, w] >> shift if shift >= 0 else groups[:, w] << -shift)
            symbols.append(symbol & np.uint32(2**b - 1))
        return jnp.stack(symbols, axis=1).astype(self.code_dtype).reshape(rows, columns, self.steps)

    def spec(self) -> dict[str, Any]:
        """Arguments of `make` that build this codebook again."""
        fields = ("name", "bits", "rms", "L", "V", "code", "Q", "seed", "overlap", "budget_mib", "search")
        return {name: getattr(self, name) for name in fields}


@CODEBOOKS.register("trellis")
def trellis(
    bits: int | float,
    L: int = 12,
    V: Count | None = None,
    code: Annotated[str, OneOf("1mad", "2mad", "3inst", "mul1", "mcg", "hyb", "lut")] = "1mad",
    rms: Positive | None = None,
    Q: Count = 9,
    seed: Natural = 0,
    overlap: Natural | None = 64,
    budget_mib: Count = 64,
    search: Annotated[str, OneOf("two_pass", "one_pass")] = "two_pass",
) -> Trellis:
    """Trellis codes of 1 to 8 bits per weight.

    Args:
      bits: K.
      L: bits of a state, 6 to 16, more than K·V.
      V: weights per step, 1, 2 or 4; None is 2 for HYB and 1 for all others. Computed codes have one.
      code: "1mad", "2mad", "3inst", "mul1", "mcg" (computed), "hyb" (a table of 2^Q entries), "lut" (random).
      rms: the input RMS; None is what suits a Gaussian best.
      Q: log₂ of the entries of HYB's table, 6 to 9.
      seed: of HYB's k-means or of the random table.
      overlap: steps on either side of the seam that the first tail-biting pass reads; None reads all, as published, at
        4/3 of the time and the same error (64 steps are many times the memory of the trellis). Fewer is cheaper.
      budget_mib: memory for back-pointers; a GPU kernel uses 32 times as much.
      search: "two_pass", as published, or "one_pass", which costs
        256 + overlap steps instead of 256 + 2·overlap and needs half the overlap: at 2 bits, 1MAD, overlap 64 the time
        falls by a fifth at L=12 and 16 and the error not at all (benchmarks/results/trellis-cpu.json).

    Raises InputError for other values.
    """
    K = check_bits("trellis", bits)
    known = (*COMPUTED, *TABLES)
    if code not in known:
        raise InputError(f"codebook 'trellis': code is {code!r}; allowed are {listed(known)}")
    V = (2 if code == "hyb" else 1) if V is None else V
    if V not in (1, 2, 4) or (V > 1 and code in COMPUTED) or (V > 2 and code == "hyb"):
        allowed = {"hyb": "1 or 2", "lut": "1, 2 or 4"}.get(code, "1")
        raise InputError(f"codebook 'trellis': V is {V}; code {code!r} has {allowed} weights per step")
    if not 6 <= L <= 16 or int(L) != L:
        raise InputError(f"codebook 'trellis': L is {L}; a state has 6 to 16 bits")
    if K * V >= L:
        raise InputError(
            f"codebook 'trellis': {K} bits × {V} weights are {K * V} new bits per step; "
            f"allowed are fewer than L={L}; use fewer bits, a smaller V, or a larger L (at most 16)"
        )
    if not 6 <= Q <= 9 or int(Q) != Q:
        raise InputError(f"codebook 'trellis': Q is {Q}; HYB's table has 2^6 to 2^9 entries")
    if overlap is not None and (overlap < 1 or overlap != int(overlap)):
        raise InputError(
            f"codebook 'trellis': overlap is {overlap}; it is a whole number of steps, at least 1, or null"
        )
    if budget_mib < 1:
        raise InputError(f"codebook 'trellis': budget_mib is {budget_mib}; it is at least 1")
    if search not in _SEARCHES:
        raise InputError(f"codebook 'trellis': search is {search!r}; allowed are {listed(_SEARCHES)}")
    table = None
    if code == "hyb":
        table = hybrid_table(Q, V, seed)
    elif code == "lut":
        table = gaussian_table(2**L, V, seed)
    default = round(_GAIN.get(K, 0.9) * RMS[code], 5)
    rms = check_rms("trellis", rms, default)
    return Trellis("trellis", K, rms, L, V, code, Q, seed, overlap, budget_mib, search, table)

"""Shapes of the packed product for tests and benchmarks."""

from __future__ import annotations

import dataclasses

__all__ = [
    "BENCHES",
    "MOSAIC_BENCHES",
    "MOSAIC_TESTS",
    "TABLE_BENCHES",
    "TABLE_TESTS",
    "TESTS",
    "TRELLIS_BENCHES",
    "TRELLIS_TESTS",
    "Spec",
]


@dataclasses.dataclass(frozen=True)
class Spec:
    """`batch` rows of x, W[out, inner] of `bits` bits; inputs per scale (None: a row); a trellis' code and L."""

    bits: int
    batch: int
    out: int
    inner: int
    group: int | None = None
    code: str | None = None
    L: int = 16


TESTS = (
    Spec(2, 1, 128, 512),
    Spec(3, 5, 256, 1024, 64),
    Spec(4, 16, 200, 700, 128),
    Spec(8, 1, 128, 1536, 512),
    Spec(2, 3, 130, 1024, 1024),
    Spec(3, 1, 128, 600, 16),
)
"""Every width, one row and several, padding of both sides, groups within and beyond a block."""

BENCHES = tuple(
    Spec(bits, batch, out, inner, group)
    for bits, group in ((2, None), (3, None), (4, None), (4, 128), (8, None))
    for batch in (1, 8, 16)
    for out, inner in ((8192, 8192), (14336, 4096), (4096, 14336))
)
"""A square matrix, and Llama-3-8B's up and down projections."""

TRELLIS_TESTS = (
    Spec(1, 1, 128, 512, None, "mul1"),
    Spec(2, 5, 48, 592, None, "1mad"),
    Spec(3, 1, 144, 1024, None, "3inst"),
    Spec(4, 16, 128, 512, None, "1mad", 12),
)
"""Every K, every code, windows that span units and rows, padding."""

TRELLIS_BENCHES = tuple(
    Spec(bits, batch, 8192, 8192, None, code)
    for bits, code in ((2, "1mad"), (2, "3inst"), (2, "mul1"), (3, "mul1"), (4, "mul1"))
    for batch in (1, 16)
)

TABLE_TESTS = (
    Spec(2, 1, 128, 512, None, "e8p"),
    Spec(3, 5, 40, 600, None, "e8p_rvq"),
    Spec(4, 16, 200, 1024, None, "e8p_rvq"),
    Spec(2, 1, 144, 592, None, "hyb"),
    Spec(3, 3, 48, 512, None, "hyb", 12),
)
"""Every code with a table, all widths of the lattices, one row and several, padding."""

TABLE_BENCHES = tuple(
    Spec(bits, batch, 8192, 8192, None, code)
    for bits, code in ((2, "e8p"), (3, "e8p_rvq"), (4, "e8p_rvq"), (2, "hyb"))
    for batch in (1, 16)
)

MOSAIC_TESTS = (
    Spec(3, 5, 256, 1024),
    Spec(4, 16, 200, 700, 128),
    Spec(3, 1, 144, 1024, None, "3inst"),
    Spec(2, 5, 48, 592, None, "1mad"),
    Spec(1, 1, 128, 512, None, "mul1"),
    Spec(8, 1, 128, 512),
)
"""Of the codes that need no table: two planes, groups, every trellis code, one row and several, padding."""

MOSAIC_BENCHES = (
    Spec(2, 1, 8192, 8192),
    Spec(4, 16, 8192, 8192, 128),
    Spec(3, 8, 14336, 4096),
    Spec(2, 1, 8192, 8192, None, "mul1"),
    Spec(2, 16, 8192, 8192, None, "1mad"),
    Spec(3, 1, 8192, 8192, None, "3inst"),
)
"""Some of the shapes above, for the kernel that needs Hopper."""

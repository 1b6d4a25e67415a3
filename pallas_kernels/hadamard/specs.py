"""Shapes of the Hadamard transform for tests and benchmarks."""

from __future__ import annotations

import dataclasses

__all__ = ["BENCHES", "TESTS", "Spec"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Rows of n values, in blocks of `block`."""

    rows: int
    n: int
    block: int


TESTS = (Spec(3, 384, 128), Spec(5, 512, 512), Spec(1, 2048, 2048), Spec(70, 256, 128), Spec(2, 1024, 256))
"""One row, odd numbers of rows, several blocks, one and two factors."""

BENCHES = (Spec(1, 8192, 8192), Spec(16, 8192, 8192), Spec(4096, 4096, 4096), Spec(4096, 14336, 128))
"""A decode step, a batch of them, the rotation of a matrix, Llama's down projection in blocks."""

"""Shapes of `Xᵀ X` for tests and benchmarks."""

from __future__ import annotations

import dataclasses

__all__ = ["BENCHES", "TESTS", "Spec"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """`rows` rows of n values."""

    rows: int
    n: int


TESTS = (Spec(70, 300), Spec(200, 256), Spec(16, 128))
"""An odd and an even number of tiles of 128, one tile, padding on both sides."""

BENCHES = (Spec(8192, 4096), Spec(8192, 14336))
"""A batch of four sequences of 2048 tokens in Llama-3-8B: attention and feed-forward inputs."""

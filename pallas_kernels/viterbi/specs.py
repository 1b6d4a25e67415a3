"""Shapes of the trellis search for tests and benchmarks."""

from __future__ import annotations

import dataclasses

__all__ = ["BENCHES", "TESTS", "Spec"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """L bits of a state, b = K·V new bits and V values a step, steps of a sequence, sequences."""

    L: int
    b: int
    V: int
    steps: int
    batch: int


TESTS = (
    Spec(6, 1, 1, 8, 3),
    Spec(6, 2, 1, 8, 5),
    Spec(7, 3, 1, 6, 2),
    Spec(9, 4, 1, 2, 2),
    Spec(6, 2, 2, 6, 3),
    Spec(9, 2, 4, 4, 2),
)
"""Every b, every V, batches that are no multiple of anything."""

BENCHES = (
    Spec(12, 2, 1, 256, 1024),
    Spec(16, 2, 1, 256, 264),
    Spec(16, 3, 1, 256, 264),
    Spec(16, 4, 1, 256, 264),
    Spec(16, 4, 2, 128, 264),
)
"""Sequences: twice the multiprocessors of an H100 at L = 16."""

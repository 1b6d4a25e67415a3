"""Matrices that equal their transpose to the last bit.

A product `Xᵀ X` need not: which terms of two mirrored entries a processor adds first depends on how its product is cut
into tiles. Every such product counts by its lower triangle alone.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped

__all__ = ["mirror"]

_ROWS = 256


def mirror(matrix: Shaped[np.ndarray, "n n"]) -> Shaped[np.ndarray, "n n"]:
    """`matrix` itself, with its lower triangle copied over what stands above the diagonal, some rows at a time."""
    for start in range(0, len(matrix), _ROWS):
        end = min(start + _ROWS, len(matrix))
        corner, above = matrix[start:end, start:end], np.triu_indices(end - start, 1)
        corner[above] = corner.T[above]
        matrix[start:end, end:] = matrix[end:, start:end].T
    return matrix

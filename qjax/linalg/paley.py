"""Paley's two constructions of Hadamard matrices over GF(q), q an odd prime power (Paley 1933)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Int8

from qjax.errors import InputError
from qjax.linalg.galois import difference_table, prime_power, quadratic_character

__all__ = ["paley_matrix", "paley_type"]


def paley_type(order: int) -> Literal["I", "II"] | None:
    """The construction that gives `order`: "I" (order q+1, q ≡ 3 mod 4), else "II" (2(q+1), q ≡ 1 mod 4), else None."""
    if order % 4:
        return None
    if prime_power(order - 1) is not None:  # q = order − 1 ≡ 3 mod 4 as 4 divides the order
        return "I"
    q = order // 2 - 1
    return "II" if q % 4 == 1 and prime_power(q) is not None else None


def paley_matrix(order: int) -> Int8[np.ndarray, "order order"]:
    """A Hadamard matrix with entries ±1: `M Mᵀ = order · I` in integers.

    With `Q_ab = χ(a − b)`: type I is `I + [[0, 1ᵀ], [−1, Q]]`; type II is
    `C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]]` with `C = [[0, 1ᵀ], [1, Q]]`. Raises InputError where neither
    construction has this order.
    """
    kind = paley_type(order)
    if kind is None:
        raise InputError(
            f"no Paley construction has order {order}; allowed are q+1 for a prime power q = 3 mod 4, "
            "and 2(q+1) for a prime power q = 1 mod 4"
        )
    q = order - 1 if kind == "I" else order // 2 - 1
    core = np.zeros((q + 1, q + 1), dtype=np.int8)
    core[0, 1:] = 1
    core[1:, 0] = -1 if kind == "I" else 1
    core[1:, 1:] = quadratic_character(q)[difference_table(q)]
    identity = np.eye(q + 1, dtype=np.int8)
    if kind == "I":
        return identity + core
    return np.kron(core, np.array([[1, 1], [1, -1]], np.int8)) + np.kron(
        identity, np.array([[1, -1], [-1, -1]], np.int8)
    )

"""Finite fields GF(p^e) as small tables: just what the Paley constructions need.

An element is an integer below q = p^e whose base-p digits are the coefficients of a polynomial, constant term first.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from jaxtyping import Int, Int8

from qjax.errors import InputError

__all__ = [
    "difference_table",
    "irreducible_polynomial",
    "prime_power",
    "quadratic_character",
]


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with `q = p^e` and p prime, or None where q is not a prime power."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    e = 0
    while q % p == 0:
        q, e = q // p, e + 1
    return (p, e) if q == 1 else None


@functools.cache
def irreducible_polynomial(p: int, e: int) -> tuple[int, ...]:
    """The lexicographically first monic irreducible polynomial of degree e over GF(p), constant coefficient first.

    Irreducibility by trial division: a reducible polynomial has a monic divisor of degree at most e/2.
    """
    for low in itertools.product(range(p), repeat=e):
        candidate = (*low, 1)
        divisors = ((*d, 1) for degree in range(1, e // 2 + 1) for d in itertools.product(range(p), repeat=degree))
        if all(any(_remainder(candidate, divisor, p)) for divisor in divisors):
            return candidate
    raise AssertionError("an irreducible polynomial of every degree exists over every prime field")


def _remainder(dividend: tuple[int, ...], divisor: tuple[int, ...], p: int) -> list[int]:
    """The coefficients of `dividend mod divisor` over GF(p); `divisor` is monic."""
    rest, degree = list(dividend), len(divisor) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        factor = rest[top]
        for i, coefficient in enumerate(divisor):
            rest[top - degree + i] = (rest[top - degree + i] - factor * coefficient) % p
    return rest[:degree]


def _field(q: int) -> tuple[int, int]:
    found = prime_power(q)
    if found is None:
        raise InputError(f"there is no finite field of order {q}; the order must be a power of a prime")
    return found


def _digits(q: int, p: int, e: int) -> Int[np.ndarray, "q e"]:
    return np.arange(q)[:, None] // p ** np.arange(e) % p


def difference_table(q: int) -> Int[np.ndarray, "q q"]:
    """`T[a, b] = a − b` in GF(q), q = p^e: digit by digit modulo p, which is not subtraction modulo q when e > 1.

    Raises InputError when q is not a prime power.
    """
    p, e = _field(q)
    digits = _digits(q, p, e)
    return (digits[:, None, :] - digits[None, :, :]) % p @ p ** np.arange(e)


def quadratic_character(q: int) -> Int8[np.ndarray, " q"]:
    """χ(a) = 0 for a = 0, +1 for the non-zero squares of GF(q), −1 for the rest; q odd.

    Raises InputError when q is not an odd prime power.
    """
    p, e = _field(q)
    if p == 2:
        raise InputError(f"every element of GF({q}) is a square; the quadratic character needs an odd order")
    digits = _digits(q, p, e)
    product = np.zeros((q, 2 * e - 1), dtype=np.int64)
    for i in range(e):
        product[:, i : i + e] += digits[:, i : i + 1] * digits
    modulus = np.array(irreducible_polynomial(p, e))
    for top in range(2 * e - 2, e - 1, -1):
        product[:, top - e : top + 1] -= product[:, top : top + 1] * modulus
        product %= p
    squares = product[:, :e] % p @ p ** np.arange(e)
    character = np.full(q, -1, dtype=np.int8)
    character[squares] = 1
    character[0] = 0
    return character

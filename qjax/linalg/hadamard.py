"""Orthonormal Hadamard transforms of every order K·2^p, where K is 1 or the order of a Paley matrix.

`Had_n = (M_K ⊗ H_{2^p}) / √n`, with K on the slow axis and H the Sylvester matrix.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from qjax.errors import InputError
from qjax.linalg.paley import paley_matrix, paley_type

__all__ = [
    "MAX_BASE",
    "base_matrix",
    "block_hadamard_transform",
    "hadamard_factor",
    "hadamard_transform",
    "is_hadamard_order",
    "next_hadamard_order",
]

MAX_BASE = 1024
"""The largest dense K×K factor: its product costs K operations per value, beside log2(n) additions for the rest."""

# On CPU a pass over the data costs more than arithmetic: few passes with a small dense factor beat log2(n) butterflies.
_RADIX_BITS = 5


@functools.cache
def _find_factor(n: int) -> tuple[int, int] | None:
    power = (n & -n).bit_length() - 1
    odd = n >> power
    if odd == 1:
        return 1, power
    for bits in range(2, power + 1):
        base = odd << bits
        if base > MAX_BASE:
            return None
        if paley_type(base) is not None:
            return base, power - bits
    return None


def is_hadamard_order(n: int) -> bool:
    """Whether `hadamard_transform` exists for an axis of length n."""
    return n >= 1 and _find_factor(n) is not None


def hadamard_factor(n: int) -> tuple[int, int]:
    """(K, p) with `n = K·2^p`, K = 1 or the smallest Paley order (at most MAX_BASE) that works.

    Raises InputError when n has no such factorisation.
    """
    factor = _find_factor(n) if n >= 1 else None
    if factor is None:
        raise InputError(
            f"no Hadamard matrix for a dimension of {n}; allowed is K * 2^p with K = 1 or a Paley order up to "
            f"{MAX_BASE}; pad to {next_hadamard_order(max(n, 1))}, or use incoherence 'block_hadamard' or 'kronecker'"
        )
    return factor


def next_hadamard_order(n: int, multiple: int = 1) -> int:
    """The smallest `N ≥ n` that is divisible by `multiple` and has a factorisation.

    Raises InputError when n or `multiple` is not positive, or when no order at all is divisible by `multiple`.
    """
    if n < 1 or multiple < 1:
        raise InputError(f"a Hadamard order needs a positive size and multiple; found size {n}, multiple {multiple}")
    odd = multiple >> ((multiple & -multiple).bit_length() - 1)
    if not any(paley_type(base) for base in range(4 * odd, MAX_BASE + 1, 4 * odd)) and odd > 1:
        raise InputError(
            f"no Hadamard order is divisible by {multiple}: no Paley order up to {MAX_BASE} is divisible by {odd}; "
            "choose a tile or sharding whose size is a product of powers of 2 and small odd numbers"
        )
    order = -(-n // multiple) * multiple
    while _find_factor(order) is None:
        order += multiple
    return order


@functools.cache
def base_matrix(order: int) -> Int8[np.ndarray, "order order"]:
    """The ±1 factor M_K (read-only), `M_K M_Kᵀ = K·I`, K = 1 or a Paley order. Raises InputError for other orders."""
    matrix = np.ones((1, 1), np.int8) if order == 1 else paley_matrix(order)
    matrix.setflags(write=False)
    return matrix


@functools.cache
def _sylvester(bits: int) -> Int8[np.ndarray, "r r"]:
    index = np.arange(1 << bits)
    parity = np.bitwise_count(index[:, None] & index) % 2
    return (1 - 2 * parity).astype(np.int8)


def _radices(power: int) -> list[int]:
    """2^power as a product of factors 2^bits with bits as equal as possible and at most _RADIX_BITS."""
    count = -(-power // _RADIX_BITS)
    return [power // count + (i < power % count) for i in range(count)]


@functools.partial(jax.jit, static_argnames=("transpose",))
def hadamard_transform(x: Float[Array, "*batch n"], transpose: bool = False) -> Float[Array, "*batch n"]:
    """`x @ Had_n` along the last axis, or `x @ Had_nᵀ` with `transpose`; orthonormal, so each undoes the other.

    K + O(log n) operations per value: one K×K product, and the power of two as products with small dense factors.
    Accumulates in float32 (float64 for float64 input) and returns the dtype of x. Raises InputError when n is no
    Hadamard order.

    Source: the randomised Hadamard transform of QuIP# (2402.04396, section 3) without its signs.
    """
    n = x.shape[-1]
    base, power = hadamard_factor(n)
    compute = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    factors = [(base_matrix(base).T if transpose else base_matrix(base))] if base > 1 else []
    factors += [_sylvester(bits) for bits in _radices(power)] if power else []
    y, rest = x.astype(compute) * (1 / math.sqrt(n)), n
    for factor in factors:
        radix = factor.shape[0]
        rest //= radix
        y = y.reshape(-1, radix, rest)
        y = jnp.einsum("bsi,st->bti", y, jnp.asarray(factor, compute), precision="highest")
    return y.reshape(x.shape).astype(x.dtype)


def block_hadamard_transform(
    x: Float[Array, "*batch n"], block: int = 128, transpose: bool = False
) -> Float[Array, "*batch n"]:
    """`x @ (I ⊗ Had_block)`: an independent transform of every `block` consecutive values of the last axis.

    Raises InputError when `block` is no Hadamard order or does not divide n.
    """
    n = x.shape[-1]
    if block < 1 or n % block:
        raise InputError(
            f"a block Hadamard transform of block {block} does not divide a dimension of {n}; pad it to a multiple"
        )
    return hadamard_transform(x.reshape(*x.shape[:-1], n // block, block), transpose=transpose).reshape(x.shape)

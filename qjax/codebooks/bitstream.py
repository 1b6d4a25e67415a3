"""Codes of any width as a flat little-endian bit stream in 32-bit words."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt32

from qjax.errors import InputError

__all__ = ["pack_bits", "packed_words", "unpack_bits"]


def packed_words(count: int, bits: int) -> int:
    """The number of 32-bit words that hold `count` codes of `bits` bits: `ceil(count·bits / 32)`."""
    return -(-count * bits // 32)


def _check(bits: int) -> None:
    if not 1 <= bits <= 32:
        raise InputError(f"cannot pack codes of {bits} bits; a code has 1 to 32 bits")


def _period(bits: int) -> tuple[int, int]:
    """(codes, words) after which code and word boundaries coincide again."""
    common = math.gcd(32, bits)
    return 32 // common, bits // common


def pack_bits(codes: Integer[Array, "..."], bits: int) -> UInt32[Array, " words"]:
    """Pack codes (flattened row-major) into words.

    Code i occupies bits `[i·bits, (i+1)·bits)` of the stream; bit j is bit `j % 32` of word `j // 32`.
    Bits of a code above `bits` are dropped; bits after the last code are zero.

    Raises InputError unless 1 <= bits <= 32.
    """
    _check(bits)
    per_period, words_per_period = _period(bits)
    mask = jnp.uint32((1 << bits) - 1)
    flat = codes.reshape(-1).astype(jnp.uint32) & mask
    count = flat.shape[0]
    flat = jnp.pad(flat, (0, -count % per_period)).reshape(-1, per_period)
    words = [jnp.zeros(flat.shape[0], jnp.uint32) for _ in range(words_per_period)]
    for i in range(per_period):
        word, shift = divmod(i * bits, 32)
        words[word] = words[word] | (flat[:, i] << shift)
        if shift + bits > 32:  # the code straddles two words
            words[word + 1] = words[word + 1] | (flat[:, i] >> (32 - shift))
    return jnp.stack(words, axis=1).reshape(-1)[: packed_words(count, bits)]


def unpack_bits(words: UInt32[Array, " words"], bits: int, count: int) -> UInt32[Array, " count"]:
    """The first `count` codes of a stream made by `pack_bits`.

    Raises InputError unless 1 <= bits <= 32 and there are exactly `packed_words(count, bits)` words.
    """
    _check(bits)
    if words.shape[0] != packed_words(count, bits):
        raise InputError(
            f"a stream of {count} codes of {bits} bits has {packed_words(count, bits)} words, found {words.shape[0]}; "
            "the packed codes belong to another shape or bit width"
        )
    per_period, words_per_period = _period(bits)
    mask = jnp.uint32((1 << bits) - 1)
    periods = -(-count // per_period)
    stream = jnp.pad(words, (0, periods * words_per_period - words.shape[0])).reshape(periods, words_per_period)
    codes = []
    for i in range(per_period):
        word, shift = divmod(i * bits, 32)
        code = stream[:, word] >> shift
        if shift + bits > 32:
            code = code | (stream[:, word + 1] << (32 - shift))
        codes.append(code & mask)
    return jnp.stack(codes, axis=1).reshape(-1)[:count]

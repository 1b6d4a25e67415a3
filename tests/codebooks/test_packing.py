"""The bit stream against Python integers, which hold any number of bits exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.codebooks.bitstream import pack_bits, packed_words, unpack_bits
from qjax.errors import InputError


@given(bits=st.integers(1, 32), count=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_stream_is_the_concatenation_of_the_codes_bits(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint64)
    words = np.asarray(pack_bits(jnp.asarray(codes.astype(np.uint32)), bits))
    expected = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    assert words.dtype == np.uint32 and words.shape == (packed_words(count, bits),)
    assert sum(int(word) << (32 * i) for i, word in enumerate(words)) == expected
    np.testing.assert_array_equal(np.asarray(unpack_bits(jnp.asarray(words), bits, count)), codes.astype(np.uint32))


def test_bits_above_the_width_are_dropped():
    assert np.asarray(pack_bits(jnp.array([0xFF, 0x1], jnp.uint32), 4)).tolist() == [0x1F]


def test_works_under_jit_and_vmap():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 8, (4, 50)), jnp.uint8)
    packed = jax.jit(jax.vmap(lambda c: pack_bits(c, 3)))(codes)
    back = jax.vmap(lambda w: unpack_bits(w, 3, 50))(packed)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", [0, 33])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(InputError, match="1 to 32 bits"):
        pack_bits(jnp.zeros(3, jnp.uint8), bits)


def test_a_stream_of_another_length_is_refused():
    with pytest.raises(InputError, match="has 2 words, found 3"):
        unpack_bits(jnp.zeros(3, jnp.uint32), 4, 16)

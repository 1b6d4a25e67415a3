"""Residual E8P codebooks of 3 and 4 bits: stages, beam search, packing, Gaussian distortion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.codebooks import CODEBOOKS, Codebook, make
from qjax.codebooks.e8p import MAX_CANDIDATES
from qjax.errors import InputError

QUANTIZE = jax.jit(lambda book, x: book.quantize(x))
DEQUANTIZE = jax.jit(lambda book, codes: book.dequantize(codes))


def tile_errors(book: Codebook, tiles: int, seed: int = 1) -> np.ndarray:
    """Squared error per coordinate of a unit Gaussian, for every tile."""
    x = np.random.default_rng(seed).normal(size=(tiles // 64, 512)).astype(np.float32) * np.float32(book.rms)
    values = np.asarray(DEQUANTIZE(book, QUANTIZE(book, x)), np.float64)
    return ((values - x) ** 2).reshape(-1, 8).mean(axis=1) / book.rms**2


@pytest.mark.parametrize(("bits", "second", "scale"), [(3, "e81b", 2.04), (4, "e8p", 3.45)])
def test_stages_are_the_two_codebooks(bits, second, scale):
    book, coarse = make("e8p_rvq", bits), make("e8p", 2)
    fine = make(second, bits - 2)
    x = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    codes = np.asarray(QUANTIZE(book, x))
    assert codes.dtype == np.uint32 and codes.shape == (20, 8)
    q0 = np.asarray(QUANTIZE(coarse, x))
    assert np.array_equal(codes >> 16, q0)
    left = x - np.asarray(DEQUANTIZE(coarse, q0))
    q1 = np.asarray(QUANTIZE(fine, left * np.float32(scale)))
    assert np.array_equal(codes & 0xFFFF, q1)
    expected = np.asarray(DEQUANTIZE(coarse, q0)) + np.asarray(DEQUANTIZE(fine, q1)) / scale
    assert np.allclose(DEQUANTIZE(book, codes), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "scales", "published"),
    [(3, "shipped", 0.0295), (4, "shipped", 0.0096), (4, "retuned", 0.0084)],
)
def test_distortion_of_a_gaussian(bits, scales, published):
    errors = tile_errors(make("e8p_rvq", bits, scales=scales), 512_000)
    assert abs(errors.mean() - published) < 0.007 * published
    assert errors.std() / len(errors) ** 0.5 < 0.0026 * published


@pytest.mark.parametrize(("bits", "gain"), [(3, 0.002), (4, 0.07)])
def test_a_beam_is_never_worse_than_stage_by_stage(bits, gain):
    # 4160 tiles: a full block of the search and a part of one.
    greedy, beam = (tile_errors(make("e8p_rvq", bits, scales="retuned", beam=b), 4160) for b in (1, 4))
    assert (beam <= greedy + 1e-6).all()
    assert beam.mean() < (1 - gain) * greedy.mean()


def test_beam_search_under_vmap_agrees_with_the_whole_matrix():
    book = make("e8p_rvq", 3, beam=2)
    x = np.random.default_rng(3).normal(size=(2, 3, 16)).astype(np.float32)
    batched = np.asarray(jax.jit(jax.vmap(book.quantize))(x))
    assert np.array_equal(batched.reshape(6, 2), QUANTIZE(book, x.reshape(6, 16)))


@pytest.mark.parametrize("bits", [3, 4])
def test_packing_takes_exactly_the_bits(bits):
    book = make("e8p_rvq", bits)
    generator = np.random.default_rng(4)
    for shape in ((1, 8), (3, 24), (16, 64)):
        groups = shape[0], shape[1] // 8
        codes = generator.integers(0, 1 << 16, groups) << 16 | generator.integers(
            0, 1 << (16 if bits == 4 else 8), groups
        )
        codes = codes.astype(np.uint32)
        packed = book.pack(jnp.asarray(codes))
        assert packed.size == -(-bits * shape[0] * shape[1] // 32)
        unpacked = book.unpack(packed, shape)
        assert np.array_equal(unpacked, codes) and unpacked.dtype == jnp.uint32
    stream = int.from_bytes(packed.tobytes(), "little")
    first = int(codes[0, 0])
    assert stream & (2 ** (8 * bits) - 1) == (first if bits == 4 else first >> 16 << 8 | first & 255)


@pytest.mark.parametrize("bits", [3, 4])
def test_contract(bits):
    book = make("e8p_rvq", bits, scales="retuned", beam=3, rms=0.95)
    assert isinstance(book, Codebook) and "e8p_rvq" in CODEBOOKS
    assert (book.bits, book.tile, book.rms, book.beam) == (bits, (1, 8), 0.95, 3)
    assert make(**book.spec()) == book and hash(make(**book.spec())) == hash(book)
    assert make("e8p_rvq", 4).rms == 1.03 and make("e8p_rvq", 4).residual_scale == 3.45
    assert make("e8p_rvq", 3).rms == 0.98 and make("e8p_rvq", 3).residual_scale == 2.04
    assert make("e8p_rvq", 4, residual_scale=3.8).residual_scale == 3.8


def test_what_does_not_exist_is_refused():
    with pytest.raises(
        InputError, match="'e8p_rvq' has 3 or 4 bits per weight, not 2; codebooks with 2 bits: d4, e8p, half_integer"
    ):
        make("e8p_rvq", 2)
    with pytest.raises(InputError, match="scales is 'tuned'; allowed are retuned, shipped"):
        make("e8p_rvq", 4, scales="tuned")
    with pytest.raises(InputError, match=f"beam is 0; it is a whole number from 1 to {MAX_CANDIDATES}"):
        make("e8p_rvq", 4, beam=0)
    with pytest.raises(InputError, match=r"residual_scale is 0\.0; it is a positive number, 2\.04 by default"):
        make("e8p_rvq", 3, residual_scale=0.0)
    with pytest.raises(InputError, match="codes 8 columns of a row together, found a matrix of 2×6"):
        make("e8p_rvq", 4, beam=2).quantize(jnp.zeros((2, 6)))

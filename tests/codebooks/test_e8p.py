"""E8P12 and E81B: bit-exact layout, exact nearest points against brute force, Gaussian distortion."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.codebooks import CODEBOOKS, Codebook, make
from qjax.codebooks.e8p import MAX_CANDIDATES, NIBBLES, e8p_magnitudes, e8p_table
from qjax.codebooks.e81b import e81b_points
from qjax.errors import InputError

QUANTIZE = jax.jit(lambda book, x: book.quantize(x))
DEQUANTIZE = jax.jit(lambda book, codes: book.dequantize(codes))


@functools.cache
def all_codewords() -> np.ndarray:
    """All 65,536 points by loops over the definition of the code, with no help from the library but the magnitudes."""
    points = np.empty((256, 256, 8))
    for index, magnitudes in enumerate(e8p_magnitudes().astype(np.float64)):
        entry = magnitudes.copy()
        if sum(magnitudes) % 2 == 1:
            entry[7] = -entry[7]
        for byte in range(256):
            parity = byte.bit_count() % 2
            effective = byte ^ parity
            signs = [-1 if effective >> (0, 4, 1, 5, 2, 6, 3, 7)[i] & 1 else 1 for i in range(8)]
            points[index, byte] = entry * signs + (-0.25 if parity else 0.25)
    return points.reshape(-1, 8)


def brute_force_distance(x: np.ndarray, points: np.ndarray, block: int = 2048) -> np.ndarray:
    """The least squared distance of every row of x to a row of `points`, float64."""
    norms = (points**2).sum(axis=1)
    best = [
        (norms - 2 * b @ points.T).min(axis=1) + (b**2).sum(axis=1) for b in np.split(x, range(block, len(x), block))
    ]
    return np.concatenate(best)


def nearest_of_magnitudes(x: np.ndarray, block: int = 1024) -> np.ndarray:
    """The least squared distance to a codeword by all 256 magnitudes with the parity correction, float64."""
    magnitudes = e8p_magnitudes().astype(np.float64)
    columns, norms, sums = magnitudes.T.copy(), (magnitudes**2).sum(axis=1), magnitudes.sum(axis=1).astype(int)
    best = []
    for part in np.split(x, range(block, len(x), block)):
        distances = []
        for shift in (0.25, -0.25):
            y = part - shift
            size = abs(y)
            wrong = (sums + (y < 0).sum(axis=1, keepdims=True)) % 2 == 1
            cheapest = size[:, :1] * columns[0]
            for i in range(1, 8):
                np.minimum(cheapest, size[:, i : i + 1] * columns[i], out=cheapest)
            score = 2 * (size @ columns - np.where(wrong, 2 * cheapest, 0)) - norms
            distances.append((y**2).sum(axis=1) - score.max(axis=1))
        best.append(np.minimum(*distances))
    return np.concatenate(best)


def chosen_distance(book: Codebook, x: np.ndarray) -> np.ndarray:
    values = np.asarray(DEQUANTIZE(book, QUANTIZE(book, x)), np.float64)
    return ((values - x) ** 2).reshape(-1, book.tile[1]).sum(axis=1)


def gaussian_distortion(book: Codebook, tiles: int, seed: int = 1) -> tuple[float, float]:
    """(mean squared error per coordinate of a unit Gaussian, its standard error)."""
    x = np.random.default_rng(seed).normal(size=(tiles // 64, 64 * book.tile[1])).astype(np.float32) * np.float32(
        book.rms
    )
    errors = chosen_distance(book, x) / (book.tile[1] * book.rms**2)
    return errors.mean(), errors.std() / len(errors) ** 0.5


def test_magnitudes_follow_the_published_table():
    table = e8p_magnitudes()
    norms = (table**2).sum(axis=1)
    counts = {int(norm): int(count) for norm, count in zip(*np.unique(norms, return_counts=True), strict=True)}
    assert counts == {2: 1, 4: 8, 6: 28, 8: 64, 10: 126, 12: 29}
    assert [tuple(row) for row in table[:227]] == sorted(tuple(row) for row in table[:227])
    assert np.array_equal(table[227], [1.5, 0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5])  # ½ at 1, 2, 3
    assert np.array_equal(table[255], [1.5, 1.5, 0.5, 0.5, 1.5, 1.5, 1.5, 0.5])  # ½ at 2, 3, 7
    assert {tuple(sorted(row)) for row in table[227:]} == {(0.5,) * 3 + (1.5,) * 5}


def test_packed_table_holds_the_magnitudes_in_nibbles():
    words = e8p_table()
    assert words.dtype == np.uint32 and words.nbytes == 1024
    for word, row in zip(words.tolist(), e8p_magnitudes().tolist(), strict=True):
        values = [((word >> 4 * j) & 15) / 2 - 4 for j in NIBBLES]
        assert values[:7] == row[:7]
        assert values[7] == (-row[7] if sum(row) % 2 == 1 else row[7])


def test_every_code_decodes_bit_exactly_to_a_distinct_point_of_the_shifted_lattice():
    codes = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    points = np.asarray(DEQUANTIZE(make("e8p", 2), codes)).reshape(-1, 8)
    assert np.array_equal(points, all_codewords())
    assert len(np.unique(points, axis=0)) == 65536
    assert np.sqrt(np.mean(points.astype(np.float64) ** 2)) == pytest.approx(1.09375, abs=1e-12)
    doubled = 2 * (points - np.where(points[:, :1] * 4 % 4 == 3, 0.25, -0.25))
    assert np.array_equal(doubled, np.round(doubled))


def test_every_codeword_is_its_own_nearest_point():
    book = make("e8p", 2)
    codes = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(QUANTIZE(book, DEQUANTIZE(book, codes)), codes)


def test_nearest_point_equals_the_magnitude_search_on_many_vectors():
    generator = np.random.default_rng(0)
    spread = np.repeat([0.3, 1.03, 1.5, 3.0], 25_600)[:, None]
    x = (generator.normal(size=(102_400, 8)) * spread).astype(np.float32)
    distance = chosen_distance(make("e8p", 2), x)
    assert np.allclose(distance, nearest_of_magnitudes(x.astype(np.float64)), rtol=1e-6, atol=1e-5)


def test_nearest_point_equals_brute_force_over_all_codewords():
    generator = np.random.default_rng(7)
    x = (generator.normal(size=(1500, 8)) * np.repeat([0.5, 1.03, 2.5], 500)[:, None]).astype(np.float32)
    best = brute_force_distance(x.astype(np.float64), all_codewords())
    assert np.allclose(chosen_distance(make("e8p", 2), x), best, rtol=1e-6, atol=1e-5)
    assert np.allclose(nearest_of_magnitudes(x.astype(np.float64)), best, rtol=1e-12, atol=1e-12)


def test_ties_are_exact_and_deterministic():
    # Multiples of 1/8 make every distance exact in float32, and most vectors equally near to several codewords.
    generator = np.random.default_rng(3)
    x = (generator.integers(-24, 25, size=(1000, 8)) / 8).astype(np.float32)
    x[:4] = np.asarray([[0.0], [0.25], [-0.25], [1.0]])
    book = make("e8p", 2)
    assert np.array_equal(chosen_distance(book, x), brute_force_distance(x.astype(np.float64), all_codewords()))
    codes = np.asarray(QUANTIZE(book, x))
    reordered = np.asarray(QUANTIZE(book, x[::-1].copy()))[::-1]
    assert np.array_equal(codes, reordered)
    assert np.array_equal(codes[:, 0], np.asarray(QUANTIZE(book, x.reshape(25, 320))).reshape(-1))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8))
def test_nearest_point_of_any_vector(values):
    x = np.asarray([values], np.float32)
    best = nearest_of_magnitudes(x.astype(np.float64))
    # The gains are differences of float32 numbers of the size of ‖x‖².
    assert np.allclose(chosen_distance(make("e8p", 2), x), best, rtol=1e-6, atol=1e-5)


def test_values_that_are_not_numbers_still_give_codes():
    x = np.asarray([[np.nan] * 8, [np.inf] * 8, [-np.inf, 1, 2, 3, 4, 5, 6, 7]], np.float32)
    assert QUANTIZE(make("e8p", 2), x).shape == (3, 1)
    assert QUANTIZE(make("e81b", 1), x).shape == (3, 1)


def test_candidates_are_codewords_near_the_tile_in_order():
    book = make("e8p", 2)
    x = np.random.default_rng(2).normal(size=(40, 8)).astype(np.float32)
    codes = np.asarray(jax.jit(lambda x: book.candidates(x, MAX_CANDIDATES))(x))[:, :, 0]
    assert codes.shape == (MAX_CANDIDATES, 40)
    distances = ((all_codewords()[codes] - x) ** 2).sum(axis=-1)
    assert (np.diff(distances, axis=0) >= -1e-5).all()
    assert np.allclose(distances[0], brute_force_distance(x.astype(np.float64), all_codewords()), atol=1e-5)
    assert all(len(set(column)) == MAX_CANDIDATES for column in codes.T.tolist())
    exact = np.partition((all_codewords() ** 2).sum(axis=1) - 2 * x @ all_codewords().T, 3, axis=1)[:, :4]
    exact = exact + (x.astype(np.float64) ** 2).sum(axis=1, keepdims=True)
    assert exact.mean() <= distances[:4].mean() < 1.03 * exact.mean()


def test_e81b_points_are_the_short_vectors_of_e8():
    points = e81b_points()
    expected = {(0.0,) * 8}
    for i, j in itertools.combinations(range(8), 2):
        for a, b in itertools.product((1, -1), repeat=2):
            expected.add(tuple(float(a if k == i else b if k == j else 0) for k in range(8)))
    expected |= {s for s in itertools.product((0.5, -0.5), repeat=8) if sum(s) % 2 == 0}
    expected |= {tuple(2.0 * s if k == i else 0.0 for k in range(8)) for i in range(8) for s in (1, -1)}
    expected.remove((0.0,) * 7 + (-2.0,))
    assert len(expected) == 256
    assert {tuple(row) for row in (points + 0.0).tolist()} == expected
    decoded = DEQUANTIZE(make("e81b", 1), np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(np.asarray(decoded).reshape(-1, 8), points)


def test_e81b_nearest_point_equals_brute_force():
    generator = np.random.default_rng(4)
    x = (generator.normal(size=(30_000, 8)) * np.repeat([0.2, 0.6, 2.0], 10_000)[:, None]).astype(np.float32)
    x[-5000:, 7] = -abs(x[-5000:, 7]) * 3  # where the missing −2e_7 would be nearest
    tied = (generator.integers(-20, 21, size=(20_000, 8)) / 8).astype(np.float32)
    book, points = make("e81b", 1), e81b_points().astype(np.float64)
    assert np.allclose(
        chosen_distance(book, x), brute_force_distance(x.astype(np.float64), points), rtol=1e-6, atol=1e-5
    )
    assert np.array_equal(chosen_distance(book, tied), brute_force_distance(tied.astype(np.float64), points))


@pytest.mark.parametrize(("name", "bits", "published"), [("e8p", 2, 0.0913), ("e81b", 1, 0.3175)])
def test_distortion_of_a_gaussian(name, bits, published):
    mean, error = gaussian_distortion(make(name, bits), 512_000)
    assert abs(mean - published) < 0.007 * published
    assert error < 0.001 * published


def test_the_default_rms_is_the_optimum_for_a_gaussian():
    for name, bits in (("e8p", 2), ("e81b", 1)):
        rms = make(name, bits).rms
        here, below, above = (gaussian_distortion(make(name, bits, rms=f * rms), 40_000)[0] for f in (1, 0.95, 1.05))
        assert here < below and here < above


@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("e81b", 1)])
def test_packing_takes_exactly_the_bits_of_the_code(name, bits):
    book = make(name, bits)
    for shape in ((3, 8), (5, 24), (16, 64)):
        codes = np.random.default_rng(5).integers(0, 2 ** (8 * bits), (shape[0], shape[1] // 8)).astype(book.code_dtype)
        packed = book.pack(jnp.asarray(codes))
        assert packed.dtype == jnp.uint32 and packed.size == -(-bits * shape[0] * shape[1] // 32)
        assert packed.tobytes()[: codes.nbytes] == codes.tobytes()  # little-endian, in order
        assert np.array_equal(book.unpack(packed, shape), codes) and book.unpack(packed, shape).dtype == codes.dtype


@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("e81b", 1)])
def test_vmap_and_float64_agree_with_jit(name, bits):
    book = make(name, bits)
    x = np.random.default_rng(6).normal(size=(3, 5, 16)).astype(np.float32)
    batched = jax.jit(jax.vmap(book.quantize))(x)
    assert batched.dtype == book.code_dtype
    for one, codes in zip(x, batched, strict=True):
        assert np.array_equal(QUANTIZE(book, one), codes)
    assert np.array_equal(jax.jit(jax.vmap(book.dequantize))(batched)[1], DEQUANTIZE(book, batched[1]))
    with jax.enable_x64(True):
        assert np.array_equal(QUANTIZE(book, x[0].astype(np.float64)), batched[0])


@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("e81b", 1)])
def test_memory_of_the_search_does_not_depend_on_the_number_of_codewords(name, bits):
    book = make(name, bits)
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    memory = jax.jit(book.quantize).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 2 * 256 * 1024 * 4


@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("e81b", 1)])
def test_is_a_registered_hashable_codebook(name, bits):
    book = make(name, bits)
    assert isinstance(book, Codebook) and name in CODEBOOKS
    assert (book.bits, book.tile) == (bits, (1, 8))
    assert make(**book.spec()) == book and hash(make(**book.spec())) == hash(book)
    assert not jax.tree.leaves(book)


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(
        InputError, match=r"'e8p' has 2 bits per weight, not 3; codebooks with 3 bits: e8p_rvq, half_integer"
    ):
        make("e8p", 3)
    with pytest.raises(InputError, match=r"'e81b' has 1 bits per weight, not 2\.5; codebooks with 2\.5 bits: none"):
        make("e81b", 2.5)
    with pytest.raises(InputError, match=r"rms is -1\.0; it is a positive number, 1\.03 by default"):
        make("e8p", 2, rms=-1.0)
    with pytest.raises(InputError, match="no option residual_scale; its options are: rms"):
        make("e8p", 2, residual_scale=2)


@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("e81b", 1)])
def test_columns_that_no_tile_divides_are_refused(name, bits):
    with pytest.raises(
        InputError,
        match="codes 8 columns of a row together, found a matrix of 4×12; pad the columns to a multiple of 8",
    ):
        make(name, bits).quantize(jnp.zeros((4, 12)))


@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("e8p_rvq", 3), ("e8p_rvq", 4)])
def test_a_program_that_rounds_and_decodes_searches_once(name, bits):
    """XLA fuses what it can: without a loop around the search, every coordinate of the decoded tile repeats it."""
    book, x = make(name, bits), jnp.zeros((4, 16))
    codes = QUANTIZE(book, x)

    def size(function, argument):
        return len(jax.jit(function).lower(argument).compile().as_text())

    apart = size(book.quantize, x) + size(book.dequantize, codes)
    assert size(lambda x: book.dequantize(book.quantize(x)), x) < 1.5 * apart

"""Trellis codes against exhaustive arithmetic, brute-force search, the published distortions and an own bit stream."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import codebooks
from qjax.codebooks import trellis_codes
from qjax.codebooks.tail_biting import exact_tail_biting, forward, one_pass_tail_biting, tail_biting, trace_back
from qjax.errors import InputError

ALL = np.arange(2**16, dtype=np.uint64)
WORD = np.uint64(2**32 - 1)


def halves(x):
    """Sum in float16 of the two float16 numbers in the masked word."""
    word = ((x & 0x8FFF8FFF) ^ 0x3B603B60).astype(np.uint32)
    parts = word.view(np.float16).reshape(-1, 2)
    return (parts[:, 0] + parts[:, 1]).astype(np.float32)


def bytes_of(x):
    return sum((x >> np.uint64(8 * i)) & np.uint64(255) for i in range(4)).astype(np.int64)


def mul1(x):
    magic = (0x6400 + bytes_of(x)).astype(np.uint16).view(np.float16).astype(np.float64)  # 1024 + sum
    scale, shift = (np.array(bits, np.uint16).view(np.float16).astype(np.float64) for bits in (0x1EEE, 0xC931))
    return (magic * scale + shift).astype(np.float16).astype(np.float32)  # one rounding


def two_mad():
    x = (ALL * np.uint64(264435761) + np.uint64(1013904223)) & WORD
    return (((x * np.uint64(1664525)) >> np.uint64(32)) + x) & WORD


ORACLES = {
    "1mad": lambda: (bytes_of((ALL * np.uint64(34038481) + np.uint64(76625530)) & WORD) - 510) / 147.800537109375,
    "2mad": lambda: (bytes_of(two_mad()) - 510) / 147.800537109375,
    "3inst": lambda: halves((ALL * np.uint64(89226354) + np.uint64(64248484)) & WORD),
    "mcg": lambda: halves((ALL * np.uint64(0xCBAC1FED)) & WORD),
    "mul1": lambda: mul1((ALL * np.uint64(0x83DCD12D)) & WORD),
}


@pytest.mark.parametrize("code", trellis_codes.COMPUTED)
@pytest.mark.parametrize("compiled", [False, True])
def test_computed_codes_on_all_states(code, compiled):
    values = lambda s: trellis_codes.state_values(code, s)  # noqa: E731
    found = (jax.jit(values) if compiled else values)(jnp.arange(2**16, dtype=jnp.uint32))
    ulp = 0 if code in ("3inst", "mcg", "mul1") else 2**-23  # float16 sums are exact, a scaled integer rounds once
    np.testing.assert_allclose(np.asarray(found)[:, 0], ORACLES[code](), rtol=ulp, atol=0)
    np.testing.assert_array_equal(found, values(jnp.arange(2**16, dtype=jnp.uint32)))


@pytest.mark.parametrize(("code", "distinct"), [("1mad", 908), ("3inst", 10598), ("mul1", 913)])
def test_published_statistics_of_computed_codes(code, distinct):
    values = np.asarray(trellis_codes.state_values(code, jnp.arange(2**16)))
    assert len(np.unique(values)) == distinct
    assert np.sqrt(np.mean(np.square(values, dtype=np.float64))) == pytest.approx(trellis_codes.RMS[code], abs=1e-4)


def test_hybrid_table_and_signs():
    table = trellis_codes.hybrid_table(9, 2, 0)
    assert table.shape == (512, 2) and np.array_equal(table, table.astype(np.float16))
    assert table.std() == pytest.approx(np.sqrt(15 / 16), rel=1e-3)
    values = np.asarray(trellis_codes.hybrid_values(jnp.arange(2**16), jnp.asarray(table)))
    for s in (0, 1, 77, 4711, 65535):
        h = s * (s + 1) % 2**32
        first, second = table[(h >> 6) & 511]
        np.testing.assert_array_equal(values[s], [-first if h >> 15 & 1 else first, second])
    assert len(np.unique(values, axis=0)) == 1024
    # k-means of a plane: 512 cells leave about (√3 π · 2)/(2 · 512) of two unit variances, Zador's bound, plus edges
    plane = np.random.default_rng(5).standard_normal((4096, 2)).astype(np.float32)
    centroids = table * np.float32(1 / table.std() * np.sqrt(1 - 0.01))
    error = np.mean(np.min(np.sum(np.square(plane[:, None] - centroids[None]), axis=2), axis=1)) / 2
    assert error < 0.0125


def brute_force(x, lut, b, closed):
    """(least cost, states) over all walks of len(x) steps."""
    steps, P = len(x), len(lut) >> b
    best = (np.inf, None)
    for digits in itertools.product(range(2**b), repeat=steps):
        for edge in range(P):
            states, e = [], edge
            for digit in digits:
                states.append((e << b) + digit)
                e = states[-1] % P
            if closed and e != edge:
                continue
            cost = float(np.sum(np.square(lut[states] - x)))
            if cost < best[0]:
                best = (cost, states)
    return best


@pytest.mark.parametrize(("L", "b", "steps"), [(6, 2, 4), (6, 1, 6), (5, 3, 3), (6, 4, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_search_is_the_best_of_all_walks(L, b, steps, seed):
    rng = np.random.default_rng(seed)
    lut = rng.standard_normal((2**L, 1)).astype(np.float32)
    x = rng.standard_normal((steps, 1)).astype(np.float32)
    cost, back = forward(jnp.asarray(x)[:, :, None], jnp.asarray(lut), b, jnp.zeros((2 ** (L - b), 1)), True)
    states = trace_back(back, jnp.argmin(cost, axis=0).astype(jnp.int32), b)[1][:, 0]
    least, expected = brute_force(x, lut, b, closed=False)
    assert float(jnp.min(cost)) == pytest.approx(least, rel=1e-5)
    assert list(np.asarray(states)) == expected
    closed = exact_tail_biting(jnp.asarray(x)[:, :, None], jnp.asarray(lut), b)[:, 0]
    assert list(np.asarray(closed)) == brute_force(x, lut, b, closed=True)[1]


def test_symbols_of_more_than_a_byte():
    rng = np.random.default_rng(6)
    lut = rng.standard_normal(2**10).astype(np.float32)
    x = rng.standard_normal((2, 1, 4)).astype(np.float32)
    cost, back = forward(jnp.asarray(x), jnp.asarray(lut)[:, None], 9, jnp.zeros((2, 4)), True)
    assert back is not None and back.dtype == jnp.uint16
    states = trace_back(back, jnp.argmin(cost, axis=0).astype(jnp.int32), 9)[1]
    first, second = np.divmod(np.arange(2**19), 2**9)
    second += (first << 9) % 2**10
    for lane in range(4):
        total = np.square(lut[first] - x[0, 0, lane]) + np.square(lut[second] - x[1, 0, lane])
        best = np.argmin(total)
        assert list(np.asarray(states)[:, lane]) == [first[best], second[best]]


def test_two_passes_are_close_to_exact_tail_biting():
    rng = np.random.default_rng(0)
    lut = jnp.asarray(rng.standard_normal((2**8, 1)).astype(np.float32))
    x = jnp.asarray(rng.standard_normal((256, 1, 64)).astype(np.float32))

    def cost(states):
        return float(jnp.mean(jnp.square(jnp.take(lut[:, 0], states) - x[:, 0])))

    exact, full = cost(exact_tail_biting(x, lut, 2)), cost(tail_biting(x, lut, 2))
    short, hasty = cost(tail_biting(x, lut, 2, 64)), cost(tail_biting(x, lut, 2, 1))
    assert exact <= full <= 1.002 * exact
    assert exact <= short <= 1.002 * exact
    assert hasty > 1.002 * exact  # the seam does need some context


def is_closed_walk(states, L, b):
    before = np.roll(np.asarray(states), 1, axis=0)
    return np.all(np.asarray(states) >> b == before & (2 ** (L - b) - 1), axis=0)


@pytest.mark.parametrize(("L", "b", "steps"), [(6, 1, 8), (6, 2, 4), (8, 2, 16), (5, 3, 3), (9, 1, 64)])
@pytest.mark.parametrize("overlap", [None, 1, 6])
def test_one_pass_is_a_closed_walk_and_no_better_than_the_best(L, b, steps, overlap):
    """Sequences this short leave many survivors, so that most lanes are open and get their tails searched again."""
    rng = np.random.default_rng(L)
    lut = jnp.asarray(rng.standard_normal((2**L, 1)).astype(np.float32))
    x = jnp.asarray(rng.standard_normal((steps, 1, 32)).astype(np.float32))
    states = np.asarray(one_pass_tail_biting(x, lut, b, overlap))
    assert is_closed_walk(states, L, b).all()
    best = np.asarray(exact_tail_biting(x, lut, b))
    found, least = (np.sum(np.square(np.asarray(lut)[s, 0] - np.asarray(x)[:, 0]), axis=0) for s in (states, best))
    assert np.all(found >= least * (1 - 1e-5)) and np.any(found > least * (1 + 1e-5))


def test_one_pass_is_close_to_exact_tail_biting():
    rng = np.random.default_rng(0)
    lut = jnp.asarray(rng.standard_normal((2**8, 1)).astype(np.float32))
    x = jnp.asarray(rng.standard_normal((256, 1, 64)).astype(np.float32))

    def cost(states):
        assert is_closed_walk(states, 8, 2).all()
        return float(jnp.mean(jnp.square(jnp.take(lut[:, 0], states) - x[:, 0])))

    exact, two = cost(exact_tail_biting(x, lut, 2)), cost(tail_biting(x, lut, 2, 64))
    short, hasty = cost(one_pass_tail_biting(x, lut, 2, 32)), cost(one_pass_tail_biting(x, lut, 2, 1))
    assert exact <= short <= 1.002 * exact and short <= 1.001 * two
    # The one pass reads all of the sequence after the seam, so that little context before it already does.
    assert short <= hasty < cost(tail_biting(x, lut, 2, 1))


def test_the_search_is_an_option_of_the_codebook():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((32, 48)).astype(np.float32))
    book = codebooks.make("trellis", 2, L=8, V=2, code="lut", search="one_pass", overlap=16)
    codes = jax.jit(book.quantize)(x)
    states = np.asarray(book.states(codes)).reshape(-1, book.steps).T
    assert is_closed_walk(states, 8, 4).all()
    assert book.spec()["search"] == "one_pass" and codebooks.make(**book.spec()).spec() == book.spec()
    old = {name: value for name, value in book.spec().items() if name != "search"}
    assert codebooks.make(**old).spec()["search"] == "two_pass"  # what was written before the option existed


# MSE on unit Gaussians, tail-biting, T = 256, at 1 to 4 bits (algorithms.md 5.4, the upper end of what was reproduced,
# and 5.5), with the input RMS over that of the code
BEST = (1.05, 1.0, 0.95, 0.9)
TABLE = {
    ("1mad", 12): ((0.2812, 0.0738, 0.0199, 0.0055), (1.05, 0.97, 1.0, 1.0)),
    ("1mad", 16): ((0.2727, 0.0693, 0.01767, 0.00453), BEST),
    ("3inst", 16): ((0.2702, 0.0691, 0.01785, 0.00463), BEST),
    ("hyb", 16): ((0.2718, 0.0705, 0.0189, 0.00555), (1.05, 1.0, 0.9, 0.85)),
    ("mul1", 16): ((0.2755, 0.0686, 0.01745, 0.00446), BEST),
    ("mcg", 16): ((0.2701, 0.0689, 0.01747, 0.00457), BEST),
}


@pytest.mark.parametrize(("code", "L"), TABLE)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_distortion_of_a_gaussian(code, L, bits):
    if L == 16 and code in ("mul1", "mcg") and bits != 2:
        pytest.skip("experiments.bench codebook measures it; two bits stand for the others here")
    errors, gains = TABLE[code, L]
    rms = gains[bits - 1] * trellis_codes.RMS[code]
    book = codebooks.make("trellis", bits, L=L, code=code, rms=rms, overlap=None)
    rng = np.random.default_rng(11)
    x = rng.standard_normal((512, 512) if L < 16 else (256, 64)).astype(np.float32)
    x /= np.sqrt(np.mean(np.square(x)))
    codes = jax.jit(book.quantize)(x * np.float32(book.rms))
    error = float(np.mean(np.square(np.asarray(book.dequantize(codes)) / np.float32(book.rms) - x)))
    # 1.5% is what is asked for; with 64 tiles (L = 16) the sample itself is uncertain by 1%
    assert error == pytest.approx(errors[bits - 1], rel=0.015 if L < 16 else 0.025)


CASES = [
    (1, {"L": 6, "code": "lut"}),
    (2, {"L": 8}),
    (3, {"L": 8, "code": "3inst"}),
    (4, {"L": 6, "code": "mul1"}),
    (2, {"L": 10, "code": "hyb", "Q": 6}),
    (2, {"L": 10, "code": "hyb", "Q": 6, "V": 1}),
    (2, {"L": 9, "code": "lut", "V": 4}),
    (7, {"L": 9, "code": "mcg"}),
    (3, {"L": 13, "code": "lut", "V": 4}),  # symbols of 12 bits
    (5, {"L": 12, "code": "lut", "V": 2, "search": "one_pass"}),
]


@pytest.mark.parametrize(("bits", "options"), CASES)
def test_stream_is_the_published_layout(bits, options):
    """States are circular windows of each tile's string, most significant bit first, in 16-bit words."""
    book = codebooks.make("trellis", bits, **options)
    x = np.random.default_rng(2).standard_normal((32, 48)).astype(np.float32) * np.float32(book.rms)
    codes = jax.jit(book.quantize)(x)
    packed = book.pack(codes)
    assert packed.shape == (bits * 32 * 48 // 32,) and packed.dtype == jnp.uint32
    np.testing.assert_array_equal(book.unpack(packed, (32, 48)), codes)
    words = np.asarray(packed).astype("<u4").view("<u2").reshape(2, 3, 16 * bits)
    table = None if book.table is None else jnp.asarray(book.table)
    values = np.asarray(book.dequantize(codes))
    for i, j in ((0, 0), (1, 2)):
        string = "".join(f"{word:016b}" for word in words[i, j])
        circular = string + string
        for t in (0, 1, book.steps // 2, book.steps - 1):
            state = int(circular[t * book.step_bits :][: book.L], 2)
            assert state == int(book.states(codes)[i, j, t])
            expected = trellis_codes.state_values(book.code, jnp.asarray([state]), table)[0]
            tile = values[16 * i : 16 * i + 16, 16 * j : 16 * j + 16].reshape(-1)
            np.testing.assert_array_equal(tile[t * book.V : (t + 1) * book.V], expected)
    assert codebooks.make(**book.spec()).spec() == book.spec()


def test_the_budget_changes_memory_and_not_the_codes():
    x = np.random.default_rng(3).standard_normal((64, 112)).astype(np.float32)
    small, large = (codebooks.make("trellis", 2, L=12, budget_mib=size) for size in (2, 64))
    assert (small.batch, large.batch) == (8, 64)
    programs = [jax.jit(book.quantize).lower(x).compile() for book in (small, large)]
    np.testing.assert_array_equal(programs[0](x), programs[1](x))
    memory = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert memory[0] < 5 * 2**20 and memory[0] < memory[1] / 2


@pytest.mark.parametrize(
    ("bits", "options", "message"),
    [
        (9, {}, "1 or 2 or 3 or 4 or 5 or 6 or 7 or 8 bits"),
        (2.5, {}, "not 2.5"),
        (2, {"code": "4mad"}, "1mad"),
        (2, {"L": 17}, "6 to 16"),
        (2, {"V": 2}, "'1mad' has 1 weights"),
        (2, {"code": "hyb", "V": 4}, "1 or 2"),
        (4, {"code": "lut", "V": 4, "L": 16}, "16 new bits .* fewer than L=16"),
        (6, {"L": 6}, "fewer than L=6"),
        (2, {"code": "hyb", "Q": 10}, "2.6 to 2.9"),
        (2, {"overlap": 0}, "overlap is 0"),
        (2, {"budget_mib": 0}, "budget_mib is 0"),
        (2, {"search": "beam"}, "search is 'beam'; allowed are.*one_pass"),
        (2, {"rms": -1.0}, "rms is -1.0"),
    ],
)
def test_bad_options_are_refused(bits, options, message):
    with pytest.raises(InputError, match=message):
        codebooks.make("trellis", bits, **options)


def test_bad_matrices_and_streams_are_refused():
    book = codebooks.make("trellis", 2, L=8)
    with pytest.raises(InputError, match="16×16.*24×16.*pad"):
        book.quantize(jnp.zeros((24, 16)))
    with pytest.raises(InputError, match="has 16 words.*found 17"):
        book.unpack(jnp.zeros(17, jnp.uint32), (16, 16))
    with pytest.raises(InputError, match="multiples of 16"):
        book.unpack(jnp.zeros(24, jnp.uint32), (24, 16))

"""Import of a published EXL3 layer, against a decoder written here with Python integers and plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qjax import codebooks
from qjax.errors import InputError, ModelFileError
from qjax.interchange.exl3 import MARKERS, pack_states, read_layer, unpack_states


def half(bits: int) -> np.float16:
    return np.array(bits, np.uint16).view(np.float16)[()]


def value(code: str, state: int) -> float:
    """What a state stands for, in float16 arithmetic."""
    if code == "mul1":
        word = state * 0x83DCD12D % 2**32
        total = sum(word >> shift & 255 for shift in (0, 8, 16, 24))
        exact = float(half(0x6400 + total)) * float(half(0x1EEE)) + float(half(0xC931))
        return float(np.float16(exact))
    word = state * 0xCBAC1FED if code == "mcg" else state * 89226354 + 64248484
    word = word % 2**32 & 0x8FFF8FFF ^ 0x3B603B60
    return float(half(word >> 16) + half(word & 0xFFFF))


def fragment_b() -> dict[tuple[int, int], tuple[int, int]]:
    """Operand B (16×8) of mma.m16n8k16 by the PTX manual: (thread, register) -> (row, column)."""
    places = {}
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        for i in range(4):
            row = member * 2 + (i & 1) if i < 2 else member * 2 + (i & 1) + 8
            places[lane, i] = (row, group)
    return places


def slow_decode(tensors: dict[str, np.ndarray], bits: int, code: str) -> np.ndarray:
    """W [in, out] by the definition: one bit, one value at a time; dense Hadamard matrices in float64."""
    trellis = tensors["trellis"]
    places = fragment_b()
    q = np.zeros((16 * trellis.shape[0], 16 * trellis.shape[1]))
    for i, j in np.ndindex(*trellis.shape[:2]):
        numbers = [int(number) % 65536 for number in trellis[i, j]]
        string = "".join(f"{numbers[k + 1]:016b}{numbers[k]:016b}" for k in range(0, len(numbers), 2))
        for t in range(256):
            end = (t + 1) * bits
            state = int("".join(string[(end - 16 + n) % len(string)] for n in range(16)), 2)
            row, column = places[t // 8, t % 4]
            q[16 * i + row, 16 * j + column + 8 * (t % 8 // 4)] = value(code, state)
    left, right = (np.kron(np.eye(size // 128), scipy.linalg.hadamard(128) / 128**0.5) for size in q.shape)
    return np.diag(tensors["suh"].astype(float)) @ left @ q @ right @ np.diag(tensors["svh"].astype(float))


def layer(bits: int, code: str, inputs: int = 128, outputs: int = 128) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(bits)
    words = rng.integers(-(2**15), 2**15, (inputs // 16, outputs // 16, 16 * bits), dtype=np.int16)
    tensors = {
        "trellis": words,
        "suh": (rng.choice([-1, 1], inputs) * rng.uniform(0.5, 2, inputs)).astype(np.float16),
        "svh": (rng.normal(size=outputs) * 0.03).astype(np.float16),
    }
    if code != "3inst":
        tensors[code] = np.array(MARKERS[code], np.uint32).view(np.int32)
    return tensors


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("code", ["3inst", "mcg", "mul1"])
def test_dense_weight(bits, code):
    tensors = layer(bits, code, 128, 256 if bits == 3 else 128)
    found = read_layer(tensors, "model.layers.0.mlp.up_proj")
    assert (found.bits, found.code) == (bits, code)
    dense = found.dequantize()
    expected = slow_decode(tensors, bits, code).T
    assert dense.dtype == np.float32 and dense.shape == expected.shape
    np.testing.assert_allclose(dense, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_the_inverse(bits):
    trellis = layer(bits, "mcg")["trellis"]
    states = unpack_states(trellis)
    np.testing.assert_array_equal(pack_states(states, bits), trellis)
    broken = states.copy()
    broken[1, 2, 3] ^= 1 << (bits - 1)
    with pytest.raises(InputError, match=f"not closed walks of {bits} bits"):
        pack_states(broken, bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_own_trellis_has_the_same_states(bits):
    """EXL3's window of state t is that of qjax when the string is turned by 16 − K bits."""
    found = read_layer(layer(bits, "mul1"))
    book = codebooks.make("trellis", bits, L=16, code="mul1")
    np.testing.assert_array_equal(book.states(jnp.asarray(found.symbols())), found.states)


def test_a_search_is_stored_and_read_back():
    book = codebooks.make("trellis", 2, L=8, code="mul1")
    codes = book.quantize(jnp.asarray(np.random.default_rng(0).standard_normal((16, 16)), jnp.float32))
    wide = codebooks.make("trellis", 2, L=16, code="mul1")  # any string is a walk of the longer state, too
    states = np.asarray(wide.states(codes)).astype(np.uint16)
    np.testing.assert_array_equal(unpack_states(pack_states(states, 2)), states)


def test_packed_signs_and_bias():
    tensors = layer(2, "3inst")
    signs = np.where(np.arange(128) % 3 == 0, -1, 1)
    word = [sum((signs[16 * i + n] < 0) << n for n in range(16)) for i in range(8)]
    del tensors["suh"]
    tensors |= {"su": np.array(word, np.uint16).view(np.int16), "bias": np.arange(128).astype(np.float16)}
    found = read_layer(tensors)
    np.testing.assert_array_equal(found.input_scale, signs.astype(np.float16))
    np.testing.assert_array_equal(found.bias, np.arange(128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trellis": None}, "up: there is no tensor 'trellis'"),
        ({"trellis": np.zeros((8, 8, 32), np.int32)}, "up: the trellis is int32 with 3 dimensions; .* int16"),
        ({"trellis": np.zeros((8, 256), np.int16)}, "int16 with 2 dimensions"),
        ({"trellis": np.zeros((8, 8, 33), np.int16)}, "has 33 numbers per tile; allowed are 16 K for K = 1 to 8"),
        ({"trellis": np.zeros((8, 8, 40), np.int16)}, "half-integer widths"),
        ({"trellis": np.zeros((8, 8, 144), np.int16)}, "has 144 numbers"),
        ({"trellis": np.zeros((8, 9, 32), np.int16)}, "128 inputs and 144 outputs; both are multiples of 128"),
        ({"suh": np.ones(64, np.float16)}, r"suh is float16\[64\]; by the trellis it is float16\[128\]"),
        ({"svh": np.ones(128, np.float32)}, r"svh is float32\[128\]"),
        ({"svh": None}, "up: there is no tensor 'svh'"),
        ({"svh": np.full(128, np.inf, np.float16)}, "svh has a value that is not finite"),
        ({"suh": None, "su": np.ones(4, np.int16)}, r"su is int16\[4\]; by the trellis it is int16\[8\]"),
        ({"bias": np.ones(64, np.float16)}, r"bias is float16\[64\]; it holds 128 finite floats"),
        ({"mul1": np.array(0, np.int32)}, "markers of two codes"),
        ({"mcg": np.array(12345, np.int32)}, "the marker mcg is 0x3039; only the multiplier 0xcbac1fed"),
        ({"mcg": np.ones(2, np.float32)}, r"the marker mcg is float32\[2\]"),
    ],
)
def test_damaged_tensors_are_refused(change, message):
    tensors = {**layer(2, "mcg"), **change}
    with pytest.raises(ModelFileError, match=message):
        read_layer({name: tensor for name, tensor in tensors.items() if tensor is not None}, "up")


def test_other_widths_are_not_packed():
    with pytest.raises(InputError, match="1 to 8 bits per weight, found 9"):
        pack_states(np.zeros((1, 1, 256), np.uint16), 9)

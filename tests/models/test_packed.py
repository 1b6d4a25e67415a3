"""Quantised checkpoints of other tools: bit streams against plain Python, values against files that the tools wrote."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import ModelFileError
from qjax.models.checkpoints.packed.bits import pack_rows, unpack_rows
from qjax.models.checkpoints.packed.integers import (
    Integers,
    awq,
    compressed_tensors,
    from_awq,
    from_compressed_tensors,
    from_gptq,
    gptq,
)
from qjax.models.checkpoints.packed.schemes import SCHEMES, scheme
from qjax.models.checkpoints.safetensors_source import SafetensorsSource

FILE = pathlib.Path(__file__).parent.parent / "fixtures" / "packed" / "compressed_tensors_0.20.1.safetensors"


def matrix(bits, rows=32, columns=64, groups=4, symmetric=False, seed=0):
    rng = np.random.default_rng(seed)
    zero = None if symmetric else rng.integers(1, 2**bits, (rows, groups))
    scale = rng.uniform(0.01, 0.1, (rows, groups)).astype(np.float16).astype(np.float32)
    return Integers(rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8), bits, scale, zero)


def bit(words, index):
    """Bit `index` of a sequence of 32-bit words, as one long number."""
    return int(words[index // 32]) >> (index % 32) & 1


def code(words, index, bits):
    return sum(bit(words, index * bits + i) << i for i in range(bits))


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_rows_are_streams(bits, rows, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert [[code(row, i, bits) for i in range(columns)] for row in packed] == codes.tolist()
    assert np.array_equal(unpack_rows(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_and_back(bits, symmetric):
    own = matrix(bits, symmetric=symmetric)
    arrays = compressed_tensors(own)
    read = from_compressed_tensors(arrays, bits, "x")
    assert np.array_equal(read.codes, own.codes) and np.array_equal(read.values(), own.values())
    if not symmetric:  # zeros run down the rows of every group
        column = arrays["weight_zero_point"].view(np.uint32)[:, 1]
        assert [code(column, row, bits) for row in range(32)] == own.zeros[:, 1].tolist()


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_layout_before_018_has_whole_codes_in_every_word(bits):
    own = matrix(bits, columns=256, symmetric=True)
    per = 32 // bits
    old = np.zeros((32, -(-256 // per)), np.uint32)
    for i in range(256):
        old[:, i // per] |= own.codes[:, i].astype(np.uint32) << np.uint32(bits * (i % per))
    arrays = {**compressed_tensors(own), "weight_packed": old.view(np.int32)}
    assert np.array_equal(from_compressed_tensors(arrays, bits, "x").codes, own.codes)


def test_a_width_that_does_not_tell_the_layout_asks_for_the_version():
    own = matrix(3, columns=16, groups=1, symmetric=True)  # two words either way
    with pytest.raises(ModelFileError, match=r"x.weight_packed: 16 codes of 3 bits .* \"version\""):
        from_compressed_tensors(compressed_tensors(own), 3, "x")
    assert np.array_equal(from_compressed_tensors(compressed_tensors(own), 3, "x", dense=True).codes, own.codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_and_back(bits, version):
    own = matrix(bits)
    arrays = gptq(own, version)
    assert [code(arrays["qweight"].view(np.uint32)[:, 5], i, bits) for i in range(64)] == own.codes[5].tolist()
    stored = [code(arrays["qzeros"].view(np.uint32)[2], row, bits) for row in range(32)]
    assert stored == (own.zeros[:, 2] - (version == 1)).tolist()
    read = from_gptq(arrays, bits, "x", version)
    assert np.array_equal(read.values(), own.values()) and read.group_of is None
    order = np.random.default_rng(1).permutation(np.arange(64) // 16).astype(np.int32)
    shuffled = Integers(own.codes, bits, own.scale, own.zero, order)
    again = from_gptq(gptq(shuffled, version), bits, "x", version)
    expected = (own.codes - own.zeros[:, order]) * own.scale[:, order]
    assert np.array_equal(again.values(), expected.astype(np.float32))


def test_awq_and_back():
    own = matrix(4)
    arrays = awq(own)
    words = arrays["qweight"].view(np.uint32)
    for output, nibble in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
        assert np.array_equal(words[:, 1] >> np.uint32(4 * nibble) & np.uint32(15), own.codes[8 + output])
    assert np.array_equal(from_awq(arrays, 4, "x").values(), own.values())


def arrays_of(kind, folder):
    """The arrays of one linear of the fixture."""
    shutil.copyfile(FILE, folder / "model.safetensors")
    source = SafetensorsSource(folder)
    return {name.split("/")[1]: source.raw(name) for name in source.names if name.startswith(f"{kind}/")}


def config(kind):
    with FILE.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return json.loads(header["__metadata__"][kind])


@pytest.mark.parametrize("kind", ["w4g", "w8c", "w3g", "w4a", "int8", "fp8", "mxfp4", "nvfp4"])
def test_values_are_those_that_compressed_tensors_reads(kind, tmp_path):
    arrays = arrays_of(kind, tmp_path)
    expected = arrays.pop("expected")
    found = scheme(config(kind), "config.json").values("model.layers.0.self_attn.k_proj", arrays)
    if kind == "nvfp4":  # which the tool itself decodes to bfloat16
        found = found.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(found, expected)


def test_fp8_has_a_scale_for_every_block():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(20, 24)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (3, 3)).astype(np.float32)
    read = scheme({"quant_method": "fp8", "weight_block_size": [8, 10]}, "config.json")
    found = read.values("x", {"weight": weight, "weight_scale_inv": scale})
    for i in range(20):
        for j in range(24):
            assert found[i, j] == np.float32(weight[i, j]) * scale[i // 8, j // 10]
    with pytest.raises(ModelFileError, match=r"x.weight_scale_inv has shape \[3, 2\]"):
        read.values("x", {"weight": weight, "weight_scale_inv": scale[:, :2]})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"quant_method": "exotic"}, "method 'exotic', which is not read; read are"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'"),
        ({"quant_method": "awq", "bits": 3}, "bits is 3; it is 4"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups is {}"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {}}, "transform_config": {"x": 1}},
            "transform_config rotates activations",
        ),
    ],
)
def test_what_is_not_read_is_refused(table, message):
    with pytest.raises(ModelFileError, match=message):
        scheme(table, "config.json")


def test_sizes_that_contradict_each_other_are_refused():
    arrays = {**gptq(matrix(4)), "scales": np.ones((4, 31), np.float16)}
    with pytest.raises(ModelFileError, match="x: qweight"):
        from_gptq(arrays, 4, "x")
    with pytest.raises(ModelFileError, match="multiples of 32"):
        gptq(matrix(4, rows=20))
    with pytest.raises(ModelFileError, match="zero of 0"):
        gptq(Integers(matrix(4).codes, 4, matrix(4).scale, np.zeros((32, 4), int)), version=1)
    assert {"gptq", "awq", "compressed-tensors", "fp8"} <= set(SCHEMES)

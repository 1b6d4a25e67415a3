"""Import of a published QuIP# layer, from files made by an encoder written here with plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qjax.codebooks import make
from qjax.errors import InputError, ModelFileError
from qjax.interchange.quip_sharp import decode_words, read_layer
from qjax.linalg.hadamard import base_matrix

PARAMETERS = {
    "codebook": "E8P12", "codebook_version": 1, "codesz": 8, "fused": True, "idx_dtype": "torch.int64", "lora_rank": 0,
    "model_version": 1, "outlier_channel_split": False, "packsz": 4, "rescale_WH": False,
}  # fmt: skip


def encode(codes: np.ndarray) -> np.ndarray:
    """Codes [m, n/8] in the published layout (m/16, n/64, 8, 4) int64, one code and one bit at a time."""
    m, groups = codes.shape
    words = np.zeros((m // 16, groups // 8, 8, 4), np.uint64)
    for row in range(0, m, 2):
        for group in range(0, groups, 2):
            four = [codes[row, group], codes[row + 1, group], codes[row, group + 1], codes[row + 1, group + 1]]
            word = 0
            for i, code in enumerate(map(int, four)):
                word |= (code >> 8) << (8 * i)
                for j in range(8):
                    word |= ((code >> j) & 1) << (32 + 4 * j + i)
            words[row // 16, group // 8, row % 16 // 2, group % 8 // 2] = word
    return words.view(np.int64)


def layer(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 65536, (m, n // 8)).astype(np.uint16)
    return codes, {
        "Qidxs": encode(codes),
        "SU": generator.choice([-1.0, 1.0], n).astype(np.float16),
        "SV": generator.normal(size=m).astype(np.float16),
        "Wscale": np.float32(0.037),
    }


def test_codes_of_a_published_layer():
    codes, tensors = layer(48, 192)
    found = read_layer(tensors, PARAMETERS, "model.layers.0.self_attn.o_proj")
    assert found.codes.dtype == np.uint16
    assert np.array_equal(found.codes, codes)
    flat = tensors["Qidxs"].reshape(-1).view(np.uint64)
    assert np.array_equal(decode_words(flat, (48, 192)), codes)


def test_one_word_bit_by_bit():
    words = np.zeros((1, 1, 8, 4), np.uint64)
    words[0, 0, 3, 2] = 0x21 << 16 | 1 << (32 + 4 * 5 + 2)  # code 2 of the word: row 6 + 0, group 4 + 1
    codes = decode_words(words, (16, 64))
    assert codes[6, 5] == 0x21 << 8 | 1 << 5
    assert codes.sum() == codes[6, 5]


def test_dense_weight_of_power_of_two_dimensions():
    codes, tensors = layer(32, 64)
    found = read_layer(tensors, PARAMETERS)
    values = np.asarray(make("e8p", 2).dequantize(jnp.asarray(codes)), np.float64) * np.float64(tensors["Wscale"])
    assert np.allclose(found.rotated(), values, rtol=1e-6)
    out, inner = (scipy.linalg.hadamard(size) / size**0.5 for size in (32, 64))
    expected = (
        np.diag(tensors["SV"].astype(np.float64)) @ out @ values @ inner.T @ np.diag(tensors["SU"].astype(np.float64))
    )
    assert np.allclose(found.dequantize(), expected, atol=1e-6)


def test_dense_weight_with_a_base_of_its_own():
    codes, tensors = layer(48, 192, seed=1)
    base = base_matrix(12)  # skew, so that its transpose is another matrix
    dense = read_layer(tensors, PARAMETERS).dequantize({48: base, 192: base})
    out, inner = (np.kron(base, scipy.linalg.hadamard(size // 12)) / size**0.5 for size in (48, 192))
    values = np.asarray(make("e8p", 2).dequantize(jnp.asarray(codes)), np.float64) * np.float64(tensors["Wscale"])
    expected = (
        np.diag(tensors["SV"].astype(np.float64)) @ out @ values @ inner.T @ np.diag(tensors["SU"].astype(np.float64))
    )
    assert np.allclose(dense, expected, atol=1e-6)


def test_the_output_uses_the_signs_scale_and_rotations_of_the_inference_recipe():
    _, tensors = layer(32, 64, seed=2)
    found = read_layer(tensors, PARAMETERS)
    x = np.random.default_rng(3).normal(size=64)
    out, inner = (scipy.linalg.hadamard(size) / size**0.5 for size in (32, 64))
    y = tensors["SV"] * (out @ (found.rotated() @ (inner.T @ (tensors["SU"] * x))))
    assert np.allclose(found.dequantize() @ x, y, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"codebook_version": 0},
            "layer: the codes were made for version 0 of the codebook table, and qjax has version 1",
        ),
        ({"codebook_version": 2}, "made for version 2 .* take a newer revision of the checkpoint, or quantise"),
        ({"codebook": "E8P12RVQ4B"}, "quip_params.codebook is 'E8P12RVQ4B'; only the 2-bit codebook 'E8P12'"),
        ({"rescale_WH": True}, "quip_params.rescale_WH is True; only False can be imported"),
        ({"lora_rank": 64}, "quip_params.lora_rank is 64; only 0 can be imported"),
    ],
)
def test_other_parameters_are_refused(change, message):
    _, tensors = layer(16, 64)
    with pytest.raises(ModelFileError, match=message):
        read_layer(tensors, {**PARAMETERS, **change})


def test_a_missing_version_is_version_zero():
    _, tensors = layer(16, 64)
    with pytest.raises(ModelFileError, match="made for version 0"):
        read_layer(tensors, {"codebook": "E8P12"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Qidxs": np.zeros(31, np.int64)}, "q_proj: 16×64 weights have 32 packed words, found 31"),
        ({"Qidxs": np.zeros(32, np.int32)}, "q_proj: the packed codes are int32; format version 1 has 64-bit integers"),
        ({"SU": np.ones(40)}, "q_proj: a packed layer has a multiple of 16 rows and of 64 columns, found 16×40"),
        ({"SV": np.full(16, np.nan)}, "q_proj: SV has a value that is not finite"),
        ({"Wscale": np.ones(3)}, "q_proj: Wscale has 3 values; a layer has one"),
    ],
)
def test_damaged_tensors_are_refused(change, message):
    _, tensors = layer(16, 64)
    with pytest.raises(ModelFileError, match=message):
        read_layer({**tensors, **change}, PARAMETERS, "q_proj")


def test_a_missing_tensor_is_named():
    _, tensors = layer(16, 64)
    del tensors["SU"], tensors["Wscale"]
    with pytest.raises(ModelFileError, match="tensors SU, Wscale are missing; a layer has Qidxs, SU, SV, Wscale"):
        read_layer(tensors, PARAMETERS)


def test_a_dimension_without_its_base_is_refused():
    _, tensors = layer(48, 64)
    found = read_layer(tensors, PARAMETERS)
    with pytest.raises(
        InputError,
        match=r"a dimension of 48 needs a K×K Hadamard matrix .* pass the checkpoint's own as bases=\{48: matrix\}",
    ):
        found.dequantize()
    with pytest.raises(InputError, match="not a Hadamard matrix"):
        found.dequantize({48: np.ones((12, 12))})

"""Bad model files and weights: cases 1 to 18 of the 36 that must give a clear error or a documented recovery."""

import json
import os
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest
from faults import (
    INDEX,
    WEIGHTS,
    dense,
    edited,
    problem,
    quantize,
    refused,
    with_header,
)
from safetensors.numpy import load_file, save_file

from qjax import models
from qjax.codebooks.scaling import ScaleRule
from qjax.errors import InputError, ModelFileError, NumericsError

# Model files ---------------------------------------------------------------------------------------------------------


def test_case_01_truncated_shard(shards):
    path = shards / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(shards, r"part-1.safetensors is truncated or has extra bytes.*fetch it again")


def test_case_02_missing_shard_listed_in_the_index(shards):
    (shards / "part-1.safetensors").unlink()
    refused(shards, r"names the shard part-1.safetensors, which is not in the folder")


def test_case_03_tensor_in_two_shards_and_in_none(shards):
    table = json.loads((shards / INDEX).read_text())
    table["weight_map"]["ghost"] = "part-0.safetensors"
    (shards / INDEX).write_text(json.dumps(table))
    refused(shards, "lists tensor ghost in part-0.safetensors, but no shard has it")
    shutil.copyfile(shards / "part-0.safetensors", shards / "part-1.safetensors")
    refused(shards, "is in two shards: part-0.safetensors and part-1.safetensors")


def test_case_04_header_longer_than_the_file(folder):
    (folder / WEIGHTS).write_bytes((10**9).to_bytes(8, "little") + b"{}")
    refused(folder, "its header claims 1000000000 bytes, the file has 10")


def test_case_05_header_that_is_no_json_has_duplicates_or_is_too_long(folder):
    with_header(folder / WEIGHTS, b"{nonsense")
    refused(folder, "the header of .* is not valid JSON")
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    with_header(folder / WEIGHTS, b'{"a":' + entry + b',"a":' + entry + b"}", bytes(4))
    refused(folder, "the key 'a' occurs twice")
    with_header(folder / WEIGHTS, b"[" * 100_000)
    refused(folder, "is not valid JSON")
    with (folder / WEIGHTS).open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)  # a hole: takes no disk
    refused(folder, "exceeds the format's limit")


def test_case_06_offsets_that_overlap_or_leave_the_file(folder):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    with_header(folder / WEIGHTS, {"a": entry, "b": {**entry, "data_offsets": [4, 12]}}, bytes(12))
    refused(folder, "tensor b overlaps the tensor before it")
    with_header(folder / WEIGHTS, {"a": entry, "b": {**entry, "data_offsets": [8, 16]}}, bytes(8))
    refused(folder, "is truncated or has extra bytes")


@pytest.mark.parametrize(
    ("shape", "message"), [([2**62, 4], "needs 73786976294838206464 bytes"), ([-1], "shape"), ([True], "shape")]
)
def test_case_07_shapes_that_overflow_are_negative_or_boolean(folder, shape, message):
    with_header(folder / WEIGHTS, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}, bytes(4))
    refused(folder, message)


@pytest.mark.parametrize("kind", ["F8_E4M3", "I64", "F4"])
def test_case_08_dtypes_that_are_not_weights(folder, kind):
    tensors = load_file(folder / WEIGHTS)
    header, body = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes()
        dtype, shape = "BF16", list(value.shape)
        if name == "model.norm.weight":
            dtype, raw = kind, bytes(len(raw) * (4 if kind == "I64" else 1) // (1 if kind == "I64" else 2))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    assert next(iter(tensors.values())).dtype == ml_dtypes.bfloat16
    with_header(folder / WEIGHTS, header, body)
    refused(folder, f"model.norm.weight (has the unknown dtype '{kind}'|is stored as {kind})")


def test_case_09_pickles_are_never_opened(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    refused(folder, "pickle files .pytorch_model.bin.*Convert the model to safetensors")
    refused(folder / "pytorch_model.bin", "is a pickle file")


def test_case_10_git_lfs_pointer_instead_of_weights(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, "Git LFS pointer.*git lfs pull")


def test_case_11_paths_and_links_out_of_the_folder(shards, tmp_path):
    index = json.loads((shards / INDEX).read_text())
    for outside in ("../part.safetensors", "/etc/part.safetensors"):
        changed = {**index["weight_map"], "model.norm.weight": outside}
        (shards / INDEX).write_text(json.dumps({"weight_map": changed}))
        refused(shards, "lies outside the model's folder")
    (shards / INDEX).write_text(json.dumps(index))
    os.replace(shards / "part-0.safetensors", tmp_path / "elsewhere")
    (shards / "part-0.safetensors").symlink_to(tmp_path / "elsewhere")  # a link of the user's own is no name in a file
    assert models.open_model(shards).config.num_layers == 2


def test_case_12_configuration_that_disagrees_with_the_tensors(folder):
    refused(edited(folder, vocab_size=65), r"embed_tokens.weight has shape \[64, 32\].* asks for \[65, 32\]")
    refused(edited(folder, vocab_size=64, num_key_value_heads=4), r"k_proj.weight has shape \[16, 32\]")
    refused(edited(folder, num_key_value_heads=3), "4 attention heads cannot share 3 key/value heads")
    edited(folder, num_key_value_heads=2)
    save_file({k: v for k, v in load_file(folder / WEIGHTS).items() if k != "lm_head.weight"}, folder / WEIGHTS)
    refused(folder, "lm_head.weight .* is missing .or set tie_word_embeddings")


def test_case_13_unsupported_architecture_and_quantised_model(folder):
    refused(edited(folder, architectures=["MambaForCausalLM"]), "MambaForCausalLM is not supported; supported are")
    edited(folder, architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "gptq"})
    refused(folder, "has a quantization_config and no tensor of the files ends in qweight")
    edited(folder, quantization_config="exotic")
    refused(folder, "method 'exotic', which is not read; read are")


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_case_14_weights_that_are_not_finite(folder, value):
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelFileError, match=rf"tensor {name} has 1 values that are not finite.*\[3, 5\]"):
        models.load(folder)


def test_case_15_zero_rows_columns_and_matrices():
    weight, h = problem()
    for rule in (None, ScaleRule("rms", "row")):
        matrix, report = quantize(np.zeros_like(weight), h, scale=rule)
        assert report.proxy_loss == 0 and np.abs(dense(matrix)).max() < 1e-25
    keep = np.arange(16) != 3
    for zeroed in (weight * keep[:, None], weight * np.tile(keep, 2)):
        matrix, report = quantize(np.ascontiguousarray(zeroed, np.float32), h)
        assert np.isfinite(dense(matrix)).all() and report.proxy_loss < 0.2
    matrix, _ = quantize(
        np.ascontiguousarray(weight * keep[:, None]), h, scale=ScaleRule("rms", "row"), incoherence="none"
    )
    assert np.abs(dense(matrix)[3]).max() < 1e-6 < np.abs(dense(matrix)[2]).min()


def test_case_16_a_huge_outlier_and_overflow(folder):
    weight, h = problem()
    weight[2, 5] = 1e4
    matrix, report = quantize(weight, h)
    assert np.isfinite(dense(matrix)).all() and report.proxy_loss < 0.2
    with pytest.raises(NumericsError, match=r"layer l7: the losses are not finite: weights reach 1e\+34"):
        quantize(weight * np.float32(1e30), h)
    tensors = {name: value.astype(np.float32) for name, value in load_file(folder / WEIGHTS).items()}
    tensors["model.norm.weight"][1] = 1e6
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelFileError, match=r"model.norm.weight has 1 values that are not finite in float16.*float32"):
        models.load(folder, "float16")


@pytest.mark.parametrize(("m", "n", "codebook"), [(7, 92, "half_integer"), (13, 20, "e8p"), (3, 23, "trellis")])
def test_case_17_sizes_without_a_hadamard_matrix_are_padded(m, n, codebook):
    weight, h = problem(m, n)
    matrix, report = quantize(weight, h, codebook=codebook)
    assert dense(matrix).shape == (m, n) and report.padded[1] >= n and report.proxy_loss < 0.3


@pytest.mark.parametrize(("m", "n"), [(1, 32), (32, 1), (1, 1)])
def test_case_18_a_single_row_or_column(m, n):
    weight, h = problem(m, n)
    matrix, report = quantize(weight, h)
    assert dense(matrix).shape == (m, n) and report.proxy_loss < 0.6


def test_case_18_no_rows_at_all():
    with pytest.raises(InputError, match=r"layer l7: .* both positive; found \(0, 4\)"):
        quantize(np.zeros((0, 4), np.float32), np.eye(4, dtype=np.float32))

"""Damaged, incomplete and hostile safetensors folders: each one a ModelFileError that names the thing."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qjax.errors import ModelFileError
from qjax.models import load, open_model
from qjax.models.checkpoints.safetensors_source import read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_every_tensor_reads_as_the_safetensors_package_reads_it(fixtures: Path):
    source = open_model(fixtures / "qwen2").weights
    expected = load_file(fixtures / "qwen2" / WEIGHTS)
    assert source.names == expected.keys()
    for name, values in expected.items():
        assert source.shape(name) == values.shape and source.dtype(name) == "BF16"
        np.testing.assert_array_equal(source.read(name), values)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floating_dtypes_are_accepted(folder: Path, tensors: dict[str, np.ndarray], dtype: Any):
    save_file({name: values.astype(dtype) for name, values in tensors.items()}, folder / WEIGHTS)
    embed = np.asarray(load(folder).params["embed"])
    np.testing.assert_array_equal(embed, tensors["model.embed_tokens.weight"].astype(dtype).astype(np.float32))


def test_shards_load_like_one_file(fixtures: Path, shards: Path):
    whole, split = load(fixtures / "llama3"), load(shards)
    np.testing.assert_array_equal(whole.params["head"], split.params["head"])
    assert len(open_model(shards).weights.files) == 2
    assert whole.fingerprint["weights"] != split.fingerprint["weights"]


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -1000])
def test_truncated_file(folder: Path, keep: int):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFileError, match=rf"{WEIGHTS} is truncated"):
        open_model(folder)


def test_extra_bytes(folder: Path):
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ModelFileError, match="extra bytes"):
        open_model(folder)


def test_header_longer_than_the_file(folder: Path):
    path = folder / WEIGHTS
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ModelFileError, match="header claims 1152921504606846976 bytes"):
        open_model(folder)


def test_header_over_the_formats_limit(tmp_path: Path):
    path = tmp_path / WEIGHTS
    with path.open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(300_000_000)  # sparse
    with pytest.raises(ModelFileError, match="exceeds the format's limit"):
        read_header(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{broken", "not valid JSON"),
        (b"[1, 2]", "holds a JSON list"),
        (b'{"a": 1, "a": 2}', "key 'a' occurs twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": {"dtype": "F32"}}', "must have exactly"),
        (b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}', "unknown dtype 'Q9'"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', r"shape \[-1\]"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', r"shape \[True\]"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "needs 4 bytes"),
        (
            b'{"a": {"dtype": "F32", "shape": [4611686018427387905], "data_offsets": [0, 4]}}',
            "needs 18446744073709551620",
        ),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}', "two integers"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "leaves a gap"),
    ],
)
def test_bad_headers(tmp_path: Path, text: bytes, message: str):
    path = tmp_path / WEIGHTS
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ModelFileError, match=message):
        read_header(path)


def test_overlapping_tensors(folder: Path):
    def overlap(header: dict[str, Any]) -> None:
        names = sorted(name for name in header if name.endswith("k_proj.weight"))
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]

    rewrite_header(folder / WEIGHTS, overlap)
    with pytest.raises(ModelFileError, match=r"k_proj.weight (overlaps|leaves a gap)"):
        open_model(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_header_bits_never_escape_the_documented_error(folder: Path, data: st.DataObject):
    path = folder / WEIGHTS
    original = path.read_bytes()
    length = int.from_bytes(original[:8], "little")
    damaged = bytearray(original)
    for position in data.draw(st.lists(st.integers(0, 8 + length - 1), min_size=1, max_size=4)):
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        source = open_model(folder).weights
        for name in source.names:
            source.read(name)
    except ModelFileError:
        pass
    finally:
        path.write_bytes(original)


def test_git_lfs_pointer(folder: Path):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(ModelFileError, match=r"Git LFS pointer.*git lfs pull"):
        open_model(folder)


def test_shard_missing_from_the_folder(shards: Path):
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFileError, match="names the shard model-00002-of-00002.safetensors"):
        open_model(shards)


def test_tensor_in_two_shards(shards: Path, tensors: dict[str, np.ndarray]):
    save_file(tensors, shards / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelFileError, match=r"tensor \S+ is in two shards"):
        open_model(shards)


def edit_index(shards: Path, **changes: Any) -> None:
    table = json.loads((shards / INDEX).read_text())
    table["weight_map"] |= changes
    (shards / INDEX).write_text(json.dumps(table))


def test_tensor_in_no_shard(shards: Path):
    edit_index(shards, **{"model.layers.9.mlp.up_proj.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(ModelFileError, match=r"layers.9.mlp.up_proj.weight.*no shard has it"):
        open_model(shards)


def test_tensor_in_another_shard_than_listed(shards: Path):
    edit_index(shards, **{"model.norm.weight": "model-00001-of-00002.safetensors"})
    edit_index(shards, **{"lm_head.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(ModelFileError, match=r"but it is in model-0000"):
        open_model(shards)


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors"])
def test_index_path_outside_the_folder(shards: Path, outside: str):
    edit_index(shards, **{"model.norm.weight": outside})
    with pytest.raises(ModelFileError, match="outside the model's folder"):
        open_model(shards)


def test_float64_is_read_and_an_unreadable_type_says_what_is(folder: Path):
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].astype(np.float64)}, folder / WEIGHTS)
    source = open_model(folder).weights
    assert source.dtype(name) == "F64" and np.array_equal(source.read(name), tensors[name].astype(np.float64))
    save_file({**tensors, name: tensors[name].astype(np.int32)}, folder / WEIGHTS)
    with pytest.raises(ModelFileError, match=f"{name} is stored as I32, .*Take weights in F64, F32, F16 or BF16"):
        open_model(folder)


def test_a_link_of_the_users_own_is_followed(folder: Path, tmp_path: Path):
    os.replace(folder / WEIGHTS, tmp_path / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    assert open_model(folder).config.num_layers == 2


def test_hub_cache_layout_may_link_into_its_blobs(folder: Path, tmp_path: Path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    (repository / "blobs").mkdir()
    os.replace(folder, snapshot)
    os.replace(snapshot / WEIGHTS, repository / "blobs" / "beef")
    (snapshot / WEIGHTS).symlink_to(Path("../../blobs/beef"))
    assert open_model(snapshot).config.num_layers == 2


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_and_never_opened(folder: Path, name: str):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelFileError, match=f"pickle files.*{name}.*safetensors"):
        open_model(folder)
    with pytest.raises(ModelFileError, match=r"pickle file"):
        open_model(folder / name)


def test_pickle_named_by_the_index(shards: Path):
    (shards / "part.bin").write_bytes(pickle.dumps(Bomb()))
    edit_index(shards, **{"model.norm.weight": "part.bin"})
    with pytest.raises(ModelFileError, match=r"part\.bin is a pickle file"):
        open_model(shards)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": []}'])
def test_index_without_a_usable_map(shards: Path, content: str):
    (shards / INDEX).write_text(content)
    with pytest.raises(ModelFileError, match="no usable weight_map"):
        open_model(shards)


def test_folder_without_weights_says_what_is_there(folder: Path):
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelFileError, match=r"neither model\.safetensors nor .* it has: config\.json"):
        open_model(folder)

"""Checks before reading, values that are not finite, and how much host memory the reader takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.errors import InputError, ModelFileError
from qjax.models import WeightSource, load, open_model, read_block, read_edges

WEIGHTS = "model.safetensors"


def test_blocks_and_edges_make_the_whole_model(fixtures: Path):
    files = open_model(fixtures / "qwen3")
    assert isinstance(files.weights, WeightSource)
    assembled = read_edges(files.weights, files.config)
    assembled["blocks"] = [read_block(files.weights, files.config, i) for i in range(files.config.num_layers)]
    loaded = load(fixtures / "qwen3").params
    assert jax.tree.structure(assembled) == jax.tree.structure(loaded)
    jax.tree.map(np.testing.assert_array_equal, assembled, loaded)
    assert "q_norm" in assembled["blocks"][0]["self_attn"] and "head" not in assembled


def test_a_block_is_read_without_a_second_copy_of_it(stories: Path):
    files = open_model(stories)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(read_block(files.weights, files.config, 0)))
    tracemalloc.start()
    for index in range(files.config.num_layers):
        read_block(files.weights, files.config, index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * size  # the block before is still held while the next one comes; the whole model is 5 blocks


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes(fixtures: Path, dtype: str):
    params = load(fixtures / "llama3", dtype=dtype).params
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}


def test_unknown_dtype_and_block(fixtures: Path):
    with pytest.raises(InputError, match="dtype 'int8'.*bfloat16, float16, float32"):
        load(fixtures / "llama3", dtype="int8")
    files = open_model(fixtures / "llama3")
    with pytest.raises(InputError, match="blocks 0 to 1"):
        read_block(files.weights, files.config, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_is_named(folder: Path, tensors: dict[str, np.ndarray], bad: float):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 7] = bad
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.up_proj\.weight has 1 values.*at \[3, 7\]"):
        load(folder)


def test_value_too_large_for_float16_is_named(folder: Path, tensors: dict[str, np.ndarray]):
    tensors["model.norm.weight"][5] = 1e6
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight.*float16.*\[5\].*dtype=float32"):
        load(folder, dtype="float16")
    assert np.asarray(load(folder).params["norm"])[5] == 1e6


def test_wrong_shape_is_found_before_any_data_is_read(folder: Path, tensors: dict[str, np.ndarray]):
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.full((8, 32), np.nan, np.float32)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelFileError, match=r"layers\.0\.self_attn\.k_proj\.weight has shape \[8, 32\].*\[16, 32\]"):
        load(folder)


def test_missing_and_superfluous_tensors_are_listed(folder: Path, tensors: dict[str, np.ndarray]):
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(
        ModelFileError, match=r"model\.norm\.weight .*is missing.*q_norm\.weight is not a tensor of Llama"
    ):
        open_model(folder)


def test_integer_weights_are_refused(folder: Path, tensors: dict[str, np.ndarray]):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelFileError, match=r"up_proj\.weight is stored as I8"):
        open_model(folder)


def test_untied_model_without_a_head(folder: Path, tensors: dict[str, np.ndarray]):
    del tensors["lm_head.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelFileError, match=r"lm_head\.weight.*tie_word_embeddings"):
        open_model(folder)


def test_a_stored_head_that_differs_from_a_tied_embedding_is_used(edit_config: Callable[..., Path]):
    folder = edit_config(tie_word_embeddings=True)
    model, files = load(folder), open_model(folder)
    stored = load_file(folder / WEIGHTS)["lm_head.weight"]
    assert np.array_equal(np.asarray(model.params["head"]), stored.astype(np.float32))
    assert not model.config.tie_embeddings and "a head of its own" in model.description
    assert len(files.remarks) == 1 and "the stored head is used" in files.remarks[0]


def test_a_stored_head_that_is_the_embedding_is_tied(folder: Path, edit_config: Callable[..., Path]):
    edit_config(tie_word_embeddings=True)
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / WEIGHTS)
    assert "head" not in load(folder).params and open_model(folder).remarks == ()


def test_rotary_tables_in_old_files_are_ignored(folder: Path, tensors: dict[str, np.ndarray]):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, folder / WEIGHTS)
    assert open_model(folder).config.num_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 63}, r"embed_tokens\.weight has shape \[64, 32\], the configuration asks for \[63, 32\]"),
        ({"num_hidden_layers": 3}, r"layers\.2\.\S+ of shape \S+ is missing"),
        ({"num_hidden_layers": 1}, r"layers\.1\.\S+ is not a tensor"),
        ({"num_hidden_layers": 10**12}, "asks for 1000000000000 layers"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight has shape"),
        ({"attention_bias": True}, r"q_proj\.bias of shape \[32\] is missing"),
    ],
)
def test_configuration_that_does_not_fit(edit_config: Callable[..., Path], changes: dict, message: str):
    with pytest.raises(ModelFileError, match=message):
        open_model(edit_config(**changes))


def test_fingerprint_follows_the_content(fixtures: Path, folder: Path, tensors: dict[str, np.ndarray]):
    first = load(fixtures / "llama3").fingerprint
    assert load(folder).fingerprint == first  # the place does not matter
    assert load(folder, dtype="bfloat16").fingerprint["sha256"] != first["sha256"]
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / WEIGHTS)
    changed = load(folder).fingerprint
    assert changed["weights"] != first["weights"] and changed["config"] == first["config"]

"""A dense model as a Hugging Face directory: what is in it, and that it appears whole."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from qjax.errors import ModelFileError, RunError
from qjax.models.checkpoints.export import hugging_face_config, hugging_face_tensors, rounded, write_directory
from qjax.models.config import ModelConfig
from qjax.training.step import Schedule, initial_state

CONFIG = ModelConfig("LlamaForCausalLM", 48, 32, 48, 1, 2, 1, 16, max_positions=16, tie_embeddings=True)
SCHEDULE = Schedule(steps=12, learning_rate=0.05, warmup=3)


def test_directory_holds_the_rounded_model_and_is_not_overwritten(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=280, max_positions=64)
    params = initial_state(jax.random.key(1), config, SCHEDULE).params
    folder = tmp_path / "deep" / "model"
    write_directory(folder, params, config, "{}", {"seed": 1}, 0)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "training.json",
    ]
    assert json.loads((folder / "config.json").read_text()) == hugging_face_config(config, 0)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    stored = load_file(folder / "model.safetensors")
    assert len(stored) == 2 + 9 * config.num_layers
    expected = hugging_face_tensors(params, config)
    assert all(np.array_equal(stored[name], expected[name]) for name in expected)
    back = jax.tree.leaves(hugging_face_tensors(rounded(params), config))
    assert all(np.array_equal(a, b) for a, b in zip(back, jax.tree.leaves(expected), strict=True))
    with pytest.raises(RunError, match="not overwritten"):
        write_directory(folder, params, config, "", {}, 0)
    write_directory(folder, params, config, "{}", {"seed": 2}, 0, replace=True)
    assert json.loads((folder / "training.json").read_text()) == {"seed": 2}
    assert [p.name for p in folder.parent.iterdir()] == ["model"]  # no staging folder is left


def test_a_failed_write_leaves_the_old_directory(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    params = initial_state(jax.random.key(1), CONFIG, SCHEDULE).params
    write_directory(folder, params, CONFIG, "{}", {"seed": 1}, 0)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qjax.models.checkpoints.export.save_file", full)
    with pytest.raises(RunError, match="No space left"):
        write_directory(folder, params, CONFIG, "{}", {"seed": 2}, 0, replace=True)
    assert json.loads((folder / "training.json").read_text()) == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_family_with_other_options_is_not_written_as_llama():
    with pytest.raises(ModelFileError, match="plain LlamaForCausalLM"):
        hugging_face_config(dataclasses.replace(CONFIG, qk_norm=True), 0)

"""`python -m experiments.train_tiny`: the files it writes, its samples, refusals."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._entry import CONFIGS
from experiments._train_tiny import sample
from qjax.errors import InputError, RunError
from qjax.models.config import ModelConfig
from qjax.models.transformer import forward
from qjax.training.step import Schedule, initial_state
from qjax.training.text import train_tokenizer

SMALL = ["text.docstrings=false", "model.vocab_size=300", "model.hidden_size=32", "model.num_heads=2"]
SMALL += ["model.num_kv_heads=1", "model.head_dim=16", "model.num_layers=1", "model.intermediate_size=32"]
SMALL += ["model.max_positions=64", "schedule.steps=2", "schedule.warmup=1", "batch=1", "evaluate_every=2"]


@pytest.fixture
def compose(tmp_path):
    from hydra import compose, initialize_config_dir

    def make(*overrides: str):
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            return compose("train_tiny", [*SMALL, f"out={tmp_path / 'out'}", *overrides])

    return make


@pytest.fixture
def short_text(monkeypatch):
    from experiments import _train_tiny as train_tiny

    words = "the function returns a new object which is the value of its argument "
    monkeypatch.setattr(train_tiny, "documentation", lambda: (words * 60, words * 12))
    monkeypatch.setattr(train_tiny, "train_tokenizer", lambda documents, size: train_tokenizer(documents, 280))
    return train_tiny


def test_run_writes_a_model_whose_record_is_its_measured_loss(compose, short_text, tmp_path, monkeypatch):
    monkeypatch.setattr(short_text, "INSTALLED", tmp_path / "installed" / "tiny")
    options = compose("model.vocab_size=280", "model.max_positions=128")
    folder = short_text.run(options)
    record = json.loads((folder / "training.json").read_text())
    assert record["held_out_perplexity"] == pytest.approx(math.exp(record["held_out_loss"]))
    assert record["tokens_seen"] == 2 * 1 * 128
    assert not (tmp_path / "installed").exists()
    with pytest.raises(RunError, match="finished"):
        short_text.run(options)
    short_text.run(compose("model.vocab_size=280", "model.max_positions=128", "install=true"))
    same = [(p / "model.safetensors").read_bytes() for p in (folder, tmp_path / "installed" / "tiny")]
    assert same[0] == same[1]


def test_out_inside_the_package_is_refused(compose, short_text, tmp_path, monkeypatch):
    monkeypatch.setattr(short_text, "INSTALLED", tmp_path / "out" / "model")
    with pytest.raises(RunError, match="into the package"):
        short_text.run(compose())


def test_errors_of_the_command_line_are_short_and_exit_with_2(tmp_path):
    command = [sys.executable, "-m", "experiments.train_tiny", *SMALL, f"out={tmp_path}", "model.vocab_size=100"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 2
    assert done.stderr.strip().endswith("at least 257 entries")
    assert "Traceback" not in done.stderr


def test_samples_are_greedy_at_temperature_zero_and_seeded_above():
    config = ModelConfig("LlamaForCausalLM", 280, 32, 48, 1, 2, 1, 16, max_positions=24, tie_embeddings=True)
    params = initial_state(jax.random.key(1), config, Schedule(steps=12, learning_rate=0.05, warmup=3)).params
    tokenizer = train_tokenizer(["the function returns the value of the argument " * 20], 280)
    ids = tokenizer.encode("the value").ids
    for _ in range(3):  # every length by itself, without padding
        scores = np.asarray(forward(params, jnp.asarray([ids], jnp.int32), config))
        ids.append(int(scores[0, -1].argmax()))
    assert sample(params, config, tokenizer, "the value", 3, 0.0, 0) == tokenizer.decode(ids)
    warm = [sample(params, config, tokenizer, "the value", 8, 1.0, seed) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    with pytest.raises(InputError, match=r"prompt .* and continuation .*; the model has 24"):
        sample(params, config, tokenizer, "the value", 24, 0.0, 0)

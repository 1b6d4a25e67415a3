"""The embedded mixture of experts: complete, small, as good as its record says, and all of its experts in use."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from qjax.data import SOURCES
from qjax.hessian.moments import block_hessians_and_outputs
from qjax.models import load
from qjax.models.transformer import embed
from qjax.training.pretrain import held_out_loss
from qjax.training.text import windows

FOLDER = Path(qjax.__file__).parent / "models" / "tiny_moe"


@pytest.fixture(scope="module")
def model():
    return load("tiny_moe")


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def held_out(model):
    corpus = SOURCES.make("pydoc")
    return corpus.separator.join(corpus.evaluation)


def test_folder_is_complete_and_at_most_six_megabytes(model, record):
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "training.json"}
    assert sum(files.values()) <= 6_000_000
    assert (model.config.experts, model.config.active) == (8, 2)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == record["parameters"]


def test_measured_loss_is_the_recorded_one(model, record, held_out):
    if hashlib.sha256(held_out.encode()).hexdigest() != record["text"]["held_out_sha256"]:
        pytest.skip("this Python's documentation topics are not the ones that the record was made with")
    ids = windows(model.tokenizer.encode(held_out), model.config.max_positions)
    loss = held_out_loss(model.params, ids, model.config)
    assert loss == pytest.approx(record["held_out_loss"], abs=1e-3)  # a router at a tie may choose another expert


def test_every_expert_is_in_use(model, held_out):
    part = windows(model.tokenizer.encode(held_out[:12000]), 256)[:8, :256]
    x, config = np.asarray(embed(model.params["embed"], part, model.config)), model.config
    for index, block in enumerate(model.params["blocks"]):
        found, y = block_hessians_and_outputs(block, x, config, index=index, batch=8)
        counts = [found[f"block_sparse_moe.experts.{expert}.w1"].tokens for expert in range(8)]
        assert sum(counts) == 2 * part.size and min(counts) > part.size / 50, counts
        x = np.asarray(y)

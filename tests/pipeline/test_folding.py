"""Folded rotations: the same function, no outliers, nothing left at run time."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

import qjax
from qjax import incoherence, models
from qjax.errors import InputError
from qjax.incoherence.families import weight_incoherence
from qjax.models.transformer import forward
from qjax.pipeline.folding import FoldedBlocks, folded

FAMILIES = pathlib.Path(__file__).parent.parent / "fixtures" / "models"


@pytest.fixture(scope="module")
def model():
    return qjax.load("tiny")


def tokens_of(model):
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24)).astype(np.int32)


@pytest.mark.parametrize("name", ["tiny", "qwen2", "qwen3", "mistral"])
def test_the_function_is_the_same(name):
    model = qjax.load(name if name == "tiny" else FAMILIES / name)
    # Gains and biases that matter, whatever the model has.
    noise = np.random.default_rng(1)
    shaken = lambda x: x + 0.3 * noise.standard_normal(x.shape).astype(x.dtype) if x.ndim == 1 else x  # noqa: E731
    model = dataclasses.replace(model, params=jax.tree.map(shaken, model.params))
    other = folded(model, seed=3)
    tokens = tokens_of(model)
    expected = np.asarray(forward(model.params, tokens, model.config))
    found = np.asarray(forward(other.params, tokens, other.config))
    assert np.abs(found - expected).max() < 2e-5 * max(1.0, np.abs(expected).max())
    assert not other.config.tie_embeddings and np.all(np.asarray(other.params["norm"]) == 1)
    assert other.fingerprint["sha256"] != model.fingerprint["sha256"]
    assert np.abs(np.asarray(other.params["embed"]) - np.asarray(model.params["embed"])).max() > 1e-3


def test_an_outlier_is_spread_over_all_inputs(model):
    block = model.params["blocks"][0]
    block = {**block, "input_layernorm": block["input_layernorm"].at[3].set(40.0)}  # a channel that stands out
    model = dataclasses.replace(model, params={**model.params, "blocks": [block, *model.params["blocks"][1:]]})
    weight = lambda model: model.params["blocks"][0]["self_attn"]["q_proj"]["weight"]  # noqa: E731
    before = weight(model) * block["input_layernorm"][None, :]
    after = weight(folded(model, seed=0))
    assert weight_incoherence(after) < 0.4 * weight_incoherence(before)


def test_seeds_and_heads_are_options(model):
    value = lambda model: np.asarray(model.params["blocks"][0]["self_attn"]["v_proj"]["weight"])  # noqa: E731
    one, same, other = (value(folded(model, seed)) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert not np.array_equal(one, value(folded(model, 0, heads=False)))


def test_blocks_on_disk_are_folded_as_they_are_read(model):
    blocks = folded(models.stream("tiny"), seed=0).params["blocks"]
    assert isinstance(blocks, FoldedBlocks) and len(blocks) == 4 and len(blocks[1:3]) == 2
    whole = folded(model, seed=0).params["blocks"]
    for found, expected in zip(blocks, whole, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


def test_a_folded_model_is_exported_and_has_the_same_logits(model, tmp_path):
    tokens = tokens_of(model)
    recipe = qjax.Recipe("half_integer", 3, rounding="nearest", incoherence="folded")
    small = qjax.quantize_model(model, tokens, recipe, progress=False)
    small.save(tmp_path / "out", format="compressed-tensors")
    read = qjax.load(tmp_path / "out")
    expected = np.asarray(forward(small.params, tokens, small.config))
    found = np.asarray(forward(read.params, tokens, read.config))
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_what_cannot_be_folded_is_refused(model):
    opt = qjax.load(FAMILIES / "opt")
    with pytest.raises(InputError, match="OPTForCausalLM is built otherwise: use incoherence=hadamard"):
        folded(opt, seed=0)
    with pytest.raises(InputError, match="leave them out"):
        incoherence.make("folded", rescale=True)
    recipe = qjax.Recipe("half_integer", 3, rounding="nearest", incoherence="folded")
    with pytest.raises(InputError, match="hessians are of the original model"):
        qjax.quantize_model(model, tokens_of(model), recipe, hessians={})

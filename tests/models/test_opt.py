"""OPT, the family that is not a Llama: its configuration, and everything that is done with models, done with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import experiments._quantize as entry_point
from qjax.errors import ModelFileError
from qjax.interchange import artifact
from qjax.job.run import run
from qjax.models import forward, generate, load, open_model
from qjax.models.checkpoints.hf_config import parse_config


def edited(fixtures: Path, folder: Path, **changes) -> Path:
    shutil.copytree(fixtures / "opt", folder)
    table = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(table))
    return folder


def test_the_configuration_says_where_norms_and_projections_are(fixtures: Path):
    plain, post = (open_model(fixtures / name).config for name in ("opt", "opt_post_norm"))
    assert plain.norm_first and plain.final_norm and plain.embedding_size == plain.hidden_size == 32
    assert not post.norm_first and not post.final_norm and post.embedding_size == 16
    assert plain.tie_embeddings and plain.mlp_bias and plain.activation == "relu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "swish"}, "activation_function 'swish' is not supported; supported are gelu, relu"),
        ({"num_attention_heads": 5}, "the width 32 does not divide among 5 attention heads"),
        ({"ffn_dim": 45}, "model.decoder.layers.0.fc1.weight has shape"),
        ({"word_embed_proj_dim": 16}, "model.decoder.project_in.weight of shape .* is missing"),
        ({"max_position_embeddings": 64}, "embed_positions.weight has shape .*130, 32.* asks for .*66, 32"),
    ],
)
def test_what_does_not_fit_is_named(fixtures: Path, tmp_path: Path, changes, message):
    with pytest.raises(ModelFileError, match=message):
        open_model(edited(fixtures, tmp_path / "model", **changes))


def test_gelu_without_biases_and_without_a_final_norm_is_read():
    table = {
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 8,
        "ffn_dim": 8,
        "num_hidden_layers": 1,
    }
    table |= {"num_attention_heads": 2, "activation_function": "gelu", "enable_bias": False}
    config = parse_config({**table, "_remove_final_layer_norm": True})
    assert config.activation == "gelu" and not config.mlp_bias and not config.final_norm


@pytest.mark.parametrize("name", ["opt", "opt_post_norm"])
def test_generation_is_the_likeliest_token_of_the_whole_forward_pass(fixtures: Path, name: str):
    model, prompt = load(fixtures / name), [5, 9, 2, 7]
    found = generate(model.params, model.config, prompt, 6).tolist()
    text = list(prompt)
    for _ in range(6):
        text.append(int(np.asarray(forward(model.params, np.asarray([text], np.int32), model.config))[0, -1].argmax()))
    assert found == text[4:]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Text that the fixture can be calibrated on: the tokens of a chain, so that contexts matter."""
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 4, 64 * 60)
    file = tmp_path_factory.mktemp("text") / "tokens.npy"
    np.save(file, (np.cumsum(steps) % 64).astype(np.int32))
    return file


SMALL = "data=tokens data.calibration_sequences=8 data.evaluation_sequences=4 data.length=64 tracker=none".split()
SMALL += ["evaluate.sanity_perplexity=null"]  # the weights are random
TUNED = "finetune.sequences=12 finetune.validation=4 finetune.tokens=512 finetune.batch=4".split()
BLOCKWISE = "hessian=original finetune=block finetune.validation=4".split()
JOBS = {
    "LDLQ, quantised stream": ["rounding=ldlq", "codebook=half_integer"],
    "YAQA, sketch B, end to end": ["rounding=yaqa", "codebook=e8p", "hessian=sketch_b", "finetune=e2e", *TUNED],
    "LDLQ, block-wise": [
        "rounding=ldlq",
        "codebook=e8p",
        "hessian=original",
        "finetune=block",
        "finetune.validation=4",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_whole_run(fixtures: Path, tmp_path: Path, tokens: Path, name: str):
    """Quantised, sketched, tuned, evaluated, stored and read again, by its one file in qjax/models/families."""
    options = ["model=hf", f"model.source={fixtures / 'opt_post_norm'}", f"data.path={tokens}", *SMALL, *JOBS[name]]
    GlobalHydra.instance().clear()
    with initialize_config_dir(entry_point.CONFIGS, version_base="1.3"):
        settings = compose("quantize", [*options, "bits=2", f"out={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}"])
    results = run(entry_point.job_of(settings))
    assert results is not None and results["matrices"] == 12 and results["kl_mean"] > 0
    if "finetune" in results and "before" in results["finetune"]:
        assert results["finetune"]["validation_after"] < results["finetune"]["validation_before"]
        assert {"weight", "bias", "input_gain"} <= set(results["finetune"]["moved"])  # norms have both
    stored = artifact.load(tmp_path / "run" / "artifact")
    assert stored.config == load(fixtures / "opt_post_norm").config
    logits = np.asarray(forward(stored.params, np.arange(8, dtype=np.int32)[None], stored.config))
    assert np.isfinite(logits).all() and logits.shape == (1, 8, 64)
    assert len(jax.tree.leaves(stored.params["blocks"][0]["self_attn_layer_norm"])) == 2

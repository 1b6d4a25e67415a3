"""Whole evaluations of small random models against a float64 numpy transformer's numbers, and of a real one."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax.data
import qjax.models
from qjax.data import TokenStream
from qjax.errors import DataError, InputError, NumericsError
from qjax.evaluate import evaluate, hidden_states, perplexity
from qjax.evaluate.metrics import token_metrics
from qjax.models import transformer
from qjax.models.config import ModelConfig

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=41,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    tie_embeddings=True,
)
SHARED = Path(os.environ.get("QJAX_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def random_params(seed, config=CONFIG):
    rng = np.random.default_rng(seed)
    width, inner, kv = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim

    def matrix(out, columns):
        return {"weight": (rng.normal(size=(out, columns)) * 1.5 / np.sqrt(columns)).astype(np.float32)}

    def gain():
        return rng.normal(1, 0.1, width).astype(np.float32)

    def block():
        return {
            "input_layernorm": gain(),
            "post_attention_layernorm": gain(),
            "self_attn": {
                "q_proj": matrix(width, width),
                "k_proj": matrix(kv, width),
                "v_proj": matrix(kv, width),
                "o_proj": matrix(width, width),
            },
            "mlp": {
                "gate_proj": matrix(inner, width),
                "up_proj": matrix(inner, width),
                "down_proj": matrix(width, inner),
            },
        }

    embed = rng.normal(size=(config.vocab_size, width)).astype(np.float32)
    return jax.device_put({"embed": embed, "norm": gain(), "blocks": [block() for _ in range(config.num_layers)]})


def forward64(params, tokens, config=CONFIG):
    """An independent float64 transformer, written with loops over heads and complex rotations."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, gain):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * gain

    def rotate(x):  # [length, head_dim]: the pairs (i, i + half) as complex numbers
        half = config.head_dim // 2
        z = x[:, :half] + 1j * x[:, half:]
        z = z * np.exp(1j * np.outer(np.arange(len(x)), config.rope_theta ** (-np.arange(half) / half)))
        return np.concatenate([z.real, z.imag], axis=1)

    results = []
    for row in tokens:
        x = params["embed"][row]
        for block in params["blocks"]:
            attention, mlp = block["self_attn"], block["mlp"]
            y = norm(x, block["input_layernorm"])
            q, k, v = (y @ attention[f"{name}_proj"]["weight"].T for name in "qkv")
            mixed = np.zeros((len(row), config.num_heads * config.head_dim))
            for head in range(config.num_heads):
                own = slice(head * config.head_dim, (head + 1) * config.head_dim)
                kv_head = head // (config.num_heads // config.num_kv_heads)
                shared = slice(kv_head * config.head_dim, (kv_head + 1) * config.head_dim)
                scores = rotate(q[:, own]) @ rotate(k[:, shared]).T / np.sqrt(config.head_dim)
                scores[np.triu_indices(len(row), 1)] = -np.inf
                scores = np.exp(scores - scores.max(1, keepdims=True))
                mixed[:, own] = scores / scores.sum(1, keepdims=True) @ v[:, shared]
            x = x + mixed @ attention["o_proj"]["weight"].T
            y = norm(x, block["post_attention_layernorm"])
            gate = y @ mlp["gate_proj"]["weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ mlp["up_proj"]["weight"].T)) @ mlp["down_proj"]["weight"].T
        results.append(norm(x, params["norm"]) @ params["embed"].T)
    logits = np.array(results)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


TOKENS = np.random.default_rng(9).integers(0, CONFIG.vocab_size, (5, 12)).astype(np.int32)
REFERENCE, OTHER = random_params(0), random_params(1)


def run(params=OTHER, tokens=TOKENS, reference=REFERENCE, batch=2, **options):
    windows = tokens.tokens if isinstance(tokens, TokenStream) else tokens
    hidden = hidden_states(reference, windows, CONFIG, batch)
    return evaluate(hidden, transformer.head(reference), params, tokens, CONFIG, batch=batch, **options)


def test_numbers_agree_with_an_independent_float64_model():
    report = run()
    log_p, log_q = (forward64(params, TOKENS)[:, :-1] for params in (REFERENCE, OTHER))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    picked = [np.take_along_axis(x, TOKENS[:, 1:, None].astype(int), -1) for x in (log_p, log_q)]
    np.testing.assert_allclose(report.perplexity_reference, np.exp(-picked[0].mean()), rtol=1e-4)
    np.testing.assert_allclose(report.perplexity, np.exp(-picked[1].mean()), rtol=1e-4)
    np.testing.assert_allclose(report.kl_mean, kl.mean(), rtol=1e-4)
    np.testing.assert_allclose(report.kl_median, np.median(kl), rtol=1e-3)
    np.testing.assert_allclose(report.kl_p99, np.quantile(kl, 0.99), rtol=1e-3)
    assert report.top1_agreement == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean())
    assert (report.tokens_evaluation, report.tokens_scored, report.sequences) == (60, 55, 5)
    for name in ("perplexity", "perplexity_reference", "kl_mean", "kl_median", "kl_p99", "top1_agreement"):
        low, high = getattr(report, f"{name}_interval")
        assert low <= getattr(report, name) <= high
    np.testing.assert_allclose(perplexity(OTHER, TOKENS, CONFIG, batch=3), report.perplexity, rtol=1e-5)


def test_the_numbers_of_a_domain_are_those_of_its_windows_alone():
    domains = {"even": np.arange(0, len(TOKENS), 2), "odd": np.arange(1, len(TOKENS), 2)}
    found = run(domains=domains).domains
    assert list(found) == ["even", "odd"]
    for name, rows in domains.items():
        alone = run(tokens=TOKENS[rows]).excerpt()
        assert found[name].keys() == alone.keys() and found[name]["sequences"] == len(rows)
        for key, value in alone.items():
            np.testing.assert_allclose(found[name][key], value, rtol=1e-5, err_msg=key)
    assert run(domains={"all": np.arange(len(TOKENS))}).domains == {}
    assert "domains" not in run().to_dict() and "domains" in run(domains=domains).to_dict()


@pytest.mark.parametrize("batch", [1, 3, 5, 8])
def test_the_batch_does_not_change_the_numbers(batch):
    one, other = run(batch=2).to_dict(), run(batch=batch).to_dict()
    for name, value in one.items():
        if isinstance(value, float | list):
            np.testing.assert_allclose(other[name], value, rtol=1e-4, err_msg=name)
        else:
            assert other[name] == value


def test_reference_against_itself():
    report = run(REFERENCE)
    assert (report.kl_mean, report.kl_p99, report.top1_agreement) == (0.0, 0.0, 1.0)
    assert report.perplexity == report.perplexity_reference
    assert report.perplexity_interval == report.perplexity_reference_interval


def test_report_is_json_and_carries_the_protocol():
    stream = TokenStream.of(TOKENS, {"bos": "sequence", "stride": 11})
    facts = json.loads(json.dumps(run(tokens=stream).to_dict()))
    assert (facts["bos"], facts["stride"], facts["context_length"]) == ("sequence", 11, 12)
    assert facts["tokens_sha256"] == stream.sha256
    assert run().bos == "unstated"
    assert isinstance(facts["kl_p99_interval"], list)


def test_seed_moves_intervals_only():
    one, other = run(seed=0), run(seed=1)
    assert one.kl_mean == other.kl_mean and one.kl_mean_interval != other.kl_mean_interval


def test_hidden_states_lead_to_the_logits_of_forward():
    hidden = hidden_states(OTHER, TOKENS, CONFIG, 2)
    assert hidden.dtype == np.float32
    found = transformer.logits(transformer.head(OTHER), hidden, CONFIG)
    np.testing.assert_allclose(found, transformer.forward(OTHER, jax.device_put(TOKENS), CONFIG), rtol=1e-4, atol=1e-5)


def test_blocks_may_be_loaded_as_they_are_used_and_progress_is_told():
    steps = []
    streamed = {**OTHER, "blocks": (block for block in OTHER["blocks"])}
    found = hidden_states(streamed, TOKENS, CONFIG, 2, progress=lambda done, total: steps.append((done, total)))
    np.testing.assert_array_equal(found, hidden_states(OTHER, TOKENS, CONFIG, 2))
    assert steps == [(1, 2), (2, 2)]


def test_one_program_for_all_blocks_and_batches():
    jax.clear_caches()
    run(batch=2)
    counts = [function._cache_size() for function in (transformer.embed, transformer.block, token_metrics)]
    assert counts == [1, 1, 1]


def test_non_finite_weights_are_named_by_sequence_and_position():
    # Position 0 although the bad token comes later: attention's zero weight times NaN is NaN for earlier queries too.
    broken = {**OTHER, "embed": OTHER["embed"].at[7].set(np.nan), "head": OTHER["embed"]}
    tokens = np.where(TOKENS == 7, 8, TOKENS)
    tokens[3, 6] = 7
    with pytest.raises(NumericsError, match="the evaluated model: nll is nan at sequence 3, position 0"):
        run(broken, tokens)
    with pytest.raises(NumericsError, match="the reference model: nll_reference is nan at sequence 3, position 0"):
        run(OTHER, tokens, reference=broken)
    with pytest.raises(NumericsError, match="the model: nll is nan at sequence 3, position 0"):
        perplexity(broken, tokens, CONFIG, batch=2)


def test_wrong_inputs_are_named():
    with pytest.raises(DataError, match="token id 41 at position 0, 1 is outside the vocabulary of 41"):
        hidden_states(OTHER, np.array([[0, 41]]), CONFIG)
    with pytest.raises(InputError, match="length >= 2"):
        perplexity(OTHER, TOKENS[:, :1], CONFIG)
    with pytest.raises(InputError, match="length >= 2"):
        perplexity(OTHER, TOKENS, CONFIG, batch=0)
    with pytest.raises(InputError, match="hold 1 blocks, the configuration says 2"):
        hidden_states({**OTHER, "blocks": OTHER["blocks"][:1]}, TOKENS, CONFIG)
    with pytest.raises(InputError, match=r"reference_hidden must be .* \[5, 12, 16\]"):
        evaluate(np.zeros((4, 12, 16), np.float32), transformer.head(OTHER), OTHER, TOKENS, CONFIG)


def test_stories260k_perplexity():
    """The data's README: between 4.0 and 5.4 on its tokens."""
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent (set QJAX_SHARED_DATA)")
    model = qjax.models.load(folder)
    split = qjax.data.load(
        "tokens",
        None,
        path=folder / "tinystories_tokens.npy",
        vocab_size=model.config.vocab_size,
        calibration_sequences=8,
        evaluation_sequences=8,
        length=256,
    )
    assert 4.0 < perplexity(model.params, split.evaluation, model.config) < 5.4

"""Per-token metrics against float64 numpy, and the divergence against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.evaluate import metrics
from qjax.evaluate.metrics import divergence, token_metrics, token_nll
from qjax.models.config import ModelConfig

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=37,
    hidden_size=8,
    intermediate_size=12,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)


def log_softmax64(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def logits64(head, hidden, eps):
    x = np.asarray(hidden, np.float64)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * np.asarray(head["norm"], np.float64)
    return x @ np.asarray(head["head"], np.float64).T


def example(seed, batch=3, length=11, scale=1.0):
    rng = np.random.default_rng(seed)

    def head():
        return {
            "norm": rng.normal(1, 0.2, CONFIG.hidden_size).astype(np.float32),
            "head": (scale * rng.normal(size=(CONFIG.vocab_size, CONFIG.hidden_size))).astype(np.float32),
        }

    hidden = [rng.normal(size=(batch, length, CONFIG.hidden_size)).astype(np.float32) for _ in range(2)]
    targets = rng.integers(0, CONFIG.vocab_size, (batch, length - 1)).astype(np.int32)
    return head(), head(), *hidden, targets


@pytest.mark.parametrize("chunk_bytes", [4 * 37, 4 * 37 * 7, 2**25])
def test_against_float64(monkeypatch, chunk_bytes):
    monkeypatch.setattr(metrics, "CHUNK_BYTES", chunk_bytes)  # 1 position, 7 (ragged) and all of them at a time
    jax.clear_caches()
    reference_head, head, reference_hidden, hidden, targets = example(0)
    found = token_metrics(reference_head, head, reference_hidden, hidden, targets, CONFIG)
    log_p = log_softmax64(logits64(reference_head, reference_hidden, CONFIG.rms_norm_eps))[:, :-1]
    log_q = log_softmax64(logits64(head, hidden, CONFIG.rms_norm_eps))[:, :-1]
    expected = {
        "nll_reference": -np.take_along_axis(log_p, targets[..., None], -1)[..., 0],
        "nll": -np.take_along_axis(log_q, targets[..., None], -1)[..., 0],
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1),
        "agree": log_p.argmax(-1) == log_q.argmax(-1),
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].shape == targets.shape
        np.testing.assert_allclose(np.asarray(found[name]), values, rtol=2e-5, atol=2e-6, err_msg=name)
    alone = token_nll(head, hidden, targets, CONFIG)
    np.testing.assert_allclose(np.asarray(alone), expected["nll"], rtol=2e-5, atol=2e-6)


def test_a_model_against_itself_is_exactly_zero():
    head, _, hidden, _, targets = example(1, scale=5.0)
    found = token_metrics(head, head, hidden, hidden, targets, CONFIG)
    assert (np.asarray(found["kl"]) == 0).all() and np.asarray(found["agree"]).all()
    np.testing.assert_array_equal(found["nll"], found["nll_reference"])


def test_every_batch_uses_one_program():
    jax.clear_caches()
    for seed in range(3):
        token_metrics(*example(seed), CONFIG)
    assert token_metrics._cache_size() == 1


def test_logits_of_the_whole_batch_never_exist():
    """The largest array of the program holds one chunk of logits, not batch · length of them."""
    config = ModelConfig(**{**vars(CONFIG), "vocab_size": 4096})
    batch, length = 4, 8193
    head = {
        "norm": jax.ShapeDtypeStruct((8,), jnp.float32),
        "head": jax.ShapeDtypeStruct((4096, 8), jnp.float32),
    }
    hidden = jax.ShapeDtypeStruct((batch, length, 8), jnp.float32)
    targets = jax.ShapeDtypeStruct((batch, length - 1), jnp.int32)
    jaxpr = jax.make_jaxpr(token_metrics, static_argnums=5)(head, head, hidden, hidden, targets, config)

    def sizes(inner):
        for equation in inner.eqns:
            yield from (variable.aval.size * 4 for variable in equation.outvars)
            for value in equation.params.values():
                if hasattr(value, "jaxpr"):
                    yield from sizes(value.jaxpr)

    assert max(sizes(jaxpr.jaxpr)) <= metrics.CHUNK_BYTES < batch * length * 4096 * 4 / 10


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [2, 3])
def test_non_finite_states_show_in_their_position_only(bad, which):
    arguments = list(example(2))
    arguments[which][1, 4, 0] = bad
    found = token_metrics(*arguments, CONFIG)
    broken = ~np.isfinite(np.asarray(found["nll_reference" if which == 2 else "nll"]))
    assert np.argwhere(broken).tolist() == [[1, 4]]


@settings(deadline=None)  # the first example compiles
@given(st.integers(0, 2**31), st.floats(-6, 1.5))
def test_divergence_is_never_negative_and_precise_at_every_size(seed, log10_size):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (4, 50))
    other = logits + 10**log10_size * rng.normal(size=(4, 50))
    log_p, log_q = (log_softmax64(x).astype(np.float32) for x in (logits, other))
    p, q = log_p.astype(np.float64), log_q.astype(np.float64)
    found = np.asarray(divergence(jnp.asarray(log_p), jnp.asarray(log_q)))
    assert (found >= 0).all()
    # The exact sum for the rounded inputs, with Σq - Σp kept, as they are normalised up to rounding only.
    expected = (np.exp(q) - np.exp(p) - np.exp(p) * (q - p)).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-13)


def test_divergence_of_two_outcomes_in_closed_form():
    for a, b in [(0.5, 0.5), (0.9, 0.1), (0.3, 0.31), (1e-6, 0.999)]:
        expected = a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))
        log_p, log_q = (jnp.log(jnp.array([x, 1 - x], jnp.float32)) for x in (a, b))
        np.testing.assert_allclose(float(divergence(log_p, log_q)), expected, rtol=2e-4, atol=1e-7)


def test_divergence_survives_vanishing_probabilities():
    log_p = jnp.array([0.0, -300.0, -200.0], jnp.float32)
    log_q = jnp.array([-250.0, 0.0, -250.0], jnp.float32)
    np.testing.assert_allclose(float(divergence(log_p, log_q)), 250.0, rtol=1e-6)

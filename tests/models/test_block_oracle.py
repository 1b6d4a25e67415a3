"""One transformer block against a float64 forward written as plain loops over positions and heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models import ModelConfig, RopeScaling, block, block_inputs, structure

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=11,
    hidden_size=12,
    intermediate_size=10,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=100.0,
)
VARIANTS = {
    "plain": CONFIG,
    "all options": dataclasses.replace(
        CONFIG,
        qkv_bias=True,
        attention_bias=True,
        mlp_bias=True,
        qk_norm=True,
        sliding_window=3,
        rope_scaling=RopeScaling(4.0, 1.0, 4.0, 40),
    ),
}


def random_block(config: ModelConfig, seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def linear(out: int, inner: int, bias: bool) -> dict:
        weight = rng.normal(size=(out, inner)) / inner**0.5
        return {"weight": weight, "bias": rng.normal(size=out)} if bias else {"weight": weight}

    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width, middle = config.hidden_size, config.intermediate_size
    attention = {
        "q_proj": linear(queries, width, config.qkv_bias),
        "k_proj": linear(keys, width, config.qkv_bias),
        "v_proj": linear(keys, width, config.qkv_bias),
        "o_proj": linear(width, queries, config.attention_bias),
    }
    if config.qk_norm:
        attention |= {name: rng.uniform(0.5, 1.5, config.head_dim) for name in ("q_norm", "k_norm")}
    return {
        "input_layernorm": rng.uniform(0.5, 1.5, width),
        "post_attention_layernorm": rng.uniform(0.5, 1.5, width),
        "self_attn": attention,
        "mlp": {
            "gate_proj": linear(middle, width, config.mlp_bias),
            "up_proj": linear(middle, width, config.mlp_bias),
            "down_proj": linear(width, middle, config.mlp_bias),
        },
    }


def angle_rates(config: ModelConfig) -> list[float]:
    rates = []
    for i in range(config.head_dim // 2):
        rate = config.rope_theta ** (-2 * i / config.head_dim)
        scaling = config.rope_scaling
        if scaling is not None:
            turns = scaling.original_max_positions * rate / (2 * np.pi)
            if turns < scaling.low_freq_factor:
                rate = rate / scaling.factor
            elif turns <= scaling.high_freq_factor:
                share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
                rate = share * rate + (1 - share) * rate / scaling.factor
        rates.append(rate)
    return rates


def oracle(p: dict, x: np.ndarray, config: ModelConfig) -> np.ndarray:
    """One sequence [length, width]; rotation as multiplication of complex numbers."""
    half = config.head_dim // 2
    rates = angle_rates(config)

    def norm(v: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return v / np.sqrt(np.mean(v**2) + config.rms_norm_eps) * gain

    def apply(q: dict, v: np.ndarray) -> np.ndarray:
        return q["weight"] @ v + q.get("bias", 0.0)

    def rotated(v: np.ndarray, position: int, gain: np.ndarray | None) -> np.ndarray:
        v = v if gain is None else norm(v, gain)
        turned = [(v[i] + 1j * v[i + half]) * np.exp(1j * position * rates[i]) for i in range(half)]
        return np.asarray([z.real for z in turned] + [z.imag for z in turned])

    attention, mlp = p["self_attn"], p["mlp"]
    inner = [norm(v, p["input_layernorm"]) for v in x]
    heads = lambda name, v: apply(attention[name], v).reshape(-1, config.head_dim)  # noqa: E731
    queries = [[rotated(h, t, attention.get("q_norm")) for h in heads("q_proj", v)] for t, v in enumerate(inner)]
    keys = [[rotated(h, t, attention.get("k_norm")) for h in heads("k_proj", v)] for t, v in enumerate(inner)]
    values = [heads("v_proj", v) for v in inner]
    out = []
    for t, residual in enumerate(x):
        first = 0 if config.sliding_window is None else max(0, t - config.sliding_window + 1)
        mixed = []
        for h in range(config.num_heads):
            g = h * config.num_kv_heads // config.num_heads
            scores = np.asarray([queries[t][h] @ keys[s][g] for s in range(first, t + 1)]) / config.head_dim**0.5
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            mixed.append(sum(w * values[s][g] for w, s in zip(weights, range(first, t + 1), strict=True)))
        y = residual + apply(attention["o_proj"], np.concatenate(mixed))
        z = norm(y, p["post_attention_layernorm"])
        gate = apply(mlp["gate_proj"], z)
        out.append(y + apply(mlp["down_proj"], gate / (1 + np.exp(-gate)) * apply(mlp["up_proj"], z)))
    return np.stack(out)


def to_float32(tree: dict) -> dict:
    return {k: to_float32(v) if isinstance(v, dict) else jnp.asarray(v, jnp.float32) for k, v in tree.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_block_agrees_with_float64_loops(name: str):
    config = VARIANTS[name]
    parameters = random_block(config, 3)
    x = np.random.default_rng(4).normal(size=(2, 9, config.hidden_size))
    found = block(to_float32(parameters), jnp.asarray(x, jnp.float32), config)
    expected = np.stack([oracle(parameters, sequence, config) for sequence in x])
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-5, rtol=0)


def test_the_sites_are_the_inputs_of_their_linears():
    config = VARIANTS["all options"]
    parameters = to_float32(random_block(config, 5))
    x = jnp.asarray(np.random.default_rng(6).normal(size=(1, 5, config.hidden_size)), jnp.float32)
    output, inputs = jax.jit(block_inputs, static_argnums=2)(parameters, x, config)
    np.testing.assert_allclose(np.asarray(output), np.asarray(block(parameters, x, config)), atol=1e-6)
    sites = structure(config).sites
    assert set(inputs) == set(sites.values())
    for name, site in sites.items():
        group, linear = name.split(".")
        assert inputs[site].shape[-1] == parameters[group][linear]["weight"].shape[1]
    # The last site and the residual before it give the block's output back.
    down = parameters["mlp"]["down_proj"]
    mlp = np.asarray(inputs["mlp.down_proj"]) @ np.asarray(down["weight"]).T + np.asarray(down["bias"])
    attention = parameters["self_attn"]["o_proj"]
    mixed = np.asarray(inputs["self_attn.o_proj"]) @ np.asarray(attention["weight"]).T + np.asarray(attention["bias"])
    np.testing.assert_allclose(np.asarray(output), np.asarray(x) + mixed + mlp, atol=1e-5)


def test_later_tokens_do_not_change_earlier_outputs():
    parameters = to_float32(random_block(CONFIG, 7))
    x = np.random.default_rng(8).normal(size=(1, 6, CONFIG.hidden_size)).astype(np.float32)
    changed = x.copy()
    changed[:, 4:] = 9.0
    first, second = (np.asarray(block(parameters, jnp.asarray(v), CONFIG)) for v in (x, changed))
    np.testing.assert_array_equal(first[:, :4], second[:, :4])
    assert np.abs(first[:, 4:] - second[:, 4:]).max() > 0.1

"""The trainable view of a model: names, rules, equality with the model itself, storage of what was tuned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import Hessian, codebooks, incoherence, models, quantize_matrix, rounding
from qjax.errors import ArtifactError, InputError
from qjax.finetune import Optimizer, Options, RateRule, assign, gained, merged, tunable, view
from qjax.finetune.loop import train_step
from qjax.finetune.parameters import Gained, hidden
from qjax.interchange import artifact
from qjax.interchange.serialize import from_arrays, to_arrays
from qjax.models.linear import replace_linears
from qjax.models.transformer import block, embed

HYB = {"L": 8, "code": "hyb", "Q": 6}
RULES = (RateRule("_gain$", 1e-3), RateRule("norm$", 1e-3), RateRule(".", None))


def matrix(out=16, inner=32, name="e8p", bits=2, rotation="hadamard", scale=None, **options):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4 * inner, inner)).astype(np.float32)
    return quantize_matrix(
        rng.standard_normal((out, inner)).astype(np.float32),
        Hessian(x.T @ x / len(x)),
        codebook=codebooks.make(name, bits, **options),
        rounding=rounding.make("ldlq"),
        incoherence=incoherence.make(rotation),
        scale=scale,
        key=jax.random.key(0),
    )[0]


@pytest.fixture(scope="module")
def model():
    return models.load("tiny")


@pytest.fixture(scope="module")
def quantized(model):
    """The embedded model with two quantised linears per layer, of unlike structure in the last one."""
    blocks = []
    for index, parameters in enumerate(model.params["blocks"]):
        last = index == len(model.params["blocks"]) - 1
        chosen = {"mlp.up_proj": HYB} if last else {"mlp.up_proj": HYB, "self_attn.q_proj": HYB}
        found = {}
        for linear, options in chosen.items():
            group, leaf = linear.split(".")
            weight = np.asarray(parameters[group][leaf]["weight"])
            found[linear] = quantize_matrix(
                weight,
                Hessian(np.eye(weight.shape[1], dtype=np.float32)),
                codebook=codebooks.make("trellis", 2, **options),
                rounding=rounding.make("nearest"),
                incoherence=incoherence.make("hadamard"),
                key=jax.random.key(0),
                name=f"layers.{index}.{linear}",
            )[0]
        blocks.append(replace_linears(parameters, found))
    return {**model.params, "blocks": blocks}


def states(params, tokens, config):
    x = embed(params["embed"], tokens, config)
    for parameters in params["blocks"]:
        x = block(parameters, x, config)
    return x


def changed(tuned):
    rng = np.random.default_rng(1)
    return {name: np.asarray(value) * (1 + 0.05 * rng.standard_normal(value.shape).astype(np.float32))
            for name, value in tuned.items()}  # fmt: skip


@pytest.mark.parametrize("rotation", ["none", "hadamard", "kronecker"])
def test_gains_multiply_rows_and_columns(rotation):
    plain = matrix(rotation=rotation)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(16).astype(np.float32), rng.standard_normal(32).astype(np.float32)
    tuned = gained(plain).replace(output_gain=jnp.asarray(a), input_gain=jnp.asarray(b))
    expected = a[:, None] * np.asarray(plain.dequantize()) * b[None]
    np.testing.assert_allclose(np.asarray(tuned.dequantize()), expected, rtol=2e-5, atol=1e-5)
    for rows in (3, 64):  # few rows are rotated, for many the matrix is decoded
        x = jnp.asarray(rng.standard_normal((rows, 32)).astype(np.float32))
        np.testing.assert_allclose(np.asarray(tuned.matmul(x)), np.asarray(x) @ expected.T, rtol=1e-3, atol=2e-4)
        folded = Gained(plain.dequantize(), jnp.asarray(a), jnp.asarray(b))
        np.testing.assert_allclose(np.asarray(folded.matmul(x)), np.asarray(x) @ expected.T, rtol=1e-3, atol=2e-4)


def test_tuned_parts_are_stored_and_counted():
    plain = matrix(name="trellis", **HYB)
    assert not any("table" in name for name in to_arrays(plain)[0])
    table = np.asarray(plain.codebook.table) + np.float32(0.25)
    tuned = plain.replace(
        output_gain=jnp.full(16, 1.5, jnp.float16),
        input_gain=jnp.full(32, 0.5, jnp.float16),
        codebook=plain.codebook.replace(table=jnp.asarray(table)),
    )
    arrays, description = to_arrays(tuned)
    again = from_arrays(arrays, description, "here")
    assert description["format"] == 3 and {"output_gain", "input_gain", "codebook.table"} < set(arrays)
    assert again.stored_bits == plain.stored_bits + 16 * (16 + 32)
    np.testing.assert_array_equal(np.asarray(again.dequantize()), np.asarray(tuned.dequantize()))
    with pytest.raises(ArtifactError, match="format version 4"):
        from_arrays(arrays, {**description, "format": 4}, "here")


def test_the_view_is_the_model_and_back(model, quantized):
    tokens = np.arange(2 * 16, dtype=np.int32).reshape(2, 16) * 37 % 2048
    config = model.config
    for rules in (RULES, (RateRule("table|_gain|norm$|up_proj.weight", 1e-3), RateRule(".", None))):
        rates = assign(rules, tunable(quantized))
        whole = view(quantized, rates)
        assert [(s.start, s.stop) for s in whole.layout.segments] == [(0, 3), (3, 4)]
        assert set(whole.tuned) == set(whole.rates) and not set(whole.tuned) & set(whole.frozen)
        assert ("table.0" in whole.tuned) == (rules is not RULES)
        for tuned in (whole.tuned, changed(whole.tuned)):
            new = merged(quantized, whole.layout, tuned, np.float32)
            for remat in (False, True):
                found = jax.jit(hidden, static_argnums=(1, 3, 4))(
                    {**whole.frozen, **tuned}, whole.layout, tokens, config, remat
                )
                np.testing.assert_allclose(np.asarray(found), np.asarray(states(new, tokens, config)), atol=2e-3)


def test_codes_stay_and_the_artifact_reloads_to_the_same_bits(model, quantized, tmp_path):
    rates = assign((RateRule("table|_gain|norm$", 1e-3), RateRule(".", None)), tunable(quantized))
    whole = view(quantized, rates)
    new = merged(quantized, whole.layout, changed(whole.tuned))
    artifact.save(tmp_path / "artifact", model, new)
    again = artifact.load(tmp_path / "artifact").params
    assert jax.tree.structure(again) == jax.tree.structure(new)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    for old, tuned in zip(quantized["blocks"], new["blocks"], strict=True):
        np.testing.assert_array_equal(
            np.asarray(old["mlp"]["up_proj"]["weight"].packed), np.asarray(tuned["mlp"]["up_proj"]["weight"].packed)
        )
    norms = 2 * sum(leaf.size for block in new["blocks"] for name, leaf in block.items() if name.endswith("norm"))
    norms += 2 * new["norm"].size  # once tuned they are no values of bfloat16 any more
    gains = artifact.model_bytes(new) - artifact.model_bytes(quantized) - norms
    assert gains == sum(2 * sum(block["mlp"]["up_proj"]["weight"].shape) for block in new["blocks"]) + sum(
        2 * sum(block["self_attn"]["q_proj"]["weight"].shape) for block in new["blocks"][:3]
    )


def test_rules_take_the_first_match_and_list_what_is_uncovered(quantized):
    names = tunable(quantized)
    assert names["layers.3.mlp.up_proj.input_gain"] == (192,) and names["table.0"] == (64, 2)
    assert "layers.3.self_attn.q_proj.weight" in names and "layers.0.self_attn.q_proj.weight" not in names
    rates = assign((RateRule(r"layers\.0\.", None), RateRule("gain", 0.5), RateRule(".", None)), names)
    assert rates["layers.0.mlp.up_proj.input_gain"] == 0 and rates["layers.1.mlp.up_proj.input_gain"] == 0.5
    with pytest.raises(InputError, match=r"no rule covers .*layers.0.input_layernorm.* and \d+ more"):
        assign((RateRule("gain", 0.5),), names)
    with pytest.raises(InputError, match="every parameter is frozen"):
        assign((RateRule(".", None),), names)
    with pytest.raises(InputError, match="not a regular expression"):
        RateRule("(", 1.0)
    with pytest.raises(InputError, match="above 0"):
        RateRule("a", -1.0)


def test_row_scales_can_be_tuned():
    from qjax.codebooks.scaling import ScaleRule

    grouped = matrix(name="half_integer", scale=ScaleRule("rms", "row"))
    ready = gained(grouped)
    assert ready.scaling.relative.dtype == np.float32

    def loss(relative):
        return jnp.sum(ready.replace(scaling=ready.scaling.replace(relative=relative)).dequantize() ** 2)

    slope = np.asarray(jax.grad(loss)(jnp.asarray(ready.scaling.relative)))
    assert slope.shape == np.shape(ready.scaling.relative) and np.all(slope > 0)


def test_bfloat16_activations_tune_float32_masters_and_a_shared_table(model, quantized):
    """Mixed precision: the first loss up to bfloat16's rounding, parameters and optimiser in float32, a lower end."""
    rates = assign((RateRule("^table", 1e-2), RateRule("_gain$|norm$", 3e-3), RateRule(".", None)), tunable(quantized))
    whole = view(quantized, rates)
    tokens = np.random.default_rng(0).integers(0, 2048, (1, 4, 32)).astype(np.int32)
    optimizer = Optimizer(steps=8)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        state = {"tuned": jax.tree.map(jnp.copy, whole.tuned), "optimizer": optimizer.init(whole.tuned)}
        options = Options(loss="next_token", chunk=32, dtype=dtype)
        static = {"layout": whole.layout, "config": model.config, "options": options, "optimizer": optimizer}
        found = []
        for _ in range(8):
            state, loss, _ = train_step(state, whole.frozen, whole.rates, tokens, {}, None, **static)
            found.append(float(loss))
        losses[dtype] = found
        floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert all(leaf.dtype == jnp.float32 for leaf in floats)
        moved = np.abs(np.asarray(state["tuned"]["table.0"]) - np.asarray(whole.tuned["table.0"]))
        assert np.mean(moved > 0) > 0.5
    assert losses["bfloat16"][0] != losses["float32"][0]
    np.testing.assert_allclose(losses["bfloat16"][0], losses["float32"][0], rtol=1e-2)
    assert all(found[-1] < found[0] - 0.1 for found in losses.values()), losses
    np.testing.assert_allclose(losses["bfloat16"][-1], losses["float32"][-1], rtol=2e-2)

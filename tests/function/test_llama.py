"""Llama as a plain function and as scanned flax.linen: names, Hessians, sketches and codes of the family's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax import hessian
from qjax.errors import ArtifactError, InputError
from qjax.matrix.operator import operators
from qjax.models.config import ModelConfig
from qjax.models.transformer import forward

CONFIG = ModelConfig("LlamaForCausalLM", 40, 16, 24, 2, 4, 2, 4, tie_embeddings=True)
LAYERS = [
    f"{group}.{name}_proj"
    for group, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for name in names
]


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)  # noqa: E731
    shapes = dict(zip(LAYERS, [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)], strict=True))

    def block():
        made: dict = {"input_layernorm": normal(16) + 1, "post_attention_layernorm": normal(16) + 1}
        for name, shape in shapes.items():
            group, own = name.split(".")
            made.setdefault(group, {})[own] = {"weight": normal(*shape)}
        return made

    params = {"embed": normal(40, 16), "norm": normal(16) + 1, "blocks": [block(), block()]}
    return qjax.Model(CONFIG, params, qjax.models.Tokenizer(None), "random", "random", {"sha256": "none"})


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 40, (4, 6)).astype(np.int32)


def norm(x, gain):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain[None, None]


def attend(q, k, v):
    """Rotary, grouped, causal attention of q [batch, length, heads, dim]."""
    length, half = q.shape[1], q.shape[3] // 2
    angle = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(half) / half)[None]
    cos, sin = (f(angle).astype(np.float32)[None, :, None] for f in (np.cos, np.sin))

    def rotated(x):
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k = rotated(q), rotated(k)
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.float32(np.sqrt(q.shape[3]))
    causal = np.tril(np.ones((length, length), bool))[None, None]
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1), v)


def plain(params, tokens):
    """Llama over a list of layers, kernels [out, in]."""
    x = params["embed"][tokens]
    for layer in params["layers"]:
        h = norm(x, layer["input_layernorm"])
        own = layer["self_attn"]
        q, k, v = ((h @ own[n]["weight"].T).reshape(*h.shape[:2], -1, 4) for n in ("q_proj", "k_proj", "v_proj"))
        x = x + attend(q, k, v).reshape(h.shape) @ own["o_proj"]["weight"].T
        h, own = norm(x, layer["post_attention_layernorm"]), layer["mlp"]
        h = jax.nn.silu(h @ own["gate_proj"]["weight"].T) * (h @ own["up_proj"]["weight"].T)
        x = x + h @ own["down_proj"]["weight"].T
    return norm(x, params["norm"]) @ params["embed"].T


class Attention(nn.Module):
    @nn.compact
    def __call__(self, h):
        heads = lambda count, name: nn.DenseGeneral((count, 4), use_bias=False, name=name)(h)  # noqa: E731
        y = attend(heads(4, "q_proj"), heads(2, "k_proj"), heads(2, "v_proj"))
        return nn.DenseGeneral(16, axis=(-2, -1), use_bias=False, name="o_proj")(y)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, h):
        gate, up = (nn.Dense(24, use_bias=False, name=name)(h) for name in ("gate_proj", "up_proj"))
        return nn.Dense(16, use_bias=False, name="down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        gain = lambda name: self.param(name, nn.initializers.ones, (16,))  # noqa: E731
        x = x + Attention(name="self_attn")(norm(x, gain("input_layernorm")))
        return x + Mlp(name="mlp")(norm(x, gain("post_attention_layernorm"))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = self.param("embed", nn.initializers.normal(), (40, 16))
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="layers")(embed[tokens], None)
        return norm(x, self.param("norm", nn.initializers.ones, (16,))) @ embed.T


def linen_params(params):
    """The family's parameters as `Scanned` has them."""

    def kernels(layer):
        own = {k: v for k, v in layer.items() if k.endswith("layernorm")}
        own["mlp"] = {name: {"kernel": entry["weight"].T} for name, entry in layer["mlp"].items()}
        own["self_attn"] = {
            name: {"kernel": w["weight"].T.reshape((4, 4, 16) if name == "o_proj" else (16, -1, 4))}
            for name, w in layer["self_attn"].items()
        }
        return own

    stacked = jax.tree.map(lambda *a: jnp.stack(a), *map(kernels, params["blocks"]))
    return {"params": {"embed": params["embed"], "norm": params["norm"], "layers": stacked}}


@pytest.fixture(scope="module")
def unrolled(model, tokens):
    params = {"embed": model.params["embed"], "norm": model.params["norm"], "layers": model.params["blocks"]}
    return qjax.trace(plain, params, tokens[:2])


@pytest.fixture(scope="module")
def scanned(model, tokens):
    return qjax.linen.trace(Scanned(), linen_params(model.params), tokens[:2])


@pytest.fixture(scope="module")
def expected(model, tokens):
    return hessian.collect(model, tokens, batch=2)


def close(found, exact):
    return np.testing.assert_allclose(found, exact, rtol=1e-6, atol=2e-6 * float(np.abs(exact).max()))


def test_they_are_the_family(model, unrolled, scanned, tokens):
    exact = forward(model.params, tokens, CONFIG)
    for traced in (unrolled, scanned):
        np.testing.assert_allclose(traced(traced.params, tokens), exact, rtol=2e-5, atol=2e-5)
        assert "gather" in traced.left["embed"]


def test_names_and_hessians(model, unrolled, scanned, tokens, expected):
    names = hessian.layer_names(CONFIG)
    assert sorted(unrolled.linears) == sorted(names)
    batches = [tokens[:2], tokens[2:]]
    found = unrolled.hessians(batches)
    for name in names:
        close(found[name].input, expected[name].input)
        assert found[name].tokens == tokens.size
    q, v = (found[f"layers.1.self_attn.{n}_proj"] for n in "qv")
    assert q.input is v.input
    stacks = scanned.hessians(batches)
    assert sorted(name for site in scanned.linears.values() for name in site.matrices) == sorted(names)
    for name, site in scanned.linears.items():
        assert stacks[name].input.shape == (2, site.shape[1], site.shape[1])
        for matrix, own in zip(site.matrices, stacks[name].input, strict=True):
            close(own, expected[matrix].input)


@pytest.mark.parametrize("estimator", ["sketch_b", "sketch_a"])
def test_sketches(model, unrolled, scanned, tokens, estimator):
    """The labels of both are drawn from the same logits with the same keys."""
    exact = hessian.collect(model, tokens, estimator, batch=2)
    found = unrolled.hessians([tokens], estimator)
    stacks = scanned.hessians([tokens], estimator) if estimator == "sketch_b" else {}
    for factor in ("input", "output"):
        for name, own in exact.items():
            want = np.asarray(getattr(own, factor))
            np.testing.assert_allclose(getattr(found[name], factor), want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
        for name, stack in stacks.items():
            for matrix, one in zip(scanned.linears[name].matrices, getattr(stack, factor), strict=True):
                want = np.asarray(getattr(exact[matrix], factor))
                np.testing.assert_allclose(one, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_codes(model, unrolled, scanned, tokens, expected, tmp_path):
    """Bit for bit those of the family, given the same Hessians."""
    recipe = qjax.Recipe("half_integer", 3, rounding="ldlq", hessian="original")
    whole = qjax.quantize_model(model, tokens, recipe, hessians=expected, key=5, progress=False)
    family = {report.name: report for report in whole.reports}
    blocks = [operators(block) for block in whole.params["blocks"]]
    params = unrolled.quantize(expected, recipe, key=5)
    assert [r.name for r in unrolled.reports] == list(unrolled.linears)
    own = unrolled.operators(params)
    stacks = {
        name: jnp.stack([expected[matrix].input for matrix in site.matrices]) for name, site in scanned.linears.items()
    }
    scan_params = scanned.quantize(stacks, recipe, key=5)
    entries = {
        matrix: entry
        for name, operator in scanned.operators(scan_params).items()
        for matrix, entry in zip(scanned.linears[name].matrices, operator.unstacked(), strict=True)
    }
    for index, block in enumerate(blocks):
        for place, operator in block.items():
            name = f"layers.{index}.{place.removesuffix('.weight')}"
            for other in (own[name], entries[name]):
                jax.tree.map(np.testing.assert_array_equal, other, operator)
            assert {r.name: r for r in unrolled.reports}[name].proxy_loss == family[name].proxy_loss
    exact = forward(whole.params, tokens, CONFIG)
    for traced, changed in ((unrolled, params), (scanned, scan_params)):
        y = jax.jit(traced)(changed, tokens)
        np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(traced(traced.dense(changed), tokens), y, rtol=1e-4, atol=1e-4)
    scanned.save(scan_params, tmp_path / "own")
    jax.tree.map(np.testing.assert_array_equal, scanned.load(tmp_path / "own"), scan_params)
    with pytest.raises(ArtifactError, match="for another function: layers.0.mlp.down_proj is absent there"):
        unrolled.load(tmp_path / "own")
    (tmp_path / "own" / "operators" / "00000.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"00000.safetensors cannot be read.*save the parameters again"):
        scanned.load(tmp_path / "own")
    with pytest.raises(ArtifactError, match="no parameters of a traced function"):
        scanned.load(tmp_path / "other")
    with pytest.raises(InputError, match="holds something else"):
        scanned.save(scan_params, tmp_path)

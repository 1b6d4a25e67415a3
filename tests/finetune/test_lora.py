"""Adapters over frozen codes: values, gradients, memory, files, for several codebooks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Hessian, codebooks, incoherence, models, quantize_matrix, rounding
from qjax.codebooks.base import CODEBOOKS
from qjax.errors import ArtifactError, InputError
from qjax.finetune import lora
from qjax.runtime.atomic import write_safetensors

BITS = {"e81b": 1, "e8p_rvq": 4}
OPTIONS = {"trellis": {"L": 8}}


def quantized(name="half_integer", bits=2, out=32, inner=48, seed=0, **options):
    rng = np.random.default_rng(seed)
    return quantize_matrix(
        rng.standard_normal((out, inner)).astype(np.float32),
        Hessian(np.eye(inner, dtype=np.float32)),
        codebook=codebooks.make(name, bits, **options),
        rounding=rounding.make("nearest"),
        incoherence=incoherence.make("hadamard"),
        key=jax.random.key(0),
    )[0]


def low_rank(matrix, rank=4, scale=0.5, seed=1):
    rng = np.random.default_rng(seed)
    a, b = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((rank, matrix.shape[1]), (matrix.shape[0], rank))
    )
    return lora.Adapted(matrix, jnp.asarray(a), jnp.asarray(b), scale)


@pytest.mark.parametrize("name", sorted(CODEBOOKS))
def test_value_and_gradients_are_those_of_the_dense_layer(name):
    """Decoding for itself, forward and backward, and decoded once for both."""
    layer = low_rank(quantized(name, BITS.get(name, 2), **OPTIONS.get(name, {})))
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((2, 3, 48)).astype(np.float32))
    target = jnp.asarray(rng.standard_normal((2, 3, 32)).astype(np.float32))
    base = layer.base.dequantize()

    def dense(a, b, x):
        return jnp.sum(target * jnp.einsum("bti,oi->bto", x, base + 0.5 * b @ a))

    def adapted(a, b, x, layer):
        own = layer.replace(lora_a=a, lora_b=b)
        return tuple(jnp.sum(target * way.matmul(x)) for way in (own, own.opened()))

    def gradients(layer):
        one, other = (jax.grad(lambda *parts, i=i: adapted(*parts, layer)[i], (0, 1, 2)) for i in range(2))
        parts = (layer.lora_a, layer.lora_b, x)
        return adapted(*parts, layer), one(*parts), other(*parts)

    values, *found = jax.jit(gradients)(layer)
    value, expected = jax.value_and_grad(dense, (0, 1, 2))(layer.lora_a, layer.lora_b, x)
    np.testing.assert_allclose(values, value, rtol=2e-3)
    for gradient in found:
        for one, other in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=2e-3, atol=2e-3)


def test_merge_and_unmerge():
    layer = low_rank(quantized())
    x = jnp.asarray(np.random.default_rng(5).standard_normal((7, 48)).astype(np.float32))
    dense = lora.merge(layer)
    np.testing.assert_allclose(np.asarray(x @ dense.T), np.asarray(layer.matmul(x)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.asarray(lora.unmerge(dense, layer)), np.asarray(layer.base.dequantize()), atol=1e-5)


@pytest.mark.parametrize("opened", [False, True])
def test_the_gradient_of_a_deep_stack_needs_the_memory_of_one_dense_layer(opened):
    """Layers of 512×512 under one scan, as tuning runs them, almost without activations: a dense layer is 1 MiB.

    `opened`: as with rematerialisation, where a layer is decoded once for its second forward and its backward pass.
    """
    size, rows = 512, 4
    temporary = {}
    layer = low_rank(quantized(out=size, inner=size))
    for depth in (2, 10):
        stacked = jax.tree.map(lambda leaf, depth=depth: np.stack([np.asarray(leaf)] * depth), layer)

        def loss(parts, stacked):
            def body(x, own):
                layer, (a, b) = own
                layer = layer.replace(lora_a=a, lora_b=b)
                return jnp.tanh((layer.opened() if opened else layer).matmul(x)), None

            step = jax.checkpoint(body, prevent_cse=False) if opened else body
            return jnp.sum(jax.lax.scan(step, jnp.ones((rows, size), jnp.float32), (stacked, parts))[0])

        # The codes are arguments, as in a model: as constants the compiler would decode them once and for all.
        program = jax.jit(jax.grad(loss)).lower((stacked.lora_a, stacked.lora_b), stacked).compile()
        temporary[depth] = program.memory_analysis().temp_size_in_bytes
    assert temporary[10] < temporary[2] + 4 * size * size, temporary


@pytest.fixture(scope="module")
def model():
    loaded = models.load("tiny")
    block = loaded.params["blocks"][0]
    weight = np.asarray(block["mlp"]["up_proj"]["weight"])
    matrix = quantize_matrix(
        weight,
        Hessian(np.eye(weight.shape[1], dtype=np.float32)),
        codebook=codebooks.make("half_integer", 2),
        rounding=rounding.make("nearest"),
        incoherence=incoherence.make("hadamard"),
        key=jax.random.key(0),
    )[0]
    first = {**block, "mlp": {**block["mlp"], "up_proj": {"weight": matrix}}}
    return loaded, {**loaded.params, "blocks": [first, *loaded.params["blocks"][1:]]}


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({}, {"scales": "{"}, "does not describe its adapters .*JSONDecodeError"),
        ({}, {"scales": "[1]"}, "does not describe its adapters"),
        ({}, {"scales": None}, "does not describe its adapters .*'scales'"),
        ({"x.lora_b": None}, {}, "does not describe its adapters .*x.lora_b"),
        ({"x.lora_a": np.zeros(3, np.float32)}, {}, "an adapter has A"),
        ({"x.lora_a": np.zeros((3, 4), np.float32)}, {}, "an adapter has A"),
        ({"y.lora_a": np.zeros((2, 4), np.float32)}, {}, "an adapter has A"),
        ({}, {"scales": '{"x": "2"}'}, "an adapter has A"),
    ],
)
def test_a_file_of_adapters_that_is_none_is_refused(tmp_path, arrays, metadata, message):
    whole = {"x.lora_a": np.zeros((2, 4), np.float32), "x.lora_b": np.zeros((3, 2), np.float32)}
    about = {"format": "qjax-adapters-1", "scales": '{"x": 2.0}', "artifact": "a" * 64}
    file = tmp_path / "adapters.safetensors"

    def written(arrays, metadata):
        kept = [{k: v for k, v in table.items() if v is not None} for table in (whole | arrays, about | metadata)]
        write_safetensors(file, *kept)
        return lora.load(file)

    assert written({}, {})["x"][2] == 2.0
    with pytest.raises(ArtifactError, match=rf"adapters\.safetensors: {message}"):
        written(arrays, metadata)


def test_fresh_adapters_change_nothing_and_are_stored_apart(model, tmp_path):
    loaded, params = model
    tokens = np.arange(12, dtype=np.int32).reshape(1, 12)
    adapted = lora.adapted(params, jax.random.key(3), rank=2)
    assert list(lora.adapters(adapted)) == ["layers.0.mlp.up_proj"]
    before = np.asarray(models.forward(params, tokens, loaded.config))
    np.testing.assert_allclose(np.asarray(models.forward(adapted, tokens, loaded.config)), before, atol=1e-4)
    lora.save(tmp_path / "adapters.safetensors", adapted, "a" * 64)
    again = lora.attached(params, lora.load(tmp_path / "adapters.safetensors", "a" * 64))
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert jax.tree.structure(lora.stripped(again)) == jax.tree.structure(params)
    whole = lora.merged(again)
    assert isinstance(whole["blocks"][0]["mlp"]["up_proj"]["weight"], lora.Merged)
    np.testing.assert_allclose(np.asarray(models.forward(whole, tokens, loaded.config)), before, atol=1e-4)
    back = lora.unmerged(whole)
    assert jax.tree.structure(back) == jax.tree.structure(again)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    with pytest.raises(ArtifactError, match="the artifact they were tuned on"):
        lora.load(tmp_path / "adapters.safetensors", "b" * 64)
    with pytest.raises(InputError, match="does not have: layers.9"):
        lora.attached(params, {"layers.9.mlp.up_proj": (np.ones((1, 1)), np.ones((1, 1)), 1.0)})
    with pytest.raises(InputError, match="does not fit"):
        lora.attached(params, {"layers.1.mlp.up_proj": (np.ones((1, 192)), np.ones((384, 1)), 1.0)})


def test_bad_options(model):
    _, params = model
    with pytest.raises(InputError, match="rank is 0"):
        lora.adapted(params, jax.random.key(0), rank=0)
    with pytest.raises(InputError, match="matches no quantised layer"):
        lora.adapted(params, jax.random.key(0), pattern="down_proj")


def test_entry_tunes_an_artifact_with_adapters_and_with_gains(tmp_path, capsys):
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    import experiments._finetune as entry
    import experiments._quantize as quantize
    from qjax.interchange import artifact
    from qjax.job.run import run
    from qjax.pipeline.stored import load_artifact

    def composed(name, *overrides):
        GlobalHydra.instance().clear()
        with initialize_config_dir(quantize.CONFIGS, version_base="1.3"):
            return compose(name, [*overrides, f"cache={tmp_path}/cache"])

    small = ["data.calibration_sequences=8", "data.evaluation_sequences=4", "data.length=64"]
    base = tmp_path / "base"
    options = ["model=tiny", *small, "codebook=e8p", "rounding=nearest", "evaluate=none", "tracker=none", f"out={base}"]
    run(quantize.job_of(composed("quantize", *options)))
    budget = ["finetune.sequences=24", "finetune.validation=4", "finetune.tokens=2560", f"artifact={base}/artifact"]
    results = {}
    for kind in ("e2e", "lora"):
        settings = entry.plain(composed("finetune", f"finetune={kind}", *budget, f"out={tmp_path}/{kind}"))
        results[kind] = entry.run(settings)
        assert results[kind]["finetune"]["validation_after"] < results[kind]["finetune"]["validation_before"]
        assert entry.run(settings)["kl_mean"] == results[kind]["kl_mean"]  # finished: read back
    assert results["e2e"]["kl_mean"] < results["e2e"]["finetune"]["before"]["kl_mean"]
    assert results["lora"]["perplexity"] < results["lora"]["finetune"]["before"]["perplexity"]
    stored = artifact.load(tmp_path / "lora" / "artifact")
    manifests = [json.loads((tmp_path / run / "artifact" / "model.json").read_text()) for run in ("base", "lora")]
    assert manifests[0]["sha256"] == manifests[1]["sha256"]  # adapters leave the codes and all else alone
    parts = lora.load(tmp_path / "lora" / "adapters.safetensors", stored.fingerprint["sha256"])
    assert len(parts) == 28 and len(lora.adapters(lora.attached(stored.params, parts))) == 28
    beside = tmp_path / "lora" / "adapters.safetensors"
    capsys.readouterr()
    assert not lora.adapters(load_artifact(tmp_path / "lora" / "artifact").params)
    assert f"adapters={beside}" in capsys.readouterr().err
    assert len(lora.adapters(load_artifact(tmp_path / "lora" / "artifact", str(beside)).params)) == 28
    assert len(lora.adapters(qjax.load(tmp_path / "lora").params)) == 28  # a run comes with its adapters
    load_artifact(base / "artifact")
    assert capsys.readouterr().err == ""

"""Mixtures of experts through the whole pipeline: quantised, stored, read again, continued, generating."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from qjax.errors import InputError
from qjax.models import forward, layer_names, structure
from qjax.models.linear import linear_weight
from qjax.models.streaming import stream
from qjax.pipeline.quantize_model import quantize_model
from qjax.pipeline.recipe import Recipe
from qjax.pipeline.records import Records

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return qjax.load(FIXTURES / "mixtral")


@pytest.fixture(scope="module")
def quantized(model):
    recipe = Recipe(codebook="grid", bits=4, rounding="gptq", incoherence=None, hessian="sequential")
    return qjax.quantize_model(model, TOKENS, recipe, progress=False)


def with_dense(params, config):
    """The parameters with every operator decoded, one by one."""
    blocks = []
    for block in params["blocks"]:
        dense = {name: linear_weight(block, name).dequantize() for name in structure(config).sites}
        blocks.append(qjax.models.linear.replace_linears(block, dense))
    return {**params, "blocks": blocks}


def test_every_experts_matrix_is_quantised_and_reported(model, quantized):
    assert [report.name for report in quantized.reports] == layer_names(model.config)
    experts = [report for report in quantized.reports if report.expert is not None]
    assert len(experts) == 2 * 3 * 4 and {report.expert for report in experts} == set(range(4))
    for projection in ("w1", "w2", "w3"):
        counted = [r.tokens for r in experts if r.name.startswith("layers.1.") and r.name.endswith(projection)]
        assert sum(counted) == 2 * TOKENS.size
    dense = [report for report in quantized.reports if report.expert is None]
    assert all(report.tokens is None and "tokens" not in report.values() for report in dense)
    router = quantized.params["blocks"][0]["block_sparse_moe"]["gate"]
    np.testing.assert_array_equal(router, model.params["blocks"][0]["block_sparse_moe"]["gate"])


def test_the_loop_over_packed_experts_gives_the_products_of_the_decoded_ones(model, quantized):
    dense = forward(with_dense(quantized.params, model.config), TOKENS[:1], model.config)
    packed = forward(quantized.params, TOKENS[:1], model.config)
    np.testing.assert_allclose(packed, dense, atol=2e-4, rtol=0)
    assert 0 < qjax.evaluate(quantized, TOKENS, reference=model).kl_mean < 1


def test_an_artifact_has_a_file_per_expert_and_gives_the_same_model(model, quantized, tmp_path):
    quantized.save(tmp_path / "run")
    files = {file.name for file in (tmp_path / "run").rglob("layers.*.safetensors")}
    assert files >= {f"{name}.safetensors" for name in layer_names(model.config)}
    again = qjax.load(tmp_path / "run")
    assert [report.values() for report in again.reports] == [report.values() for report in quantized.reports]
    a, b = (jax.tree.leaves(own.params) for own in (again, quantized))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    texts = [qjax.models.generate(own.params, own.config, [3, 1, 4], 4).tolist() for own in (again, quantized)]
    assert texts[0] == texts[1] and len(texts[0]) == 4


def test_a_run_continues_from_the_records_of_its_experts_and_streams(model, quantized, tmp_path):
    recipe = Recipe(codebook="grid", bits=4, rounding="gptq", incoherence=None, hessian="sequential")
    records = Records(tmp_path, "digest")
    streamed, known = stream(FIXTURES / "mixtral"), []
    stop = "layers.1.block_sparse_moe.experts.2.w3"

    def until(report, found):
        if report.name == stop:
            raise KeyboardInterrupt

    arguments = (model.config, streamed.params, TOKENS, recipe)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(*arguments, seed=0, batch=4, records=records, on_layer=until)
    result = quantize_model(
        *arguments,
        seed=0,
        batch=4,
        records=records,
        held_bytes=0,
        on_layer=lambda report, found: known.append((report.name, found)),
    )
    last = layer_names(model.config).index(stop)
    assert known == [(name, place <= last) for place, name in enumerate(layer_names(model.config))]
    for block, other in zip(result.params["blocks"], quantized.params["blocks"], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (block, other)), strict=True))


def test_rules_name_an_expert(model):
    recipe = Recipe(
        bits=2,
        rounding="nearest",
        incoherence=None,
        hessian="sequential",
        rules=[{"pattern": r"experts\.3\.w2", "bits": 4}, {"pattern": "self_attn", "skip": True}],
    )
    plans = recipe.plan(layer_names(model.config))
    assert plans["layers.0.block_sparse_moe.experts.3.w2"].codebook.bits == 4
    assert plans["layers.0.block_sparse_moe.experts.2.w2"].codebook.bits == 2


def test_experts_over_several_devices_are_refused_by_name(model):
    from qjax.tensor_parallel.placement import check

    check(model.config, 1)
    with pytest.raises(InputError, match=r"mesh.model is 2.*experts.*mesh.model=1"):
        check(model.config, 2)


@pytest.mark.parametrize("preset", ["quip_sharp", "qtip", "yaqa"])
def test_the_published_methods(model, preset: str):
    recipe = qjax.pipeline.presets.preset(preset, None)
    found = qjax.quantize_model(model, TOKENS, dataclasses.replace(recipe, finetune=None), progress=False)
    assert len(found.reports) == len(layer_names(model.config))
    assert all(0 < report.proxy_loss < 1 for report in found.reports)
    assert 0 < qjax.evaluate(found, TOKENS, reference=model).kl_mean < 5

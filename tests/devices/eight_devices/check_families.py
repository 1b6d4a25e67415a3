"""A family that is not a Llama on a mesh: OPT's logits, states and tokens, dense and quantised, as on one device."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from qjax import codebooks, incoherence, models, rounding, tensor_parallel
from qjax.evaluate import hidden_states
from qjax.hessian import collect
from qjax.matrix.quantize import quantize_matrix
from qjax.models.linear import linear_weight, replace_linears
from qjax.runtime import mesh

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "models"
TOKENS = np.random.default_rng(1).integers(0, 64, (4, 24)).astype(np.int32)


@pytest.fixture(scope="module", params=["opt", "opt_post_norm"])
def model(request):
    assert len(jax.devices()) == 8
    return models.load(FIXTURES / request.param)


def quantized(model):
    hessians = collect(model, TOKENS, batch=4)
    blocks = []
    for index, parameters in enumerate(model.params["blocks"]):
        found = {
            name: quantize_matrix(
                linear_weight(parameters, name),
                hessians[f"layers.{index}.{name}"],
                codebook=codebooks.make("half_integer", 2),
                rounding=rounding.make("ldlq"),
                incoherence=incoherence.make("block_hadamard", block=4),
                key=jax.random.key(0),
                name=f"layers.{index}.{name}",
            )[0]
            for name in models.structure(model.config).sites
        }
        blocks.append(replace_linears(parameters, found))
    return {**model.params, "blocks": blocks}


@pytest.mark.parametrize("kind", ["dense", "quantized"])
def test_the_model_on_two_by_four_devices_is_that_on_one(model, kind):
    params = model.params if kind == "dense" else quantized(model)
    found = tensor_parallel.distribute(params, model.config, mesh.make(2, 4), packed=False)
    logits = np.asarray(models.forward(params, TOKENS, model.config))
    atol = 1e-5 * np.abs(logits).max()
    np.testing.assert_allclose(np.asarray(models.forward(found, TOKENS, model.config)), logits, atol=atol)
    states = hidden_states(params, TOKENS, model.config)
    np.testing.assert_allclose(
        hidden_states(found, TOKENS, model.config), states, atol=1e-5 * np.abs(states).max(), rtol=0
    )
    texts = [[5, 9, 2, 7], [1, 3]]
    one, many = (models.generate_batch(p, model.config, texts, 5).tokens for p in (params, found))
    assert [text.tolist() for text in one] == [text.tolist() for text in many]


def test_hessians_of_eight_devices_are_those_of_one(model):
    one, many = (collect(model, TOKENS, "sketch_b", batch=1, mesh=own) for own in (None, mesh.make(4, 2)))
    for name, own in one.items():
        for factor in ("input", "output"):
            expected = np.asarray(getattr(own, factor))
            np.testing.assert_allclose(np.asarray(getattr(many[name], factor)), expected, atol=2e-5 * expected.max())

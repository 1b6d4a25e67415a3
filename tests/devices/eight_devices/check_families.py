"""Families that are no Llamas on a mesh: logits, states and tokens, dense and quantised, as on one device."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest
from generated import generated

from qjax import codebooks, incoherence, models, rounding, tensor_parallel
from qjax.errors import InputError
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


@pytest.mark.parametrize("case", ["gpt_neox", "gemma2"])
def test_fused_linears_and_layers_of_two_kinds_on_four_by_two_devices(case):
    model = generated(case)
    agree(model, quantized(model), mesh.make(4, 2))


@pytest.mark.parametrize("case", ["phi3", "olmo2"])
def test_what_cannot_be_cut_is_refused(case):
    model = generated(case)
    with pytest.raises(InputError, match="cannot be cut into parts .*use mesh.model=1"):
        tensor_parallel.distribute(model.params, model.config, mesh.make(4, 2), packed=False)


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
    agree(model, model.params if kind == "dense" else quantized(model), mesh.make(2, 4))


def agree(model, params, devices):
    """Raises AssertionError unless logits, states and tokens on these devices are those on one."""
    found = tensor_parallel.distribute(params, model.config, devices, packed=False)
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

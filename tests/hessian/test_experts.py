"""Hessians of a mixture's experts against brute force in numpy, token by token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from qjax.errors import InputError
from qjax.hessian import HessianStore, collect
from qjax.hessian.estimators import Moments
from qjax.hessian.experts import ExpertFactor
from qjax.hessian.moments import block_hessians, block_hessians_of_two_streams
from qjax.linalg.kronecker import Hessian
from qjax.models import load, structure
from qjax.models.transformer import block_record, embed, probed

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
PLACE = "block_sparse_moe"


@pytest.fixture(scope="module")
def model():
    return load(FIXTURES / "mixtral")


@pytest.fixture(scope="module")
def x(model):
    tokens = np.random.default_rng(3).integers(0, 64, (5, 12)).astype(np.int32)
    return np.asarray(embed(model.params["embed"], tokens, model.config))


@pytest.fixture(scope="module")
def found(model, x):
    return block_hessians(model.params["blocks"][0], x, model.config, index=0, batch=2)


def by_hand(model, rows):
    """{(expert, "w1" or "w2"): (E[x xᵀ] over its tokens, over all tokens, its tokens)} of normed inputs, float64."""
    block = model.params["blocks"][0][PLACE]
    probabilities = np.exp(rows @ np.asarray(block["gate"], np.float64).T)
    chosen = np.argsort(-probabilities, axis=1)[:, : model.config.active]
    result = {}
    for expert in range(model.config.experts):
        w1, w3 = (np.asarray(block["experts"][str(expert)][name]["weight"], np.float64) for name in ("w1", "w3"))
        gate = rows @ w1.T
        hidden = gate / (1 + np.exp(-gate)) * (rows @ w3.T)
        own = (chosen == expert).any(axis=1)
        for name, values in (("w1", rows), ("w2", hidden)):
            mean = values[own].T @ values[own] / own.sum()
            result[expert, name] = mean, values.T @ values / len(values), int(own.sum())
    return result


def test_every_experts_hessian_is_that_of_its_own_tokens(model, x, found):
    _, seen = block_record(model.params["blocks"][0], x, model.config)
    rows = np.asarray(seen[f"{PLACE}.experts.0.w1"][2], np.float64).reshape(-1, 32)
    for (expert, name), (own, every, tokens) in by_hand(model, rows).items():
        hessian = found[f"{PLACE}.experts.{expert}.{name}"]
        assert hessian.tokens == tokens
        np.testing.assert_allclose(hessian.input, own, rtol=1e-4, atol=1e-5 * np.abs(own).max())
        np.testing.assert_allclose(hessian.pooled, every, rtol=1e-4, atol=1e-5 * np.abs(every).max())
    assert sum(found[f"{PLACE}.experts.{e}.w1"].tokens for e in range(4)) == 2 * 5 * 12
    assert found[f"{PLACE}.experts.1.w1"].input is found[f"{PLACE}.experts.1.w3"].input
    assert found["self_attn.q_proj"].pooled is None and found["self_attn.q_proj"].tokens == 60


def test_the_store_gives_back_what_an_expert_has(found, tmp_path):
    store = HessianStore(tmp_path)
    store.save("key", 0, found)
    again = store.load("key", 0)
    assert again is not None and again.keys() == found.keys()
    for name, hessian in found.items():
        assert again[name].tokens == hessian.tokens
        np.testing.assert_array_equal(again[name].input, hessian.input)
        assert (again[name].pooled is None) == (hessian.pooled is None)
        if hessian.pooled is not None:
            np.testing.assert_array_equal(again[name].pooled, hessian.pooled)


def test_few_tokens_shrink_towards_all_and_none_are_all():
    own, pooled = np.diag([4.0, 2.0]).astype(np.float32), np.diag([1.0, 1.0]).astype(np.float32)
    shrunk = lambda tokens, **options: ExpertFactor(**options)(Hessian(own, None, tokens, pooled=pooled), "x").input  # noqa: E731
    np.testing.assert_allclose(shrunk(25, expert_tokens=100), 0.25 * own + 0.75 * pooled)
    np.testing.assert_array_equal(shrunk(100, expert_tokens=100), own)
    np.testing.assert_array_equal(shrunk(4), own)  # by default twice as many as inputs are enough
    np.testing.assert_allclose(shrunk(3), 0.75 * own + 0.25 * pooled)
    np.testing.assert_array_equal(shrunk(1, expert_tokens=0), own)
    np.testing.assert_array_equal(shrunk(0, expert_tokens=0), pooled)
    np.testing.assert_array_equal(shrunk(1000, routing="all"), pooled)
    np.testing.assert_allclose(shrunk(1000, routing="blend"), (own / 3 + pooled) / 2)
    plain = Hessian(own, None, 7)
    assert ExpertFactor()(plain, "x") is plain
    with pytest.raises(InputError, match="routing"):
        ExpertFactor(routing="most")


def test_an_expert_without_tokens_has_the_hessian_of_all(model):
    params = {**model.params, "blocks": [dict(block) for block in model.params["blocks"]]}
    block = params["blocks"][0]
    gate = np.zeros((4, 32), np.float32)  # of equal probabilities the first are kept: experts 2 and 3 see nothing
    block[PLACE] = {**block[PLACE], "gate": gate}
    tokens = np.random.default_rng(3).integers(0, 64, (2, 12)).astype(np.int32)
    found = collect(dataclasses.replace(model, params=params), tokens)
    empty, full = (found[f"layers.0.{PLACE}.experts.{e}.w1"] for e in (3, 0))
    assert (empty.tokens, full.tokens) == (0, 24)
    np.testing.assert_allclose(empty.input, full.input, rtol=1e-5)
    sketch = collect(dataclasses.replace(model, params=params), tokens, "sketch_b", batch=2)
    for name, hessian in sketch.items():
        assert np.trace(np.asarray(hessian.input)) > 0 and np.trace(np.asarray(hessian.output)) > 0, name


def test_a_sketch_of_an_expert_sees_its_tokens_alone(model):
    tokens = np.random.default_rng(3).integers(0, 64, (2, 12)).astype(np.int32)
    x = np.asarray(embed(model.params["embed"], tokens, model.config))
    y, pull, inputs = probed(model.params["blocks"][0], x, model.config)
    _, gradients = pull(jax.numpy.ones_like(y))
    _, seen = block_record(model.params["blocks"][0], x, model.config)
    for linear in structure(model.config).linears:
        if linear.expert is None:
            continue
        routed = np.asarray(seen[linear.name.rsplit(".", 1)[0] + ".w1"][1])
        g = np.asarray(gradients[linear.name])
        assert (g[~routed] == 0).all() and (np.abs(g[routed]).sum(-1) > 0).all()
        assert (np.asarray(inputs[structure(model.config).sites[linear.name]])[~routed] == 0).all()


def test_the_corrected_stream_is_refused_by_name(model, x):
    with pytest.raises(InputError, match=r"corrected.*MixtralForCausalLM.*hessian=sequential or original"):
        block_hessians_of_two_streams(model.params["blocks"][0], x, x, model.config, index=0, batch=2)


def test_the_options_of_estimators_are_those_of_the_factor():
    for field in dataclasses.fields(ExpertFactor):
        assert getattr(Moments(), field.name) == field.default

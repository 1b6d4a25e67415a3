"""Stacks of stacks and sketches of all kinds of linears, against gradients of the whole matrices."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.matrix import Dense
from qjax.matrix.stacked import stack

LAYERS, EXPERTS, WIDTH = 2, 3, 4


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 0.5, jnp.float32)  # noqa: E731
    params = {
        "layers": {"experts": normal(LAYERS, EXPERTS, WIDTH, 5), "back": normal(LAYERS, EXPERTS, 5, WIDTH)},
        "fused": normal(LAYERS, WIDTH, 2 * WIDTH),
        "tied": normal(WIDTH, WIDTH),
        "taken": normal(WIDTH, WIDTH),
        "other": normal(WIDTH, WIDTH),
    }

    def function(p, x):
        def layer(x, own):
            experts, (left, right) = own
            h = jnp.tanh(jnp.einsum("bti,eio->ebto", x, experts["experts"]))  # every expert's own rows from here on
            h = jnp.mean(jnp.einsum("ebti,eio->ebto", h, experts["back"]), axis=0)
            return x + h @ p["tied"] + jnp.sin(x @ left) * (x @ right), None

        halves = p["fused"][..., :WIDTH], p["fused"][..., WIDTH:]
        x, _ = jax.lax.scan(layer, x, (p["layers"], halves), reverse=True)
        positive = jnp.sum(x * x) > 0
        return jax.lax.cond(positive, lambda p: jnp.tanh(x @ p["taken"]), lambda p: x @ p["other"], p)

    x = normal(3, 2, WIDTH)
    return function, params, x, qjax.trace(function, params, x)


def loss(y, x):
    return jnp.sum(jnp.sin(y) * (1 + x))


def test_names_of_stacks(case):
    traced = case[3]
    sites = traced.linears
    assert sites["layers.back"].stack == (LAYERS, EXPERTS)
    assert sites["layers.back"].matrices[4] == "layers.1.back.1"
    assert {"fused[:,:,0:4]", "fused[:,:,4:8]", "tied", "taken", "other", "layers.experts"} <= set(sites)
    assert sites["fused[:,:,0:4]"].stack == (LAYERS,)


def test_sketches_are_those_of_whole_gradients(case):
    """E[Gᵀ G] and E[G Gᵀ] of every matrix over sequences, G = ∂ℓ/∂W by JAX, scaled to a mean diagonal of 1."""
    function, params, x, traced = case
    found = traced.hessians([x[:2], x[2:]], "sketch_b", loss=loss)
    gradient = jax.jit(jax.grad(lambda p, x: loss(function(p, x), x)))
    gradients = [gradient(params, x[i : i + 1]) for i in range(len(x))]
    leaves = [jax.tree.leaves(g) for g in gradients]
    for name, site in traced.linears.items():
        g = np.stack([np.asarray(site.matrix(own[site.leaf]), np.float64) for own in leaves])
        for factor, subscripts in (("input", "s...oi,s...oj->...ij"), ("output", "s...oi,s...pi->...op")):
            exact = np.einsum(subscripts, g, g)
            diagonal = np.einsum("...ii->...", exact)[..., None, None] / exact.shape[-1]
            exact = np.where(diagonal > 0, exact / np.maximum(diagonal, 1e-30), 0)
            np.testing.assert_allclose(getattr(found[name], factor), exact, rtol=1e-3, atol=1e-3)
        assert found[name].tokens == 3


def test_operators_in_stacks(case):
    function, params, x, traced = case
    leaves, operators = jax.tree.leaves(params), {}
    for name, site in traced.linears.items():
        own = [Dense(m) for m in site.matrix(leaves[site.leaf]).reshape(-1, *site.shape)]
        operators[name] = stack(own, site.stack) if site.stack else own[0]
    replaced = traced.with_operators(operators)
    np.testing.assert_allclose(traced(replaced, x), function(params, x), rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, traced.dense(replaced), params)
    with pytest.raises(qjax.errors.InputError, match=r"fused\[:,:,4:8\] is a slice.*replace all"):
        traced.with_operators({"fused[:,:,0:4]": operators["fused[:,:,0:4]"]})


def test_the_page_runs(pytestconfig, monkeypatch, tmp_path):
    page = pytestconfig.rootpath / "docs" / "any-jax-function.md"
    code = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code[1], found)
    assert list(found["traced"].linears) == ["up", "down"]
    error = jnp.linalg.norm(found["y"] - found["function"](found["dense"], found["batches"][0]))
    assert error < 1e-4 * jnp.linalg.norm(found["y"])
    assert (pathlib.Path("runs/function") / "function.json").is_file()

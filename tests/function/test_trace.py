"""What a traced function refuses, lists and replaces; the doors of flax and Equinox; convolutions; files."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.errors import DataError, InputError, NumericsError
from qjax.matrix import Dense


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


W, X = {"w": normal(6, 4)}, normal(3, 6, seed=1)


def product(p, x):
    return x @ p["w"]


def test_what_is_not_taken_says_why():
    params = {
        "both": normal(6, 6),
        "head": normal(6, 6),
        "loop": normal(6, 6),
        "part": normal(6, 8),
        "scaled": normal(6, 6),
        "squared": normal(6, 6),
        "vector": normal(6),
        "grown": normal(6, 6),
        "ok": {"kernel": normal(6, 6)},
    }

    def function(p, x):
        x = jnp.tanh(x @ p["both"]) @ p["both"].T
        x = jax.lax.while_loop(lambda s: jnp.sum(s) > 1e9, lambda s: s @ p["loop"], x)
        x = x @ p["part"][:, :6] @ (p["scaled"] * 2) @ (p["squared"] @ p["squared"]) + (x @ p["vector"])[:, None]
        grown = jnp.broadcast_to(p["grown"], (3, 6, 6))
        return jnp.einsum("bi,bio->bo", x, grown) @ p["ok"]["kernel"] + p["head"][jnp.arange(3)]

    traced = qjax.trace(function, params, X)
    assert list(traced.linears) == ["ok"]
    reasons = {
        "both": "different matrices",
        "loop": "inside while",
        "part": "36 of its 48",
        "scaled": "enters mul",
        "squared": "another parameter",
        "vector": "a vector",
        "grown": "broadcast to a larger",
        "head": "enters gather",
    }
    assert set(traced.left) == set(reasons)
    for name, reason in reasons.items():
        assert reason in traced.left[name], traced.left[name]


def test_tied_kernels_are_one_linear():
    traced = qjax.trace(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].astype(jnp.float32), {"w": normal(6, 6)}, X)
    assert traced.linears["w"].uses == 2
    x = np.asarray(X, np.float64)
    rows = np.concatenate([x, np.tanh(x @ np.asarray(traced.params["w"]))])
    found = traced.hessians([X])["w"]
    np.testing.assert_allclose(found.input, rows.T @ rows / 6, rtol=1e-5, atol=1e-6)
    assert found.tokens == 6


def test_parameters_that_are_one_array():
    traced = qjax.trace(lambda w, x: x @ w, W["w"], X)
    assert list(traced.linears) == ["weight"]
    replaced = traced.with_operators({"weight": Dense(W["w"].T)})
    np.testing.assert_allclose(traced(replaced, X), X @ W["w"], rtol=1e-5, atol=1e-5)


counter, kept = itertools.count(), []


@pytest.mark.parametrize(
    ("function", "params", "inputs", "message"),
    [
        (product, {"w": "text"}, (X,), r"parameter \['w'\] is 'text' \(str\)"),
        (product, {"w": 3.0}, (X,), r"parameter \['w'\] is 3.0 \(float\)"),
        (product, W, ("text",), r"input \[0\] is 'text'.*functools.partial"),
        (lambda p, x: x @ p["w"] if jnp.sum(x) > 0 else x, W, (X,), "depend on values.*lax.cond"),
        (lambda p, x: x[x > 0], W, (X,), "depend on values"),
        (lambda p, x: (x @ p["w"]) * next(counter), W, (X,), "another program every time.*random keys"),
        (
            lambda p, x: x @ p["w"] * np.random.default_rng().random(4).astype(np.float32)[None],
            W,
            (X,),
            "another program",
        ),
        (lambda p, x: p.update(v=x) or x @ p["w"], W, (X,), "adds or removes parameters"),
        (lambda p, x: _written(p, x), W, (X,), "writes to parameter w"),
        (lambda p, x: _leaked(p, x), W, (X,), "keeps arrays of an earlier call"),
        (product, {**W, "idle": normal(2)}, (X,), "parameter idle is needed by no output"),
        (lambda p, x: x + p["w"][0, 0], W, (X,), "no linear: w: it enters slice|no linear"),
    ],
    ids=lambda value: None if callable(value) or isinstance(value, dict | tuple) else value[:24],
)
def test_refusals(function, params, inputs, message):
    with pytest.raises(InputError, match=message):
        qjax.trace(function, params, *inputs)


def _written(p, x):
    p["w"] = p["w"] * 2
    return x @ p["w"]


def _leaked(p, x):
    kept.append(x @ p["w"])
    return kept[0] + x @ p["w"]


def test_unused_parameters_may_be_left():
    assert list(qjax.trace(product, {**W, "idle": normal(2)}, X, unused="leave").linears) == ["w"]


def test_refusals_of_a_traced_function():
    traced = qjax.trace(product, W, X)
    recipe = qjax.Recipe("half_integer", 2)
    with pytest.raises(InputError, match="batch 1 is .*traced with inputs"):
        traced.hessians([X, (X, X)])
    with pytest.raises(DataError, match="no calibration batches"):
        traced.hessians([])
    with pytest.raises(NumericsError, match="w: its inputs .* batch 0"):
        traced.hessians([X.at[0, 0].set(np.nan)])
    with pytest.raises(InputError, match="unknown Hessian estimator 'sketch'.*did you mean 'sketch_"):
        traced.hessians([X], "sketch")
    with pytest.raises(InputError, match="not one array of logits.*loss="):
        traced.hessians([X], "sketch_b")
    with pytest.raises(InputError, match="seed: options of the estimators"):
        traced.hessians([X], seed=3)
    with pytest.raises(InputError, match="tunes by 'e2e', which a traced function does not have"):
        traced.quantize({}, qjax.Recipe("half_integer", 2, finetune="e2e"))
    with pytest.raises(InputError, match="no linear 'v'"):
        traced.quantize({"v": np.eye(6, dtype=np.float32)}, recipe)
    with pytest.raises(InputError, match="no Hessian of w"):
        traced.quantize({}, recipe)
    with pytest.raises(InputError, match=r"input factor of w's Hessian is \[4, 4\]; it is \[6, 6\]"):
        traced.quantize({"w": np.eye(4, dtype=np.float32)}, recipe)
    with pytest.raises(InputError, match=r"w is \[4, 6\]; what shall stand in its place is \[6, 4\]"):
        traced.with_operators({"w": Dense(W["w"])})
    with pytest.raises(InputError, match="the parameters are"):
        traced({"v": W["w"]}, X)
    with pytest.raises(InputError, match=r"parameter w is \[6, 5\]; it was \[6, 4\]"):
        traced({"w": normal(6, 5)}, X)
    stacked = qjax.trace(
        lambda p, x: jax.lax.scan(lambda x, w: (x @ w["w"] + w["b"][None], None), x, p["layers"])[0],
        {"layers": {"w": normal(2, 6, 6), "b": normal(2, 6)}},
        X,
    )
    rules = [{"pattern": r"layers\.1", "skip": True}]
    with pytest.raises(InputError, match=r"skip layers.1.w and not layers.0.w"):
        stacked.quantize({"layers.w": np.stack([np.eye(6)] * 2)}, qjax.Recipe("half_integer", 2, rules=rules))


def test_convolutions_that_are_linears():
    """Patches of stride = window, and single places, in the layouts of images and text."""
    params = {"patch": normal(2, 3, 5, 8), "one": normal(1, 8, 6), "slide": normal(3, 6, 4)}
    image = normal(2, 4, 7, 5)

    def function(p, x):
        kind = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, p["patch"], (2, 3), "VALID", dimension_numbers=kind)
        x = jnp.tanh(x.reshape(2, -1, 8))
        kind = ("NWC", "WIO", "NWC")
        x = jax.lax.conv_general_dilated(x, p["one"], (2,), "VALID", dimension_numbers=kind)
        return jax.lax.conv_general_dilated(x, p["slide"], (1,), "SAME", dimension_numbers=kind)

    traced = qjax.trace(function, params, image)
    assert list(traced.linears) == ["patch", "one"]
    assert "pads" in traced.left["slide"]
    x = np.asarray(image, np.float64)
    patches = np.stack(
        [x[:, i : i + 2, j : j + 3].reshape(2, -1) for i in (0, 2) for j in (0, 3)], axis=1
    )  # window, then features
    hidden = np.tanh(patches @ np.asarray(params["patch"], np.float64).reshape(30, 8))[:, ::2].reshape(-1, 8)
    patches = patches.reshape(-1, 30)
    found = traced.hessians([image])
    np.testing.assert_allclose(found["patch"].input, patches.T @ patches / 8, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["one"].input, hidden.T @ hidden / 4, rtol=1e-4, atol=1e-5)
    operators = {name: Dense(site.matrix(params[name])) for name, site in traced.linears.items()}
    replaced = traced.with_operators(operators)
    np.testing.assert_allclose(traced(replaced, image), function(params, image), rtol=1e-4, atol=1e-4)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.last = nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        x = self.norm(nnx.relu(self.first(x)))
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x.reshape(-1, 2, 4))


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="module")
def quantized(net):
    traced = qjax.nnx.trace(net, X)
    return traced, traced.quantize(traced.hessians([X]), qjax.Recipe("half_integer", 4, rounding="nearest"), key=1)


def test_an_nnx_module(net, quantized):
    traced, params = quantized
    assert list(traced.linears) == ["first", "layers.0", "layers.1", "last"]
    merged = qjax.nnx.merge(net, traced, params)
    np.testing.assert_allclose(traced(params, X), merged(X), rtol=1e-4, atol=1e-4)
    assert not np.allclose(merged(X), net(X), atol=1e-3)
    with pytest.raises(InputError, match="takes a flax.nnx module, and dict is none"):
        qjax.nnx.trace({}, X)


def test_gradients_and_batches_of_a_quantized_function(quantized):
    """With respect to the inputs, under jit, and mapped over batches."""
    traced, params = quantized
    dense = traced.dense(params)

    def loss(bias, params):
        return jnp.sum(traced(params, X + bias) ** 2)

    bias = jnp.zeros((1, 6))
    found, exact = (jax.jit(jax.grad(loss))(bias, own) for own in (params, dense))
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)
    many = jax.vmap(lambda x: traced(params, x))(jnp.stack([X, 2 * X]))
    np.testing.assert_allclose(many[1], traced(params, 2 * X), rtol=1e-4, atol=1e-4)


def test_equinox(monkeypatch):
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.MLP(6, 4, 8, 1, key=jax.random.key(0))
    traced = qjax.equinox.trace(layer, X[0])
    assert list(traced.linears) == ["layers.0", "layers.1"]
    found = traced.hessians(list(X))["layers.0"]
    np.testing.assert_allclose(found.input, np.asarray(X).T @ np.asarray(X) / 3, rtol=1e-5, atol=1e-6)


def test_equinox_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(InputError, match=r"needs equinox: pip install -e '\.\[equinox\]'"):
        qjax.equinox.trace(None, X)

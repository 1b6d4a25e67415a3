"""The fit of Kronecker factors against explicit gradients, exact Fisher matrices and planted ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import hessian
from qjax.data.stream import TokenStream
from qjax.errors import InputError
from qjax.hessian import HessianStore, alignment, exact_fisher
from qjax.hessian.fit import Fit, error_bound, gradient_terms, measure_fit, predicted_cost
from qjax.hessian.labels import draw
from qjax.models.linear import linears_of
from qjax.models.transformer import forward
from qjax.pipeline.hessians import check_settings, fits, provide

LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
SETTINGS = {
    "estimator": "sketch_b",
    "stream": "original",
    "batch": 2,
    "rounds": 1,
    "labels": "sampled",
    "seed": 0,
    "input": "sketch",
    "budget_gb": 8,
    "checkpoint_s": 600,
    "fit_sequences": 6,
}


def by_block(hessians):
    return lambda index: {linear: hessians[f"layers.{index}.{linear}"] for linear in LINEARS}


def explicit_gradients(model, tokens):
    """G of every sequence and linear in float64, labels drawn as the module documents."""
    root = jax.random.wrap_key_data(jnp.array([2**31, 0], jnp.uint32))
    found = {}
    for index, sequence in enumerate(tokens):
        sequence = jnp.asarray(sequence)
        z = forward(model.params, sequence[None], model.config)[0]
        labels = draw(jax.random.fold_in(root, jnp.uint32(index)), jax.nn.softmax(z, axis=-1))  # see test_sketch

        def loss(params, s=sequence, c=labels):
            z = jax.nn.log_softmax(forward(params, s[None], model.config)[0])
            return -jnp.sum(jnp.take_along_axis(z, c[:, None], axis=1))

        gradient = jax.grad(loss)(model.params)
        for block, parameters in enumerate(gradient["blocks"]):
            for linear, weight in linears_of(parameters).items():
                found.setdefault(f"layers.{block}.{linear}", []).append(np.asarray(weight))
    return {name: np.stack(values).astype(np.float64) for name, values in found.items()}


def test_the_fit_is_that_of_explicit_gradients(model, tokens):
    hessians = hessian.collect(model, tokens[:3], "sketch_b", batch=3)
    held_out = tokens[3:7]
    found = measure_fit(model.config, model.params, held_out, by_block(hessians), batch=2)
    for name, g in explicit_gradients(model, held_out).items():
        h_in, h_out = (np.asarray(h, np.float64) for h in (hessians[name].input, hessians[name].output))
        inner = np.mean(np.einsum("sai,ab,ij,sbj->s", g, h_out, h_in, g, optimize=True))
        square = np.mean([np.sum(g[a] * g[a + 1]) ** 2 for a in (0, 2)])
        expected = inner / np.sqrt(square) / np.linalg.norm(h_in) / np.linalg.norm(h_out)
        assert found[name].cosine == pytest.approx(expected, rel=2e-3)
        assert found[name].norm == pytest.approx(np.sqrt(square), rel=2e-3)
        assert (found[name].sequences, found[name].length) == (4, tokens.shape[1])


def test_an_absent_output_factor_is_the_identity(model, tokens):
    moments = hessian.collect(model, tokens[:3], batch=3)
    eye = lambda name: np.eye(leaf_rows(model, name), dtype=np.float32)  # noqa: E731
    explicit = {name: hessian.Hessian(h.input, eye(name)) for name, h in moments.items()}
    one = measure_fit(model.config, model.params, tokens[3:7], by_block(moments), batch=2)
    other = measure_fit(model.config, model.params, tokens[3:7], by_block(explicit), batch=2)
    for name, fit in one.items():
        assert fit.cosine == pytest.approx(other[name].cosine, rel=1e-4)


def leaf_rows(model, name):
    _, index, group, linear = name.split(".")
    return model.params["blocks"][int(index)][group][linear]["weight"].shape[0]


def test_means_of_pairs_are_the_cosine_with_the_exact_fisher():
    """Over a finite set of gradients taken as the whole distribution, all ordered pairs give ‖𝓗‖² and the cosine."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((9, 3, 5)).astype(np.float32), rng.standard_normal((9, 3, 4)).astype(np.float32)
    h_in, h_out = (np.cov(rng.standard_normal((k, 20))).astype(np.float32) for k in (5, 4))
    inner, pairs = gradient_terms(jnp.asarray(x), jnp.asarray(g), jnp.asarray(h_in), jnp.asarray(h_out))
    fisher = exact_fisher(np.einsum("stm,stn->smn", g, x))
    assert np.mean(np.asarray(pairs) ** 2) == pytest.approx(np.sum(fisher**2), rel=1e-5)
    cosine = np.mean(inner) / np.sqrt(np.mean(np.asarray(pairs) ** 2)) / np.linalg.norm(h_in) / np.linalg.norm(h_out)
    assert cosine == pytest.approx(alignment(fisher, h_out, h_in), rel=1e-5)


def test_the_bound_holds_for_the_exact_fisher():
    rng = np.random.default_rng(1)
    for _ in range(50):
        gradients = rng.standard_normal((6, 4, 5)) * rng.standard_normal((1, 4, 1)) ** 2
        fisher = exact_fisher(gradients)
        h_in, h_out = np.einsum("smi,smj->ij", gradients, gradients), np.einsum("sin,sjn->ij", gradients, gradients)
        fit = Fit(alignment(fisher, h_out, h_in), 0.0, float(np.linalg.norm(fisher)), 6, 7)
        for error in (rng.standard_normal((4, 5)), gradients[0]):
            exact = 0.5 * error.ravel() @ fisher @ error.ravel() / 7
            kronecker = np.trace(h_out @ error @ h_in @ error.T) / np.linalg.norm(h_out) / np.linalg.norm(h_in)
            assert exact <= error_bound(fit, float(np.sum(error**2)), float(kronecker)) * (1 + 1e-9)
    # It is tight for a Kronecker product: no gap, and the loss itself.
    h_in, h_out, error = np.cov(rng.standard_normal((5, 9))), np.cov(rng.standard_normal((4, 9))), np.ones((4, 5))
    norm = np.linalg.norm(h_in) * np.linalg.norm(h_out)
    loss = np.trace(h_out @ error @ h_in @ error.T)
    assert error_bound(Fit(1.0, 0.0, float(norm), 1, 1), 20.0, float(loss / norm)) == pytest.approx(loss / 2)
    assert predicted_cost(Fit(1.0, 0.0, float(norm), 1, 1), float(loss / norm)) == pytest.approx(loss / 2)


def test_the_fit_is_kept_in_the_store(model, tokens, tmp_path, monkeypatch):
    store = HessianStore(tmp_path)
    calibration = TokenStream.of(tokens, {})
    held_out = TokenStream.of(tokens[::-1], {})
    source = provide(store, model, calibration, SETTINGS)
    first = fits(store, model, held_out, SETTINGS, source)
    assert first is not None and set(first) == {f"layers.{i}.{linear}" for i in range(2) for linear in LINEARS}
    monkeypatch.setattr("qjax.pipeline.hessians.measure_fit", None)  # a second computation would fail
    assert fits(store, model, held_out, SETTINGS, source) == first
    assert fits(store, model, held_out, {**SETTINGS, "fit_sequences": 0}, source) is None
    with pytest.raises(InputError, match="there are 7 evaluation sequences"):
        fits(store, model, held_out, {**SETTINGS, "fit_sequences": 8}, source)


def test_errors_say_what_is_needed(model, tokens):
    hessians = hessian.collect(model, tokens[:2], batch=2)
    with pytest.raises(InputError, match="at least two batches"):
        measure_fit(model.config, model.params, tokens[:3], by_block(hessians), batch=2)
    with pytest.raises(InputError, match="fit is measured for Hessians of the original model"):
        check_settings({"estimator": "input", "stream": "quantized", "batch": 2, "fit_sequences": 6})

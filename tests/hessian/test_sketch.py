"""Sketches against gradients of every sequence and token by automatic differentiation, summed in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import hessian, models
from qjax.errors import InputError, NumericsError
from qjax.hessian import alignment, exact_fisher
from qjax.hessian import labels as labels_module
from qjax.hessian import sketch as sketch_module
from qjax.hessian.labels import draw
from qjax.hessian.sketch import assembled, divided, gram_is_cheaper, increments, row_blocks
from qjax.models import structure
from qjax.models.transformer import forward
from qjax.pipeline.hessians import check_settings

LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
NAMES = [f"layers.{index}.{linear}" for index in range(2) for linear in LINEARS]


def leaf(params, name):
    _, index, group, linear = name.split(".")
    return params["blocks"][int(index)][group][linear]


def sampled(model, sequence, index, number=0, seed=0):
    """The labels of sequence `index` in pass `number`, from the documented keys."""
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.array([number, seed], jnp.uint32)), jnp.uint32(index))
    return drawn(key, forward(model.params, sequence[None], model.config)[0])


def drawn(key, z):
    """The documented inversion in float64: a group of 128 tokens by the first number, one of them by the second."""
    p = np.exp(np.asarray(z, np.float64))
    p = np.pad(p, ((0, 0), (0, -p.shape[1] % 128))).reshape(len(p), -1, 128)
    uniform = np.asarray(jax.random.uniform(key, (2, len(p))), np.float64)
    found = []
    for row, first, second in zip(p, uniform[0], uniform[1], strict=True):
        group = np.searchsorted(np.cumsum(row.sum(1)), first * row.sum(), side="right")
        found.append(group * 128 + np.searchsorted(np.cumsum(row[group]), second * row[group].sum(), side="right"))
    return jnp.asarray(found)


def likelihood(params, config, sequence, labels, weight):
    z = jax.nn.log_softmax(forward(params, sequence[None], config)[0])
    return -jnp.sum(jnp.take_along_axis(z, labels[:, None], axis=1)[:, 0] * weight)


def weight_gradients(model, tokens, labels="sampled"):
    """G of every sequence and linear: {name: [sequences, m, n]}."""
    found = {name: [] for name in NAMES}
    for index, sequence in enumerate(tokens):
        sequence = jnp.asarray(sequence)
        if labels == "sampled":
            chosen, weight = sampled(model, sequence, index), jnp.ones(len(sequence))
        else:
            chosen, weight = jnp.roll(sequence, -1), jnp.arange(len(sequence)) < len(sequence) - 1
        weight = weight.astype(jnp.float32)
        gradient = jax.grad(likelihood)(model.params, model.config, sequence, chosen, weight)
        for name in NAMES:
            found[name].append(np.asarray(leaf(gradient, name)["weight"], np.float64))
    return {name: np.stack(values) for name, values in found.items()}


def normal(matrix):
    return matrix / (np.trace(matrix) / len(matrix))


@pytest.mark.parametrize("labels", ["sampled", "data"])
@pytest.mark.parametrize("batch", [3, 7])
def test_sketch_b_is_the_sum_of_outer_products(model, tokens, batch, labels):
    gradients = weight_gradients(model, tokens, labels)
    found = hessian.collect(model, tokens, "sketch_b", batch=batch, labels=labels)
    assert list(found) == NAMES
    for name, g in gradients.items():
        np.testing.assert_allclose(found[name].input, normal(np.einsum("smi,smj->ij", g, g)), atol=2e-5)
        np.testing.assert_allclose(found[name].output, normal(np.einsum("sin,sjn->ij", g, g)), atol=2e-5)
        assert found[name].tokens == len(tokens)
        np.testing.assert_array_equal(found[name].input, found[name].input.T)


def test_the_second_round_weights_by_the_first(model, tokens):
    first = hessian.collect(model, tokens, "sketch_b", batch=3)
    second = hessian.collect(model, tokens, "sketch_b", batch=3, rounds=2)
    g = {name: [] for name in NAMES}
    for index, sequence in enumerate(tokens):  # labels of the second pass are new samples
        sequence = jnp.asarray(sequence)
        chosen = sampled(model, sequence, index, number=1)
        gradient = jax.grad(likelihood)(model.params, model.config, sequence, chosen, jnp.ones(len(sequence)))
        for name in NAMES:
            g[name].append(np.asarray(leaf(gradient, name)["weight"], np.float64))
    for name in NAMES:
        h_in, h_out = (np.asarray(x, np.float64) for x in (first[name].input, first[name].output))
        stack = np.stack(g[name])
        expected_in = np.einsum("sai,ab,sbj->ij", stack, h_out, stack, optimize=True)
        expected_out = np.einsum("sia,ab,sjb->ij", stack, h_in, stack, optimize=True)
        np.testing.assert_allclose(second[name].input, normal(expected_in), atol=5e-5)
        np.testing.assert_allclose(second[name].output, normal(expected_out), atol=5e-5)


def test_sketch_a_takes_tokens_one_by_one(model, tokens):
    """Against `E_t[(xᵀ H_in x) g gᵀ]`; per-token gradients are those of a bias of each token's own."""
    tokens = tokens[:3]
    found = hessian.collect(model, tokens, "sketch_a", batch=4)
    moments = hessian.collect(model, tokens, batch=4)
    sums = dict.fromkeys(NAMES, 0.0)
    from qjax.models.transformer import block_inputs, embed

    for index, sequence in enumerate(tokens):
        sequence = jnp.asarray(sequence)
        chosen, length = sampled(model, sequence, index), len(sequence)

        def loss(biases, s=sequence, c=chosen):
            params = jax.tree.map(lambda leaf: leaf, model.params)
            for name, bias in biases.items():
                leaf(params, name)["probe"] = bias[None]
            return likelihood(params, model.config, s, c, jnp.ones(len(s)))

        zeros = {name: jnp.zeros((length, leaf(model.params, name)["weight"].shape[0])) for name in NAMES}
        gradients, x = jax.grad(loss)(zeros), embed(model.params["embed"], np.asarray(sequence)[None], model.config)
        for block_index, parameters in enumerate(model.params["blocks"]):
            x, inputs = block_inputs(parameters, x, model.config)
            for linear, site in structure(model.config).sites.items():
                name = f"layers.{block_index}.{linear}"
                rows, g = np.asarray(inputs[site][0], np.float64), np.asarray(gradients[name], np.float64)
                h = np.asarray(moments[name].input, np.float64)
                for t in range(length):
                    sums[name] = sums[name] + (rows[t] @ h @ rows[t]) * np.outer(g[t], g[t])
    for name in NAMES:
        np.testing.assert_allclose(found[name].output, normal(sums[name]), atol=5e-5)
        np.testing.assert_array_equal(found[name].input, moments[name].input)
    third = hessian.collect(model, tokens, "sketch_a", batch=4, rounds=3)
    for name in NAMES:
        np.testing.assert_array_equal(third[name].output, found[name].output)
        assert not np.array_equal(third[name].input, found[name].input)


@pytest.mark.parametrize("with_factors", [False, True])
def test_gram_matrices_and_gradients_give_the_same(monkeypatch, with_factors):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    x, g = normal(3, 20, 24), normal(3, 20, 16)
    factors = (jnp.asarray(np.cov(normal(24, 99))), jnp.asarray(np.cov(normal(16, 99)))) if with_factors else ()
    factors = tuple(f.astype(jnp.float32) for f in factors)
    results = []
    for gram in (True, False):
        monkeypatch.setattr(sketch_module, "gram_is_cheaper", lambda *_, gram=gram: gram)
        results.append(whole(increments(x, g, *factors, per_token=False)))
    for name in ("input", "output"):
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-4, atol=1e-2)


def whole(increment):
    """The matrices of an increment, zeros above their blocks of rows."""
    return {name: assembled([np.asarray(block) for block in blocks]) for name, blocks in increment.items()}


def test_only_the_lower_blocks_of_wide_factors_are_computed():
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal((2, 4, n)).astype(np.float32)) for n in (768, 8))
    blocks = increments(x, g, per_token=False)["input"]
    assert [block.shape for block in blocks] == row_blocks(768) == [(192, 192), (192, 384), (192, 576), (192, 768)]
    found = assembled([np.asarray(block, np.float64) for block in blocks])
    stack = np.einsum("btm,btn->bmn", np.asarray(g, np.float64), np.asarray(x, np.float64))
    expected = np.einsum("bmi,bmj->ij", stack, stack)
    np.testing.assert_allclose(np.tril(found), np.tril(expected), rtol=1e-4, atol=1e-3)
    assert np.all(found[:192, 192:] == 0)
    for block, again in zip(blocks, divided(found), strict=True):
        np.testing.assert_array_equal(block, again)


def test_the_cheaper_form_is_chosen():
    assert gram_is_cheaper(256, 1536, 576)
    assert not gram_is_cheaper(2048, 576, 576)


def test_power_iteration_raises_the_alignment_with_the_exact_fisher():
    """Gradients of a planted, not separable Fisher: every round fits it better, and the optimum is the SVD's."""
    rng = np.random.default_rng(0)
    m, n, samples, length = 6, 8, 400, 3
    mix_x, mix_g = rng.standard_normal((n, n)) ** 3, rng.standard_normal((m, m)) ** 3
    x = (rng.standard_normal((samples, length, n)) @ mix_x).astype(np.float32)
    g = (rng.standard_normal((samples, length, m)) @ mix_g * (1 + x[..., :1] ** 2)).astype(np.float32)
    fisher = exact_fisher(np.einsum("btm,btn->bmn", g, x))
    factors, cosines = {"input": None, "output": None}, []
    for _ in range(4):
        found = increments(jnp.asarray(x), jnp.asarray(g), factors["input"], factors["output"], per_token=False)
        factors = {name: jnp.asarray(value / np.trace(value)) for name, value in whole(found).items()}
        cosines.append(alignment(fisher, np.asarray(factors["output"]), np.asarray(factors["input"])))
    rearranged = fisher.reshape(m, n, m, n).transpose(0, 2, 1, 3).reshape(m * m, n * n)
    best = np.linalg.svd(rearranged, compute_uv=False)[0] / np.linalg.norm(fisher)
    identity = alignment(fisher, np.eye(m), np.eye(n))
    assert identity < cosines[0] < cosines[1] < cosines[2] <= best + 1e-6
    assert cosines[-1] == pytest.approx(best, abs=2e-3)
    per_token = whole(increments(jnp.asarray(x), jnp.asarray(g), per_token=True))
    assert 0 < alignment(fisher, per_token["output"], per_token["input"]) < 1


def test_exact_fisher_is_the_quadratic_form():
    rng = np.random.default_rng(1)
    e = rng.standard_normal((3, 4))
    h_out, h_in = (np.cov(rng.standard_normal((k, 9))) for k in (3, 4))
    kron = np.kron(h_out, h_in)
    assert e.ravel() @ kron @ e.ravel() == pytest.approx(np.trace(h_out @ e @ h_in @ e.T))
    assert alignment(kron, h_out, h_in) == pytest.approx(1)
    with pytest.raises(InputError, match="at most 4096 weights"):
        exact_fisher(np.zeros((1, 65, 64)))


@pytest.mark.parametrize(("estimator", "rounds"), [("sketch_b", 1), ("sketch_a", 3)])
def test_rounding_to_bfloat16_is_far_below_the_sampling_error(model, tokens, estimator, rounds):
    def sketch(tokens, compute):
        return hessian.collect(model, tokens, estimator, batch=3, rounds=rounds, labels="data", compute=compute)

    exact, rounded = (sketch(tokens[:3], compute) for compute in ("float32", "bfloat16"))
    other = sketch(tokens[3:6], "float32")
    for name in exact:
        for factor in ("input", "output"):
            a, b, c = (np.asarray(getattr(h[name], factor)) for h in (exact, rounded, other))
            assert b.dtype == np.float32
            assert 0 < np.linalg.norm(a - b) < 0.2 * np.linalg.norm(a - c), (name, factor)


@pytest.mark.parametrize("vocab", [128, 300])
def test_labels_follow_the_distribution(vocab):
    """Frequencies of 200,000 draws of one skew distribution with impossible tokens, within five standard errors."""
    rng = np.random.default_rng(0)
    p = rng.gamma(0.3, size=vocab).astype(np.float32)
    p[rng.permutation(vocab)[:40]] = 0
    p /= p.sum()
    draws = 200_000
    found = jax.jit(draw)(jax.random.key(1), jnp.broadcast_to(jnp.asarray(p), (draws, vocab)))
    counts = np.bincount(np.asarray(found), minlength=vocab)
    assert counts[p == 0].sum() == 0
    assert np.all(np.abs(counts - draws * p) < 5 * np.sqrt(draws * p * (1 - p)) + 2)


def test_labels_do_not_depend_on_the_batch(model, tokens, monkeypatch):
    one, many = (hessian.collect(model, tokens, "sketch_b", batch=batch) for batch in (1, 5))
    monkeypatch.setattr(labels_module, "_POSITIONS", 1)
    monkeypatch.setattr(labels_module, "_PIECES", 2)
    in_two_pieces = hessian.collect(model, tokens, "sketch_b", batch=3)
    for name in NAMES:
        np.testing.assert_allclose(one[name].output, many[name].output, atol=1e-5)
        np.testing.assert_allclose(one[name].output, in_two_pieces[name].output, atol=1e-5)
    other = hessian.collect(model, tokens, "sketch_b", batch=5, seed=1)
    assert not np.allclose(one[NAMES[0]].output, other[NAMES[0]].output, atol=1e-3)


def test_a_gradient_that_is_not_finite_is_named(model, tokens):
    table = model.params["embed"]  # also the head, which stays as it is
    params = {**model.params, "embed": table.at[7].set(jnp.nan), "head": table}
    clean = np.where(tokens == 7, 8, tokens).astype(np.int32)
    clean[4, 5] = 7
    broken = models.Model(model.config, params, model.tokenizer, "random", "random", {"sha256": "none"})
    with pytest.raises(NumericsError, match=r"layers\.\d\.\S+: the gradient of calibration sequence 4 is not finite"):
        hessian.collect(broken, clean, "sketch_b", batch=3)


def test_errors_say_what_is_allowed(model, tokens):
    with pytest.raises(InputError, match="hessian.rounds is 1; sketch_a needs at least 2"):
        hessian.collect(model, tokens, "sketch_a", rounds=1)
    with pytest.raises(InputError, match="hessian.labels is 'gold'; allowed are sampled, data"):
        hessian.collect(model, tokens, "sketch_b", labels="gold")
    with pytest.raises(InputError, match="rounds: options of the estimators sketch_a and sketch_b"):
        hessian.collect(model, tokens, "input", rounds=3)
    settings = {
        "estimator": "sketch_b",
        "stream": "original",
        "rounds": 1,
        "labels": "sampled",
        "seed": 0,
        "compute": "float32",
        "input": "sketch",
        "budget_gb": 8,
        "checkpoint_s": 600,
        "fit_sequences": 0,
    }
    check_settings(settings)
    for change, message in [
        ({"estimator": "sketch_c"}, "there is: input, sketch_a, sketch_b"),
        ({"input": "both"}, "hessian.input is 'both'; allowed are: sketch, moment"),
        ({"stream": "quantized"}, "use hessian.input=moment, or hessian.stream=original"),
        ({"compute": "float16"}, "hessian.compute is 'float16'; allowed are: float32, bfloat16"),
        ({"budget_gb": 0}, "hessian.budget_gb is 0; it is greater than 0"),
        ({"stream": "quantized", "input": "moment", "sequences": 4}, "use data.calibration_sequences"),
    ]:
        with pytest.raises(InputError, match=message):
            check_settings(settings | change)

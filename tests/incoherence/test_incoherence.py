"""Incoherence processing: the model's function and the proxy loss do not change, and outliers disappear."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import incoherence
from qjax.errors import InputError
from qjax.incoherence.families import diagonal_rescale, hessian_incoherence, weight_incoherence

KINDS = {
    "none": {},
    "hadamard": {},
    "hadamard_input": {"name": "hadamard", "side": "input"},
    "hadamard_output": {"name": "hadamard", "side": "output"},
    "block_hadamard": {"block": 8},
    "block_hadamard_12": {"name": "block_hadamard", "block": 12, "side": "input"},
    "kronecker": {},
    "kronecker_single": {"name": "kronecker", "mode": "single"},
}


def build(kind, **more):
    return incoherence.make(**{"name": kind, **KINDS[kind], **more})


def matrices(m, n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * n, n)) * np.exp(rng.standard_normal(n))
    g = rng.standard_normal((3 * m, m))
    return rng.standard_normal((m, n)), x.T @ x / len(x), g.T @ g / len(g)


def draw(kind, m, n, multiple=(1, 1), seed=0, **more):
    w, h, _ = matrices(m, n)
    weight, hessian = (jnp.asarray(w), jnp.asarray(h)) if more.get("rescale") else (None, None)
    return build(kind, **more).sample(jax.random.key(seed), m, n, weight, hessian, multiple)


def proxy(e, h_in, h_out):
    return float(np.sum((h_out @ e) * (e @ h_in)))


@functools.partial(jax.jit, static_argnames=("spec", "multiple"))
def everything(spec, multiple, key, w, h_in, h_out, x):
    """One compiled program: sample, and apply every method."""
    scale_from = (w, h_in) if spec.rescale else (None, None)
    transform = spec.sample(key, *w.shape, *scale_from, multiple)
    rotated = transform.weight(w)
    y = transform.output(jnp.matmul(transform.input(x), rotated.T, precision="highest"))
    hessians = transform.input_hessian(h_in), transform.output_hessian(h_out)
    return transform, rotated, transform.weight_inverse(rotated), y, *hessians


@pytest.mark.parametrize(
    ("kind", "m", "n", "rescale"),
    [
        *((kind, 11, 22, True) for kind in KINDS),
        *((kind, m, n, False) for kind in KINDS if "kronecker" not in kind for m, n in ((16, 7), (1, 1))),
        ("kronecker", 1, 13, False),
    ],
)
def test_function_and_proxy_loss_are_kept(kind, m, n, rescale):
    """In float64: inverse, x Wᵀ and tr(H_out E H_in Eᵀ) to rounding (Kronecker factors are float32)."""
    tolerance = 1e-5 if kind.startswith("kronecker") else 1e-12
    w, h_in, h_out = matrices(m, n)
    x = np.random.default_rng(1).standard_normal((2, 3, n))
    with jax.enable_x64(True):
        arrays = (jnp.asarray(a) for a in (w, h_in, h_out, x))
        out = everything(build(kind, rescale=rescale), (4, 8), jax.random.key(0), *arrays)
        transform, (rotated, back, y, rotated_in, rotated_out) = out[0], (np.asarray(a) for a in out[1:])
    padded = transform.padded
    assert transform.shape == (m, n)
    assert padded[0] % 4 == padded[1] % 8 == 0
    assert (rotated.shape, rotated_in.shape, rotated_out.shape) == (padded, padded[1:] * 2, padded[:1] * 2)
    assert rotated.dtype == y.dtype == rotated_in.dtype == np.float64
    np.testing.assert_allclose(back, w, atol=tolerance)
    np.testing.assert_allclose(y, x @ w.T, atol=30 * tolerance)
    np.testing.assert_allclose(rotated_in, rotated_in.T, atol=100 * tolerance)
    # The transform is linear in W, so E = W stands for any error of rounding.
    assert proxy(rotated, rotated_in, rotated_out) == pytest.approx(proxy(w, h_in, h_out), rel=10 * tolerance)


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(["none", "hadamard", "block_hadamard"]),
    seed=st.integers(0, 2**31 - 1),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_any_seed_and_scale_in_float32(kind, seed, scale):
    w, h_in, h_out = matrices(5, 9, seed)
    x = np.random.default_rng(seed).standard_normal((2, 9))
    arrays = (jnp.asarray(a, jnp.float32) for a in (scale * w, h_in, h_out, x))
    _, _, back, y, _, _ = everything(build(kind), (1, 1), jax.random.key(seed), *arrays)
    np.testing.assert_allclose(back / np.float32(scale), w, atol=1e-5)
    np.testing.assert_allclose(y / np.float32(scale), x @ w.T, atol=5e-5)


def test_the_hadamard_is_the_published_formula():
    """W̃ = Had_mᵀ diag(SV) W diag(SU) Had_n (algorithm 3 of QuIP#, with the transposes that K = 12 needs)."""
    from qjax.linalg.hadamard import base_matrix

    with jax.enable_x64(True):
        w, h, _ = matrices(12, 20)
        transform = draw("hadamard", 12, 20)
        sv, su = (
            np.diag(np.asarray(r.signs(), np.float64)) for r in (transform.output_rotation, transform.input_rotation)
        )
        had_m, had_n = base_matrix(12) / np.sqrt(12), base_matrix(20) / np.sqrt(20)
        np.testing.assert_allclose(transform.weight(jnp.asarray(w)), had_m.T @ sv @ w @ su @ had_n, atol=1e-12)
        np.testing.assert_allclose(transform.input_hessian(jnp.asarray(h)), had_n.T @ su @ h @ su @ had_n, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "hadamard", "block_hadamard", "kronecker"])
def test_jit_vmap_and_eager_agree(kind):
    """Sampling inside a compiled program gives the bits of the eager sample, and a batch of keys works under vmap."""
    spec = build(kind)
    keys = jax.random.split(jax.random.key(7), 2)
    w, h, _ = (jnp.asarray(a, jnp.float32) for a in matrices(12, 20))
    eager = spec.sample(keys[0], 12, 20, multiple=(4, 4))
    inside = jax.jit(lambda key: spec.sample(key, 12, 20, multiple=(4, 4)))(keys[0])
    assert jax.tree.structure(eager) == jax.tree.structure(inside)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(inside), strict=True):
        np.testing.assert_array_equal(a, b)

    def run(transform):
        return transform.input(h), transform.weight(w)

    batched = jax.jit(jax.vmap(lambda key: run(spec.sample(key, 12, 20, multiple=(4, 4)))))(keys)
    for a, b in zip(batched, jax.jit(run)(inside), strict=True):
        np.testing.assert_allclose(a[0], b, atol=2e-5)
    if eager.bits_stored:
        assert np.abs(batched[1][0] - batched[1][1]).max() > 0.1


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_spec_and_abstract_structure(kind, rescale):
    spec = build(kind, rescale=rescale)
    assert incoherence.make(**json.loads(json.dumps(spec.spec()))) == spec
    assert hash(spec) == hash(incoherence.make(**spec.spec()))
    abstract = spec.abstract(11, 22, (4, 8))
    concrete = draw(kind, 11, 22, (4, 8), rescale=rescale)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert abstract.bits_stored == concrete.bits_stored


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("none", 0), ("hadamard", 608 + 192), ("hadamard_input", 608), ("hadamard_output", 192), ("kronecker", 128)],
)
def test_bits_stored(kind, bits):
    """A bit per sign of the padded axis in whole words: 600 -> 608 is 19 words, 172 -> 176 is 6; or a 64-bit key."""
    assert draw(kind, 172, 600).bits_stored == bits
    assert draw(kind, 172, 600, rescale=True).bits_stored == bits + 16 * 600


@pytest.mark.parametrize(
    ("kind", "shape", "multiple", "padded"),
    [
        ("none", (172, 64), (1, 1), (172, 64)),
        ("none", (172, 64), (16, 16), (176, 64)),
        ("hadamard", (172, 64), (1, 1), (176, 64)),
        ("hadamard", (576, 1536), (16, 16), (576, 1536)),
        ("hadamard", (172, 172), (16, 128), (176, 256)),
        ("hadamard_input", (172, 172), (1, 1), (172, 176)),
        ("hadamard_output", (172, 172), (1, 8), (176, 176)),
        ("block_hadamard", (172, 64), (1, 1), (176, 64)),
        ("block_hadamard_12", (172, 172), (16, 16), (176, 192)),
        ("kronecker", (172, 64), (1, 1), (172, 64)),
        ("kronecker", (2017, 64), (1, 1), (2018, 64)),
    ],
)
def test_padding_is_the_least_possible(kind, shape, multiple, padded):
    assert build(kind).abstract(*shape, multiple).padded == padded


def test_dtypes_of_weights_and_activations():
    transform = draw("hadamard", 12, 20)
    half = jnp.ones((12, 20), jnp.bfloat16)
    assert transform.weight(half).dtype == jnp.float32
    assert transform.input(half).dtype == jnp.bfloat16
    assert transform.output(jnp.ones((2, 12), jnp.bfloat16)).dtype == jnp.bfloat16
    assert transform.input_hessian(jnp.eye(20, dtype=jnp.bfloat16)).dtype == jnp.float32


def test_rescale_attains_the_cauchy_schwarz_bound():
    """min over D of tr(D⁻¹HD⁻¹) ‖WD‖² is (Σ_j √(H_jj w_j))², and other scalings are worse."""
    w, h, _ = matrices(16, 24)
    s = np.asarray(diagonal_rescale(jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32)), np.float64)
    columns, diagonal = (w**2).sum(0), np.diag(h)

    def cost(d):
        return (diagonal / d**2).sum() * (columns * d**2).sum()

    bound = np.sqrt(columns * diagonal).sum() ** 2
    assert bound <= cost(s) <= bound * (1 + 1e-6)
    assert cost(np.ones(24)) > 1.05 * bound
    assert np.log(s).mean() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rescale_survives_zeros_and_any_scale(scale):
    w, h = np.zeros((4, 8), np.float32), np.zeros((8, 8), np.float32)
    for weight, hessian in ((w, h), (w, h + np.eye(8, dtype=np.float32)), (w + np.eye(4, 8, dtype=np.float32), h)):
        s = np.asarray(diagonal_rescale(jnp.asarray(weight * np.float32(scale)), jnp.asarray(hessian)), np.float32)
        assert np.isfinite(s).all()
        assert (s > 0).all()


def test_bounds_of_quip_sharp():
    """Lemma 3.1: with probability 1 − δ, μ_H ≤ √(2 ln(2n²/δ)) and μ_W ≤ 2 ln(4mn/δ) after the transform."""
    m, n, delta = 96, 128, 1e-3
    weight = np.full((m, n), 1e-3, np.float32)
    weight[3, 5], weight[50, 70] = 100, -80
    hessian = np.diag(np.linspace(1, 2, n)).astype(
        np.float32
    )  # eigenvectors are unit vectors: the worst case, μ_H = √n
    assert float(weight_incoherence(jnp.asarray(weight))) > 80
    assert float(hessian_incoherence(jnp.asarray(hessian))) == pytest.approx(np.sqrt(n), rel=1e-5)

    @jax.jit
    @jax.vmap
    def incoherence_after(key):
        transform = incoherence.make("hadamard").sample(key, m, n)
        rotated, rotated_in = transform.weight(jnp.asarray(weight)), transform.input_hessian(jnp.asarray(hessian))
        return weight_incoherence(rotated), hessian_incoherence(rotated_in)

    mu_weight, mu_hessian = incoherence_after(jax.random.split(jax.random.key(0), 5))
    assert mu_weight.max() <= 2 * np.log(4 * m * n / delta)
    assert mu_hessian.max() <= np.sqrt(2 * np.log(2 * n**2 / delta))


@pytest.mark.parametrize("kind", ["hadamard", "block_hadamard", "kronecker", "kronecker_single"])
def test_outliers_disappear(kind):
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    weight[7] *= 20
    weight[:, 9] *= 20
    before = float(weight_incoherence(jnp.asarray(weight)))
    after = float(weight_incoherence(draw(kind, 64, 64).weight(jnp.asarray(weight))))
    assert before > 15
    assert after < before / 2


def test_incoherence_of_known_matrices():
    assert float(weight_incoherence(-3 * jnp.ones((4, 6)))) == pytest.approx(1)
    assert float(weight_incoherence(jnp.eye(1, 16))) == pytest.approx(4)


def test_sides_leave_the_other_axis_alone():
    w = jnp.asarray(matrices(12, 20)[0], jnp.float32)
    rows = np.asarray(draw("hadamard_input", 12, 20).weight(w))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), np.linalg.norm(w, axis=1), rtol=1e-5)
    columns = np.asarray(draw("hadamard_output", 12, 20).weight(w))
    np.testing.assert_allclose(np.linalg.norm(columns, axis=0), np.linalg.norm(w, axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hadamrad", {}, "unknown incoherence 'hadamrad'; there is: block_hadamard, folded, hadamard, kronecker, none"),
        ("hadamard", {"blocks": 8}, "no option blocks; its options are: rescale, side"),
        ("hadamard", {"side": "left"}, "side is 'left'; allowed are: both, input, output"),
        ("kronecker", {"mode": "dense"}, "mode is 'dense'; allowed are: butterfly, single"),
        ("block_hadamard", {"block": 100 + 72}, "dimension of 172"),
        ("block_hadamard", {"block": 0}, "block is 0; it is a number of things, at least 1"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(InputError, match=message):
        incoherence.make(name, **options)


def test_bad_samples():
    key = jax.random.key(0)
    for sizes, multiple in (((0, 8), (1, 1)), ((8, -1), (1, 1)), ((8, 8), (1, 0))):
        with pytest.raises(InputError, match="must be positive"):
            incoherence.make("hadamard").sample(key, *sizes, multiple=multiple)
    rescaled = incoherence.make("none", rescale=True)
    with pytest.raises(InputError, match="needs the weight and its input Hessian"):
        rescaled.sample(key, 4, 8)
    with pytest.raises(InputError, match=r"weight has shape \[8, 4\].*\[4, 8\]"):
        rescaled.sample(key, 4, 8, jnp.ones((8, 4)), jnp.eye(8))
    with pytest.raises(InputError, match=r"Hessian has shape \[4, 4\].*\[8, 8\]"):
        rescaled.sample(key, 4, 8, jnp.ones((4, 8)), jnp.eye(4))


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("weight", (22, 11)),
        ("weight_inverse", (11, 22)),
        ("input_hessian", (24, 24)),
        ("output_hessian", (12, 12)),
        ("input", (3, 24)),
        ("output", (3, 11)),
    ],
)
def test_wrong_shapes(method, shape):
    transform = draw("hadamard", 11, 22)
    assert transform.padded == (12, 24)
    with pytest.raises(InputError, match=r"of a \[11, 22\] matrix takes"):
        getattr(transform, method)(jnp.zeros(shape))


@pytest.mark.parametrize("kind", ["hadamard", "kronecker"])
def test_a_hessian_rotated_some_rows_at_a_time_is_the_same(monkeypatch, kind):
    _, h, _ = matrices(8, 24)
    transform = draw(kind, 8, 24)
    whole = transform.input_hessian(jnp.asarray(h, jnp.float32))
    monkeypatch.setattr("qjax.incoherence.transform._ROWS", 8)
    np.testing.assert_allclose(transform.input_hessian(jnp.asarray(h, jnp.float32)), whole, rtol=0, atol=2e-6)
    eye = np.asarray(transform.input(jnp.eye(24, dtype=jnp.float32)), np.float64)
    np.testing.assert_allclose(whole, eye.T @ h @ eye, rtol=0, atol=1e-4 * np.abs(h).max())

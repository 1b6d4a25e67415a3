"""The trellis search: the GPU kernel against XLA, bit for bit, and its lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import ladder
import numpy as np
import pytest

from pallas_kernels.viterbi import costs, pallas_gpu, reference, search
from pallas_kernels.viterbi.specs import BENCHES, TESTS, Spec
from qjax.codebooks import tail_biting


def inputs(spec, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((spec.steps, spec.V, spec.batch)).astype(np.float32)
    lut = rng.standard_normal((2**spec.L, spec.V)).astype(np.float32)
    start = np.abs(rng.standard_normal((2 ** (spec.L - spec.b), spec.batch))).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(lut), jnp.asarray(start)


@pytest.mark.parametrize(("spec", "pinned"), [*((spec, False) for spec in TESTS), (TESTS[1], True)], ids=str)
def test_interpreted_kernel_finds_the_paths_of_xla(spec, pinned):
    x, lut, start = inputs(spec)
    end = jnp.arange(spec.batch, dtype=jnp.int32) % start.shape[0] if pinned else None
    expected = reference.search(x, lut, spec.b, start, end)
    found = pallas_gpu.search(x, lut, spec.b, start, end, interpret=True)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])


def test_interpreted_costs_and_back_pointers_are_those_of_xla():
    spec = Spec(8, 2, 1, 12, 3)
    x, lut, start = inputs(spec, seed=1)
    expected, expected_back = reference.forward(x, lut, spec.b, start, True)
    found, back = pallas_gpu.forward(x, lut, spec.b, start, True, interpret=True)
    np.testing.assert_allclose(found.T, expected, rtol=1e-6)
    np.testing.assert_array_equal(back.transpose(1, 2, 0), expected_back)
    alone, none = pallas_gpu.forward(x, lut, spec.b, start, False, interpret=True)
    np.testing.assert_array_equal(alone, found)
    assert none is None


def test_tail_biting_on_the_kernel_is_tail_biting_on_xla(monkeypatch):
    spec = Spec(8, 2, 1, 32, 9)
    x, lut, _ = inputs(spec, seed=2)
    expected = tail_biting.tail_biting(x, lut, spec.b, 8)
    assert np.array_equal(expected[-1] % 64, expected[0] >> 2)
    called = []

    def kernel(*arguments):
        called.append(True)
        return pallas_gpu.search(*arguments, interpret=True)

    monkeypatch.setattr(tail_biting, "search", lambda x, lut, b, cost, end=None: kernel(x, lut, b, cost, end))
    np.testing.assert_array_equal(tail_biting.tail_biting(x, lut, spec.b, 8), expected)
    assert len(called) == 2


@pytest.mark.parametrize("spec", [TESTS[0], BENCHES[1], BENCHES[3]], ids=str)
def test_lowers_for_cuda(spec):
    x = jax.ShapeDtypeStruct((spec.steps, spec.V, spec.batch), jnp.float32)
    lut = jax.ShapeDtypeStruct((2**spec.L, spec.V), jnp.float32)
    start = jax.ShapeDtypeStruct((2 ** (spec.L - spec.b), spec.batch), jnp.float32)
    text = ladder.exported("cuda", lambda x, lut, start: pallas_gpu.search(x, lut, spec.b, start, None), x, lut, start)
    assert "viterbi_forward" in text and "viterbi_trace_back" in text


@pytest.mark.parametrize("spec", [BENCHES[1], BENCHES[3]], ids=str)
def test_moves_every_choice_once_out_and_once_in(spec):
    """Beside the operands and the results: a byte per edge and step, written by the search and read on the way back."""
    edges = 2 ** (spec.L - spec.b)
    x = jax.ShapeDtypeStruct((spec.steps, spec.V, spec.batch), jnp.float32)
    lut, start = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2**spec.L, spec.V), (edges, spec.batch)))
    moved = ladder.hbm_bytes(lambda *given: pallas_gpu.search(*given[:2], spec.b, given[2], None), x, lut, start)
    own = 4 * (spec.steps * spec.V * spec.batch + 2**spec.L * spec.V + 2 * edges * spec.batch)
    paths = 4 * (spec.steps + 2) * (spec.batch + 31)  # whole programs of 32 sequences
    assert own <= moved <= 1.1 * (own + 2 * spec.steps * spec.batch * edges + paths)


@pytest.mark.parametrize(
    ("L", "b", "reason"), [(8, 5, "at most 4"), (6, 3, "at least twice as many edges"), (16, 0, "do not fit")]
)
def test_what_the_kernel_cannot_do_is_said(L, b, reason):
    assert reason in pallas_gpu.obstacle(2**L, b)


def test_a_named_kernel_raises_and_none_falls_back():
    spec = TESTS[0]
    x, lut, start = inputs(spec)
    if jax.default_backend() == "cpu":
        for op in (search, costs):
            with pytest.raises(ValueError, match="runs on gpu and the backend is cpu"):
                op(x, lut, spec.b, start, implementation="pallas_gpu")
    np.testing.assert_array_equal(search(x, lut, spec.b, start)[2], reference.search(x, lut, spec.b, start, None)[2])


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*TESTS, Spec(12, 2, 1, 256, 40), Spec(16, 2, 1, 256, 8)], ids=str)
def test_device_finds_paths_as_good_as_xla(spec):
    x, lut, start = inputs(spec)
    run = functools.partial(jax.jit, static_argnums=2)
    expected = run(reference.search)(x, lut, spec.b, start, None)
    found = run(functools.partial(search, implementation="pallas_gpu"))(x, lut, spec.b, start, None)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)  # a fused multiply-add may turn a tie
    assert np.mean(np.asarray(found[2]) == np.asarray(expected[2])) > 0.99

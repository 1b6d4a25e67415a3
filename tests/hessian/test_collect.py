"""Hessians against float64 sums over the inputs of every linear, and the store that keeps them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import hessian, models
from qjax.errors import ArtifactError, DataError, InputError, NumericsError
from qjax.hessian import HessianStore
from qjax.hessian.moments import accumulate, empty, finish
from qjax.hessian.products import second_moment
from qjax.hessian.store import pack_triangle, unpack_triangle
from qjax.models import structure
from qjax.models.transformer import block_inputs, embed
from qjax.runtime.fingerprint import digest
from qjax.streams.batches import Spread
from qjax.streams.forward import batches


def exact(model, tokens):
    """E[x xᵀ] of every linear, summed in float64 sequence by sequence."""
    sums, x = {}, embed(model.params["embed"], tokens, model.config)
    for index, parameters in enumerate(model.params["blocks"]):
        x, inputs = block_inputs(parameters, x, model.config)
        for linear, site in structure(model.config).sites.items():
            rows = np.asarray(inputs[site], np.float64).reshape(-1, inputs[site].shape[-1])
            sums[f"layers.{index}.{linear}"] = rows.T @ rows / len(rows)
    return sums


@pytest.mark.parametrize("batch", [1, 3, 7, 50])
def test_collected_hessians_are_the_second_moments(model, tokens, batch):
    found = hessian.collect(model, tokens, batch=batch)
    assert list(found) == hessian.layer_names(model.config)
    for name, value in exact(model, tokens).items():
        np.testing.assert_allclose(found[name].input, value, rtol=2e-5, atol=1e-6 * np.abs(value).max())
        assert found[name].tokens == tokens.size and found[name].output is None
    assert found["layers.0.self_attn.q_proj"].input is found["layers.0.self_attn.v_proj"].input  # shared, not copied


def test_many_batches_lose_nothing(model):
    """A thousand equal batches have the mean of one, to the last bit of float32, where plain sums drift.

    One batch of the same program is the reference, so that the sums alone are tested and not how a machine rounds the
    activations (test_collected_hessians_are_the_second_moments does that).
    """
    x = np.asarray(embed(model.params["embed"], np.arange(24, dtype=np.int32).reshape(2, 12), model.config))
    parameters = model.params["blocks"][0]

    def mean_of(batches):
        spread = Spread(2, 2)
        moments, (step,) = empty(model.config, spread), spread.feed(x)
        inputs = (parameters, *step.parts, step.mask, step.numbers)
        for _ in range(batches):
            moments, _ = accumulate(moments, *inputs, model.config, mesh=spread.mesh, propagate=False)
        means, broken, _ = finish(moments, 24 * batches, spread.mesh)
        assert not broken
        return means

    once, often = mean_of(1), mean_of(1000)
    for site in once:
        product = once[site] * np.float32(24)
        plain = np.zeros_like(product)
        for _ in range(1000):
            plain = plain + product
        ours, naive = (np.abs(mean - once[site]).max() for mean in (often[site], plain / np.float32(24_000)))
        assert ours <= 2**-23 * np.abs(once[site]).max()
        assert ours < naive


def test_ragged_batches_are_masked(tokens):
    parts = list(batches(tokens, 3))
    assert [part.shape for part, _ in parts] == [(3, 12)] * 3
    assert [mask.tolist() for _, mask in parts] == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]


def test_inputs_that_are_not_finite_name_the_layer(model, tokens):
    params = jax.tree.map(lambda x: x, model.params)
    params["blocks"][1]["post_attention_layernorm"] = jnp.full(32, np.inf, jnp.float32)
    broken = models.Model(model.config, params, model.tokenizer, "x", "x", {})
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.gate_proj: its inputs"):
        hessian.collect(broken, tokens)


def test_bad_arguments(model, tokens):
    with pytest.raises(InputError, match="there is: input"):
        hessian.collect(model, tokens, "fisher")
    with pytest.raises(DataError, match="at least one token"):
        hessian.collect(model, tokens[:0])


@pytest.mark.parametrize("n", [1, 2, 17])
def test_triangles_round_trip(n):
    x = np.random.default_rng(n).standard_normal((n, n)).astype(np.float32)
    symmetric = x + x.T
    packed = pack_triangle(symmetric)
    assert packed.size == n * (n + 1) // 2
    np.testing.assert_array_equal(unpack_triangle(packed), symmetric)


def test_a_triangle_has_a_triangular_number_of_values():
    with pytest.raises(ArtifactError, match="not the triangle"):
        unpack_triangle(np.zeros(5, np.float32))


def collect_into(store, model, tokens, **options):
    key = store.key("model", digest(tokens.tolist()), "input", 3)
    return key, store.collect(key, model.config, model.params, tokens, batch=3, **options)


def test_the_store_returns_what_was_collected_and_never_collects_twice(model, tokens, tmp_path):
    store, seen = HessianStore(tmp_path), []
    key, load = collect_into(store, model, tokens, progress=lambda done, total: seen.append(done))
    direct = hessian.collect(model, tokens, batch=3)
    for index in range(2):
        for linear, value in load(index).items():
            np.testing.assert_array_equal(value.input, direct[f"layers.{index}.{linear}"].input)
            assert value.tokens == tokens.size
    assert seen == [1, 2]
    collect_into(store, model, tokens, progress=lambda done, total: seen.append(done))
    assert seen == [1, 2]
    size = sum(file.stat().st_size for file in (tmp_path / key).iterdir())
    assert size < 1.2 * 2 * 4 * sum(n * (n + 1) // 2 for n in (32, 32, 32, 48)) + 2 * 2000  # headers of a small file


def test_a_damaged_or_missing_block_is_collected_again_to_the_same_values(model, tokens, tmp_path):
    store = HessianStore(tmp_path)
    key, load = collect_into(store, model, tokens)
    before = [load(index)["mlp.down_proj"].input for index in range(2)]
    file = tmp_path / key / "block_0001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    assert store.load(key, 1) is None
    with pytest.raises(ArtifactError, match="damaged while in use"):
        load(1)
    _, load = collect_into(store, model, tokens)
    np.testing.assert_array_equal(load(1)["mlp.down_proj"].input, before[1])
    (tmp_path / key / "block_0000.safetensors").unlink()
    _, load = collect_into(store, model, tokens)
    np.testing.assert_array_equal(load(0)["mlp.down_proj"].input, before[0])


def test_everything_that_matters_is_in_the_address(tmp_path):
    store = HessianStore(tmp_path)
    base = store.key("m", "t", "input", 8)
    assert (
        len({base, store.key("n", "t", "input", 8), store.key("m", "u", "input", 8), store.key("m", "t", "input", 4)})
        == 4
    )


def test_the_environment_names_what_computes_second_moments(monkeypatch):
    rows = np.random.default_rng(0).standard_normal((40, 24)).astype(np.float32)
    expected = rows.astype(np.float64).T @ rows
    found = {}
    for name in ("", "xla"):
        monkeypatch.setenv("QJAX_GRAM", name)
        found[name] = np.asarray(jax.jit(lambda x: second_moment(x))(jnp.asarray(rows)))
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-5)
    assert np.array_equal(found["xla"], found["xla"].T)
    monkeypatch.setenv("QJAX_GRAM", "triangle")
    with pytest.raises(
        ValueError, match="gram has no implementation 'triangle'; there are mosaic_gpu, pallas_tpu, xla"
    ):
        second_moment(jnp.asarray(rows))

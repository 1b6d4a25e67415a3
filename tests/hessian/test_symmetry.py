"""Every Hessian equals its transpose to the last bit, however a processor's product adds up."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import hessian
from qjax.hessian import HessianStore, Sketch, exact_fisher
from qjax.hessian.fit import gradient_terms
from qjax.hessian.moments import block_hessians_of_two_streams, cross, empty, finish
from qjax.hessian.sketch_store import collect_into
from qjax.hessian.store import pack_triangle, unpack_triangle
from qjax.models.transformer import embed
from qjax.streams.batches import Spread


def symmetric(matrix):
    matrix = np.asarray(matrix)
    return np.array_equal(matrix, matrix.T)


def factors(hessians):
    """{name of linear and factor: array} of those that there are."""
    found = {(name, factor): getattr(h, factor) for name, h in hessians.items() for factor in ("input", "output")}
    return {name: np.asarray(array) for name, array in found.items() if array is not None}


@pytest.mark.parametrize("estimator", ["input", "sketch_a", "sketch_b"])
def test_collected_factors_are_symmetric_and_those_of_the_store(any_model, tokens, tmp_path, estimator):
    store, config, params = HessianStore(tmp_path), any_model.config, any_model.params
    load = store.collect("moments", config, params, tokens, batch=3)
    if estimator != "input":
        sketch = Sketch(estimator, rounds=2 if estimator == "sketch_a" else 1)
        moments = load if estimator == "sketch_a" else None
        load = collect_into(
            store, "k", config, params, tokens, sketch, batch=3, budget=1e9, checkpoint=60, moments=moments
        )
    found = factors(hessian.collect(any_model, tokens, estimator, batch=3))
    stored = factors({f"layers.{i}.{name}": h for i in range(2) for name, h in load(i).items()})
    assert found.keys() == stored.keys()
    assert {len(array) for array in found.values()} >= {32, config.hidden_size, config.intermediate_size}
    for name, array in found.items():
        assert symmetric(array), name
        assert array.tobytes() == stored[name].tobytes(), name


def test_the_quantised_stream_has_symmetric_moments_and_a_cross_moment_of_its_own(model, tokens):
    x = np.asarray(embed(model.params["embed"], tokens, model.config))
    z = x + np.random.default_rng(3).standard_normal(x.shape).astype(np.float32) * np.float32(0.1)
    found, _ = block_hessians_of_two_streams(model.params["blocks"][0], x, z, model.config, index=0, batch=3)
    assert len(found) == 7
    for own in found.values():
        assert symmetric(own.input) and not symmetric(own.cross)


@pytest.mark.parametrize("width", [31, 32, 172, 300])
def test_sums_that_differ_from_their_mirrors_count_by_their_lower_triangle(model, width):
    """Planted, so that the law is tested on processors whose products are symmetric too."""
    spread, site = Spread(4, 4), "mlp.down_proj"
    moments = empty(dataclasses.replace(model.config, intermediate_size=width), spread, pairs=True)
    sums = np.random.default_rng(width).standard_normal((width, width)).astype(np.float32)
    total = {**moments.total, site: sums[None], cross(site): sums[None]}
    means, bad, _ = finish(moments.replace(total=total), 3, spread.mesh)
    assert not bad
    exact = (sums.astype(np.float64) / 3).astype(np.float32)
    np.testing.assert_array_equal(means[cross(site)], exact)
    np.testing.assert_array_equal(means[site], np.tril(exact) + np.tril(exact, -1).T)
    np.testing.assert_array_equal(unpack_triangle(pack_triangle(means[site])), means[site])


@pytest.mark.parametrize(("m", "n"), [(4, 8), (3, 5)])
def test_the_exact_fisher_and_the_pairs_of_gradients_are_symmetric(m, n):
    rng = np.random.default_rng(m)
    assert symmetric(exact_fisher(rng.standard_normal((50, m, n)).astype(np.float32)))
    x, g = (jnp.asarray(rng.standard_normal((7, 20, size)).astype(np.float32)) for size in (n, m))
    assert symmetric(gradient_terms(x, g, jnp.eye(n), None)[1])

"""Every kernel that can run here against float64 on small random operands."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dequant_matmul, gram, hadamard, viterbi
from pallas_kernels.bench.cases import describe, packed
from pallas_kernels.dequant_matmul import reference
from pallas_kernels.dequant_matmul import specs as products
from pallas_kernels.dequant_matmul.specs import Spec
from pallas_kernels.gram import specs as grams
from pallas_kernels.hadamard import reference as hadamard_reference
from pallas_kernels.hadamard import specs as transforms
from pallas_kernels.viterbi import reference as viterbi_reference
from pallas_kernels.viterbi import specs as searches

__all__ = ["checks", "error", "gram_kernels", "search_operands"]


def error(found: Any, expected: Any) -> float:
    """The largest difference over the largest value; infinite when anything is not finite."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    worst = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    return float(worst) if np.isfinite(worst) else math.inf


def _check_product(spec: Spec, dtype: Any) -> tuple[str, float, float]:
    weight = packed(spec, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (spec.batch, spec.inner), jnp.float32).astype(dtype)
    dense = np.asarray(jax.jit(lambda w: reference.dequantize(w).astype(dtype))(weight).astype(jnp.float32), np.float64)
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ dense
    errors = {}
    for name in dequant_matmul.available(spec.batch, dtype, weight) or ["xla"]:
        found = jax.jit(dequant_matmul.matmul, static_argnums=2)(x, weight, name)
        exact = name == "mosaic_gpu" and spec.group is None  # W is not rounded to the dtype of x
        errors[name] = error(found.astype(jnp.float32), _unrounded(x, weight) if exact else expected)
    return " ".join(errors), max(errors.values()), _limit(dtype)


def _unrounded(x: Any, weight: Any) -> Any:
    dense = np.asarray(jax.jit(reference.dequantize)(weight), np.float64)
    return np.asarray(x.astype(jnp.float32), np.float64) @ dense


def _limit(dtype: Any) -> float:
    return 1e-5 if dtype == jnp.float32 else 1e-2


def _check_transform(spec: transforms.Spec, dtype: Any) -> tuple[str, float, float]:
    x = jax.random.normal(jax.random.key(0), (spec.rows, spec.n), jnp.float32).astype(dtype)
    matrix = np.asarray(hadamard_reference.sylvester(spec.block), np.float64) / math.sqrt(spec.block)
    expected = np.asarray(x.astype(jnp.float32), np.float64).reshape(spec.rows, -1, spec.block) @ matrix
    errors = {}
    for name in hadamard.available(spec.block, dtype) or ["xla"]:
        found = jax.jit(functools.partial(hadamard.hadamard, block=spec.block, implementation=name))(x)
        errors[name] = error(found.astype(jnp.float32), expected.reshape(spec.rows, spec.n))
    return " ".join(errors), max(errors.values()), _limit(dtype)


def _check_gram(spec: grams.Spec, dtype: Any) -> tuple[str, float, float]:
    x = jax.random.normal(jax.random.key(0), (spec.rows, spec.n), jnp.float32).astype(dtype)
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    names = gram_kernels(dtype)
    errors = [error(jax.jit(gram.gram, static_argnums=1)(x, name), wide.T @ wide) for name in names]
    return " ".join(names), max(errors), 1e-5


def search_operands(spec: searches.Spec) -> tuple[Any, Any, Any]:
    """(x, table, costs to begin with) of a trellis search."""
    x = jax.random.normal(jax.random.key(0), (spec.steps, spec.V, spec.batch), jnp.float32)
    lut = jax.random.normal(jax.random.key(1), (2**spec.L, spec.V), jnp.float32)
    return x, lut, jnp.zeros((2 ** (spec.L - spec.b), spec.batch), jnp.float32)


def _check_search(spec: searches.Spec) -> tuple[str, float, float]:
    """The path's own cost, summed in float64, against the reference's least cost: better than equal states."""
    x, lut, cost = search_operands(spec)
    least, _, _ = jax.jit(viterbi_reference.search, static_argnums=2)(x, lut, spec.b, cost, None)
    found, _, states = jax.jit(viterbi.search, static_argnums=2)(x, lut, spec.b, cost)
    path = np.asarray(lut, np.float64)[np.asarray(states)].transpose(0, 2, 1) - np.asarray(x, np.float64)
    own = np.square(path).sum(axis=(0, 1))
    name = viterbi.chosen(2**spec.L, spec.b)
    return name, max(error(found, least), error(own, least)), 1e-5


def checks() -> Iterator[tuple[str, Callable[[], tuple[str, float, float]]]]:
    """(what, function that gives the names of the kernels compared, their largest error, the largest allowed)."""
    half = [jnp.bfloat16, jnp.float32]
    for spec in (*products.TESTS, *products.TRELLIS_TESTS, *products.TABLE_TESTS):
        for dtype in half:
            yield f"product {describe(spec)}, {dtype.__name__}", functools.partial(_check_product, spec, dtype)
    for own in transforms.TESTS:
        for dtype in half:
            yield f"hadamard {own}, {dtype.__name__}", functools.partial(_check_transform, own, dtype)
    for search in searches.TESTS:
        yield f"viterbi {search}", functools.partial(_check_search, search)
    for product in grams.TESTS:
        for dtype in half:
            yield f"gram {product}, {dtype.__name__}", functools.partial(_check_gram, product, dtype)


def gram_kernels(dtype: Any) -> list[str]:
    """The implementations of a triangle that can run here: kernels first, XLA's block rows last."""
    return [*gram.available(dtype), "xla"]

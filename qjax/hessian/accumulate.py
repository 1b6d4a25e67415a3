"""Second moments of a block's inputs, accumulated on the device without losing small terms."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from pallas_kernels.gram import gram
from qjax.linalg.rotations import Leaf
from qjax.models.config import ModelConfig
from qjax.models.linear import HostOrDevice
from qjax.models.transformer import SITES, block_inputs

__all__ = ["Moments", "accumulate", "accumulate_pair", "empty", "finish", "site_widths"]


@struct.dataclass
class Moments:
    """Running sums for one block: `Σ x xᵀ` per site in two float32 parts (sum and compensation), and `Σ` of weights.

    With two streams, x original and z quantised, the site's own name holds `Σ z zᵀ` and its name in `CROSS` `Σ x zᵀ`.

    The compensation carries what a float32 addition drops (Kahan), so thousands of batches lose nothing.
    """

    total: dict[str, Leaf]
    carry: dict[str, Leaf]
    tokens: Leaf
    finite: dict[str, Leaf]


def site_widths(config: ModelConfig) -> dict[str, int]:
    """The input width of the linears at every site."""
    heads = config.num_heads * config.head_dim
    return dict(zip(SITES, (config.hidden_size, heads, config.hidden_size, config.intermediate_size), strict=True))


_ROWS = 256
CROSS = {site: f"{site}:cross" for site in SITES}


def empty(config: ModelConfig, cross: bool = False) -> Moments:
    """Zero sums (host arrays: building them compiles nothing)."""
    widths = site_widths(config)
    if cross:
        widths |= {CROSS[site]: n for site, n in widths.items()}
    zeros = lambda: {name: np.zeros((n, n), np.float32) for name, n in widths.items()}  # noqa: E731
    return Moments(zeros(), zeros(), np.float32(0), {name: np.bool_(True) for name in widths})


@functools.partial(jax.jit, static_argnames=("config", "propagate"), donate_argnames="moments")
def accumulate(
    moments: Moments,
    parameters: Any,
    x: HostOrDevice,
    mask: HostOrDevice,
    config: ModelConfig,
    *,
    propagate: bool,
) -> tuple[Moments, Array | None]:
    """Add a batch `[batch, length, width]` of block inputs.

    Sequences with mask 0 (padding of the last batch) do not count.
    Returns the new sums and, with `propagate`, the block's output.
    """
    y, inputs = block_inputs(parameters, x, config)
    rows = {site: _rows(inputs[site], mask) for site in SITES}
    products = {site: _second_moment(rows[site]) for site in SITES}
    return _added(moments, products, jnp.sum(mask) * x.shape[1]), (y if propagate else None)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="moments")
def accumulate_pair(
    moments: Moments, parameters: Any, x: HostOrDevice, z: HostOrDevice, mask: HostOrDevice, config: ModelConfig
) -> tuple[Moments, Array]:
    """As `accumulate`, for the block's inputs x in the original model and z in the quantised stream.

    Adds `z zᵀ` and `x zᵀ` at every site; returns the new sums and the block's output for x.
    """
    y, original = block_inputs(parameters, x, config)
    _, changed = block_inputs(parameters, z, config)
    products = {}
    for site in SITES:
        own = _rows(changed[site], mask)
        products[site] = _second_moment(own)
        products[CROSS[site]] = _product(_rows(original[site], mask), own)
    return _added(moments, products, jnp.sum(mask) * x.shape[1]), y


def _rows(inputs: Array, mask: HostOrDevice) -> Array:
    return (inputs.astype(jnp.float32) * mask[:, None, None]).reshape(-1, inputs.shape[-1])


def _second_moment(rows: Array) -> Array:
    """`Xᵀ X`: XLA's whole product, or what `QJAX_GRAM` names of `pallas_kernels.gram` when the program is traced.

    Those compute one triangle, half of the work. Whether one is faster anywhere is not measured: none is the default.
    """
    name = os.environ.get("QJAX_GRAM", "")
    return gram(rows, name) if name else _product(rows, rows)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)


def _added(moments: Moments, products: dict[str, Array], tokens: Array) -> Moments:
    total, carry, finite = {}, {}, {}
    for name, product in products.items():
        finite[name] = moments.finite[name] & jnp.all(jnp.isfinite(product))
        addend = product - moments.carry[name]
        total[name] = moments.total[name] + addend
        carry[name] = (total[name] - moments.total[name]) - addend
    return Moments(total, carry, moments.tokens + tokens, finite)


def finish(moments: Moments) -> tuple[dict[str, np.ndarray], int, list[str]]:
    """(means of the sums as float32 on the host, tokens, sites with values that are not finite)."""
    moments = jax.device_get(moments)
    count = float(moments.tokens)
    means = {name: np.empty(total.shape, np.float32) for name, total in moments.total.items()}
    for name, mean in means.items():
        for start in range(0, len(mean), _ROWS):  # a few rows at a time: in float64 the whole is four times as large
            rows = slice(start, start + _ROWS)
            mean[rows] = (moments.total[name][rows].astype(np.float64) - moments.carry[name][rows]) / count
    return means, round(count), [site for site in SITES if not moments.finite[site]]

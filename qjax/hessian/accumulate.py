"""Second moments of a block's inputs, accumulated on the device without losing small terms."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from qjax.linalg.rotations import Leaf
from qjax.models.config import ModelConfig
from qjax.models.linear import HostOrDevice
from qjax.models.transformer import SITES, block_inputs

__all__ = ["Moments", "accumulate", "empty", "finish", "site_widths"]


@struct.dataclass
class Moments:
    """Running sums for one block: `Σ x xᵀ` per site in two float32 parts (sum and compensation), and `Σ` of weights.

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


def empty(config: ModelConfig) -> Moments:
    """Zero sums (host arrays: building them compiles nothing)."""
    zeros = lambda: {site: np.zeros((n, n), np.float32) for site, n in site_widths(config).items()}  # noqa: E731
    return Moments(zeros(), zeros(), np.float32(0), {site: np.bool_(True) for site in SITES})


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
    total, carry, finite = dict(moments.total), dict(moments.carry), dict(moments.finite)
    for site in SITES:
        rows = (inputs[site].astype(jnp.float32) * mask[:, None, None]).reshape(-1, inputs[site].shape[-1])
        product = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
        finite[site] = moments.finite[site] & jnp.all(jnp.isfinite(product))
        addend = product - moments.carry[site]
        total[site] = moments.total[site] + addend
        carry[site] = (total[site] - moments.total[site]) - addend
    tokens = moments.tokens + jnp.sum(mask) * x.shape[1]
    return Moments(total, carry, tokens, finite), (y if propagate else None)


def finish(moments: Moments) -> tuple[dict[str, np.ndarray], int, list[str]]:
    """(`E[x xᵀ]` per site as float32 on the host, tokens, sites with values that are not finite)."""
    moments = jax.device_get(moments)
    count = float(moments.tokens)
    means = {
        site: ((moments.total[site].astype(np.float64) - moments.carry[site]) / count).astype(np.float32)
        for site in SITES
    }
    return means, round(count), [site for site in SITES if not moments.finite[site]]

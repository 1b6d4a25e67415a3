"""Second moments of a block's inputs, accumulated on every device without losing small terms, and reduced once."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array

from pallas_kernels.gram import gram
from qjax.hessian.spread import Spread
from qjax.linalg.rotations import Leaf
from qjax.mesh import AXES, EACH, WHOLE
from qjax.models.config import ModelConfig
from qjax.models.linear import HostOrDevice
from qjax.models.transformer import SITES, block_inputs

__all__ = ["NONE", "Moments", "accumulate", "accumulate_pair", "empty", "finish", "reduced", "site_widths"]


@struct.dataclass
class Moments:
    """Running sums for one block, one on every device: `Σ x xᵀ` per site in two float32 parts (sum, compensation).

    With two streams, x original and z quantised, the site's own name holds `Σ z zᵀ` and its name in `CROSS` `Σ x zᵀ`.
    All arrays have a leading axis of devices. `bad`: the least number of a sequence whose inputs or their squares are
    not finite, by name, or `NONE`.

    The compensation carries what a float32 addition drops (Kahan), so thousands of batches lose nothing.
    """

    total: dict[str, Leaf]
    carry: dict[str, Leaf]
    bad: dict[str, Leaf]


def site_widths(config: ModelConfig) -> dict[str, int]:
    """The input width of the linears at every site."""
    heads = config.num_heads * config.head_dim
    return dict(zip(SITES, (config.hidden_size, heads, config.hidden_size, config.intermediate_size), strict=True))


_ROWS = 256
NONE = np.uint32(2**32 - 1)
CROSS = {site: f"{site}:cross" for site in SITES}


def empty(config: ModelConfig, spread: Spread, cross: bool = False) -> Moments:
    """Zero sums (no program is compiled for them)."""
    widths = site_widths(config)
    if cross:
        widths |= {CROSS[site]: n for site, n in widths.items()}

    def zeros() -> dict[str, HostOrDevice]:
        return {name: spread.sums(lambda shape: np.zeros(shape, np.float32), (n, n)) for name, n in widths.items()}

    none = {name: spread.sums(lambda shape: np.full(shape, NONE), ()) for name in widths}
    return Moments(zeros(), zeros(), none)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "propagate"), donate_argnames="moments")
def accumulate(
    moments: Moments,
    parameters: Any,
    x: HostOrDevice,
    mask: HostOrDevice,
    numbers: HostOrDevice,
    config: ModelConfig,
    *,
    mesh: Mesh,
    propagate: bool,
) -> tuple[Moments, Array | None]:
    """Add a step `[devices · batch, length, width]` of block inputs, each device's part to its own sums.

    Sequences with mask 0 (what fills up the last step) do not count. Nothing is communicated.
    Returns the new sums and, with `propagate`, the block's output, split as x is.
    """

    def own(moments: Moments, parameters: Any, x: Array, mask: Array, numbers: Array) -> tuple[Moments, Array | None]:
        y, inputs = block_inputs(parameters, x, config)
        products, bad = {}, {}
        for site in SITES:
            rows = _masked(inputs[site], mask)
            products[site] = _second_moment(rows)
            bad[site] = _first_bad(numbers, products[site], rows)
        return _added(moments, products, bad), (y if propagate else None)

    return _on(mesh, own)(moments, parameters, x, mask, numbers)


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="moments")
def accumulate_pair(
    moments: Moments,
    parameters: Any,
    x: HostOrDevice,
    z: HostOrDevice,
    mask: HostOrDevice,
    numbers: HostOrDevice,
    config: ModelConfig,
    *,
    mesh: Mesh,
) -> tuple[Moments, Array]:
    """As `accumulate`, for the block's inputs x in the original model and z in the quantised stream.

    Adds `z zᵀ` and `x zᵀ` at every site; returns the new sums and the block's output for x.
    """

    def own(
        moments: Moments, parameters: Any, x: Array, z: Array, mask: Array, numbers: Array
    ) -> tuple[Moments, Array]:
        y, original = block_inputs(parameters, x, config)
        _, changed = block_inputs(parameters, z, config)
        products, bad = {}, {}
        for site in SITES:
            a, b = _masked(original[site], mask), _masked(changed[site], mask)
            products[site], products[CROSS[site]] = _second_moment(b), _product(a, b)
            bad[site] = _first_bad(numbers, products[site], b)
            bad[CROSS[site]] = _first_bad(numbers, products[CROSS[site]], a, b)
        return _added(moments, products, bad), y

    return _on(mesh, own)(moments, parameters, x, z, mask, numbers)


def _on(mesh: Mesh, own: Any) -> Any:
    """`own(moments, parameters, *split)` on every device, without the sums' leading axis."""

    def body(moments: Moments, parameters: Any, *split: Array) -> Any:
        moments, y = own(jax.tree.map(lambda a: a[0], moments), parameters, *split)
        return jax.tree.map(lambda a: a[None], moments), y

    def run(moments: Moments, parameters: Any, *split: Array) -> Any:
        specs = (EACH, WHOLE, *(EACH for _ in split))
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(EACH, EACH), check_vma=False)(
            moments, parameters, *split
        )

    return run


def _masked(inputs: Array, mask: Array) -> Array:
    """`[batch, length, n]` float32, with zeros for what does not count, also where it is not finite."""
    return jnp.where(mask[:, None, None] > 0, inputs.astype(jnp.float32), 0)


def _second_moment(rows: Array) -> Array:
    """`Xᵀ X`: XLA's whole product, or what `QJAX_GRAM` names of `pallas_kernels.gram` when the program is traced.

    Those compute one triangle, half of the work. Whether one is faster anywhere is not measured: none is the default.
    """
    name = os.environ.get("QJAX_GRAM", "")
    return gram(rows.reshape(-1, rows.shape[-1]), name) if name else _product(rows, rows)


def _product(a: Array, b: Array) -> Array:
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)


def _first_bad(numbers: Array, product: Array, *rows: Array) -> Array:
    """The number of the first sequence with a value or a sum of squares that is not finite, `NONE` without one.

    Sums of squares bound every entry of a sequence's product. Where only the sum over the batch overflows, its first
    sequence is named.
    """
    broken = jnp.any(~jnp.isfinite(jnp.stack([jnp.sum(jnp.square(x), axis=1) for x in rows])), axis=(0, 2))
    named = jnp.where(jnp.any(broken), jnp.argmax(broken), 0)
    wrong = jnp.any(broken) | ~jnp.all(jnp.isfinite(product))
    return jnp.where(wrong, jax.lax.dynamic_index_in_dim(numbers, named, keepdims=False), NONE)


def _added(moments: Moments, products: dict[str, Array], bad: dict[str, Array]) -> Moments:
    total, carry, first = {}, {}, {}
    for name, product in products.items():
        first[name] = jnp.minimum(moments.bad[name], bad[name])
        total[name], carry[name] = kahan(moments.total[name], moments.carry[name], product)
    return Moments(total, carry, first)


def kahan(total: Array, carry: Array, addend: Array) -> tuple[Array, Array]:
    """`total - carry + addend` in two parts again: the sum, and what its rounding has added to it."""
    addend = addend - carry
    after = total + addend
    return after, (after - total) - addend


@functools.partial(jax.jit, static_argnames="mesh")
def reduced(moments: Moments, *, mesh: Mesh) -> tuple[dict[str, Array], dict[str, Array]]:
    """(sums over all devices, least `bad`) by name, on every device: one all-reduce of `[n, n]` float32 per factor."""

    def body(moments: Moments) -> tuple[dict[str, Array], dict[str, Array]]:
        names = list(moments.total)
        # Rounded to float32 on its device first: what is sent is half as large.
        sums = {name: jax.lax.psum(moments.total[name][0] - moments.carry[name][0], AXES) for name in names}
        bad = jax.lax.pmin(jnp.stack([moments.bad[name][0] for name in names]), AXES)
        return sums, {name: bad[i] for i, name in enumerate(names)}

    return jax.shard_map(body, mesh=mesh, in_specs=(EACH,), out_specs=(WHOLE, WHOLE), check_vma=False)(moments)


def finish(moments: Moments, count: int, mesh: Mesh) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """(means of the sums over `count` tokens as float32 on the host, first sequence that is not finite by site).

    The running sums are freed.
    """
    sums, bad = reduced(moments, mesh=mesh)
    bad = jax.device_get(bad)
    for leaf in jax.tree.leaves((moments.total, moments.carry)):
        if isinstance(leaf, jax.Array):  # not the zeros of no step at all
            leaf.delete()
    means = {}
    for name in list(sums):
        total = np.asarray(sums.pop(name))
        means[name] = np.empty(total.shape, np.float32)
        for start in range(0, len(total), _ROWS):  # a few rows at a time: in float64 the whole is twice as large
            rows = slice(start, start + _ROWS)
            means[name][rows] = total[rows].astype(np.float64) / count
    first = {site: min(int(bad[name]) for name in (site, CROSS[site]) if name in bad) for site in SITES}
    return means, {site: number for site, number in first.items() if number != NONE}

"""Second moments of a block's inputs, accumulated on every device without losing small terms, and reduced once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from qjax.errors import InputError, NumericsError
from qjax.hessian.experts import pools
from qjax.hessian.products import NONE, first_bad, kahan, masked, product, second_moment
from qjax.linalg.compiled import lean_jit
from qjax.linalg.kronecker import Hessian
from qjax.linalg.symmetric import mirror
from qjax.models.config import ModelConfig
from qjax.models.structure import structure
from qjax.models.transformer import block_inputs, block_record
from qjax.runtime.ahead import call
from qjax.runtime.mesh import AXES, EACH, WHOLE
from qjax.streams import activations
from qjax.streams.activations import Activations
from qjax.streams.batches import Spread
from qjax.typing import HostOrDevice, Leaf, pytree

__all__ = [
    "Moments",
    "accumulate",
    "accumulate_pair",
    "block_hessians",
    "block_hessians_and_outputs",
    "block_hessians_of_two_streams",
    "empty",
    "finish",
    "on_devices",
    "reduced",
    "shapes",
    "with_rows",
]


@pytree
class Moments:
    """Running sums for one block, one on every device: `Σ x xᵀ` per site in two float32 parts (sum, compensation).

    With two streams, x original and z quantised, the site's own name holds `Σ z zᵀ` and `cross(site)` `Σ x zᵀ`.
    All arrays have a leading axis of devices. `bad`: the least number of a sequence whose inputs or their squares are
    not finite, by name, or `NONE`.

    The experts of a mixture whose sites differ in the expert alone are one `[experts, n, n]` sum, of the tokens that
    are routed to each, under the stack's name (`Structure.stacks`), and `every(stack)` one of all tokens where experts
    have inputs of their own. `count` are the tokens of every expert by stack.

    The compensation carries what a float32 addition drops (Kahan), so thousands of batches lose nothing.
    """

    total: dict[str, Leaf]
    carry: dict[str, Leaf]
    bad: dict[str, Leaf]
    count: dict[str, Leaf] = dataclasses.field(default_factory=dict)


_ROWS = 256


def cross(site: str) -> str:
    """The name of a site's cross moment."""
    return f"{site}:cross"


def every(name: str) -> str:
    """The name of a stack's or an expert's moment over all tokens."""
    return f"{name}:every"


def _sizes(config: ModelConfig, pairs: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every sum, with `pairs` of those of two streams. Raises InputError for pairs of a mixture."""
    found = structure(config)
    if pairs and found.stacks:
        raise InputError(
            f"hessian.stream is 'corrected'; {config.architecture} routes a token to other experts once the blocks "
            "before it are quantised, and what then belongs together is not defined: use hessian=sequential or original"
        )
    sizes: dict[str, tuple[int, ...]] = {site: (n, n) for site, n in found.widths.items() if site not in found.experts}
    sizes |= {cross(site): shape for site, shape in sizes.items()} if pairs else {}
    for stack, sites in found.stacks.items():
        names = (stack, every(stack)) if stack in found.own_inputs else (stack,)
        sizes |= dict.fromkeys(names, (len(sites), *2 * (found.widths[sites[0]],)))
    return sizes


def empty(config: ModelConfig, spread: Spread, pairs: bool = False) -> Moments:
    """Zero sums, with `pairs` those of two streams (no program is compiled for them)."""
    sizes = _sizes(config, pairs)

    def zeros() -> dict[str, HostOrDevice]:
        return {name: spread.sums(lambda shape: np.zeros(shape, np.float32), size) for name, size in sizes.items()}

    none = {name: spread.sums(lambda shape: np.full(shape, NONE), ()) for name in sizes}
    count = {
        stack: spread.sums(lambda shape: np.zeros(shape, np.uint32), (len(sites),))
        for stack, sites in structure(config).stacks.items()
    }
    return Moments(zeros(), zeros(), none, count)


def shapes(config: ModelConfig, pairs: bool = False) -> Moments:
    """`empty` on one device as shapes."""
    sums = {name: jax.ShapeDtypeStruct((1, *size), np.float32) for name, size in _sizes(config, pairs).items()}
    stacks = structure(config).stacks.items()
    count = {stack: jax.ShapeDtypeStruct((1, len(sites)), np.uint32) for stack, sites in stacks}
    return Moments(sums, dict(sums), {name: jax.ShapeDtypeStruct((1,), NONE.dtype) for name in sums}, count)


@lean_jit(static_argnames=("config", "mesh", "propagate"), donate_argnames="moments")
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
        y, seen = block_record(parameters, x, config)
        products, bad, count, experts = {}, {}, {}, structure(config).experts
        for site, (own_inputs, _, _) in seen.items():
            if site not in experts:
                rows = masked(own_inputs, mask)
                products[site] = second_moment(rows)
                bad[site] = first_bad(numbers, products[site], rows)
        for stack, sites in structure(config).stacks.items():
            routed = jnp.stack([jnp.asarray(seen[site][1]) for site in sites]) & (mask > 0)[None, :, None]
            count[stack] = jnp.sum(routed, axis=(1, 2), dtype=jnp.uint32)
            rows = {stack: jnp.stack([masked(seen[site][0], mask) for site in sites])}
            if stack in structure(config).own_inputs:
                rows[every(stack)] = jax.vmap(masked, in_axes=(0, None))(jnp.asarray(seen[sites[0]][2]), mask)
            for name, part in rows.items():
                products[name] = jax.vmap(product)(part, part)
                bad[name] = first_bad(numbers, products[name], *part)
        return _added(moments, products, bad, count), (y if propagate else None)

    return on_devices(mesh, own)(moments, parameters, x, mask, numbers)


@lean_jit(static_argnames=("config", "mesh"), donate_argnames="moments")
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
        for site in original:
            a, b = masked(original[site], mask), masked(changed[site], mask)
            products[site], products[cross(site)] = second_moment(b), product(a, b)
            bad[site] = first_bad(numbers, products[site], b)
            bad[cross(site)] = first_bad(numbers, products[cross(site)], a, b)
        return _added(moments, products, bad, {}), y

    return on_devices(mesh, own)(moments, parameters, x, z, mask, numbers)


def with_rows(moments: Moments, inputs: dict[str, Array], mask: Array, numbers: Array) -> Moments:
    """The sums of one device with a step's inputs `[batch, length, n]` of every site."""
    products, bad = {}, {}
    for site, own in inputs.items():
        rows = masked(own, mask)
        products[site] = second_moment(rows)
        bad[site] = first_bad(numbers, products[site], rows)
    return _added(moments, products, bad, {})


def on_devices(mesh: Mesh, own: Any) -> Any:
    """`own(moments, parameters, *split)` on every device, without the sums' leading axis.

    On one device it is not mapped: what a mapped program gives lies on a mesh, and the first step, which gets zeros of
    the host, and the others would be two programs.
    """

    def body(moments: Moments, parameters: Any, *split: Array) -> Any:
        moments, y = own(jax.tree.map(lambda a: a[0], moments), parameters, *split)
        return jax.tree.map(lambda a: a[None], moments), y

    if mesh.size == 1:
        return body

    def run(moments: Moments, parameters: Any, *split: Array) -> Any:
        specs = (EACH, WHOLE, *(EACH for _ in split))
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(EACH, EACH), check_vma=False)(
            moments, parameters, *split
        )

    return run


def _added(moments: Moments, products: dict[str, Array], bad: dict[str, Array], count: dict[str, Array]) -> Moments:
    total, carry, first = {}, {}, {}
    for name, own in products.items():
        first[name] = jnp.minimum(moments.bad[name], bad[name])
        total[name], carry[name] = kahan(moments.total[name], moments.carry[name], own)
    return Moments(total, carry, first, {name: moments.count[name] + own for name, own in count.items()})


@functools.partial(jax.jit, static_argnames="mesh")
def reduced(moments: Moments, *, mesh: Mesh) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """(sums over all devices, least `bad`, tokens of every expert) by name, on every device.

    That is one all-reduce of `[n, n]` float32 per factor.
    """
    if mesh.size == 1:
        sums = {name: (total - moments.carry[name])[0] for name, total in moments.total.items()}
        first = lambda part: {name: own[0] for name, own in part.items()}  # noqa: E731
        return sums, first(moments.bad), first(moments.count)

    def body(moments: Moments) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        names = list(moments.total)
        # Rounded to float32 on its device first: what is sent is half as large.
        sums = {name: jax.lax.psum(moments.total[name][0] - moments.carry[name][0], AXES) for name in names}
        bad = jax.lax.pmin(jnp.stack([moments.bad[name][0] for name in names]), AXES)
        count = {name: jax.lax.psum(own[0], AXES) for name, own in moments.count.items()}
        return sums, {name: bad[i] for i, name in enumerate(names)}, count

    return jax.shard_map(body, mesh=mesh, in_specs=(EACH,), out_specs=(WHOLE, WHOLE, WHOLE), check_vma=False)(moments)


def finish(
    moments: Moments, count: int, mesh: Mesh
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, np.ndarray]]:
    """(means over tokens as float32 on the host, first sequence that is not finite, tokens of every expert), by name.

    `count` is the number of all tokens; the mean over an expert's, of none of them 0, is in its stack's.

    Second moments are exactly symmetric: their lower triangle is what counts, as in the store. The running sums are
    freed.
    """
    sums, bad, routed = call(reduced, moments, mesh=mesh)
    bad, routed = jax.device_get((bad, routed))
    for leaf in jax.tree.leaves((moments.total, moments.carry)):
        if isinstance(leaf, jax.Array):  # not the zeros of no step at all
            leaf.delete()
    means = {}
    for name in list(sums):
        total = np.asarray(sums.pop(name))
        means[name] = np.empty(total.shape, np.float32)
        for number, part in enumerate(total[None] if total.ndim == 2 else total):
            own = max(int(routed[name][number]), 1) if name in routed else count
            mean = means[name] if total.ndim == 2 else means[name][number]
            for start in range(0, len(part), _ROWS):  # a few rows at a time: in float64 the whole is twice as large
                rows = slice(start, start + _ROWS)
                mean[rows] = part[rows].astype(np.float64) / own
            if not name.endswith(cross("")):
                mirror(mean)
    first: dict[str, int] = {}
    for name, number in bad.items():
        site = name.removesuffix(cross("")).removesuffix(every(""))
        first[site] = min(int(number), first.get(site, int(NONE)))
    return means, {site: number for site, number in first.items() if number != NONE}, routed


def block_hessians(
    parameters: Any, x: Activations, config: ModelConfig, *, index: int, batch: int, spread: Spread | None = None
) -> dict[str, Hessian]:
    """`H = E[x xᵀ]` of every linear of block `index`; linears that share an input share the array.

    `x` are the block's inputs `[sequences, length, width]`, wherever they lie: all of them, or with `spread` those that
    this process holds. Raises NumericsError, in all processes alike, naming the first linear whose input is not finite.
    """
    spread = spread or Spread(len(x), batch)
    moments, parameters = empty(config, spread), spread.whole(parameters)
    options = {"mesh": spread.mesh, "propagate": False}
    for step in spread.feed(x):
        moments, _ = call(accumulate, moments, parameters, *step.parts, step.mask, step.numbers, config, **options)
    return _hessians(moments, index, config, spread, x.shape[1])


def block_hessians_and_outputs(
    parameters: Any, x: Activations, config: ModelConfig, *, index: int, batch: int, spread: Spread | None = None
) -> tuple[dict[str, Hessian], Activations]:
    """The result of `block_hessians`, and the block's outputs `[sequences, length, width]` from the same pass."""
    spread = spread or Spread(len(x), batch)
    moments, parameters, outputs = empty(config, spread), spread.whole(parameters), activations.like(x)
    for step in spread.feed(x):
        moments, y = accumulate(
            moments, parameters, *step.parts, step.mask, step.numbers, config, mesh=spread.mesh, propagate=True
        )
        assert y is not None
        spread.put(outputs, step, y)
    return _hessians(moments, index, config, spread, x.shape[1]), outputs


def block_hessians_of_two_streams(
    parameters: Any,
    x: Activations,
    z: Activations,
    config: ModelConfig,
    *,
    index: int,
    batch: int,
    spread: Spread | None = None,
) -> tuple[dict[str, Hessian], Activations]:
    """`H = E[z zᵀ]` and `C = E[x zᵀ]` of every linear, and the original block's outputs for x.

    x are the block's inputs in the original model, z those in the quantised stream.
    """
    spread = spread or Spread(len(x), batch)
    moments, outputs = empty(config, spread, pairs=True), activations.like(x)
    parameters = spread.whole(parameters)
    for step in spread.feed(x, z):
        moments, y = call(
            accumulate_pair, moments, parameters, *step.parts, step.mask, step.numbers, config, mesh=spread.mesh
        )
        spread.put(outputs, step, y)
    return _hessians(moments, index, config, spread, x.shape[1]), outputs


def _hessians(moments: Moments, index: int, config: ModelConfig, spread: Spread, length: int) -> dict[str, Hessian]:
    sites, tokens = structure(config).sites, spread.sequences * length
    means, bad, routed = finish(moments, tokens, spread.mesh)
    count = dict.fromkeys(sites.values(), tokens)
    for stack, experts in structure(config).stacks.items():
        if stack in bad:
            bad[experts[0]] = bad.pop(stack)
        own = means.pop(stack)
        pooled = pools(own, routed[stack], means.pop(every(stack), None))
        for site, mean, shared, seen in zip(experts, own, pooled, routed[stack], strict=True):
            means[site], means[every(site)], count[site] = mean, shared, int(seen)
    means = jax.device_put(means)  # once: the program of every linear would copy a host array for itself
    if bad:
        name = next(site for site in sites.values() if site in bad)  # a site has the name of its first linear
        sequence = bad[name]
        raise NumericsError(
            f"layers.{index}.{name}: its inputs on the calibration data are not finite, first in sequence {sequence}; "
            "drop that sequence, check the weights of the blocks before it, or load the model in float32"
        )
    return {
        name: Hessian(means[site], None, count[site], means.get(cross(site)), means.get(every(site)))
        for name, site in sites.items()
    }

"""Sketches of all linears of a model: forward and backward through the blocks, one batch of sequences at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from qjax.errors import InputError, NumericsError
from qjax.hessian.experts import ExpertFactor
from qjax.hessian.labels import label_gradient
from qjax.hessian.moments import block_hessians_and_outputs
from qjax.hessian.products import NONE, kahan
from qjax.hessian.sketch import Sketch, assembled, increments, row_blocks
from qjax.linalg.kronecker import Hessian
from qjax.linalg.symmetric import mirror
from qjax.models.config import ModelConfig
from qjax.models.structure import structure, unnumbered
from qjax.models.transformer import embed, head, probed
from qjax.runtime.mesh import AXES, EACH, WHOLE, single
from qjax.streams.batches import Spread
from qjax.streams.blocks import blocks
from qjax.streams.gradients import backward, there_and_back
from qjax.typing import HostOrDevice, Leaf, pytree

__all__ = [
    "Sums",
    "activation_bytes",
    "block_bytes",
    "collect_sketch",
    "empty_sums",
    "finish_sums",
    "ranges",
    "sketch_pass",
]


@pytree
class Sums:
    """Running sums of one block by linear and factor ("input", "output"), float32 in two parts, one on every device.

    A factor is a tuple of its `row_blocks`. As in `Moments` all arrays have a leading axis of devices, and `bad` is
    the first sequence whose gradient was not finite, by linear, or `NONE`. Only the lower triangles mean anything.
    """

    total: dict[str, dict[str, tuple[Leaf, ...]]]
    carry: dict[str, dict[str, tuple[Leaf, ...]]]
    bad: dict[str, Leaf]


def empty_sums(config: ModelConfig, update: str, spread: Spread) -> Sums:
    """Zero sums of a block, of the factors that a pass renews."""
    shapes = structure(config).shapes
    zeros = lambda shape: np.zeros(shape, np.float32)  # noqa: E731

    def factors() -> dict[str, dict[str, tuple[HostOrDevice, ...]]]:
        result: dict[str, dict[str, tuple[HostOrDevice, ...]]] = {}
        for name, (m, n) in shapes.items():
            sizes = {"input": n, "output": m}
            result[name] = {
                factor: tuple(spread.sums(zeros, block) for block in row_blocks(size))
                for factor, size in sizes.items()
                if update in ("both", factor)
            }
        return result

    none = {name: spread.sums(lambda shape: np.full(shape, NONE), ()) for name in shapes}
    return Sums(factors(), factors(), none)


def block_bytes(config: ModelConfig) -> int:
    """Memory of one block's sums of both factors."""
    entries = lambda size: sum(rows * end for rows, end in row_blocks(size))  # noqa: E731
    return sum(8 * (entries(m) + entries(n)) for m, n in structure(config).shapes.values())


def ranges(config: ModelConfig, budget: float) -> list[range]:
    """Ranges of blocks, last ones first, whose sums fit into `budget` bytes (one block at least)."""
    count = max(1, int(budget // block_bytes(config)))
    ends = range(config.num_layers, 0, -count)
    return [range(max(0, end - count), end) for end in ends]


@functools.partial(jax.jit, static_argnames=("sites", "per_token", "update", "mesh"))
def accumulate_sketch(
    sums: Sums,
    pull: Any,
    inputs: dict[str, Array],
    gradient: HostOrDevice,
    mask: HostOrDevice,
    numbers: HostOrDevice,
    factors: dict[str, dict[str, Leaf]],
    *,
    sites: tuple[tuple[str, str], ...],
    per_token: bool,
    update: str,
    mesh: Mesh,
) -> tuple[Sums, Array]:
    """Add a step at one block; returns the sums and the gradient in the block's input. Nothing is communicated.

    `factors`: those of the pass before, by linear and factor; absent ones are identities.  `sites`: of every linear.
    """

    def own(sums: Sums, inputs: Any, gradients: Any, mask: Any, numbers: Any, factors: Any) -> Sums:
        sums = jax.tree.map(lambda a: a[0], sums)
        total, carry, bad = {}, {}, {}
        for name, site in sites:
            g = gradients[name] * mask[:, None, None].astype(gradients[name].dtype)
            known = factors.get(name, {})
            added = increments(
                inputs[site], g, known.get("input"), known.get("output"), per_token=per_token, update=update
            )
            broken = ~jnp.all(jnp.isfinite(g), axis=(1, 2))
            first = jax.lax.dynamic_index_in_dim(numbers, jnp.argmax(broken), keepdims=False)
            bad[name] = jnp.minimum(sums.bad[name], jnp.where(jnp.any(broken), first, NONE))
            total[name], carry[name] = {}, {}
            for factor, parts in added.items():
                before = zip(sums.total[name][factor], sums.carry[name][factor], strict=True)
                pairs = [kahan(*pair, part) for pair, part in zip(before, parts, strict=True)]
                total[name][factor], carry[name][factor] = (tuple(column) for column in zip(*pairs, strict=True))
        return jax.tree.map(lambda a: a[None], Sums(total, carry, bad))

    back, gradients = pull(gradient)
    specs = (EACH, EACH, EACH, EACH, EACH, WHOLE)
    on_each = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=EACH, check_vma=False)
    return on_each(sums, inputs, gradients, mask, numbers, factors), back


@functools.partial(jax.jit, static_argnames="mesh")
def reduce_sums(sums: Sums, *, mesh: Mesh) -> tuple[dict[str, dict[str, tuple[Array, ...]]], dict[str, Array]]:
    """(sums over all devices by linear and factor, least `bad`), on every device: an all-reduce per block of rows."""

    def own(sums: Sums) -> Any:
        added = jax.tree.map(lambda total, carry: jax.lax.psum(total[0] - carry[0], AXES), sums.total, sums.carry)
        bad = jax.lax.pmin(jnp.stack([sums.bad[name][0] for name in sums.bad]), AXES)
        return added, {name: bad[i] for i, name in enumerate(sums.bad)}

    return jax.shard_map(own, mesh=mesh, in_specs=(EACH,), out_specs=WHOLE, check_vma=False)(sums)


def activation_bytes(parameters: Any, config: ModelConfig, batch: int, length: int, dtype: str = "float32") -> int:
    """Memory of what one block keeps of a batch for its pullback."""
    _, pull, inputs = jax.eval_shape(
        functools.partial(probed, config=config),
        parameters,
        jax.ShapeDtypeStruct((batch, length, config.hidden_size), jnp.dtype(dtype)),
    )
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    return max(size((pull, inputs)) - size(parameters), 0)  # the weights are kept anyway


def sketch_pass(
    config: ModelConfig,
    params: Any,
    tokens: Int[np.ndarray, "sequences length"],
    sketch: Sketch,
    number: int,
    sums: dict[int, Sums],
    factors: Callable[[int], Mapping[str, Mapping[str, HostOrDevice]]] | None,
    *,
    spread: Spread,
    budget: float = 0,
) -> Iterator[int]:
    """Pass `number` over the sequences of `spread`; yields the number of sequences done after every step.

    Every block is evaluated once when all that its pullback needs fits into `budget` bytes beside the sums, else a
    second time on the way back, to the same bits. `tokens` are those of all sequences.

    `sums` holds the blocks to accumulate, a contiguous range, and is brought up to date in place. `factors(block)` are
    those of the pass before, or None for identities. Raises NumericsError naming the linear and the sequence whose
    gradient is not finite.
    """
    update = sketch.passes[number]
    blocks = [spread.whole(_weights_as(sketch.compute, parameters)) for parameters in params["blocks"]]
    table, top = spread.whole((params["embed"], _weights_as(sketch.compute, head(params))))
    lowest, batch = min(sums), spread.batch
    known = {i: {} if factors is None else {k: dict(v) for k, v in factors(i).items()} for i in sums}
    known = spread.whole(known)
    root, sites = np.array([number, sketch.seed], np.uint32), tuple(structure(config).sites.items())
    held = len(sums) * block_bytes(config)
    shape = batch, tokens.shape[1], sketch.compute
    held += sum(activation_bytes(blocks[i], config, *shape) for i in range(lowest, len(blocks)))
    keep = held <= budget
    for step in spread.feed(spread.take(tokens)):
        (part,) = step.parts
        first = embed(table, part, config).astype(sketch.compute)
        x, way = there_and_back(blocks, first, config, lowest=lowest, keep=keep)
        gradient = label_gradient(top, x, part, root, step.numbers, config, labels=sketch.labels)
        for index, pull, inputs in way:
            if index in sums:
                sums[index], gradient = accumulate_sketch(
                    sums[index],
                    pull,
                    inputs,
                    gradient,
                    step.mask,
                    step.numbers,
                    known[index],
                    sites=sites,
                    per_token=sketch.estimator == "sketch_a",
                    update=update,
                    mesh=spread.mesh,
                )
            else:
                gradient = backward(pull, gradient)
        if jax.process_count() == 1:  # a process that ends alone leaves the others waiting: they meet in `finish_sums`
            bad = jax.device_get({index: block_sums.bad for index, block_sums in sums.items()})
            for index, linears in bad.items():
                _check(index, {name: linears[name].min() for name, _ in sites})
        yield step.done


def _weights_as(dtype: str, parameters: Any) -> Any:
    """Matrices in the dtype that products take them in, which would convert them in every step; the rest as it is."""
    return jax.tree.map(lambda a: jnp.asarray(a, dtype) if a.ndim == 2 and a.dtype != dtype else a, parameters)


def _check(index: int, bad: Mapping[str, Any]) -> None:
    for name, sequence in bad.items():
        if sequence != NONE:
            raise NumericsError(
                f"layers.{index}.{name}: the gradient of calibration sequence {int(sequence)} is not finite; "
                "drop that sequence, check the weights, or load the model in float32"
            )


def finish_sums(
    sums: Sums,
    index: int,
    config: ModelConfig,
    before: Mapping[str, Mapping[str, HostOrDevice]] | None,
    spread: Spread,
    done: int | None = None,
) -> dict[str, Hessian]:
    """The factors of a block, symmetric and with mean diagonal 1; what the pass did not renew is taken from `before`.

    With `done` sequences so far the sums stay in use, else they are freed. Raises InputError when neither has an input
    factor, NumericsError, in all processes alike, for a gradient that was not finite.
    """
    totals, bad = jax.device_get(reduce_sums(sums, mesh=spread.mesh))
    if done is None:
        for leaf in jax.tree.leaves((sums.total, sums.carry)):
            if isinstance(leaf, jax.Array):  # not the zeros of no step at all
                leaf.delete()
    names = tuple(structure(config).sites)
    _check(index, {name: bad[name] for name in names})
    count, result = spread.sequences if done is None else done, {}
    made_of = {name: {factor: assembled(total) for factor, total in totals[name].items()} for name in names}
    for name in names:
        made = {factor: _normal(_or_others(name, factor, made_of, config)) for factor in made_of[name]}
        known = {} if before is None else before.get(name, {})
        both = {factor: made[factor] if factor in made else known.get(factor) for factor in ("input", "output")}
        if both["input"] is None:
            raise InputError(f"layers.{index}.{name}: no input factor; the pass before it is missing")
        result[name] = Hessian(both["input"], both["output"], count)
    return result


def _or_others(
    name: str, factor: str, totals: Mapping[str, Mapping[str, np.ndarray]], config: ModelConfig
) -> np.ndarray:
    """The sum of a linear; of an expert that no token was routed to, that of all experts of its projection."""
    experts, own = structure(config).experts, totals[name][factor]
    if name not in experts or own.any():
        return own
    stack = unnumbered(name, experts[name])
    return np.sum([totals[k][factor] for k, e in experts.items() if unnumbered(k, e) == stack], axis=0)


def _normal(total: np.ndarray) -> np.ndarray:
    exact = total.astype(np.float64)
    mean = np.trace(exact) / len(exact)
    if mean > 0:
        exact /= mean
    return mirror(exact.astype(np.float32))


def collect_sketch(
    config: ModelConfig,
    params: Any,
    tokens: Int[np.ndarray, "sequences length"],
    estimator: str,
    *,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> dict[str, Hessian]:
    """The sketch of every linear, in memory (the store keeps them on disk, and continues after a kill).

    Sketch A makes two half-steps unless `rounds` says otherwise.
    """
    options.setdefault("rounds", 2 if estimator == "sketch_a" else 1)
    sketch = Sketch(estimator, **options)
    count, spread = len(params["blocks"]), Spread(len(tokens), batch, mesh or single())
    factors: dict[int, dict[str, dict[str, HostOrDevice]]] | None = None
    if estimator == "sketch_a":  # its first half-step, H_in = E[x xᵀ], needs no gradients
        factors, factor = {}, ExpertFactor()
        for here in blocks(config, params, tokens, batch=batch, spread=spread):
            found, here.y = block_hessians_and_outputs(
                here.parameters, here.x, config, index=here.index, batch=batch, spread=spread
            )
            shrunk = {name: factor(hessian, f"layers.{here.index}.{name}") for name, hessian in found.items()}
            factors[here.index] = {name: {"input": hessian.input} for name, hessian in shrunk.items()}
    result: dict[int, dict[str, Hessian]] = {}
    for number, update in enumerate(sketch.passes):
        sums = {index: empty_sums(config, update, spread) for index in range(count)}
        before = None if factors is None else factors.__getitem__
        for done in sketch_pass(config, params, tokens, sketch, number, sums, before, spread=spread):
            if progress is not None:
                progress(number * len(tokens) + done, len(sketch.passes) * len(tokens))
        result = {i: finish_sums(sums[i], i, config, None if factors is None else factors[i], spread) for i in sums}
        factors = {i: known_factors(hessians) for i, hessians in result.items()}
    return {f"layers.{i}.{name}": result[i][name] for i in range(count) for name in structure(config).sites}


def known_factors(hessians: Mapping[str, Hessian]) -> dict[str, dict[str, HostOrDevice]]:
    """The factors that there are, by linear and name."""
    return {
        name: {f: value for f in ("input", "output") if (value := getattr(hessian, f)) is not None}
        for name, hessian in hessians.items()
    }

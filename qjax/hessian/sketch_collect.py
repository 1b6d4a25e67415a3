"""Sketches of all linears of a model: forward and backward through the blocks, one batch of sequences at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from qjax.errors import InputError, NumericsError
from qjax.hessian.collect import batches, block_hessians_and_outputs, embedded
from qjax.hessian.labels import label_gradient
from qjax.hessian.sketch import Sketch, increments
from qjax.hessian.statistics import Hessian
from qjax.linalg.rotations import Leaf
from qjax.models.config import ModelConfig
from qjax.models.linear import HostOrDevice
from qjax.models.transformer import LINEARS, embed, head, probed

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


@struct.dataclass
class Sums:
    """Running sums of one block by linear and factor ("input", "output"), float32 in two parts (see `Moments`).

    Only the lower triangles mean anything. `bad`: the first sequence whose gradient was not finite, by linear, or −1.
    """

    total: dict[str, dict[str, Leaf]]
    carry: dict[str, dict[str, Leaf]]
    bad: dict[str, Leaf]


def shapes(parameters: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of a block."""
    found = {}
    for name in LINEARS:
        group, leaf = name.split(".")
        found[name] = tuple(int(size) for size in parameters[group][leaf]["weight"].shape)
    return found


def empty_sums(parameters: Any, update: str) -> Sums:
    """Zero sums of a block, of the factors that a pass renews."""

    def zeros() -> dict[str, dict[str, np.ndarray]]:
        result: dict[str, dict[str, np.ndarray]] = {}
        for name, (m, n) in shapes(parameters).items():
            sizes = {"input": n, "output": m}
            result[name] = {f: np.zeros((s, s), np.float32) for f, s in sizes.items() if update in ("both", f)}
        return result

    return Sums(zeros(), zeros(), {name: np.int32(-1) for name in LINEARS})


def block_bytes(parameters: Any) -> int:
    """Memory of one block's sums of both factors."""
    return sum(8 * (m**2 + n**2) for m, n in shapes(parameters).values())


def ranges(blocks: list[Any], budget: float) -> list[range]:
    """Ranges of blocks, last ones first, whose sums fit into `budget` bytes (one block at least)."""
    result, end = [], len(blocks)
    while end > 0:
        start, used = end - 1, block_bytes(blocks[end - 1])
        while start > 0 and used + block_bytes(blocks[start - 1]) <= budget:
            start -= 1
            used += block_bytes(blocks[start])
        result.append(range(start, end))
        end = start
    return result


forward = jax.jit(probed, static_argnames="config")
"""A block's output, its pullback (an argument of the next two) and the inputs of its linears."""


@jax.jit
def backward(pull: Any, gradient: HostOrDevice) -> Array:
    """The gradient in a block's input alone."""
    return pull(gradient)[0]


@functools.partial(jax.jit, static_argnames=("per_token", "update"), donate_argnames="sums")
def accumulate_sketch(
    sums: Sums,
    pull: Any,
    inputs: dict[str, Array],
    gradient: HostOrDevice,
    mask: HostOrDevice,
    first: HostOrDevice,
    factors: dict[str, dict[str, Leaf]],
    *,
    per_token: bool,
    update: str,
) -> tuple[Sums, Array]:
    """Add a batch at one block; returns the sums and the gradient in the block's input.

    `factors`: those of the pass before, by linear and factor; absent ones are identities.
    """
    back, gradients = pull(gradient)
    total, carry, bad = {}, {}, {}
    for name, site in LINEARS.items():
        g = gradients[name] * mask[:, None, None].astype(gradients[name].dtype)
        known = factors.get(name, {})
        added = increments(inputs[site], g, known.get("input"), known.get("output"), per_token=per_token, update=update)
        broken = ~jnp.all(jnp.isfinite(g), axis=(1, 2))
        found = jnp.where(jnp.any(broken), first.astype(jnp.int32) + jnp.argmax(broken).astype(jnp.int32), -1)
        bad[name] = jnp.where(sums.bad[name] >= 0, sums.bad[name], found)
        total[name], carry[name] = {}, {}
        for factor, product in added.items():
            addend = product - sums.carry[name][factor]
            total[name][factor] = sums.total[name][factor] + addend
            carry[name][factor] = (total[name][factor] - sums.total[name][factor]) - addend
    return Sums(total, carry, bad), back


def activation_bytes(parameters: Any, config: ModelConfig, batch: int, length: int, dtype: str = "float32") -> int:
    """Memory of what one block keeps of a batch for its pullback."""
    width = parameters["input_layernorm"].shape[0]
    _, pull, inputs = jax.eval_shape(
        functools.partial(probed, config=config),
        parameters,
        jax.ShapeDtypeStruct((batch, length, width), jnp.dtype(dtype)),
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
    batch: int,
    start: int = 0,
    budget: float = 0,
) -> Iterator[int]:
    """Pass `number` over the sequences from `start` on; yields the number of sequences done after every batch.

    Every block is evaluated once when all that its pullback needs fits into `budget` bytes beside the sums, else a
    second time on the way back, to the same bits.

    `sums` holds the blocks to accumulate, a contiguous range, and is brought up to date in place (an entry taken out
    of it is invalid after the next step: its memory is used again). `factors(block)` are those of the pass before, or
    None for identities. Raises NumericsError naming the linear and the sequence whose gradient is not finite.
    """
    update = sketch.passes[number]
    blocks, top = params["blocks"], head(params)
    lowest = min(sums)
    known = {i: {} if factors is None else {k: dict(v) for k, v in factors(i).items()} for i in sums}
    root = jax.random.wrap_key_data(jax.device_put(np.array([number, sketch.seed], np.uint32)))
    held = sum(block_bytes(blocks[index]) for index in sums)
    shape = batch, tokens.shape[1], sketch.compute
    held += sum(activation_bytes(blocks[i], config, *shape) for i in range(lowest, len(blocks)))
    keep = held <= budget
    for offset, (part, mask) in enumerate(batches(tokens[start:], batch)):
        first = np.uint32(start + offset * batch)
        x, kept = embed(params["embed"], part).astype(sketch.compute), []
        for index, parameters in enumerate(blocks):
            before = x
            x, pull, inputs = forward(parameters, before, config)
            if index >= lowest:
                kept.append((pull, inputs) if keep else before)
        gradient = label_gradient(top, x, part, root, first, config, labels=sketch.labels)
        for index in range(len(blocks) - 1, lowest - 1, -1):
            pull, inputs = kept.pop() if keep else forward(blocks[index], kept.pop(), config)[1:]
            if index in sums:
                sums[index], gradient = accumulate_sketch(
                    sums[index],
                    pull,
                    inputs,
                    gradient,
                    mask,
                    first,
                    known[index],
                    per_token=sketch.estimator == "sketch_a",
                    update=update,
                )
            else:
                gradient = backward(pull, gradient)
        _check({index: block_sums.bad for index, block_sums in sums.items()})
        yield min(start + (offset + 1) * batch, len(tokens))


def _check(bad: dict[int, dict[str, Array]]) -> None:
    for index, linears in jax.device_get(bad).items():
        for name, sequence in linears.items():
            if sequence >= 0:
                raise NumericsError(
                    f"layers.{index}.{name}: the gradient of calibration sequence {int(sequence)} is not finite; "
                    "drop that sequence, check the weights, or load the model in float32"
                )


def finish_sums(
    sums: Sums, index: int, before: Mapping[str, Mapping[str, HostOrDevice]] | None, sequences: int
) -> dict[str, Hessian]:
    """The factors of a block, symmetric and with mean diagonal 1; what the pass did not renew is taken from `before`.

    Raises InputError when neither has an input factor.
    """
    sums = jax.device_get(sums)
    result = {}
    for name in LINEARS:
        made = {factor: _normal(total, sums.carry[name][factor]) for factor, total in sums.total[name].items()}
        known = {} if before is None else before.get(name, {})
        both = {factor: made[factor] if factor in made else known.get(factor) for factor in ("input", "output")}
        if both["input"] is None:
            raise InputError(f"layers.{index}.{name}: no input factor; the pass before it is missing")
        result[name] = Hessian(both["input"], both["output"], sequences)
    return result


def _normal(total: np.ndarray, carry: np.ndarray) -> np.ndarray:
    exact = np.tril(total.astype(np.float64) - carry)
    mean = np.trace(exact) / len(exact)
    if mean > 0:
        exact /= mean
    return (exact + np.tril(exact, -1).T).astype(np.float32)


def collect_sketch(
    config: ModelConfig,
    params: Any,
    tokens: Int[np.ndarray, "sequences length"],
    estimator: str,
    *,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Hessian]:
    """The sketch of every linear, in memory (the store keeps them on disk, and continues after a kill).

    Sketch A makes two half-steps unless `rounds` says otherwise.
    """
    options.setdefault("rounds", 2 if estimator == "sketch_a" else 1)
    sketch = Sketch(estimator, **options)
    count = len(params["blocks"])
    factors: dict[int, dict[str, dict[str, HostOrDevice]]] | None = None
    if estimator == "sketch_a":  # its first half-step, H_in = E[x xᵀ], needs no gradients
        factors, x = {}, embedded(params["embed"], tokens, batch)
        for index, parameters in enumerate(params["blocks"]):
            found, x = block_hessians_and_outputs(parameters, x, config, index=index, batch=batch)
            factors[index] = {name: {"input": hessian.input} for name, hessian in found.items()}
    result: dict[int, dict[str, Hessian]] = {}
    for number, update in enumerate(sketch.passes):
        sums = {index: empty_sums(params["blocks"][index], update) for index in range(count)}
        before = None if factors is None else factors.__getitem__
        for done in sketch_pass(config, params, tokens, sketch, number, sums, before, batch=batch):
            if progress is not None:
                progress(number * len(tokens) + done, len(sketch.passes) * len(tokens))
        result = {i: finish_sums(sums[i], i, None if factors is None else factors[i], len(tokens)) for i in sums}
        factors = {i: known_factors(hessians) for i, hessians in result.items()}
    return {f"layers.{i}.{name}": result[i][name] for i in range(count) for name in LINEARS}


def known_factors(hessians: Mapping[str, Hessian]) -> dict[str, dict[str, HostOrDevice]]:
    """The factors that there are, by linear and name."""
    return {
        name: {f: value for f in ("input", "output") if (value := getattr(hessian, f)) is not None}
        for name, hessian in hessians.items()
    }

"""Kronecker sketches A and B of a function's linears, from gradients at their outputs, a sequence at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import InputError, NumericsError
from qjax.function.evaluate import Observer, evaluate
from qjax.function.program import Program
from qjax.function.walk import Use
from qjax.hessian.labels import draw
from qjax.hessian.products import kahan
from qjax.hessian.sketch import Sketch, assembled, increments
from qjax.linalg.kronecker import Hessian
from qjax.linalg.symmetric import mirror

__all__ = ["sketch_hessians"]

Loss = Callable[..., Any]


class _Probes(Observer):
    """Keeps the inputs of every product and adds a probe to its output, whose gradient is that of the output."""

    def wants(self, use: Use) -> bool:
        return True

    def see(self, use: Use, rows: Any, slot: Any) -> tuple[Any, Any]:
        return rows, slot


def _probe_shape(use: Use) -> tuple[int, ...]:
    *experts, out, _ = use.layout.matrix
    return (*(scan.length for scan in use.scans), *experts, use.layout.tokens, out)


def _by_matrix(use: Use, values: Any) -> Any:
    """`[matrices, rows, n]` of `[*scans, *experts, rows, n]`: steps that share a kernel are rows of it."""
    stacked = [axis for axis, scan in enumerate(use.scans) if scan.stacked]
    shared = [axis for axis, scan in enumerate(use.scans) if not scan.stacked]
    count = len(use.scans)
    experts = range(count, values.ndim - 2)
    values = values.transpose(*stacked, *experts, *shared, values.ndim - 2, values.ndim - 1)
    front = len(stacked) + len(experts)
    matrices = int(np.prod(values.shape[:front], dtype=int))
    return values.reshape(matrices, -1, values.shape[-1])


def label_loss(labels: str, root: Any, number: Any, output: Any, inputs: Sequence[Any]) -> Any:
    """Cross-entropy summed over positions: labels of the model's own softmax, or the next tokens of the first input."""
    logits = output.astype(jnp.float32)[0]
    chosen: Any
    counted = jnp.ones(logits.shape[0], jnp.float32)
    if labels == "sampled":
        probability = jax.nn.softmax(jax.lax.stop_gradient(logits), axis=-1)
        chosen = draw(jax.random.fold_in(root, number), probability)
    else:
        chosen = jnp.roll(inputs[0][0], -1)
        counted = (jnp.arange(logits.shape[0]) < logits.shape[0] - 1).astype(jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), chosen[:, None], axis=1)[:, 0]
    return -jnp.sum(picked * counted)


def _sequence(
    program: Program,
    tree: Any,
    loss: Callable[[Any, Sequence[Any], Any], Any],
    per_token: bool,
    update: str,
    leaves: list[Any],
    inputs: list[Any],
    number: Any,
    factors: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Increments of all linears from one sequence: by name and factor the row blocks `[matrices, rows, end]`."""

    def total(probes: dict[int, Any]) -> tuple[Any, Any]:
        found, rows = evaluate(
            program.closed, [*leaves, *inputs], program.uses, program.sites.of_use, _Probes(), probes
        )
        output = jax.tree.unflatten(tree, found)
        return loss(output, inputs, number), rows

    probes = {use.index: jnp.zeros(_probe_shape(use), jnp.float32) for use in program.uses}
    gradients, rows = jax.grad(total, has_aux=True)(probes)
    names, parts = list(program.sites.linears), {}
    for use in program.uses:
        name = names[program.sites.of_use[use.index]]
        pair = _by_matrix(use, rows[use.index].astype(jnp.float32)), _by_matrix(use, gradients[use.index])
        before = parts.get(name)
        parts[name] = pair if before is None else tuple(map(_joined, before, pair))
    result = {}
    for name, (x, g) in parts.items():
        known = factors.get(name, {})
        one = lambda x, g, known: increments(  # noqa: E731
            x[None], g[None], known.get("input"), known.get("output"), per_token=per_token, update=update
        )
        result[name] = jax.vmap(one)(x, g, dict(known)), jnp.all(jnp.isfinite(g))
    return result


def _joined(a: Any, b: Any) -> Any:
    return jnp.concatenate([a, b], axis=1)


@functools.partial(jax.jit, static_argnames="step")
def _batch(step: Any, total: Any, carry: Any, leaves: Any, inputs: Any, numbers: Any, factors: Any) -> Any:
    """The sums with the sequences of a batch added one after the other, and whether every gradient was finite."""

    def one(state: Any, own: Any) -> tuple[Any, Any]:
        total, carry = state
        sequence, number = own
        found = step(leaves, [a[None] for a in sequence], number, factors)
        flat, structure = jax.tree.flatten({name: pair[0] for name, pair in found.items()})
        pairs = [
            kahan(sums, rest, part)
            for sums, rest, part in zip(jax.tree.leaves(total), jax.tree.leaves(carry), flat, strict=True)
        ]
        sums, rest = (jax.tree.unflatten(structure, column) for column in zip(*pairs, strict=True))
        return (sums, rest), {name: pair[1] for name, pair in found.items()}

    return jax.lax.scan(one, (total, carry), (inputs, numbers))


def sketch_hessians(
    batches: Callable[[], Any],
    program_of: Callable[[Sequence[Any]], tuple[Program, Any]],
    leaves: Sequence[Any],
    sketch: Sketch,
    loss: Loss | None,
    moments: Mapping[str, Hessian] | None,
) -> dict[str, Hessian]:
    """The sketch of all linears over batches whose inputs all have sequences as leading axis.

    `batches()` gives them anew for every pass; `program_of(sequence)` the program of one sequence and the structure of
    its output. `loss(output, *inputs)` of a sequence, None for the model's own softmax of logits `[1, length, vocab]`.
    `moments` are `E[x xᵀ]`, sketch A's first half-step. Raises NumericsError for gradients that are not finite.
    """
    factors: dict[str, dict[str, Any]] = {}
    stacks: dict[str, tuple[int, ...]] = {}
    if moments is not None:
        factors = {name: {"input": _flat(h.input)} for name, h in moments.items()}
    count, result = 0, {}
    steps: dict[Any, Any] = {}
    for number, update in enumerate(sketch.passes):
        root = np.array([number, sketch.seed], np.uint32)
        total: Any = None
        carry: Any = None
        count = 0
        for inputs, structure in batches():
            one = [jax.ShapeDtypeStruct((1, *np.shape(a)[1:]), a.dtype) for a in inputs]
            program, tree = program_of(one)
            stacks = {name: site.stack for name, site in program.sites.linears.items()}
            key = id(program), number
            if key not in steps:
                own = _loss(program, loss, sketch, root, structure)
                per_token = sketch.estimator == "sketch_a"
                steps[key] = functools.partial(_sequence, program, tree, own, per_token, update)
            size = int(np.shape(inputs[0])[0])
            numbers = np.arange(count, count + size, dtype=np.uint32)
            if total is None:
                shapes = jax.eval_shape(steps[key], list(leaves), one, numbers[0], factors)
                total = {n: jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), p[0]) for n, p in shapes.items()}
                carry = jax.tree.map(np.zeros_like, total)
            (total, carry), fine = _batch(steps[key], total, carry, list(leaves), inputs, numbers, factors)
            for name, values in jax.device_get(fine).items():
                if not values.all():
                    raise NumericsError(
                        f"{name}: the gradient of calibration sequence {count + int(np.argmin(values))} is not "
                        "finite; drop that sequence, check the parameters, or compute in float32"
                    )
            count += size
        sums = jax.device_get(jax.tree.map(lambda a, b: a - b, total, carry))
        made = {name: {f: _normal(blocks) for f, blocks in own.items()} for name, own in sums.items()}
        factors = {name: {**factors.get(name, {}), **own} for name, own in made.items()}
    for name, own in factors.items():
        shaped = {f: jnp.asarray(m).reshape(*stacks[name], *m.shape[1:]) for f, m in own.items()}
        result[name] = Hessian(shaped["input"], shaped["output"], count)
    return result


def _flat(stack: Any) -> Any:
    return jnp.asarray(stack).reshape(-1, *stack.shape[-2:])


def _normal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Matrices with mean diagonal 1 of their row blocks `[matrices, rows, end]`."""
    result = []
    for own in zip(*blocks, strict=True):
        exact = assembled(own).astype(np.float64)
        mean = np.trace(exact) / len(exact)
        result.append(mirror((exact / mean if mean > 0 else exact).astype(np.float32)))
    return np.stack(result)


def _loss(program: Program, loss: Loss | None, sketch: Sketch, root: np.ndarray, structure: Any) -> Any:
    if loss is not None:

        def own(output: Any, inputs: Sequence[Any], number: Any) -> Any:
            value = loss(output, *jax.tree.unflatten(structure, inputs))
            if jnp.shape(value) != ():
                raise InputError(f"the loss of a sequence has shape {list(jnp.shape(value))}; it is one number")
            return value

        return own
    shapes = [tuple(shape.shape) for shape in program.shapes]
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][0] != 1:
        raise InputError(
            f"the function's output {shapes} is not one array of logits [sequences, length, vocabulary]; give the loss "
            "of a sequence, loss=lambda output, *inputs: …"
        )
    if sketch.labels == "data" and not jnp.issubdtype(program.closed.in_avals[-1].dtype, jnp.integer):
        raise InputError("labels=data takes the next tokens of the first input, and it holds no tokens; give loss=")
    return lambda output, inputs, number: label_loss(
        sketch.labels, jax.random.wrap_key_data(jnp.asarray(root)), number, jax.tree.leaves(output)[0], inputs
    )

"""`y = x Wᵀ` and rows of W: the single place where arrays and operators are told apart; products are recorded."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.errors import InputError
from qjax.typing import HostOrDevice

__all__ = [
    "Operator",
    "Record",
    "affine",
    "answered",
    "bits_per_weight",
    "linear",
    "linear_entry",
    "linear_weight",
    "linears_of",
    "product",
    "recorded",
    "replace_linears",
    "route",
    "rows",
    "summed",
]


@runtime_checkable
class Operator(Protocol):
    """A matrix that is not a plain array: `QuantizedMatrix`, or what fine-tuning puts in its place."""

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x Wᵀ` in the dtype of `x`."""
        ...


@dataclasses.dataclass
class Record:
    """The products that `linear` was asked for inside a `recorded` block, in order.

    Attributes:
      weights: the weight of every product, the very object.
      inputs: the input of every product, the very object: linears that share one have the same. An expert's input has
        zeros in place of what is not routed to it.
      experts: the number of the expert whose the weight is, None where it is no expert's.
      routed: which tokens of the input count, `[batch, length]`; None for all.
      every: the input of an expert before its tokens were chosen: that of all tokens; None where it is no expert's.
      routers: the probabilities `[batch, length, experts]` of every router.
      answers: by the weight's `id`, what `linear` returns instead of the product; absent ones are computed.
    """

    weights: list[Any] = dataclasses.field(default_factory=list)
    inputs: list[Any] = dataclasses.field(default_factory=list)
    experts: list[int | None] = dataclasses.field(default_factory=list)
    routed: list[Any] = dataclasses.field(default_factory=list)
    every: list[Any] = dataclasses.field(default_factory=list)
    routers: list[Any] = dataclasses.field(default_factory=list)
    answers: Mapping[int, Any] = dataclasses.field(default_factory=dict)


_record: contextvars.ContextVar[Record | None] = contextvars.ContextVar("qjax_linear_record", default=None)


@contextlib.contextmanager
def recorded(answers: Mapping[int, Any] | None = None) -> Iterator[Record]:
    """A record of the products inside a `with` block, while a function is evaluated or traced."""
    record = Record(answers=answers or {})
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def linear(
    x: Float[Array, "*batch in"], weight: Float[HostOrDevice, "out in"] | Operator
) -> Float[Array, "*batch out"]:
    """`x Wᵀ` in the dtype of `x` (a quantised weight is decoded on the fly and stays packed in memory)."""
    record = _record.get()
    if record is not None:
        record.weights.append(weight)
        record.inputs.append(x)
        record.experts.append(None)
        record.routed.append(None)
        record.every.append(None)
        if id(weight) in record.answers:
            return record.answers[id(weight)]
    return product(x, weight)


def product(
    x: Float[Array, "*batch in"], weight: Float[HostOrDevice, "out in"] | Operator
) -> Float[Array, "*batch out"]:
    """`x Wᵀ` as of `linear`, which no record sees."""
    if isinstance(weight, Operator):
        return weight.matmul(x)
    if x.dtype == jnp.bfloat16:
        return _bfloat16(x, weight.astype(x.dtype))
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


def rows(weight: Any, index: Int[HostOrDevice, "*batch"]) -> Float[Array, "*batch in"]:
    """Rows of a matrix `[out, in]`, array or operator: what an embedding is looked up by. Indices are clipped.

    Raises InputError for an operator that has no rows of its own.
    """
    if isinstance(weight, Operator):
        lookup: Any = weight
        if not hasattr(lookup, "rows"):
            raise InputError(
                f"an embedding's rows are looked up, which {type(weight).__name__} cannot; use an array or a "
                "QuantizedMatrix in its place"
            )
        return lookup.rows(index)
    return jnp.take(weight, index, axis=0, mode="clip")


def answered(weights: Sequence[Any], x: Array, routed: Array) -> Array | None:
    """Put the products of all experts of one projection on record: the record's answers, None where it has none.

    `x` is `[batch, length, in]` for all experts or `[experts, batch, length, in]`; `routed` `[batch, length, experts]`.
    """
    record = _record.get()
    if record is None:
        return None
    for number, weight in enumerate(weights):
        earlier = next((i for i, own in enumerate(record.every) if own is x and record.experts[i] == number), None)
        chosen = routed[:, :, number]
        own = jnp.where(chosen[..., None], x[number] if x.ndim == 4 else x, 0)
        record.weights.append(weight)
        record.inputs.append(own if earlier is None else record.inputs[earlier])
        record.experts.append(number)
        record.routed.append(chosen if earlier is None else record.routed[earlier])
        record.every.append(x)
    found: list[Any] = [record.answers.get(id(weight)) for weight in weights]
    return None if any(answer is None for answer in found) else jnp.stack(found)


def route(probabilities: Array) -> Array:
    """A router's probabilities, put on record."""
    record = _record.get()
    if record is not None:
        record.routers.append(probabilities)
    return probabilities


def affine(parameters: Any, x: Array) -> Array:
    """`x Wᵀ + b` of `{"weight", "bias"?}`; with a "probe" that is added, whose gradient is that of the output."""
    y = linear(x, parameters["weight"])
    if "bias" in parameters:
        y = y + parameters["bias"].astype(y.dtype)[None, None, :]
    return y + parameters["probe"] if "probe" in parameters else y


@jax.custom_vjp
def _bfloat16(x: Array, weight: Array) -> Array:
    """`x Wᵀ`, added up in float32, in both directions.

    The derivative that JAX makes of such a product multiplies float32 by bfloat16, which a CPU does at half the speed.
    """
    return summed("...i,oi->...o", x, weight)


def summed(subscripts: str, a: Array, b: Array) -> Array:
    """A product that adds up in float32, rounded once to the dtype of a."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _bfloat16(x, weight), (x, weight)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = kept
    return summed("...o,oi->...i", gradient, weight), summed("...o,...i->oi", gradient, x)


_bfloat16.defvjp(_forward, _backward)


def linear_entry(parameters: Any, name: str) -> Any:
    """The `{"weight", "bias"?}` of one linear of a block, by its name, e.g. "mlp.down_proj" or "fc1"."""
    for key in name.split("."):
        parameters = parameters[key]
    return parameters


def linear_weight(parameters: Any, name: str) -> Any:
    """The weight of one linear of a block."""
    return linear_entry(parameters, name)["weight"]


def linears_of(parameters: Any, prefix: str = "") -> dict[str, Any]:
    """The weight of every linear of a block by name: matrices, and whatever else stands in their place."""
    found: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            found |= linears_of(value, f"{prefix}{key}.")
        elif key == "weight" and getattr(value, "ndim", 2) == 2:  # the gain of a norm is a vector
            found[prefix.removesuffix(".")] = value
    return found


def replace_linears(parameters: Any, matrices: Mapping[str, Any], key: str = "weight") -> Any:
    """A block's parameters with the weights (or the entries under another `key`) of some linears replaced."""
    result = dict(parameters)
    for name, matrix in matrices.items():
        *groups, last = name.split(".")
        node, source = result, parameters
        for group in groups:
            source = source[group]
            if node[group] is source:  # not yet a copy of its own
                node[group] = dict(source)
            node = node[group]
        node[last] = {**node[last], key: matrix}
    return result


def bits_per_weight(params: Any) -> float:
    """Stored bits per weight of the matrices that are operators, embedding and head among them.

    Of all linears of the blocks, by their dtype, where none is.
    """
    weights = [weight for block in params["blocks"] for weight in linears_of(block).values()]
    edges = {name: value for name, value in params.items() if name != "blocks"}
    outside = jax.tree.leaves(edges, is_leaf=lambda leaf: isinstance(leaf, Operator))
    operators: list[Any] = [weight for weight in (*outside, *weights) if isinstance(weight, Operator)]
    if operators:
        bits = sum(operator.stored_bits for operator in operators)
    else:
        bits = sum(8 * weight.size * weight.dtype.itemsize for weight in weights)
    return bits / sum(math.prod(weight.shape) for weight in operators or weights)

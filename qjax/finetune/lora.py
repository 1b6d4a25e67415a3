"""Low-rank adapters over frozen codes: `y = Ŵ x + (α/r) B A x`, with Ŵ decoded wherever it is used.

The backward pass decodes again instead of keeping dense weights, for every codebook: nothing but
`dequantize` is asked of it. Source: ModuLoRA (2309.16119).

A layer alone (`Adapted.matmul`) has one matrix dense at a time. Where a block is computed again in the backward pass
anyway, its matrices are decoded once for both (`Adapted.opened`), and one block is dense at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import ArtifactError, InputError
from qjax.finetune.parameters import Layout, layer_value
from qjax.linalg.prng import named_key
from qjax.matrix.dense import Dense
from qjax.matrix.low_rank import LowRank
from qjax.matrix.operator import LinearOperator, is_operator
from qjax.matrix.sums import Sum
from qjax.models.linear import linears_of, replace_linears
from qjax.registry import Count, Positive, check_options
from qjax.runtime.atomic import read_safetensors, write_safetensors
from qjax.typing import Leaf, pytree, static

__all__ = [
    "Adapted",
    "Adapters",
    "Merged",
    "adapted",
    "adapters",
    "attached",
    "filled",
    "load",
    "mapped",
    "merge",
    "merged",
    "save",
    "stripped",
    "summed",
    "unmerge",
    "unmerged",
]

_FORMAT = "qjax-adapters-1"


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a model.

    Attributes:
      rank: r, of A and B.
      alpha: α of the scale α/r.
      pattern: a regular expression that the names of the quantised layers which get them contain.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    pattern: str = "."

    def __post_init__(self) -> None:
        check_options(self, "finetune.lora")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(scale: float, base: LinearOperator, a: Array, b: Array, x: Array) -> Array:
    return Sum((base, LowRank(b, a, scale))).matmul(x)


def _fwd(scale: float, base: LinearOperator, a: Array, b: Array, x: Array) -> tuple[Array, Any]:
    return _matmul(scale, base, a, b, x), (base, a, b, x)


def _bwd(scale: float, saved: Any, g: Array) -> tuple[None, Array, Array, Array]:
    """`∂x = Ŵᵀ g + s Aᵀ Bᵀ g`, `∂A = s (Bᵀ g) xᵀ`, `∂B = s g (A x)ᵀ`; the codes get no gradient."""
    base, a, b, x = saved
    # Without the barrier the compiler would see that the forward pass decodes the same matrix, and keep it till here.
    base, g = jax.lax.optimization_barrier((base, g))
    dense = base.dequantize().astype(g.dtype)
    back = scale * jnp.einsum("to,or->tr", g, b.astype(g.dtype))
    d_x = jnp.einsum("to,oi->ti", g, dense) + jnp.einsum("tr,ri->ti", back, a.astype(g.dtype))
    d_a = jnp.einsum("tr,ti->ri", back, x).astype(a.dtype)
    d_b = scale * jnp.einsum("to,tr->or", g, jnp.einsum("ti,ri->tr", x, a.astype(x.dtype)))
    return None, d_a, d_b.astype(b.dtype), d_x.astype(x.dtype)


_matmul.defvjp(_fwd, _bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole_matmul(scale: float, dense: Array, a: Array, b: Array, x: Array) -> Array:
    """As `_matmul` by the one matrix `Ŵ + s B A`: two thin products and a sum fewer, forward and backward."""
    return _whole_fwd(scale, dense, a, b, x)[0]


def _whole_fwd(scale: float, dense: Array, a: Array, b: Array, x: Array) -> tuple[Array, Any]:
    whole = dense + scale * jnp.einsum("or,ri->oi", b, a)
    return jnp.einsum("ti,oi->to", x, whole), (whole, a, b, x)


def _whole_bwd(scale: float, saved: Any, g: Array) -> tuple[None, Array, Array, Array]:
    whole, a, b, x = saved
    d_a = scale * jnp.einsum("tr,ti->ri", jnp.einsum("to,or->tr", g, b), x)
    d_b = scale * jnp.einsum("to,tr->or", g, jnp.einsum("ti,ri->tr", x, a))
    return None, d_a, d_b, jnp.einsum("to,oi->ti", g, whole)


_whole_matmul.defvjp(_whole_fwd, _whole_bwd)


@pytree
class Adapted:
    """The sum `Ŵ + scale · B A` in training: Ŵ `[out, in]` is frozen, A `[r, in]` and B `[out, r]` have gradients.

    Attributes:
      base: Ŵ, an operator.
      lora_a: A.
      lora_b: B.
      scale: α/r.
    """

    base: Leaf
    lora_a: Leaf
    lora_b: Leaf
    scale: float = static()

    @property
    def sum(self) -> Sum:
        """The layer as an operator, which can be stored, packed and shared out."""
        return Sum((self.base, self.low_rank))

    @property
    def low_rank(self) -> LowRank:
        """The term that is added to Ŵ."""
        return LowRank(self.lora_b, self.lora_a, self.scale)

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x (Ŵ + scale B A)ᵀ` in the dtype of x."""
        flat = x.reshape(-1, x.shape[-1])
        base: Any = self.base
        if not isinstance(base, Dense):
            y: Array = _matmul(self.scale, base, self.lora_a, self.lora_b, flat)
        elif x.dtype == jnp.float32:
            y = _whole_matmul(self.scale, base.weight, self.lora_a, self.lora_b, flat)
        else:  # the sum of Ŵ and a small B A must not be rounded to the type of x
            y = self.sum.matmul(flat)
        return y.reshape(*x.shape[:-1], -1)

    def opened(self) -> Adapted:
        """The same layer, decoded: for one pass forward and back over a block that is computed again in between."""
        whole: Any = self
        return whole.replace(base=Dense(jax.lax.stop_gradient(self.base.dequantize())))


@pytree
class Merged:
    """The dense `Ŵ + scale · B A` `[out, in]`, which computes, and the layer that it was made of."""

    dense: Leaf
    layer: Adapted

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x (Ŵ + scale B A)ᵀ` in the dtype of x."""
        return jnp.einsum("...i,oi->...o", x, self.dense.astype(x.dtype))


def _weights(params: Any) -> Iterator[tuple[str, Any]]:
    """Layer name and weight of every linear, block by block."""
    for index, block in enumerate(params["blocks"]):
        for name, weight in linears_of(block).items():
            yield f"layers.{index}.{name}", weight


def mapped(params: Any, change: Callable[[str, Any], Any]) -> Any:
    """`params` with `change(layer name, weight)` in place of every linear's weight."""
    blocks = []
    for index, block in enumerate(params["blocks"]):
        found = {name: change(f"layers.{index}.{name}", weight) for name, weight in linears_of(block).items()}
        blocks.append(replace_linears(block, found))
    return {**params, "blocks": blocks}


def adapted(
    params: Any, key: Array, rank: int = 8, alpha: float = 16.0, pattern: str = ".", dense: bool = False
) -> Any:
    """`params` with adapters on the quantised layers whose name matches: A of deviation `in^-½`, B zero, scale α/r.

    `dense`: on layers that are not quantised too, which is LoRA as usual, to compare with.
    Raises InputError for a rank below 1, or a pattern that matches no quantised layer.
    """
    if rank < 1:
        raise InputError(f"finetune.lora.rank is {rank}; it must be at least 1")
    found = []

    def change(name: str, weight: Any) -> Any:
        if not (dense or is_operator(weight)) or not re.search(pattern, name):
            return weight
        found.append(name)
        out, inner = weight.shape
        weight = weight if is_operator(weight) else Dense(weight)
        a = jax.random.normal(named_key(key, name), (rank, inner)) * inner**-0.5
        return Adapted(weight, a, jnp.zeros((out, rank)), alpha / rank)

    result = mapped(params, change)
    if not found:
        raise InputError(
            f"finetune.lora.pattern {pattern!r} matches no quantised layer; names look like layers.0.mlp.up_proj"
        )
    return result


def filled(params: Any, layout: Layout, tuned: Mapping[str, Any]) -> Any:
    """Adapted `params` with the tuned values of their adapters."""
    host = {name: np.asarray(value) for name, value in tuned.items()}

    def change(name: str, weight: Any) -> Any:
        if not isinstance(weight, Adapted):
            return weight
        values = {part: layer_value(host, layout, f"{name}.{part}") for part in ("lora_a", "lora_b")}
        whole: Any = weight
        return whole.replace(**{part: jax.device_put(value) for part, value in values.items() if value is not None})

    return mapped(params, change)


def stripped(params: Any) -> Any:
    """The quantised model without its adapters; itself where it has none."""
    if not adapters(params):
        return params

    def change(name: str, weight: Any) -> Any:
        if not isinstance(weight, Adapted):
            return weight
        base: Any = weight.base
        return base.weight if isinstance(base, Dense) else base

    return mapped(params, change)


def summed(params: Any) -> Any:
    """Adapted `params` with the sum of every adapted layer in its place: operators, to count, store or share out."""
    return mapped(params, lambda name, weight: weight.sum if isinstance(weight, Adapted) else weight)


def adapters(params: Any) -> dict[str, Adapted]:
    """The adapted layers by name."""
    return {name: weight for name, weight in _weights(params) if isinstance(weight, Adapted)}


def attached(params: Any, parts: Mapping[str, tuple[Any, Any, float]]) -> Any:
    """Quantised `params` with adapters (A, B, scale) by layer name, as `load` gives them.

    Raises InputError for a layer that is missing, not quantised or of another shape.
    """
    rest = dict(parts)

    def change(name: str, weight: Any) -> Any:
        if name not in rest:
            return weight
        a, b, scale = rest.pop(name)
        if not is_operator(weight) or (b.shape[0], a.shape[1]) != weight.shape:
            raise InputError(
                f"{name}: an adapter of a {b.shape[0]}×{a.shape[1]} matrix does not fit "
                f"{getattr(weight, 'shape', '?')}; use the adapters of this model"
            )
        return Adapted(weight, jax.device_put(a), jax.device_put(b), scale)

    result = mapped(params, change)
    if rest:
        raise InputError(f"adapters of layers that the model does not have: {', '.join(list(rest)[:4])}")
    return result


@jax.jit
def merge(matrix: Adapted) -> Float[Array, "out in"]:
    """The dense `Ŵ + scale B A`, float32: what an adapted layer computes, without codes."""
    return matrix.sum.dequantize()


@jax.jit
def unmerge(dense: Float[Array, "out in"], matrix: Adapted) -> Float[Array, "out in"]:
    """`dense − scale B A`: the dense Ŵ again, up to rounding."""
    return dense - matrix.low_rank.dequantize()


def merged(params: Any) -> Any:
    """Adapted `params` with every adapted layer dense: no decoding and no thin products, at the price of memory."""
    return mapped(params, lambda name, weight: Merged(merge(weight), weight) if isinstance(weight, Adapted) else weight)


def unmerged(params: Any) -> Any:
    """The inverse of `merged`: the same codes and adapters, bit for bit."""
    return mapped(params, lambda name, weight: weight.layer if isinstance(weight, Merged) else weight)


def save(path: str | pathlib.Path, params: Any, artifact_sha256: str) -> None:
    """Write the adapters alone, with the identity of the model they belong to."""
    found = adapters(params)
    arrays = {
        f"{name}.{part}": np.asarray(getattr(m, part)) for name, m in found.items() for part in ("lora_a", "lora_b")
    }
    scales = json.dumps({name: matrix.scale for name, matrix in found.items()}, sort_keys=True)
    write_safetensors(path, arrays, {"format": _FORMAT, "scales": scales, "artifact": artifact_sha256})


def load(
    path: str | pathlib.Path, artifact_sha256: str | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """(A, B, scale) by layer name. Raises ArtifactError for a damaged file, or one of another model."""
    arrays, metadata = read_safetensors(path)
    if metadata.get("format") != _FORMAT:
        raise ArtifactError(f"{path}: format {metadata.get('format')!r}; this qjax reads adapters of {_FORMAT}")
    try:
        artifact, scales = metadata["artifact"], json.loads(metadata["scales"])
        parts = {name: (arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"], scale) for name, scale in scales.items()}
        fit = all(
            a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and isinstance(scale, int | float)
            for a, b, scale in parts.values()
        )
    except (KeyError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: does not describe its adapters ({error!r}); copy the file again") from error
    if not fit or 2 * len(parts) != len(arrays):
        raise ArtifactError(
            f"{path}: an adapter has A [rank, in], B [out, rank] and a scale, which not all have here; copy it again"
        )
    if artifact_sha256 is not None and artifact != artifact_sha256:
        raise ArtifactError(
            f"{path}: adapters of the artifact {artifact[:12]}, this one is {artifact_sha256[:12]}; "
            "use the artifact they were tuned on"
        )
    return parts

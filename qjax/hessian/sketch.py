"""Kronecker sketches of the Fisher matrix of a linear layer: `E[vec(G) vec(G)ᵀ] ≈ H_out ⊗ H_in`, G = ∂ℓ/∂W.

For a sequence with inputs X `[T, n]` and output gradients Γ `[T, m]` of a linear, G = Γᵀ X. A step of the power
iteration for the best Kronecker fit is (YAQA, 2505.22988, section 3)

    H_in ← E[Gᵀ H_out G],   H_out ← E[G H_in Gᵀ]

Sketch B takes G of whole sequences; sketch A takes the tokens as independent, `G_t = g_t x_tᵀ`, which is the same
formula with everything but the diagonal of two T × T matrices dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import InputError

__all__ = ["Sketch", "assembled", "divided", "gram_is_cheaper", "increments", "row_blocks"]

_PIECE = 192  # columns of a block of a symmetric product; narrower ones save less than they cost
_precise = jax.lax.Precision.HIGHEST
LABELS = ("sampled", "data")
COMPUTE = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Sketch:
    """Which sketch to collect.

    Attributes:
      estimator: "sketch_a" (per token) or "sketch_b" (per sequence).
      rounds: passes over the data. sketch_b: both factors are renewed in each, from the identity in the first.
        sketch_a: half-steps that renew H_in = E[x xᵀ] (the first), H_out, H_in, ... in turn; at least 2.
        None: the least, 1 and 2.
      labels: "sampled" from the model's own softmax (the true Fisher), or the next token of the "data" (the empirical).
      seed: of the samples.
      compute: dtype of activations, gradients and of what enters the matrix products; sums are float32. "bfloat16" is
        faster where the device multiplies it faster; it changes the factors by far less than another sample does.
    """

    estimator: str = "sketch_b"
    rounds: int | None = None
    labels: str = "sampled"
    seed: int = 0
    compute: str = "float32"

    def __post_init__(self) -> None:
        if self.estimator not in ("sketch_a", "sketch_b"):
            raise InputError(f"hessian.estimator is {self.estimator!r}; sketches are sketch_a and sketch_b")
        least = 2 if self.estimator == "sketch_a" else 1
        if self.rounds is None:
            object.__setattr__(self, "rounds", least)
        if self.renewals < least:
            raise InputError(f"hessian.rounds is {self.rounds}; {self.estimator} needs at least {least}")
        if self.labels not in LABELS:
            raise InputError(f"hessian.labels is {self.labels!r}; allowed are {', '.join(LABELS)}")
        if self.compute not in COMPUTE:
            raise InputError(f"hessian.compute is {self.compute!r}; allowed are {', '.join(COMPUTE)}")

    @property
    def renewals(self) -> int:
        """`rounds`, which is never None once it is made."""
        assert self.rounds is not None
        return self.rounds

    @property
    def passes(self) -> tuple[str, ...]:
        """The factors that each pass with gradients renews: "both", "output" or "input"."""
        if self.estimator == "sketch_b":
            return ("both",) * self.renewals
        return tuple("output" if half % 2 else "input" for half in range(1, self.renewals))

    def text(self) -> str:
        """All that identifies the sketch, for the store's key."""
        text = f"{self.estimator}:rounds={self.rounds}:labels={self.labels}:seed={self.seed}:draw=2"
        return text if self.compute == "float32" else f"{text}:compute={self.compute}:logits=float32"


def gram_is_cheaper(length: int, m: int, n: int) -> bool:
    """Whether `Xᵀ(ΓΓᵀ)X` takes fewer multiplications than forming G: `2T²(m+n) + T(m²+n²)` or `Tmn + mn² + m²n`."""
    return 2 * length**2 * (m + n) + length * (m**2 + n**2) < length * m * n + m * n**2 + m**2 * n


def increments(
    x: Float[Array, "batch length n"],
    g: Float[Array, "batch length m"],
    h_in: Float[Array, "n n"] | None = None,
    h_out: Float[Array, "m m"] | None = None,
    *,
    per_token: bool,
    update: str = "both",
) -> dict[str, tuple[Array, ...]]:
    """Sums over sequences of `Gᵀ H_out G` ("input") and `G H_in Gᵀ` ("output"), None meaning the identity.

    Every sequence contributes its own product (gradients are never added up before). The products are computed from
    T × T Gram matrices or from G, whichever is cheaper for the shapes. Products take their operands in the dtype of x
    and g and add up in float32. Both are symmetric, and given by their `row_blocks`.
    """
    operands = _operands(x, g, h_in, h_out, per_token, update)
    return {factor: tuple(_product(a, b)) for factor, (a, b) in operands.items()}


def _operands(
    x: Float[Array, "batch length n"],
    g: Float[Array, "batch length m"],
    h_in: Float[Array, "n n"] | None,
    h_out: Float[Array, "m m"] | None,
    per_token: bool,
    update: str,
) -> dict[str, tuple[Array, Array]]:
    """(a, b) by factor whose product `aᵀ b` is the increment."""
    _, length, n = x.shape
    m = g.shape[2]
    h_in, h_out = (None if h is None else h.astype(x.dtype) for h in (h_in, h_out))
    want_in, want_out = update in ("both", "input"), update in ("both", "output")
    result = {}
    if not per_token and not gram_is_cheaper(length, m, n):
        gradient = _einsum("btm,btn->bmn", g, x)
        if want_in:
            left = gradient if h_out is None else _einsum("ij,bjn->bin", h_out, gradient)
            result["input"] = left.reshape(-1, n), gradient.reshape(-1, n)
        if want_out:
            right = gradient if h_in is None else _einsum("bmi,in->bmn", gradient, h_in)
            right, gradient = jnp.swapaxes(right, 1, 2), jnp.swapaxes(gradient, 1, 2)
            result["output"] = right.reshape(-1, m), gradient.reshape(-1, m)
        return result
    if want_in:
        weighted = g if h_out is None else _einsum("bti,im->btm", g, h_out)
        result["input"] = _mixed(weighted, g, x, per_token)
    if want_out:
        weighted = x if h_in is None else _einsum("bti,in->btn", x, h_in)
        result["output"] = _mixed(weighted, x, g, per_token)
    return result


def _mixed(a: Array, b: Array, x: Array, per_token: bool) -> tuple[Array, Array]:
    """Operands of `Σ xᵀ K x` over the batch, `K = a bᵀ` of each sequence or its diagonal."""
    width = x.shape[2]
    if per_token:
        left = jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=2, keepdims=True).astype(x.dtype) * x
    else:
        left = _einsum("bts,bsn->btn", _einsum("btm,bsm->bts", a, b), x)
    return left.reshape(-1, width), x.reshape(-1, width)


def _einsum(subscripts: str, a: Array, b: Array) -> Array:
    """A product that adds up in float32, rounded once to the operands' dtype."""
    return jnp.einsum(subscripts, a, b, precision=_precise, preferred_element_type=jnp.float32).astype(a.dtype)


def row_blocks(size: int) -> list[tuple[int, int]]:
    """(rows, columns) of the blocks of rows that a symmetric matrix is computed and summed in, first rows first.

    A block ends with its diagonal: less to multiply, to keep and to add.
    """
    count = next((k for k in (6, 4, 3, 2) if size % k == 0 and size // k >= _PIECE), 1)
    return [(size // count, (i + 1) * size // count) for i in range(count)]


def _product(a: Float[Array, "rows n"], b: Float[Array, "rows n"]) -> Iterator[Float[Array, "piece end"]]:
    """A symmetric `aᵀ b` by `row_blocks`."""
    blocks = row_blocks(a.shape[1])
    # In memory where it is used by parts: XLA's CPU products of transposed views are slower.
    transposed = a.T if len(blocks) == 1 else jax.lax.optimization_barrier(a.T)
    for rows, end in blocks:
        left, right = transposed[end - rows : end], b[:, :end]
        yield jnp.matmul(left, right, precision=_precise, preferred_element_type=jnp.float32)


def assembled(blocks: Sequence[np.ndarray]) -> Float[np.ndarray, "n n"]:
    """One matrix of its `row_blocks`, zeros above them."""
    size = blocks[-1].shape[1]
    return np.concatenate([np.pad(block, ((0, 0), (0, size - block.shape[1]))) for block in blocks])


def divided(matrix: Float[np.ndarray, "n n"]) -> tuple[np.ndarray, ...]:
    """The `row_blocks` of a matrix."""
    return tuple(matrix[end - rows : end, :end] for rows, end in row_blocks(matrix.shape[0]))

"""Kronecker sketches of the Fisher matrix of a linear layer: `E[vec(G) vec(G)ᵀ] ≈ H_out ⊗ H_in`, G = ∂ℓ/∂W.

For a sequence with inputs X `[T, n]` and output gradients Γ `[T, m]` of a linear, G = Γᵀ X. A step of the power
iteration for the best Kronecker fit is (YAQA, 2505.22988, section 3)

    H_in ← E[Gᵀ H_out G],   H_out ← E[G H_in Gᵀ]

Sketch B takes G of whole sequences; sketch A takes the tokens as independent, `G_t = g_t x_tᵀ`, which is the same
formula with everything but the diagonal of two T × T matrices dropped.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import InputError

__all__ = ["Sketch", "gram_is_cheaper", "increments"]

_PIECE = 192  # columns of a block of a symmetric product; narrower ones save less than they cost
_precise = jax.lax.Precision.HIGHEST
LABELS = ("sampled", "data")


@dataclasses.dataclass(frozen=True)
class Sketch:
    """Which sketch to collect.

    Attributes:
      estimator: "sketch_a" (per token) or "sketch_b" (per sequence).
      rounds: passes over the data. sketch_b: both factors are renewed in each, from the identity in the first.
        sketch_a: half-steps that renew H_in = E[x xᵀ] (the first), H_out, H_in, ... in turn; at least 2.
      labels: "sampled" from the model's own softmax (the true Fisher), or the next token of the "data" (the empirical).
      seed: of the samples.
    """

    estimator: str = "sketch_b"
    rounds: int = 1
    labels: str = "sampled"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.estimator not in ("sketch_a", "sketch_b"):
            raise InputError(f"hessian.estimator is {self.estimator!r}; sketches are sketch_a and sketch_b")
        least = 2 if self.estimator == "sketch_a" else 1
        if self.rounds < least:
            raise InputError(f"hessian.rounds is {self.rounds}; {self.estimator} needs at least {least}")
        if self.labels not in LABELS:
            raise InputError(f"hessian.labels is {self.labels!r}; allowed are {', '.join(LABELS)}")

    @property
    def passes(self) -> tuple[str, ...]:
        """What each pass that needs gradients renews: "both", "output" or "input"."""
        if self.estimator == "sketch_b":
            return ("both",) * self.rounds
        return tuple("output" if half % 2 else "input" for half in range(1, self.rounds))

    def text(self) -> str:
        """All that identifies the sketch, for the store's key."""
        return f"{self.estimator}:rounds={self.rounds}:labels={self.labels}:seed={self.seed}:draw=2"


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
) -> dict[str, Array]:
    """Sums over sequences of `Gᵀ H_out G` ("input") and `G H_in Gᵀ` ("output"), None meaning the identity.

    Every sequence contributes its own product (gradients are never added up before). The products are computed from
    T × T Gram matrices or from G, whichever is cheaper for the shapes.
    """
    _, length, n = x.shape
    m = g.shape[2]
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
    want_in, want_out = update in ("both", "input"), update in ("both", "output")
    result = {}
    if not per_token and not gram_is_cheaper(length, m, n):
        gradient = jnp.einsum("btm,btn->bmn", g, x, precision=_precise)
        if want_in:
            left = gradient if h_out is None else _rows(h_out, gradient)
            result["input"] = _product(left.reshape(-1, n), gradient.reshape(-1, n))
        if want_out:
            right = gradient if h_in is None else jnp.matmul(gradient, h_in, precision=_precise)
            result["output"] = _product(
                jnp.swapaxes(right, 1, 2).reshape(-1, m), jnp.swapaxes(gradient, 1, 2).reshape(-1, m)
            )
        return result
    if want_in:
        weighted = g if h_out is None else jnp.matmul(g, h_out, precision=_precise)
        result["input"] = _mixed(weighted, g, x, per_token)
    if want_out:
        weighted = x if h_in is None else jnp.matmul(x, h_in, precision=_precise)
        result["output"] = _mixed(weighted, x, g, per_token)
    return result


def _mixed(a: Array, b: Array, x: Array, per_token: bool) -> Array:
    """`Σ xᵀ K x` over the batch, `K = a bᵀ` of each sequence or its diagonal."""
    width = x.shape[2]
    if per_token:
        left = jnp.sum(a * b, axis=2, keepdims=True) * x
    else:
        left = jnp.matmul(jnp.einsum("btm,bsm->bts", a, b, precision=_precise), x, precision=_precise)
    return _product(left.reshape(-1, width), x.reshape(-1, width))


def _rows(matrix: Array, batch: Array) -> Array:
    return jnp.einsum("ij,bjn->bin", matrix, batch, precision=_precise)


def _product(a: Float[Array, "rows n"], b: Float[Array, "rows n"]) -> Float[Array, "n n"]:
    """`aᵀ b`, known to be symmetric: only blocks on and below the diagonal are computed, 0 elsewhere."""
    n = a.shape[1]
    pieces = next((k for k in (6, 4, 3, 2) if n % k == 0 and n // k >= _PIECE), 1)
    if pieces == 1:
        return jnp.matmul(a.T, b, precision=_precise)
    size = n // pieces
    rows = []
    for i in range(pieces):
        end = (i + 1) * size
        part = jnp.matmul(a[:, i * size : end].T, b[:, :end], precision=_precise)
        rows.append(jnp.pad(part, ((0, 0), (0, n - end))))
    return jnp.concatenate(rows)

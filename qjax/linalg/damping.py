"""Damped factorisation of a Hessian: normalise, add to the diagonal, factorise, and add more until it succeeds."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qjax.errors import InputError, NumericsError
from qjax.linalg.cholesky import cholesky
from qjax.linalg.ldl import check_block, unit_lower

__all__ = ["DampedFactor", "check_hessian", "damped_factor", "unit_mean_diagonal"]

ESCALATION = 10**0.5
"""Factor between two attempts: two attempts per decade, so the damping is within 3.2 of the least that works."""

_FIRST_ESCALATION = (
    1e-6  # where the escalation starts when no damping was asked for: about 10 units in the last place of float32
)
_SYMMETRY_TOLERANCE = 1e-4
_CHECKED_ROWS = 256


class DampedFactor(NamedTuple):
    """`L D Lᵀ = Ĥ + damping·I`, Ĥ the normalised Hessian (mean diagonal 1 over live channels, dead ones set to 1).

    Attributes:
      lower: L [n, n], unit block-lower-triangular.
      diagonal: the diagonal blocks of D [n/block, block, block].
      damping: what was added to the diagonal of Ĥ, a fraction of its mean.
      ok: whether the factor is usable; when False, `lower` and `diagonal` must not be.
      min_pivot: the smallest squared pivot of the Cholesky factor; at least `damping` in exact arithmetic.
      dead: how many channels have a zero diagonal.
    """

    lower: Float[Array, "n n"]
    diagonal: Float[Array, "blocks block block"]
    damping: Float[Array, ""]
    ok: Bool[Array, ""]
    min_pivot: Float[Array, ""]
    dead: Int[Array, ""]


def unit_mean_diagonal(
    hessian: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Int[Array, ""]]:
    """(Ĥ, dead): H divided by its mean diagonal over live channels, and the number of dead channels.

    A channel whose diagonal is 0 (or so small that its reciprocal overflows) never fires: its row and column are
    cleared and its diagonal set to the mean, 1, so it takes part in no feedback. An all-zero H (no calibration) gives
    the identity; where the mean is negative the result is NaN.
    Source: GPTQ's treatment of dead columns (2210.17323, released code), with the mean in place of 1.
    """
    diagonal = jnp.diagonal(hessian)
    live = ~(jnp.abs(diagonal) <= 4 * jnp.finfo(diagonal.dtype).tiny)  # NaN counts as live: it must be reported
    count = jnp.sum(live, dtype=jnp.int32)
    total = jnp.sum(
        jnp.where(live, diagonal / jnp.maximum(count, 1).astype(diagonal.dtype), 0)
    )  # divided first: a sum may overflow
    mean = jnp.where(count > 0, jnp.where(total > 0, total, jnp.nan), 1)
    n = diagonal.shape[0]
    kept = live.reshape(n, 1) & live.reshape(1, n)
    cleared = jnp.where(kept, hessian / mean, 0)
    return cleared + jnp.diag((~live).astype(diagonal.dtype)), n - count


@functools.partial(jax.jit, static_argnames=("block",))
def damped_factor(
    hessian: Float[Array, "n n"],
    damping: Float[Array, ""] | float = 0.01,
    block: int = 1,
    retries: Int[Array, ""] | int = 10,
) -> DampedFactor:
    """Block LDL of `Ĥ + δ I`: from `δ = damping`, δ grows by √10 until the factor is sound, at most `retries` times.

    Sound means finite with every squared pivot at least δ/2: the pivots of a positive semidefinite matrix plus δI are
    at least δ, so a smaller one shows that rounding errors, or a negative eigenvalue of H, have reached the size of
    the damping. From a damping of 0 the escalation starts at 1e-6. A Hessian with NaN or infinity is not retried and
    gives `ok = False`.

    Raises InputError when `block` does not divide n. Source: damping of GPTQ and QuIP#; block LDL of QuIP#
    (2402.04396), section 4.1.
    """
    check_block(hessian.shape[0], block)
    n, dtype = hessian.shape[0], hessian.dtype
    matrix, dead = unit_mean_diagonal(hessian)
    start = jnp.asarray(damping, dtype)
    finite = jnp.all(jnp.isfinite(matrix))

    def attempt(state: tuple[Array, ...]) -> tuple[Array, ...]:
        tries, *_ = state
        grown = jnp.maximum(start, _FIRST_ESCALATION) * jnp.asarray(ESCALATION, dtype) ** tries.astype(dtype)
        delta = jnp.where(tries > 0, grown, start)
        factor = cholesky(matrix, shift=delta)
        pivot = jnp.min(jnp.square(jnp.diagonal(factor)))
        ok = jnp.all(jnp.isfinite(factor)) & (pivot > 0) & (pivot >= delta / 2)
        return tries + 1, factor, delta, pivot, ok

    def unfinished(state: tuple[Array, ...]) -> Array:
        tries, *_, ok = state
        return ~ok & (tries <= retries) & (finite | (tries == 0))

    first = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((n, n), dtype),
        start,
        jnp.zeros((), dtype),
        jnp.zeros((), bool),
    )
    _, factor, delta, pivot, ok = jax.lax.while_loop(unfinished, attempt, first)
    lower, diagonal = unit_lower(factor, block)
    return DampedFactor(lower, diagonal, delta, ok & jnp.all(jnp.isfinite(lower)), pivot, dead)


def check_hessian(hessian: np.ndarray, layer: str) -> None:
    """Check on the host that H [n, n] of `layer` can be a second moment: square, finite, symmetric, diagonal ≥ 0.

    Symmetric means `max |H − Hᵀ| ≤ 1e-4 · max diag(H)`. Raises InputError for a wrong shape, NumericsError for wrong
    values; the message names the layer, the first offending entry and the remedy.
    """
    matrix = np.asarray(hessian)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise InputError(
            f"{layer}: the Hessian has shape {list(matrix.shape)}; allowed is [n, n], n the layer's number of inputs"
        )
    if not np.issubdtype(matrix.dtype, np.floating):
        raise InputError(
            f"{layer}: the Hessian has dtype {matrix.dtype}; allowed are the floating-point types; collect it again"
        )
    n = matrix.shape[0]
    remedy = "drop the batches that overflow, or collect the Hessian again in float32"
    for start in range(0, n, _CHECKED_ROWS):  # by rows, so that a large H is never held twice
        rows = matrix[start : start + _CHECKED_ROWS]
        finite = np.isfinite(rows)
        if not finite.all():
            i, j = np.argwhere(~finite)[0]
            raise NumericsError(
                f"{layer}: the Hessian has values that are not finite, the first at [{start + i}, {j}]: {rows[i, j]}; "
                f"all must be finite; {remedy}"
            )
    diagonal = np.diagonal(matrix)
    if (diagonal < 0).any():
        i = int(np.argmin(diagonal))
        raise NumericsError(
            f"{layer}: the Hessian has {int((diagonal < 0).sum())} negative values on its diagonal, the least at "
            f"[{i}, {i}]: {diagonal[i]:.3g}; a second moment has none; collect it again or check the file it is from"
        )
    allowed = _SYMMETRY_TOLERANCE * float(diagonal.max())
    for start in range(0, n, _CHECKED_ROWS):
        end = start + _CHECKED_ROWS
        skew = np.abs(matrix[start:end].astype(np.float64) - matrix[:, start:end].T.astype(np.float64))
        if skew.max() > allowed:
            i, j = np.unravel_index(int(skew.argmax()), skew.shape)
            raise NumericsError(
                f"{layer}: the Hessian is not symmetric: [{start + i}, {j}] and its mirror differ by {skew[i, j]:.3g}; "
                f"allowed is {allowed:.3g} (1e-4 of the largest diagonal); collect it again or check its file"
            )

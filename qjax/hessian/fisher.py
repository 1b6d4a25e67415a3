"""The exact Fisher block of a small layer, to judge Kronecker fits by."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from qjax.errors import InputError
from qjax.linalg.symmetric import mirror

__all__ = ["alignment", "exact_fisher"]

_LARGEST = 4096


def exact_fisher(gradients: Float[np.ndarray, "samples m n"]) -> Float[np.ndarray, "mn mn"]:
    """`𝓗 = mean vec(G) vec(G)ᵀ` in float64, vec by rows: `vec(E)ᵀ (H_out ⊗ H_in) vec(E) = tr(H_out E H_in Eᵀ)`.

    Exactly symmetric. Raises InputError for a layer of more than 4096 weights (128 MiB).
    """
    samples, m, n = gradients.shape
    if m * n > _LARGEST:
        raise InputError(f"an exact Fisher block of {m} × {n} weights is too large; at most {_LARGEST} weights")
    flat = gradients.reshape(samples, m * n).astype(np.float64)
    return mirror(flat.T @ flat / samples)


def alignment(
    fisher: Float[np.ndarray, "mn mn"], h_out: Float[np.ndarray, "m m"], h_in: Float[np.ndarray, "n n"]
) -> float:
    """The cosine `⟨𝓗, H_out ⊗ H_in⟩ / (‖𝓗‖ ‖H_out‖ ‖H_in‖)`, 1 for a perfect fit (YAQA, 2505.22988, section 3)."""
    m, n = len(h_out), len(h_in)
    inner = np.einsum("ijkl,ik,jl->", fisher.reshape(m, n, m, n), h_out, h_in, optimize=True)
    return float(inner / (np.linalg.norm(fisher) * np.linalg.norm(h_out) * np.linalg.norm(h_in)))

"""Linear algebra of quantisation: Hadamard and random orthogonal transforms, (block) LDL, damping."""

from qjax.linalg.damping import DampedFactor, check_hessian, damped_factor, unit_mean_diagonal
from qjax.linalg.hadamard import (
    base_matrix,
    block_hadamard_transform,
    hadamard_factor,
    hadamard_transform,
    is_hadamard_order,
    next_hadamard_order,
)
from qjax.linalg.ldl import block_ldl, block_ldl_host, block_udu
from qjax.linalg.orthogonal import balanced_factors, haar_orthogonal

__all__ = [
    "DampedFactor",
    "balanced_factors",
    "base_matrix",
    "block_hadamard_transform",
    "block_ldl",
    "block_ldl_host",
    "block_udu",
    "check_hessian",
    "damped_factor",
    "haar_orthogonal",
    "hadamard_factor",
    "hadamard_transform",
    "is_hadamard_order",
    "next_hadamard_order",
    "unit_mean_diagonal",
]

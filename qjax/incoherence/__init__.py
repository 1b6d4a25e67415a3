"""Incoherence processing: families of random transforms that leave no entry of a weight or Hessian standing out."""

from qjax.incoherence.families import (
    INCOHERENCE,
    BlockHadamard,
    Hadamard,
    Incoherence,
    Kronecker,
    NoIncoherence,
    diagonal_rescale,
    hessian_incoherence,
    make,
    weight_incoherence,
)
from qjax.incoherence.transform import Transform

__all__ = [
    "INCOHERENCE",
    "BlockHadamard",
    "Hadamard",
    "Incoherence",
    "Kronecker",
    "NoIncoherence",
    "Transform",
    "diagonal_rescale",
    "hessian_incoherence",
    "make",
    "weight_incoherence",
]

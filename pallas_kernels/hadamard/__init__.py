"""Hadamard transform of power-of-two order, full or block-diagonal."""

from pallas_kernels.hadamard.api import available, chosen, hadamard
from pallas_kernels.hadamard.reference import factors

__all__ = ["available", "chosen", "factors", "hadamard"]

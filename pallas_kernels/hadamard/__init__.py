"""Hadamard transform of power-of-two order, full or block-diagonal."""

from pallas_kernels.hadamard.api import chosen, hadamard

__all__ = ["chosen", "hadamard"]

"""Trellis encode: Viterbi's algorithm with the costs of all states on the chip."""

from pallas_kernels.viterbi.api import chosen, costs, search

__all__ = ["chosen", "costs", "search"]

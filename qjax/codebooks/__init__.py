"""Codebooks: finite sets of weight tiles, from scalar grids to lattices and trellises."""

from qjax.codebooks import d4, e8p, e81b, quip_sharp, residual, trellis
from qjax.codebooks.base import CODEBOOKS, Codebook
from qjax.codebooks.bitstream import pack_bits, unpack_bits
from qjax.codebooks.scalar import grid, half_integer, lloyd_max, quip_grid
from qjax.codebooks.scaling import ScaleRule, Scaling

__all__ = [
    "CODEBOOKS",
    "Codebook",
    "ScaleRule",
    "Scaling",
    "d4",
    "e8p",
    "e81b",
    "grid",
    "half_integer",
    "lloyd_max",
    "make",
    "pack_bits",
    "quip_grid",
    "quip_sharp",
    "residual",
    "trellis",
    "unpack_bits",
]


def make(name: str, bits: int | float, **options) -> Codebook:
    """Build a codebook by name, e.g. `make("half_integer", 2)`.

    Raises InputError listing names, options and bit widths.
    """
    return CODEBOOKS.make(name, bits, **options)

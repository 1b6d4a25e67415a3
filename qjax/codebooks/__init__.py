"""Codebooks: finite sets of weight tiles, from scalar grids to lattices and trellises."""

import importlib.util

from qjax.codebooks.base import CODEBOOKS, Codebook
from qjax.codebooks.packing import pack_bits, unpack_bits
from qjax.codebooks.scalar import grid, half_integer, lloyd_max, quip_grid
from qjax.codebooks.scaling import ScaleRule, Scaling

for _family in ("d4", "e8p", "e81b", "residual"):
    if importlib.util.find_spec(f"qjax.codebooks.{_family}"):
        importlib.import_module(f"qjax.codebooks.{_family}")

__all__ = [
    "CODEBOOKS",
    "Codebook",
    "ScaleRule",
    "Scaling",
    "grid",
    "half_integer",
    "lloyd_max",
    "make",
    "pack_bits",
    "quip_grid",
    "unpack_bits",
]


def make(name: str, bits: int | float, **options) -> Codebook:
    """Build a codebook by name, e.g. `make("half_integer", 2)`. Raises InputError listing names, options and bit widths."""
    return CODEBOOKS.make(name, bits, **options)

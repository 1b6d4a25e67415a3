"""Products with packed weights: scalar grids of 1 to 8 bits, trellis codes (with HYB) of 1 to 4, E8P of 2 to 4."""

from pallas_kernels.dequant_matmul.api import available, chosen, matmul, prepared
from pallas_kernels.dequant_matmul.layout import PackedMatrix, from_codes, repack
from pallas_kernels.dequant_matmul.reference import dequantize
from pallas_kernels.dequant_matmul.rows import RowMatrix, from_rows, to_rows
from pallas_kernels.dequant_matmul.tables import repack_lattice
from pallas_kernels.dequant_matmul.trellis import repack_trellis

__all__ = [
    "PackedMatrix",
    "RowMatrix",
    "available",
    "chosen",
    "dequantize",
    "from_codes",
    "from_rows",
    "matmul",
    "prepared",
    "repack",
    "repack_lattice",
    "repack_trellis",
    "to_rows",
]

"""Products with packed scalar grids of 1 to 8 bits, scales and offsets per row or per group."""

from pallas_kernels.dequant_matmul.api import chosen, matmul
from pallas_kernels.dequant_matmul.layout import PackedMatrix, from_codes, repack
from pallas_kernels.dequant_matmul.reference import dequantize

__all__ = ["PackedMatrix", "chosen", "dequantize", "from_codes", "matmul", "repack"]

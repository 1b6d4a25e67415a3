"""Tensor-parallel evaluation and decoding of dense and quantised models over a mesh of devices."""

from qjax.tensor_parallel.matrices import ColumnParallel, RowParallel, RowParallelDense
from qjax.tensor_parallel.placement import MeshBlock, check, collectives, device_bytes, distribute, summary
from qjax.tensor_parallel.sums import ColumnParallelLowRank, ParallelSum, RowParallelLowRank

__all__ = [
    "ColumnParallel",
    "ColumnParallelLowRank",
    "MeshBlock",
    "ParallelSum",
    "RowParallel",
    "RowParallelDense",
    "RowParallelLowRank",
    "check",
    "collectives",
    "device_bytes",
    "distribute",
    "summary",
]

"""Tensor-parallel evaluation and decoding of dense and quantised models over a mesh of devices."""

from qjax.tensor_parallel.matrices import ColumnParallel, RowParallel, RowParallelDense
from qjax.tensor_parallel.placement import MeshBlock, check, collectives, device_bytes, distribute, summary

__all__ = [
    "ColumnParallel",
    "MeshBlock",
    "RowParallel",
    "RowParallelDense",
    "check",
    "collectives",
    "device_bytes",
    "distribute",
    "summary",
]

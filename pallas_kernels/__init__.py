"""Kernels, one folder per operation, usable without qjax.

Every operation has `reference.py` (XLA: the oracle and the fallback), `pallas_gpu.py` (Triton) and, where it makes
sense, `pallas_mosaic_gpu.py` and `pallas_tpu.py`, `specs.py` (shapes for tests and benchmarks) and `api.py`, whose
functions take `implementation=None | "xla" | "pallas_gpu" | "mosaic_gpu" | "pallas_tpu"`; `dispatch.py` has the rule
for None. `QJAX_DISABLE_KERNELS=1` turns all kernels off.
"""

from pallas_kernels.dispatch import KernelError

__all__ = ["KernelError"]

"""Checks and timings of the kernels on the device at hand: `python -m pallas_kernels.bench` needs jax only.

`scripts/gpu_suite.sh` and `scripts/tpu_suite.sh` call it on a bare machine; `python -m experiments.bench kernels` is
the same with Hydra.
"""

from pallas_kernels.bench.suite import Settings, lines, run

__all__ = ["Settings", "lines", "run"]

"""What a run will need, from shapes alone, so that it is refused before hours are spent and not after."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import shutil
from collections.abc import Mapping

import numpy as np

from qjax.errors import RunError
from qjax.hessian.accumulate import site_widths
from qjax.models.config import ModelConfig
from qjax.models.transformer import LINEARS
from qjax.models.weights import tensor_shapes
from qjax.recipe import LayerPlan

__all__ = ["Estimate", "check", "estimate", "linear_shapes"]

# Python, JAX with its compiler, and the libraries they load; measured on a run of the smallest model.
_BASE_BYTES = 800 * 2**20


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Predicted needs of a run in bytes, and how many matrices and weights it quantises."""

    matrices: int
    weights: int
    code_bytes: int
    host_bytes: int
    disk_bytes: int

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.matrices} matrices, {self.weights / 1e6:.1f} M weights, codes {self.code_bytes / 2**20:.1f} MiB",
            f"predicted peak memory {self.host_bytes / 2**30:.2f} GiB, disk {self.disk_bytes / 2**30:.2f} GiB",
        ]


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of a block."""
    prefix = "model.layers.0."
    tensors = tensor_shapes(config)
    return {linear: tensors[f"{prefix}{linear}.weight"][:2] for linear in LINEARS}  # pyright: ignore[reportReturnType]


def estimate(
    config: ModelConfig,
    plans: Mapping[str, LayerPlan | None],
    *,
    bytes_per_parameter: int,
    calibration: tuple[int, int],
    evaluation: tuple[int, int],
    batch: int,
    stored_hessians: bool,
    streamed: bool = False,
) -> Estimate:
    """Predict from shapes; `calibration` and `evaluation` are (sequences, length); `streamed`: the blocks stay on disk.

    Raises InputError through the incoherence when a matrix cannot be rotated or padded.
    """
    shapes = linear_shapes(config)
    codes = weights = matrices = 0
    for name, plan in plans.items():
        if plan is None:
            continue
        out, inner = shapes[name.split(".", 2)[2]]
        padded = plan.incoherence.abstract(out, inner, multiple=plan.codebook.tile).padded
        codes += int(np.ceil(plan.codebook.bits * padded[0] * padded[1] / 8))
        weights, matrices = weights + out * inner, matrices + 1
    block = sum(out * inner for out, inner in shapes.values())
    edges = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    held = min(2, config.num_layers) if streamed else config.num_layers
    model = (edges + held * block) * bytes_per_parameter
    skipped = sum(math.prod(shapes[name.split(".", 2)[2]]) for name, plan in plans.items() if plan is None)
    model += skipped * bytes_per_parameter if streamed else 0  # what stays dense is part of the result
    states = 4 * config.hidden_size * (calibration[0] * calibration[1] + 3 * evaluation[0] * evaluation[1])
    hessian = 4 * sum(n * n for n in site_widths(config).values())
    tokens = batch * calibration[1]
    working = (
        4 * tokens * (6 * config.hidden_size + 3 * config.intermediate_size)
        + 8 * batch * config.num_heads * calibration[1] ** 2
    )
    matrix = 12 * 4 * max(out * inner for out, inner in shapes.values()) + 6 * 4 * max(
        n * n for n in site_widths(config).values()
    )
    host = _BASE_BYTES + model + codes + states + 6 * hessian + max(working, matrix)
    disk = 2 * codes + edges * bytes_per_parameter + states // 2
    disk += config.num_layers * hessian * 6 // 10 if stored_hessians else 0
    return Estimate(matrices, weights, codes, host, int(disk * 1.1))


def check(need: Estimate, out: pathlib.Path, *, host_gb: float | None, disk_gb: float | None) -> None:
    """Raise RunError when the prediction exceeds a stated limit, the machine's memory, or the free disk space."""
    memory = _physical_memory()
    limit = memory if host_gb is None else host_gb * 2**30
    if need.host_bytes > limit:
        bound = "this machine has" if host_gb is None else "memory.host_gb allows"
        raise RunError(
            f"the run is predicted to need {need.host_bytes / 2**30:.2f} GiB of memory, {bound} "
            f"{limit / 2**30:.2f} GiB; use fewer calibration sequences, a smaller hessian.batch, "
            "or model.dtype=bfloat16"
        )
    folder = out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    limit = free if disk_gb is None else min(free, disk_gb * 2**30)
    if need.disk_bytes > limit:
        raise RunError(
            f"{out}: the run is predicted to need {need.disk_bytes / 2**30:.2f} GiB of disk "
            f"and {limit / 2**30:.2f} GiB may be used; "
            "free some space or choose another out="
        )


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

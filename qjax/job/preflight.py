"""The estimate of a run's needs, from shapes alone: a run is refused before hours are spent and not after."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qjax import data, models
from qjax.errors import RunError
from qjax.finetune.methods import TuningMethod, method_of
from qjax.models.config import ModelConfig
from qjax.models.edges import edge_matrices
from qjax.models.families import family
from qjax.models.structure import structure
from qjax.pipeline.finished import HELD_BYTES
from qjax.pipeline.recipe import LayerPlan
from qjax.streams.activations import Place

__all__ = [
    "Estimate",
    "Extra",
    "activation_streams",
    "announced_place",
    "estimate",
    "estimated",
    "place_activations",
    "sketch_needs",
    "tuning_needs",
]

# Python, JAX with its compiler, and the libraries they load; measured on a run of the smallest model.
_BASE_BYTES = 800 * 2**20


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Predicted needs of a run in bytes, and how many matrices and weights it quantises.

    `host_bytes`, `device_bytes` (on an accelerator; part of the host on a CPU) and `disk_bytes` are without the
    activations between blocks, `activation_bytes` at once, which lie in one of the three.
    """

    matrices: int
    weights: int
    code_bytes: int
    host_bytes: int
    disk_bytes: int
    device_bytes: int = 0
    activation_bytes: int = 0

    def lines(self, where: str = "host") -> list[str]:
        """For people; `where` the activations lie."""
        extra = {"host": 0, "disk": 0, "device": 0} | {where: self.activation_bytes}
        host = self.host_bytes + extra["host"] + (0 if _accelerated() else extra["device"])
        device = f"device {_size(self.device_bytes + extra['device'])}, " if _accelerated() else ""
        place = {"host": "on the host", "disk": "on disk", "device": "on the device"}[where]
        return [
            f"{self.matrices} matrices, {self.weights / 1e6:.1f} M weights, codes {self.code_bytes / 2**20:.1f} MiB",
            f"activations between blocks {self.activation_bytes / 2**20:.1f} MiB, {place}",
            f"predicted peak memory {_size(host)}, {device}disk {_size(self.disk_bytes + extra['disk'])}",
        ]


@dataclasses.dataclass(frozen=True)
class Extra:
    """Needs of stages besides Hessians of inputs, rounding and evaluation: of sketches and tuning."""

    memory: int = 0
    disk: int = 0


def _size(size: float) -> str:
    """A number of bytes for people, in the unit in which two digits or more say something."""
    unit, name = next((one for one in ((2**30, "GiB"), (2**20, "MiB")) if size >= one[0] / 10), (2**10, "KiB"))
    return f"{size / unit:.2f} {name}"


def _accelerated() -> bool:
    return jax.default_backend() != "cpu"


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
    streams: int = 1,
    extra: Extra = Extra(),
) -> Estimate:
    """Predict from shapes; `plans` are those of layers, and of embedding and head where they are quantised.

    `calibration` and `evaluation` are (sequences, length); `streamed`: the blocks stay on disk.

    `streams`: how many sets of activations exist at once (see `activation_streams`); `extra`: of `sketch_needs` and
    `tuning_needs`. Raises InputError through the incoherence when a matrix cannot be rotated or padded.
    """
    shapes = structure(config).shapes
    outside = {name: edge.shape for name, edge in edge_matrices(config).items()}
    codes = weights = matrices = 0
    for name, plan in plans.items():
        if plan is None:
            continue
        out, inner = outside[name] if name in outside else shapes[name.split(".", 2)[2]]
        padded = plan.incoherence.abstract(out, inner, multiple=plan.codebook.tile).padded
        codes += int(np.ceil(plan.codebook.bits * padded[0] * padded[1] / 8))
        weights, matrices = weights + out * inner, matrices + 1
    block = sum(out * inner for out, inner in shapes.values())
    edges = sum(math.prod(shape) for _, shape in family(config).edge_tensors(config).values() if len(shape) == 2)
    held = min(2, config.num_layers) if streamed else config.num_layers
    model = (edges + held * block) * bytes_per_parameter
    skipped = sum(math.prod(shapes[name.split(".", 2)[2]]) for name, plan in plans.items() if plan is None)
    model += skipped * bytes_per_parameter if streamed else 0  # what stays dense is part of the result
    reference = 12 * config.hidden_size * evaluation[0] * evaluation[1]
    activations = streams * bytes_per_parameter * config.hidden_size * calibration[0] * calibration[1]
    hessian = 4 * sum(n * n for n in structure(config).widths.values())
    rounded = [*shapes.values(), *(shape for name, shape in outside.items() if name in plans)]
    rounding = 2 * hessian + max(_rounding(out, inner) for out, inner in rounded)
    collecting = 4 * hessian + _working(config, batch, calibration[1])  # sum, compensation, product, mean
    kept = min(codes, HELD_BYTES) if streamed else codes
    device = model + kept + max(rounding, collecting, extra.memory)
    host = _BASE_BYTES + reference + (model + 2 * hessian if _accelerated() else device)
    disk = 2 * codes + edges * bytes_per_parameter + 2 * config.hidden_size * evaluation[0] * evaluation[1] + extra.disk
    disk += config.num_layers * hessian * 6 // 10 if stored_hessians else 0
    return Estimate(matrices, weights, codes, host, int(disk * 1.1), device, activations)


def _rounding(out: int, inner: int) -> int:
    """Bytes of the program that rounds one matrix, besides its Hessian.

    Counted by the compiler for 2048×8192, LDLQ with E8P: three Hessians and six matrices; GPTQ's inverse takes another.
    """
    return 4 * (5 * inner * inner + 8 * out * inner)


def _working(config: ModelConfig, batch: int, length: int) -> int:
    """Inside one block, for one batch."""
    states = 4 * batch * length * (6 * config.hidden_size + 3 * config.intermediate_size)
    return states + 8 * batch * config.num_heads * length**2


def activation_streams(stream: str, tuned: bool) -> int:
    """The number of sets of activations at once: inputs and outputs, of the quantised model and of the original."""
    return {"quantized": 1, "original": 2, "corrected": 3}[stream] + (1 if tuned else 0)


def sketch_needs(config: ModelConfig, *, batch: int, length: int, budget: float) -> Extra:
    """Needs of a sketch of both factors: its sums within `budget` bytes, one block's at least, and a backward pass.

    On disk the triangles of all factors, and a checkpoint of the sums.
    """
    shapes = structure(config).shapes.values()
    block = sum(8 * (out**2 + inner**2) for out, inner in shapes)
    sums = max(block, min(int(budget), config.num_layers * block))
    states = 4 * batch * length * config.hidden_size * (config.num_layers + 1)
    logits = 12 * batch * length * config.vocab_size
    backward = states + max(logits, 2 * _working(config, batch, length))
    both = block + max(_rounding(out, inner) + _rounding(inner, out) for out, inner in shapes)
    return Extra(max(sums + block + backward, both), config.num_layers * block // 4 + sums)


def tuning_needs(
    config: ModelConfig, *, batch: int, length: int, windows: int, chunk: int, rank: int, dense: bool, topk: int | None
) -> Extra:
    """Needs of tuning end to end: gradients and AdamW's moments of what is tuned, one decoded block, activations.

    `rank`: of adapters, 0 without. `dense`: whether embedding and head are tuned too. `windows`: whose targets are
    stored, as states or as `topk` logits.
    """
    shapes = structure(config).shapes.values()
    per_block = sum((rank or 1) * (out + inner) for out, inner in shapes) + 2 * config.hidden_size
    tuned = config.num_layers * per_block + config.hidden_size
    tuned += config.vocab_size * config.hidden_size if dense else 0
    decoded = 2 * 4 * sum(out * inner for out, inner in shapes)
    states = 4 * batch * length * config.hidden_size * (config.num_layers + 2)
    logits = 16 * batch * min(chunk, length) * config.vocab_size
    targets = 4 * windows * length * (config.hidden_size if topk is None else 2 * topk)
    copies = 5 * 4 * tuned  # value, gradient, two moments, the best so far
    return Extra(copies + decoded + states + logits + targets + 2 * _working(config, batch, length), targets + copies)


def place_activations(
    need: Estimate,
    out: pathlib.Path,
    *,
    host_gb: float | None,
    device_gb: float | None,
    disk_gb: float | None,
    on_device: bool,
) -> str:
    """The place where the activations between blocks fit, "device", "host" or "disk", the first of them that does.

    Raises RunError with the numbers when the run does not fit wherever they lie. `host_gb` null is the machine's
    memory, `disk_gb` null what is free, `device_gb` null the accelerator's memory; on a CPU the device counts only
    when `device_gb` is given, and is part of the host. `on_device`: whether the run can use them there.
    """
    host = _physical_memory() if host_gb is None else host_gb * 2**30
    free = _free(out)
    disk = free if disk_gb is None else min(free, disk_gb * 2**30)
    device = _device_memory() if device_gb is None else device_gb * 2**30
    size = need.activation_bytes
    bound = "this machine has" if host_gb is None else "memory.host_gb allows"
    if device is not None and need.device_bytes > device:
        raise RunError(
            f"the run is predicted to need {_size(need.device_bytes)} on the device, "
            f"{'it has' if device_gb is None else 'memory.device_gb allows'} {_size(device)}; use a smaller "
            "hessian.batch, model.dtype=bfloat16, or a larger device"
        )
    if need.host_bytes > host:
        raise RunError(
            f"the run is predicted to need {_size(need.host_bytes)} of memory, {bound} {_size(host)}, with all "
            "activations elsewhere; use a smaller hessian.batch or model.dtype=bfloat16"
        )
    if need.disk_bytes > disk:
        raise RunError(
            f"{out}: the run is predicted to need {_size(need.disk_bytes)} of disk and {_size(disk)} may be used; "
            "free some space or choose another out="
        )
    own = _accelerated() or need.host_bytes + size <= host  # on a CPU they take the host's memory all the same
    if on_device and device is not None and need.device_bytes + size <= device and own:
        return "device"
    if need.host_bytes + size <= host:
        return "host"
    if need.disk_bytes + size <= disk:
        return "disk"
    raise RunError(
        f"the activations between blocks take {_size(size)}. Memory: {_size(need.host_bytes)} besides them, {bound} "
        f"{_size(host)}. Disk: {_size(need.disk_bytes)} besides them, {_size(disk)} may be used. Use fewer calibration "
        "sequences (data.calibration_sequences, data.length), model.dtype=bfloat16, or a disk with more space"
    )


def _free(folder: pathlib.Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _device_memory() -> int | None:
    """The least memory of the local devices; None on a CPU, whose device is the host."""
    limits = (
        [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()] if _accelerated() else []
    )
    return min((limit for limit in limits if limit is not None), default=None)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def estimated(
    *,
    model: Mapping[str, Any],
    hessian: Mapping[str, Any],
    finetune: Mapping[str, Any],
    config: models.ModelConfig,
    plans: Mapping[str, Any],
    tokens: data.TokenSplit,
    streamed: bool,
) -> Estimate:
    """The estimate of a job with these groups of settings."""
    batch = min(hessian["batch"], tokens.calibration.sequences)
    length = tokens.calibration.length
    extra = Extra()
    if "budget_gb" in hessian:  # a sketch, whose sums are held in parts
        extra = sketch_needs(config, batch=batch, length=length, budget=hessian["budget_gb"] * 1e9)
    method = method_of(finetune)
    if method is not None and not method.while_rounding:
        tuning = _tuning(method, config, length)
        extra = Extra(max(extra.memory, tuning.memory), extra.disk + tuning.disk)
    return estimate(
        config,
        plans,
        bytes_per_parameter=4 if model["dtype"] == "float32" else 2,
        calibration=tokens.calibration.tokens.shape,
        evaluation=tokens.evaluation.tokens.shape,
        batch=batch,
        stored_hessians=hessian["stream"] == "original",
        streamed=streamed,
        streams=activation_streams(hessian["stream"], method is not None and method.while_rounding),
        extra=extra,
    )


def _tuning(method: TuningMethod, config: models.ModelConfig, length: int) -> Extra:
    """What a method needs that tunes the whole model; options that a user's own method lacks count as none."""
    own: Mapping[str, Any] = {"batch": 1, "validation": 0, "loss": "kl", "chunk": 512} | vars(method)
    moves = lambda name: next((r.rate for r in own.get("rules", ()) if re.search(r.pattern, name)), None)  # noqa: E731
    windows = own.get("sequences")
    if windows is None:  # a text may have more windows than one epoch reads; their targets are made all the same
        windows = -(-own.get("tokens", 0) // length)
    adapters = own.get("lora")
    return tuning_needs(
        config,
        batch=own["batch"],
        length=length,
        windows=(windows + own["validation"]) * (own["loss"] == "kl"),
        chunk=own["chunk"],
        rank=config.hidden_size if method.tunes_weights else adapters.rank if adapters else 0,
        dense=bool(moves("embed") or moves("head")),
        topk=own.get("topk"),
    )


def announced_place(
    need: Estimate, out: pathlib.Path, memory: Mapping[str, Any], while_rounding: bool = False, devices: int = 1
) -> Place:
    """The place of the activations by the budgets `memory`, printed with the estimate. Raises RunError when none fits.

    Block-wise tuning draws windows at random, and several devices take theirs from the host: not on the device.
    """
    where = place_activations(
        need,
        out,
        host_gb=memory["host_gb"],
        device_gb=memory.get("device_gb"),
        disk_gb=memory["disk_gb"],
        on_device=not while_rounding and devices == 1,
    )
    for line in need.lines(where):
        print(line, flush=True)
    return Place(where, out if where == "disk" else None)

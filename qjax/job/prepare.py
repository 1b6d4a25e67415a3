"""A job looked at before anything is computed: its files and text, what it will need, where its activations lie."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from qjax import data, models
from qjax.errors import InputError
from qjax.finetune.sharding import check_mesh
from qjax.job.preflight import Estimate, announced_place, estimated
from qjax.job.settings import Job
from qjax.job.warnings import codebook_warnings, run_warnings
from qjax.models.edges import edge_matrices
from qjax.models.transformer import layer_names
from qjax.runtime.distributed import on_all
from qjax.streams.activations import Place

__all__ = ["Prepared", "prepare"]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The inputs of a job, and what its run will be.

    Attributes:
      files: the model's checked headers.
      tokens: the calibration and evaluation windows.
      need: memory, disk and matrices, from shapes alone.
      where: the place of the activations between blocks.
      warnings: sentences about what will work and may not be meant.
      mesh: the devices.
      tuning_mesh: those that end-to-end tuning is shared out among, None for one.
    """

    files: models.ModelFiles
    tokens: data.TokenSplit
    need: Estimate
    where: Place
    warnings: list[str]
    mesh: Mesh
    tuning_mesh: Mesh | None


def prepare(job: Job, mesh: Mesh) -> Prepared:
    """Read headers and text, predict what the run needs, and say so. Raises RunError when that does not fit."""
    _check_processes(job)
    shared_out = _tuning_mesh(job, mesh)
    files = job.inputs.files(job.model["source"])
    tokens = job.inputs.tokens(job.model["source"], job.seed, job.data)
    known = edge_matrices(files.config)
    edges = job.recipe.edges(known)
    plans = {**edges, **job.recipe.plan(layer_names(files.config))}
    _check_length(tokens, files.config)
    print(f"{files.name} ({files.description}) -> {job.out}")
    print(
        f"calibration {tokens.calibration.tokens.size} tokens, evaluation {tokens.evaluation.tokens.size}, "
        f"length {tokens.calibration.length}"
    )
    for name, plan in edges.items():
        also, rule = " and head, one matrix" if known[name].tied else "", job.recipe.edge_rule(name, known[name])
        assert rule is not None
        print(
            f"{name}{also}: {plan.codebook.spec()['name']}, {plan.codebook.bits:g} bits, by the rule {rule.pattern!r}"
        )
    need = estimated(
        model=job.model,
        hessian=job.hessian,
        finetune=job.finetune,
        config=files.config,
        plans=plans,
        tokens=tokens,
        streamed=job.streamed,
    )
    by_block = job.tuning is not None and job.tuning.while_rounding
    where = on_all(lambda: announced_place(need, job.out, job.memory, by_block, mesh.size))
    found = run_warnings(files.config, tokens.calibration, files.tokenizer, job.data.get("bos", "none"))
    found += files.remarks
    found += codebook_warnings(plan.codebook for plan in plans.values() if plan is not None)
    for warning in found:
        print(f"warning: {warning}", flush=True)
    return Prepared(files, tokens, need, where, found, mesh, shared_out)


def _check_length(tokens: data.TokenSplit, config: models.ModelConfig) -> None:
    if tokens.calibration.length > config.max_positions:
        raise InputError(
            f"data.length is {tokens.calibration.length} and the model has {config.max_positions} positions; "
            f"use data.length={config.max_positions}"
        )


def _tuning_mesh(job: Job, mesh: Mesh) -> Mesh | None:
    """The devices that end-to-end tuning is shared out among, checked before anything is computed; None is one."""
    if mesh.size == 1 or job.tuning is None or job.tuning.one_device:
        return None
    check_mesh(mesh, job.finetune["batch"])
    return mesh


def _check_processes(job: Job) -> None:
    """Raises InputError for a tuning that runs on one device in a job of several processes."""
    if jax.process_count() > 1 and job.tuning is not None and job.tuning.one_device:
        raise InputError(
            f"finetune is {job.finetune['name']!r}, which runs on one device, and there are {jax.process_count()} "
            "processes; use finetune=e2e, lora, qat or none, or one process"
        )

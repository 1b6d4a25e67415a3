"""The stages of a run: reference, Hessians and rounding, tuning, evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import Any

from qjax import models
from qjax.evaluate.compare import compare, reference_states
from qjax.finetune import BlockReport
from qjax.hessian.store import HessianStore
from qjax.job.prepare import Prepared
from qjax.job.settings import Job
from qjax.job.tuning import finetune_model
from qjax.job.warnings import check_reference
from qjax.matrix.quantize import MatrixReport
from qjax.models.transformer import layer_names
from qjax.pipeline import by_recipe
from qjax.pipeline.by_recipe import Observer, Rounded, Surroundings
from qjax.pipeline.finished import HELD_BYTES
from qjax.pipeline.programs import begin
from qjax.pipeline.quantize_model import QuantizedModel
from qjax.pipeline.records import Records
from qjax.runtime.distributed import on_primary
from qjax.runtime.monitor import Stopwatch, peak_memory_bytes
from qjax.runtime.tracker import Tracker

__all__ = ["Started", "announced", "compared", "reference", "rounded", "tuned"]

_log = logging.getLogger("qjax")


@dataclasses.dataclass(frozen=True)
class Started(Observer):
    """A job under way, which watches its model being rounded.

    Attributes:
      job: its settings.
      prepared: its inputs.
      model: in memory, or with its blocks on disk.
      records: the finished matrices.
      watch: the seconds of every stage.
      tracker: of losses and reports.
      peaks: peak memory by matrix, in bytes.
    """

    job: Job
    prepared: Prepared
    model: models.Model
    records: Records
    watch: Stopwatch
    tracker: Tracker
    peaks: dict[str, int] = dataclasses.field(default_factory=dict)

    def stage(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Its seconds are counted."""
        return self.watch.stage(name)

    def layer(self, report: MatrixReport, found: bool, done: int) -> None:
        """Peak memory, and for a new matrix the tracker and the log."""
        self.peaks[report.name] = peak_memory_bytes()
        if not found:
            self.tracker.log({f"layer/{key}": value for key, value in dataclasses.asdict(report).items()}, step=done)
            _log.info("%s", report)
            _remark(report, self.job.recipe.damping)

    def block(self, index: int, report: BlockReport, done: int) -> None:
        """The tracker and the log."""
        entry = {"block": index, **dataclasses.asdict(report)}
        self.tracker.log({f"block/{key}": value for key, value in entry.items()}, step=done)
        _log.info("block %d: %s", index, report)

    def warning(self, text: str) -> None:
        """Printed and logged."""
        super().warning(text)
        _log.warning("%s", text)


def announced(started: Started) -> None:
    """Begin the programs of the rounding, which compile while the reference is computed."""
    job, model = started.job, started.model
    begin(
        model.config,
        model.params,
        started.prepared.tokens.calibration.tokens,
        job.recipe.plan(layer_names(model.config)),
        seed=job.seed,
        stream=job.hessian["stream"],
        outputs=job.hessian["estimator"] != "input",
        correction=job.hessian["correction"],
        records=started.records,
        batch=job.hessian["batch"],
        mesh=started.prepared.mesh,
    )


def reference(started: Started) -> Any:
    """The original's states on the evaluation text, checked; None where nothing is evaluated."""
    job, model, evaluation = started.job, started.model, started.prepared.tokens.evaluation
    found: list[Any] = [None]

    def states() -> None:
        found[0] = reference_states(model, evaluation, job.evaluate["batch"], job.cache)
        check_reference(model, found[0], evaluation, job.evaluate["batch"], job.evaluate.get("sanity_perplexity"))

    with started.watch.stage("reference"):
        if job.evaluate["enabled"]:
            on_primary(states)
    return found[0]


def compared(started: Started, params: Any, teacher: Any) -> dict[str, Any]:
    """The evaluation of `params` against the reference; empty where nothing is evaluated."""
    tokens, batch = started.prepared.tokens, started.job.evaluate["batch"]

    def found() -> dict[str, Any]:
        with started.watch.stage("evaluate"):
            return compare(started.model, params, teacher, tokens.evaluation, batch, tokens.rows)

    return on_primary(found) if started.job.evaluate["enabled"] else {}


def tuned(started: Started, rounded: Rounded, teacher: Any) -> tuple[QuantizedModel, dict[str, Any]]:
    """The model after the tuning that the job asks for, and what its results say of it."""
    job, quantized = started.job, rounded.model
    if job.tuning is None:
        return quantized, {}
    if job.tuning.while_rounding:  # was tuned as it was rounded
        return quantized, {"finetune": {"blocks": rounded.blocks}}
    before = compared(started, quantized.params, teacher)
    with started.watch.stage("finetune"):
        found = finetune_model(
            started.model,
            quantized.params,
            method=job.tuning,
            text=job.data,
            seed=job.seed,
            cache=job.cache,
            out=job.out,
            tracker=started.tracker,
            mesh=started.prepared.tuning_mesh,
        )
    report = {**({"before": before} if before else {}), **found.report}
    return dataclasses.replace(quantized, params=found.params), {"finetune": report}


def rounded(started: Started) -> Rounded:
    """The model rounded by the job's recipe, and told about: tracker, log, peak memory."""
    job, prepared = started.job, started.prepared
    around = Surroundings(
        store=HessianStore(job.cache / "hessians"),
        records=started.records,
        mesh=prepared.mesh,
        place=prepared.where,
        held_bytes=HELD_BYTES if job.streamed else None,
        label=f"quantise {job.out.name}",
        observer=started,
    )
    tokens = prepared.tokens
    return by_recipe.rounded(
        started.model, tokens.calibration, job.recipe, around, seed=job.seed, evaluation=tokens.evaluation
    )


def _remark(report: MatrixReport, damping: float) -> None:
    """Warnings in the log about a matrix that went otherwise than asked for."""
    if report.damping > 1.01 * damping:
        _log.warning("%s: the damping was raised to %.3g of the mean diagonal", report.name, report.damping)
    if report.fallback is not None:
        _log.warning("%s: the rounding lost more than plain rounding, which was kept", report.name)

"""The stages of a run: reference, Hessians and rounding, tuning, evaluation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax

from qjax import models
from qjax.evaluate.compare import compare, reference_states
from qjax.finetune import BlockReport, BlockSettings
from qjax.hessian.fit import Fit
from qjax.hessian.store import HessianStore
from qjax.job.hessians import fits, provide
from qjax.job.prepare import Prepared
from qjax.job.settings import Job
from qjax.job.tuning import finetune_model
from qjax.job.warnings import check_reference
from qjax.matrix.quantize import MatrixReport
from qjax.models.transformer import layer_names
from qjax.pipeline.finished import HELD_BYTES
from qjax.pipeline.programs import begin
from qjax.pipeline.quantize_and_tune import quantize_and_tune
from qjax.pipeline.quantize_model import QuantizedModel, quantize_model
from qjax.pipeline.records import Records
from qjax.runtime.distributed import on_primary
from qjax.runtime.freed_memory import give_back
from qjax.runtime.memory import forget_programs, shrinking
from qjax.runtime.monitor import Stopwatch, peak_memory_bytes
from qjax.runtime.progress import Progress
from qjax.runtime.tracker import Tracker
from qjax.streams.activations import placed

__all__ = ["Rounded", "Started", "announced", "compared", "reference", "rounded", "tuned"]

_log = logging.getLogger("qjax")

_GROWTH = 64 << 20  # bytes that a run may hold freed before they are given back between two matrices


@dataclasses.dataclass(frozen=True)
class Started:
    """A job under way.

    Attributes:
      job: its settings.
      prepared: its inputs.
      model: in memory, or with its blocks on disk.
      records: the finished matrices.
      watch: the seconds of every stage.
      tracker: of losses and reports.
    """

    job: Job
    prepared: Prepared
    model: models.Model
    records: Records
    watch: Stopwatch
    tracker: Tracker


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The rounded model.

    Attributes:
      model: its parameters and reports.
      peaks: peak memory by matrix, in bytes.
      blocks: reports of block-wise tuning.
      fits: of the sketches, None where none were measured.
    """

    model: QuantizedModel
    peaks: dict[str, int]
    blocks: list[dict[str, Any]]
    fits: Mapping[str, Fit] | None


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
    if job.finetune["name"] == "none":
        return quantized, {}
    if job.finetune["name"] == "block":  # was tuned as it was rounded
        return quantized, {"finetune": {"blocks": rounded.blocks}}
    before = compared(started, quantized.params, teacher)
    with started.watch.stage("finetune"):
        found = finetune_model(
            started.model,
            quantized.params,
            options=job.finetune,
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
    """Collect and round; in one process with fewer sequences per step where memory runs out."""
    place = ["the Hessians"]

    def tell(text: str) -> None:
        print(f"warning: {text}", flush=True)
        _log.warning("%s", text)

    def step(batch: int) -> Rounded:
        return _rounded_by(started, batch, place)

    batch = min(started.job.hessian["batch"], started.prepared.tokens.calibration.sequences)
    with placed(started.prepared.where):
        if jax.process_count() > 1:  # all would have to run out at once
            return step(batch)
        return shrinking(step, batch, lambda: place[0], tell)


def _rounded_by(started: Started, batch: int, place: list[str]) -> Rounded:
    job, model, calibration = started.job, started.model, started.prepared.tokens.calibration
    watch, tracker = started.watch, started.tracker
    place[0] = "the Hessians"
    with watch.stage("hessians"):
        store, settings = HessianStore(job.cache / "hessians"), {**job.hessian, "batch": batch}
        source = provide(store, model, calibration, settings, started.prepared.mesh)
        measured = fits(store, model, started.prepared.tokens.evaluation, settings, source)
    forget_programs()
    peaks: dict[str, int] = {}
    place[0] = "the first matrix"
    with watch.stage("quantize"), Progress(f"quantise {job.out.name}", started.prepared.need.matrices) as progress:

        def on_layer(report: MatrixReport, found: bool) -> None:
            give_back(grown=_GROWTH)
            peaks[report.name] = peak_memory_bytes()
            place[0] = f"what follows {report.name}"
            progress.advance(note=f"{report.name} proxy loss {report.proxy_loss:.4f}")
            if not found:
                tracker.log(
                    {f"layer/{key}": value for key, value in dataclasses.asdict(report).items()}, step=progress.done
                )
                _log.info("%s", report)
                _remark(report, job.recipe.damping)

        held = HELD_BYTES if job.streamed else None
        block_reports: list[dict[str, Any]] = []

        def on_block(index: int, report: BlockReport) -> None:
            entry = {"block": index, **dataclasses.asdict(report)}
            block_reports.append(entry)
            tracker.log({f"block/{key}": value for key, value in entry.items()}, step=progress.done)
            _log.info("block %d: %s", index, report)

        if job.finetune["name"] == "block" and source.hessians is not None:
            quantized = quantize_and_tune(
                model.config,
                model.params,
                calibration.tokens,
                job.recipe,
                BlockSettings.of(job.finetune),
                seed=job.seed,
                hessians=source.hessians,
                records=started.records,
                batch=batch,
                on_layer=on_layer,
                on_block=on_block,
                held_bytes=held,
            )
            return Rounded(quantized, peaks, block_reports, measured)
        quantized = quantize_model(
            model.config,
            model.params,
            calibration.tokens,
            job.recipe,
            seed=job.seed,
            stream=job.hessian["stream"],
            hessians=source.hessians,
            outputs=source.outputs,
            correction=job.hessian["correction"],
            records=started.records,
            batch=batch,
            on_layer=on_layer,
            mesh=started.prepared.mesh,
            held_bytes=held,
        )
    return Rounded(quantized, peaks, block_reports, measured)


def _remark(report: MatrixReport, damping: float) -> None:
    """Warnings in the log about a matrix that went otherwise than asked for."""
    if report.damping > 1.01 * damping:
        _log.warning("%s: the damping was raised to %.3g of the mean diagonal", report.name, report.damping)
    if report.fallback is not None:
        _log.warning("%s: the rounding lost more than plain rounding, which was kept", report.name)

"""One quantisation run from settings to a finished run directory: load, check, calibrate, round, evaluate, store."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from qjax import data, models
from qjax.errors import InputError
from qjax.evaluate.compare import compare, reference_states
from qjax.finetune import BlockReport, BlockSettings, lora
from qjax.finetune.sharding import check_mesh
from qjax.hessian.fit import Fit
from qjax.hessian.store import HessianStore
from qjax.interchange import artifact
from qjax.job.directory import RunDirectory
from qjax.job.hessians import fits, provide
from qjax.job.preflight import Estimate, estimated, place
from qjax.job.results import bound, circumstances, finite, losses, sizes
from qjax.job.settings import IRRELEVANT, Job
from qjax.job.tuning import finetune_model, recovered, save_adapters
from qjax.job.warnings import check_reference, codebook_doubts, doubts
from qjax.matrix.quantize import MatrixReport
from qjax.models.transformer import layer_names
from qjax.pipeline.finished import HELD_BYTES
from qjax.pipeline.quantize_and_tune import quantize_and_tune
from qjax.pipeline.quantize_model import QuantizedModel, quantize_model
from qjax.pipeline.records import Records
from qjax.runtime.distributed import is_primary, on_all, on_primary
from qjax.runtime.fingerprint import versions
from qjax.runtime.freed_memory import give_back, giving_back
from qjax.runtime.group import leading, visible
from qjax.runtime.log import crashes_to, log_to
from qjax.runtime.memory import forget_programs, shrinking
from qjax.runtime.monitor import CompileCounter, Stopwatch, peak_memory_bytes
from qjax.runtime.progress import Progress
from qjax.runtime.tracker import Tracker
from qjax.runtime.tracker import make as make_tracker
from qjax.streams.activations import Place, placed

__all__ = ["run"]

_log = logging.getLogger("qjax")

_GROWTH = 64 << 20  # bytes that a run may hold freed before they are given back between two matrices


def run(job: Job) -> dict[str, Any] | None:
    """Carry out a job; returns its results (None for a dry run).

    A finished run is not repeated, a killed one continues.
    Raises the errors of `qjax.errors`; the run directory never looks finished unless it is.
    """
    mesh = job.mesh.make()
    if jax.process_count() > 1 and job.finetune["name"] in ("block", "pv"):
        raise InputError(
            f"finetune is {job.finetune['name']!r}, which runs on one device, and there are {jax.process_count()} "
            "processes; use finetune=e2e, lora, qat or none, or one process"
        )
    shared_out = _tuning_mesh(job, mesh)
    forget_programs()  # of the jobs before this one
    with CompileCounter() as compiles, giving_back(), leading(job.out):
        watch = Stopwatch(compiles)
        with watch.stage("load"):
            files = job.inputs.files(job.model["source"])
            tokens = job.inputs.tokens(job.model["source"], job.seed, job.data)
            plans = job.recipe.plan(layer_names(files.config))
            _fits(tokens, files.config)
            need = estimated(
                model=job.model,
                hessian=job.hessian,
                finetune=job.finetune,
                config=files.config,
                plans=plans,
                tokens=tokens,
                streamed=_streams(job),
            )
        where = on_all(lambda: _announce(job, files, tokens, need, mesh.size))
        notes = doubts(files.config, tokens.calibration, files.tokenizer, job.data.get("bos", "none"))
        notes += codebook_doubts(plan.codebook for plan in plans.values() if plan is not None)
        for note in notes:
            print(f"warning: {note}", flush=True)
        if job.dry_run:
            print("dry run: nothing was computed")
            return None
        with watch.stage("load"):
            fingerprint = _fingerprint(
                job, job.inputs.fingerprint(job.model["source"], job.model["dtype"])["sha256"], tokens
            )
            directory = RunDirectory(job.out)
            on_primary(lambda: directory.claim(fingerprint, job.settings_yaml, resume=job.resume) and None)
            records = directory.records(fingerprint)
            visible(directory.path / "fingerprint.json")
        if (known := on_primary(directory.results)) is not None:
            print(f"{job.out}: finished before; nothing to do (resume=false starts anew)")
            return known
        with _logged(job, notes) as tracker:
            read = job.inputs.streamed if _streams(job) else job.inputs.model
            with watch.stage("load"):
                model = read(job.model["source"], job.model["dtype"])
            started = _Started(job, model, tokens, records, need.matrices, watch, tracker, mesh)
            with watch.stage("reference"):
                teacher = _teacher(started)
            with placed(where):
                rounded = _quantize(started)
            quantized, tuning = _tuned(started, rounded, teacher, shared_out)
            peaks, measured = rounded.peaks, rounded.fits
            del rounded  # a model that tuning has replaced
            results = {**sizes(model, quantized), **losses(quantized.reports), **tuning}
            if measured is not None:
                results["error_bound"] = bound(quantized.reports, measured)
            forget_programs()
            if job.evaluate["enabled"]:
                results |= on_primary(lambda: _compared(started, quantized.params, teacher))
                if "before" in results.get("finetune", {}):
                    results["finetune"]["recovered"] = recovered(results["finetune"]["before"], results)
            with watch.stage("save"):
                artifact.save(directory.artifact, model, lora.stripped(quantized.params), records.folder)
                save_adapters(directory.path, quantized.params)

            def written() -> dict[str, Any]:
                with watch.stage("save"):
                    directory.write_layers(quantized.reports, peaks)
                found = circumstances(job.settings, str(job.model["source"]), model, tokens, watch, compiles)
                return directory.write_results(finite(results | found))

            results = on_primary(written)
            tracker.summary(results)
            tracker.artifact(directory.artifact, job.out.name)
            return results


@dataclasses.dataclass(frozen=True)
class _Started:
    """A job under way: what its stages need."""

    job: Job
    model: models.Model
    tokens: data.TokenSplit
    records: Records
    matrices: int
    watch: Stopwatch
    tracker: Tracker
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """What rounding leaves: the model, peaks of memory by matrix, reports of block-wise tuning, fits of sketches."""

    model: QuantizedModel
    peaks: dict[str, int]
    blocks: list[dict[str, Any]]
    fits: Mapping[str, Fit] | None


@contextlib.contextmanager
def _logged(job: Job, notes: list[str]) -> Iterator[Tracker]:
    """The run's log, crash reports and tracker, which only the leading process has; says how the run ends."""
    handler = log_to(job.out / "log.txt") if is_primary() else logging.NullHandler()
    crashes = crashes_to(job.out / "log.txt") if is_primary() else None
    tracker = job.tracker(job.out) if is_primary() else make_tracker("none", job.out)
    try:
        _log.info("started: %s", job.settings)
        for note in notes:
            _log.warning("%s", note)
        yield tracker
        _log.info("finished")
    except BaseException as error:
        _log.error("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        tracker.close()
        _log.removeHandler(handler)
        handler.close()
        if crashes is not None:
            faulthandler.disable()
            crashes.close()


def _teacher(started: _Started) -> Any:
    """The original's states on the evaluation text, checked; None where nothing is evaluated."""
    job, model, evaluation = started.job, started.model, started.tokens.evaluation
    found: list[Any] = [None]

    def reference() -> None:
        found[0] = reference_states(model, evaluation, job.evaluate["batch"], job.cache)
        check_reference(model, found[0], evaluation, job.evaluate["batch"], job.evaluate.get("sanity_perplexity"))

    if job.evaluate["enabled"]:
        on_primary(reference)
    return found[0]


def _compared(started: _Started, params: Any, teacher: Any) -> dict[str, Any]:
    tokens = started.tokens
    with started.watch.stage("evaluate"):
        return compare(started.model, params, teacher, tokens.evaluation, started.job.evaluate["batch"], tokens.rows)


def _tuned(
    started: _Started, rounded: _Rounded, teacher: Any, shared_out: Mesh | None
) -> tuple[QuantizedModel, dict[str, Any]]:
    """The model after the tuning that the job asks for, and what its results say of it."""
    job, quantized = started.job, rounded.model
    if job.finetune["name"] == "none":
        return quantized, {}
    if job.finetune["name"] == "block":  # was tuned as it was rounded
        return quantized, {"finetune": {"blocks": rounded.blocks}}
    before: dict[str, Any] = {}
    if job.evaluate["enabled"]:
        before = {"before": on_primary(lambda: _compared(started, quantized.params, teacher))}
    with started.watch.stage("finetune"):
        tuned = finetune_model(
            started.model,
            quantized.params,
            options=job.finetune,
            text=job.data,
            seed=job.seed,
            cache=job.cache,
            out=job.out,
            tracker=started.tracker,
            mesh=shared_out,
        )
    return dataclasses.replace(quantized, params=tuned.params), {"finetune": {**before, **tuned.report}}


def _streams(job: Job) -> bool:
    """Whether one pass over the blocks at a time is all that the run makes; sketches and tuning go back and forth."""
    sketched = job.hessian["estimator"] != "input" or bool(job.hessian["fit_sequences"])
    return not sketched and job.finetune["name"] in ("none", "block")


def _fits(tokens: data.TokenSplit, config: models.ModelConfig) -> None:
    if tokens.calibration.length > config.max_positions:
        raise InputError(
            f"data.length is {tokens.calibration.length} and the model has {config.max_positions} positions; "
            f"use data.length={config.max_positions}"
        )


def _announce(job: Job, files: models.ModelFiles, tokens: data.TokenSplit, need: Estimate, devices: int) -> Place:
    """Say what the run will need and where its activations lie. Raises RunError when that does not fit."""
    print(f"{files.name} ({files.description}) -> {job.out}")
    print(
        f"calibration {tokens.calibration.tokens.size} tokens, evaluation {tokens.evaluation.tokens.size}, "
        f"length {tokens.calibration.length}"
    )
    where = place(need, job.out, job.memory, job.finetune, devices)
    for line in need.lines(where):
        print(line, flush=True)
    return Place(where, job.out if where == "disk" else None)


def _fingerprint(job: Job, model_sha256: str, tokens: data.TokenSplit) -> dict[str, Any]:
    """What decides the run's bytes: settings without places and conveniences, model, tokens, versions."""
    return {
        "settings": {key: value for key, value in job.settings.items() if key not in IRRELEVANT},
        "model": model_sha256,
        "calibration": tokens.calibration.sha256,
        "evaluation": tokens.evaluation.sha256,
        "versions": versions(),
        "platform": jax.default_backend(),
    }


def _tuning_mesh(job: Job, mesh: Mesh) -> Mesh | None:
    """The devices that end-to-end tuning is shared out among, checked before anything is computed; None is one."""
    if mesh.size == 1 or job.finetune["name"] in ("none", "block", "pv"):
        return None
    check_mesh(mesh, job.finetune["batch"])
    return mesh


def _quantize(started: _Started) -> _Rounded:
    """Collect and round; in one process with fewer sequences per step where memory runs out."""
    place = ["the Hessians"]

    def tell(text: str) -> None:
        print(f"warning: {text}", flush=True)
        _log.warning("%s", text)

    def step(batch: int) -> _Rounded:
        return _quantize_by(started, batch, place)

    batch = min(started.job.hessian["batch"], started.tokens.calibration.sequences)
    if jax.process_count() > 1:  # all would have to run out at once
        return step(batch)
    return shrinking(step, batch, lambda: place[0], tell)


def _quantize_by(started: _Started, batch: int, place: list[str]) -> _Rounded:
    job, model, calibration = started.job, started.model, started.tokens.calibration
    watch, tracker = started.watch, started.tracker
    place[0] = "the Hessians"
    with watch.stage("hessians"):
        store, settings = HessianStore(job.cache / "hessians"), {**job.hessian, "batch": batch}
        source = provide(store, model, calibration, settings, started.mesh)
        measured = fits(store, model, started.tokens.evaluation, settings, source)
    forget_programs()
    peaks: dict[str, int] = {}
    place[0] = "the first matrix"
    with watch.stage("quantize"), Progress(f"quantise {job.out.name}", started.matrices) as progress:

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

        held = HELD_BYTES if _streams(job) else None
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
            return _Rounded(quantized, peaks, block_reports, measured)
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
            mesh=started.mesh,
            held_bytes=held,
        )
    return _Rounded(quantized, peaks, block_reports, measured)


def _remark(report: MatrixReport, damping: float) -> None:
    """What a reader of the log should not have to look for."""
    if report.damping > 1.01 * damping:
        _log.warning("%s: the damping was raised to %.3g of the mean diagonal", report.name, report.damping)
    if report.fallback is not None:
        _log.warning("%s: the rounding lost more than plain rounding, which was kept", report.name)

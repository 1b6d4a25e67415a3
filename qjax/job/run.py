"""One quantisation run from settings to a finished run directory: load, check, calibrate, round, evaluate, store."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from qjax.finetune import lora
from qjax.interchange import artifact
from qjax.job.directory import RunDirectory
from qjax.job.prepare import Prepared, prepare
from qjax.job.results import bound, circumstances, finite, losses, sizes
from qjax.job.settings import Job
from qjax.job.stages import Started, announced, compared, reference, rounded, tuned
from qjax.job.tuning import recovered
from qjax.pipeline import folding
from qjax.pipeline.by_recipe import Rounded
from qjax.pipeline.compressed import save_adapters
from qjax.pipeline.quantize_model import QuantizedModel
from qjax.runtime.ahead import compiling
from qjax.runtime.distributed import is_primary, on_primary
from qjax.runtime.freed_memory import giving_back
from qjax.runtime.group import leading, visible
from qjax.runtime.log import crashes_to, log_to
from qjax.runtime.memory import forget_programs
from qjax.runtime.monitor import CompileCounter, Stopwatch
from qjax.runtime.tracker import Tracker
from qjax.runtime.tracker import make as make_tracker

__all__ = ["run"]

_log = logging.getLogger("qjax")


def run(job: Job) -> dict[str, Any] | None:
    """Carry out a job; returns its results (None for a dry run).

    A finished run is not repeated, a killed one continues.
    Raises the errors of `qjax.errors`; the run directory never looks finished unless it is.
    """
    mesh = job.mesh.make()
    forget_programs()  # of the jobs before this one
    with CompileCounter() as compiles, compiling(), giving_back(), leading(job.out):
        watch = Stopwatch(compiles)
        with watch.stage("load"):
            prepared = prepare(job, mesh)
        if job.dry_run:
            print("dry run: nothing was computed")
            return None
        with watch.stage("load"):
            directory, fingerprint = _claimed(job, prepared)
        if (known := on_primary(directory.results)) is not None:
            print(f"{job.out}: finished before; nothing to do (resume=false starts anew)")
            return known
        with _logged(job, prepared.warnings) as tracker:
            with watch.stage("load"):
                model = job.inputs.read(job.model["source"], job.model["dtype"], streamed=job.streamed)
                model = folding.prepared(model, job.recipe.incoherence, job.seed)
            started = Started(job, prepared, model, directory.records(fingerprint), watch, tracker)
            announced(started)
            teacher = reference(started)
            first = rounded(started)
            quantized, tuning = tuned(started, first, teacher)
            results = _results(started, first, quantized, tuning)
            forget_programs()
            results |= compared(started, quantized.params, teacher)
            if "before" in results.get("finetune", {}):
                results["finetune"]["recovered"] = recovered(results["finetune"]["before"], results)
            return _stored(started, directory, quantized, results, compiles)


def _claimed(job: Job, prepared: Prepared) -> tuple[RunDirectory, Mapping[str, Any]]:
    """The directory of the job, and the fingerprint that ties it to the job."""
    fingerprint, directory = job.fingerprint(prepared.tokens), RunDirectory(job.out)
    on_primary(lambda: directory.claim(fingerprint, job.settings_yaml, resume=job.resume))
    visible(directory.path / "fingerprint.json")
    return directory, fingerprint


def _results(started: Started, first: Rounded, quantized: QuantizedModel, tuning: dict[str, Any]) -> dict[str, Any]:
    """Sizes and losses, of the rounded and tuned model."""
    results = {**sizes(started.prepared.files, quantized), **losses(quantized.reports), **tuning}
    if first.fits is not None:
        results["error_bound"] = bound(quantized.reports, first.fits)
    return results


def _stored(
    started: Started,
    directory: RunDirectory,
    quantized: QuantizedModel,
    results: dict[str, Any],
    compiles: CompileCounter,
) -> dict[str, Any]:
    """The results as they are written, last of all: the artifact, the table of layers and the circumstances before."""
    job, watch = started.job, started.watch
    with watch.stage("save"):
        artifact.save(directory.artifact, started.model, lora.stripped(quantized.params), started.records.folder)
        save_adapters(directory.path, quantized.params)

    def written() -> dict[str, Any]:
        with watch.stage("save"):
            directory.write_layers(quantized.reports, started.peaks)
        tokens = started.prepared.tokens
        found = circumstances(job.settings, str(job.model["source"]), started.model, tokens, watch, compiles)
        return directory.write_results(finite(results | found))

    results = on_primary(written)
    started.tracker.summary(results)
    started.tracker.artifact(directory.artifact, job.out.name)
    return results


@contextlib.contextmanager
def _logged(job: Job, warnings: list[str]) -> Iterator[Tracker]:
    """The run's log, crash reports and tracker, which only the leading process has; says how the run ends."""
    handler = log_to(job.out / "log.txt") if is_primary() else logging.NullHandler()
    crashes = crashes_to(job.out / "log.txt") if is_primary() else None
    tracker = job.tracker(job.out) if is_primary() else make_tracker("none", job.out)
    try:
        _log.info("started: %s", job.settings)
        for warning in warnings:
            _log.warning("%s", warning)
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

"""Numerics, memory, signals and disks that fail: cases 28 to 36 of the 36."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from faults import (
    REPOSITORY,
    dense,
    problem,
    quantize,
)

import qjax
from qjax.codebooks.scaling import ScaleRule
from qjax.errors import ArtifactError, InputError, RunError
from qjax.job import warnings
from qjax.linalg.kronecker import Hessian
from qjax.linalg.prng import root_key
from qjax.pipeline.layer import quantize_layer, suspicious
from qjax.pipeline.recipe import Recipe
from qjax.runtime.memory import shrinking

# Numerics ------------------------------------------------------------------------------------------------------------


def test_case_28_factorisation_that_fails_is_damped_more_and_reported():
    weight, _ = problem()
    x = np.random.default_rng(2).standard_normal((3, 32)).astype(np.float32)
    h = x.T @ x - 1e-3 * np.eye(32, dtype=np.float32)
    np.fill_diagonal(h, np.maximum(np.diagonal(h), 1e-4))
    _, report = quantize(weight, h, damping=1e-6)
    assert 1e-6 < report.damping < 1


def test_case_29_plain_rounding_is_kept_where_feedback_loses(monkeypatch):
    weight, h = problem()
    recipe = Recipe({"name": "half_integer"}, 2, qjax.rounding.make("ldlq"), qjax.incoherence.make("hadamard"))
    plan = recipe.plan(["l7"])["l7"]
    _, good = quantize_layer(weight, Hessian(h, None), plan, "l7", root_key(0), 0.0)
    assert good.fallback is None and good.alignment < 1 and not suspicious(good)
    from qjax.pipeline import layer

    def harmful(weight, hessian, *, rounding, **options):
        matrix, report = qjax.quantize_matrix(weight, hessian, rounding=rounding, **options)
        if type(rounding).__name__ == "Nearest":
            return matrix, report
        return matrix, dataclasses.replace(report, proxy_loss=0.9, alignment=3.0)

    monkeypatch.setattr(layer, "quantize_matrix", harmful)
    matrix, report = quantize_layer(weight, Hessian(h, None), plan, "l7", root_key(0), 0.0)
    assert report.fallback == "nearest"
    assert np.array_equal(dense(matrix), dense(quantize(weight, h, rounding="nearest")[0]))


def test_case_30_scale_candidates_that_overflow_are_not_chosen():
    weight, h = problem()
    found = quantize(weight, h, scale=ScaleRule("search", "matrix", candidates=(1e-38, 1.0, 1e38)))[1]
    assert found.proxy_loss == pytest.approx(quantize(weight, h)[1].proxy_loss)
    with pytest.raises(InputError, match="at least one positive factor"):
        ScaleRule("search", "matrix", candidates=())


# System --------------------------------------------------------------------------------------------------------------


def test_case_31_memory_that_runs_out_halves_the_batch_and_then_says_the_numbers():
    tried, told = [], []

    def step(batch):
        tried.append(batch)
        if batch > limit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes.")
        return batch

    limit = 2
    assert shrinking(step, 8, lambda: "layers.3", told.append) == 2 and tried == [8, 4, 2]
    assert told[0] == "memory is used up at layers.3 (asked for 123456 bytes); going on with 4 sequences per step"
    limit = 0
    with pytest.raises(RunError, match=r"used up at layers.3 with one sequence per step .asked for 123456 bytes; peak"):
        shrinking(step, 2, lambda: "layers.3", told.append)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        shrinking(lambda batch: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: x")), 2, str, told.append)


SMALL = ["model=tiny", "data.calibration_sequences=2", "data.evaluation_sequences=1", "data.length=16", "tracker=none"]
SMALL += ["evaluate=none", "rounding=nearest", "incoherence=none", "hessian=original"]


def task(out, cache, *overrides):
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    import experiments._quantize as entry

    GlobalHydra.instance().clear()
    with initialize_config_dir(entry.CONFIGS, version_base="1.3"):
        return entry.job_of(compose("quantize", [*SMALL, f"out={out}", f"cache={cache}", *overrides]))


@pytest.mark.parametrize(("signal", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_case_32_signals_leave_nothing_that_looks_finished(tmp_path, signal, code):
    """SIGKILL at every operation: test_kill_points.py. Here: what a process says when it is asked to stop."""
    program = (
        "import os, signal, sys, qjax.pipeline.records\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells have their background jobs ignore it
        "save = qjax.pipeline.records.Records.save\n"
        "def stop(self, matrix, report):\n"
        "    save(self, matrix, report)\n"
        f"    os.kill(os.getpid(), signal.{signal})\n"
        "qjax.pipeline.records.Records.save = stop\n"
        "import experiments.quantize\n"
        "experiments.quantize.main()\n"
    )
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", program, *SMALL, f"out={out}", f"cache={tmp_path / 'cache'}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert not (out / "results.json").exists() and not (out / "artifact").exists()
    assert len(list((out / "layers").glob("*.safetensors"))) == 1
    if signal != "SIGKILL":
        assert "what was finished is kept; the same command continues" in done.stderr
        assert "Traceback" not in done.stderr and "ended by" in (out / "log.txt").read_text()


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EROFS"])
def test_case_33_a_disk_that_is_full_failing_or_read_only(tmp_path, monkeypatch, code):
    import errno

    from qjax.job.run import run

    replace, calls = os.replace, []

    def failing(source, target, **options):
        calls.append(target)
        if "layers" in str(target) and len([c for c in calls if "layers" in str(c)]) > 2:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        return replace(source, target, **options)

    monkeypatch.setattr(os, "replace", failing)
    remedy = {"ENOSPC": "the disk is full", "EIO": "input/output error", "EROFS": "read-only"}[code]
    out = tmp_path / "run"
    with pytest.raises(RunError, match=f"could not write .*{remedy}"):
        run(task(out, tmp_path / "cache"))
    assert not (out / "results.json").exists() and not (out / "artifact").exists()
    assert len(list((out / "layers").iterdir())) == 2  # whole records, no leftovers
    monkeypatch.setattr(os, "replace", replace)
    assert run(task(out, tmp_path / "cache"))["matrices"] == 28


def test_case_34_two_jobs_in_one_directory(tmp_path):
    from qjax.job.run import run
    from qjax.runtime.lock import RunLock

    with RunLock(tmp_path / "run"), pytest.raises(RunError, match=f"in use by process {os.getpid()} on"):
        run(task(tmp_path / "run", tmp_path / "cache"))
    assert not (tmp_path / "run" / "fingerprint.json").exists()


def test_case_35_another_configuration_in_the_same_directory(tmp_path):
    from qjax.job.directory import RunDirectory

    directory = RunDirectory(tmp_path)
    directory.claim({"model": "a", "versions": {"jax": "1"}, "calibration": "x"}, "", resume=True)
    for change in ({"model": "b"}, {"versions": {"jax": "2"}}, {"calibration": "y"}):
        now = {"model": "a", "versions": {"jax": "1"}, "calibration": "x"} | change
        with pytest.raises(RunError, match=rf"holds a run with other settings .{next(iter(change))}.*resume=false"):
            directory.claim(now, "", resume=True)


def test_case_36_damaged_checkpoints_clocks_and_commit_markers(tmp_path, monkeypatch):
    import time

    from qjax.interchange import artifact
    from qjax.job.run import run

    backwards = itertools.count(10**9, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    run(task(tmp_path / "whole", tmp_path / "cache"))
    monkeypatch.undo()
    out = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", out)
    (out / "results.json").unlink()
    (out / "artifact" / "model.json").unlink()  # the mark of a whole artifact
    with pytest.raises(ArtifactError, match="no model.json"):
        artifact.load(out / "artifact")
    for number, file in enumerate(sorted((out / "layers").iterdir())[:4]):
        content = bytearray(file.read_bytes())
        content[-1 - number * 5] ^= 4
        file.write_bytes(content[: len(content) - number])
    run(task(out, tmp_path / "cache"))
    sums = [json.loads((o / "artifact" / "model.json").read_text())["sha256"] for o in (tmp_path / "whole", out)]
    assert sums[0] == sums[1]


def test_an_untested_version_of_jax_is_named():
    assert warnings.version_warning(jax.__version__) is None
    assert "jax 0.4.30 is outside the tested versions" in warnings.version_warning("0.4.30")

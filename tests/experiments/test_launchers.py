"""Launchers of several processes and the Optuna sweeper: one device per job, nothing repeated."""

import contextlib
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import pytest

from experiments import _devices, quantize
from qjax.errors import RunError

joblib = pytest.mark.skipif(
    importlib.util.find_spec("joblib") is None
    or importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None,
    reason="needs hydra-joblib-launcher, of the extra `sweep`",
)
submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs hydra-submitit-launcher, of the extra `sweep`"
)
optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="needs hydra-optuna-sweeper, of the extra `sweep`"
)


def test_devices_are_found_without_jax(tmp_path):
    assert _devices.available({"JAX_PLATFORMS": "cpu"}, tmp_path) == ("cpu", [])
    four = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=4 --b"}
    assert _devices.available(four, tmp_path) == ("cpu", ["0", "1", "2", "3"])
    _devices.show_only("cpu", "2", four)
    assert four["XLA_FLAGS"] == "--a=1 --xla_force_host_platform_device_count=1 --b"
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "proc/driver/nvidia/gpus" / name).mkdir(parents=True)
    assert _devices.available({}, tmp_path) == ("cuda", ["0", "1"])
    assert _devices.available({"CUDA_VISIBLE_DEVICES": "3, GPU-ab"}, tmp_path) == ("cuda", ["3", "GPU-ab"])
    assert _devices.available({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == ("cpu", [])
    (tmp_path / "dev").mkdir()
    for index in range(4):
        (tmp_path / "dev" / f"accel{index}").touch()
    assert _devices.available({"JAX_PLATFORMS": "tpu"}, tmp_path) == ("tpu", ["0", "1", "2", "3"])
    environment = {}
    _devices.show_only("tpu", "3", environment)
    assert environment["TPU_VISIBLE_CHIPS"] == "3"
    _devices.show_only("cuda", "1", environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"


def test_every_process_gets_its_own_device_and_the_next_one_waits(tmp_path, monkeypatch):
    def claimed(**options):
        monkeypatch.setattr(_devices, "_held", {})  # as another process
        environment = {"CUDA_VISIBLE_DEVICES": "4,7"}
        device = _devices.claim("joblib", environment=environment, folder=tmp_path, say=lambda _: None, **options)
        held.append(_devices._held)
        return device, environment["CUDA_VISIBLE_DEVICES"]

    held = []
    assert claimed() == ("cuda:4", "4") and claimed() == ("cuda:7", "7")
    with pytest.raises(RunError, match="none of the 2 cuda devices became free"):
        claimed(wait_s=0.0)
    held[0]["cuda:4"].release()  # as at the end of the first process, however it ends
    assert claimed() == ("cuda:4", "4")
    assert (
        _devices.claim("joblib", environment={}, folder=tmp_path) == "cuda:4"
    )  # a process that is used again keeps it
    for own in held[1:]:
        for lock in own.values():
            lock.release()
    monkeypatch.setattr(_devices, "_held", {})
    assert _devices.claim("basic", environment={"CUDA_VISIBLE_DEVICES": "4,7"}, folder=tmp_path) is None
    assert _devices.claim("submitit_slurm", environment={"CUDA_VISIBLE_DEVICES": "4,7"}, folder=tmp_path) is None
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="devices cannot be shared out .*TMPDIR"):
        _devices.claim("joblib", environment={"CUDA_VISIBLE_DEVICES": "4,7"}, folder=tmp_path / "file")


COMMON = "debug=fast rounding=nearest hessian=original evaluate=none tracker=none"


def started(folder, words, **environment):
    command = [sys.executable, "-m", "experiments.quantize", "-m", *words.split(), *COMMON.split()]
    return subprocess.run(
        [*command, f"cache={folder}/cache"],
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def results(folder):
    files = sorted((folder / "runs" / "sweep").glob("*/results.json"))
    return {file: file.stat().st_mtime_ns for file in files}


@joblib
@pytest.mark.slow
def test_joblib_gives_each_job_a_device_and_another_launcher_repeats_nothing(tmp_path, monkeypatch, capsys):
    flags = "--xla_force_host_platform_device_count=2"
    words = "hydra/launcher=joblib hydra.launcher.n_jobs=2 bits=2,3,9"
    first = started(tmp_path, words, XLA_FLAGS=flags)
    assert "3 jobs: 2 finished, 0 failed, 1 not possible" in first.stdout, first.stdout + first.stderr
    assert "Traceback" not in first.stderr and first.returncode == 0
    made = results(tmp_path)
    assert len(made) == 2
    assert all(json.loads(file.read_text())["device"]["count"] == 1 for file in made)  # of two: one each
    hessians = list((tmp_path / "cache" / "hessians").glob("*/block_0000.safetensors"))
    assert len(hessians) == 1  # one collection for both
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quantize", "-m", "bits=2,3", *COMMON.split(), f"cache={tmp_path}/cache"])
    quantize.main()  # the basic launcher
    assert capsys.readouterr().out.count("finished before") == 2 and results(tmp_path) == made


@submitit
@pytest.mark.slow
def test_submitit_local_continues_a_sweep(tmp_path):
    run = started(tmp_path, "hydra/launcher=submitit_local hydra.launcher.timeout_min=10 bits=2,9")
    assert "2 jobs: 1 finished, 0 failed, 1 not possible" in run.stdout, run.stdout + run.stderr
    assert len(results(tmp_path)) == 1


@optuna
@pytest.mark.slow
def test_optuna_continues_a_study_in_sqlite_and_survives_impossible_trials(tmp_path):
    words = (
        "hydra/sweeper=optuna hydra.sweeper.n_trials=3 hydra.sweeper.n_jobs=1 hydra.sweeper.max_failure_rate=1.0 "
        "hydra.sweeper.storage=sqlite:///study.db hydra.sweeper.study_name=s hydra/sweeper/sampler=grid "
        "bits=choice(2,9,3)"
    )
    first = started(tmp_path, words)
    assert "3 jobs: 2 finished, 0 failed, 1 not possible" in first.stdout, first.stdout + first.stderr
    made = results(tmp_path)
    losses = sorted(json.loads(file.read_text())["proxy_loss_mean"] for file in made)
    second = started(tmp_path, words)  # a grid that was visited is visited again, in an order of its own
    repeated = second.stdout.count("finished before")
    assert f"3 jobs: {repeated} finished, 0 failed, {3 - repeated} not possible" in second.stdout, second.stdout
    assert results(tmp_path) == made
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as database:
        states = [state for (state,) in database.execute("select state from trials")]
        values = [value for (value,) in database.execute("select value from trial_values")]
    assert len(states) == 6 and states.count("COMPLETE") == 2 + repeated  # one study, of both starts
    assert len(values) == 2 + repeated and all(min(abs(value - loss) for loss in losses) < 1e-9 for value in values)

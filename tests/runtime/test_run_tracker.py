"""Trackers keep the numbers, and never end a run."""

from __future__ import annotations

import json
import logging
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import wandb

from qjax.errors import InputError, RunError
from qjax.runtime import tracker


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def exercise(folder, kind, **options):
    track = tracker.make(
        kind, folder, run_name="a", group="g", config={"bits": 2, "model": {"name": "tiny"}}, **options
    )
    track.log({"loss": np.float32(0.5), "layer": "q_proj"}, step=1)
    track.log({"loss": jnp.float32(0.25), "nan": float("nan")}, step=2)
    track.log({"free": 1})
    track.summary({"kl_mean": 0.1, "seconds": {"load": 1.5}})
    track.artifact(folder, "model")
    track.close()
    track.close()
    return track


def test_json_lines(tmp_path):
    exercise(tmp_path, "jsonl", clock=lambda: 7.0)
    assert lines(tmp_path) == [
        {"kind": "start", "time": 7.0, "name": "a", "group": "g", "config": {"bits": 2, "model": {"name": "tiny"}}},
        {"kind": "log", "time": 7.0, "step": 1, "metrics": {"loss": 0.5, "layer": "q_proj"}},
        {"kind": "log", "time": 7.0, "step": 2, "metrics": {"loss": 0.25, "nan": "nan"}},
        {"kind": "log", "time": 7.0, "step": None, "metrics": {"free": 1}},
        {"kind": "summary", "time": 7.0, "summary": {"kl_mean": 0.1, "seconds": {"load": 1.5}}},
        {"kind": "artifact", "time": 7.0, "path": str(tmp_path), "name": "model"},
    ]


def test_json_lines_continue_after_a_kill_in_the_middle_of_a_line(tmp_path):
    exercise(tmp_path, "jsonl")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "lo')
    exercise(tmp_path, "jsonl")
    assert [line["kind"] for line in lines(tmp_path)] == ["start", "log", "log", "log", "summary", "artifact"] * 2


def test_json_lines_on_a_full_disk_report_once_and_go_on(tmp_path, caplog):
    track = tracker.JsonLines(tmp_path)

    class FullDisk:
        closed, name = False, "metrics.jsonl"

        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            self.closed = True
            raise OSError(28, "No space left on device")

    track._file.close()
    track._file = FullDisk()
    with caplog.at_level(logging.WARNING):
        track.log({"x": 1})
        track.log({"x": 2})
    assert [record.getMessage() for record in caplog.records] == [
        "metrics.jsonl: No space left on device; nothing more is tracked, the run goes on"
    ]


def test_json_lines_need_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"metrics.jsonl: cannot be written"):
        tracker.make("jsonl", tmp_path / "file")


def test_none_leaves_nothing(tmp_path):
    exercise(tmp_path, "none")
    assert not list(tmp_path.iterdir())


def test_unknown_names_and_options_list_what_there_is(tmp_path):
    with pytest.raises(InputError, match="unknown tracker 'mlflow'; there is: jsonl, none, wandb"):
        tracker.make("mlflow", tmp_path)
    with pytest.raises(InputError, match="tracker 'none' has no option mode"):
        tracker.make("none", tmp_path, mode="online")
    with pytest.raises(InputError, match="mode='cloud' is unknown"):
        tracker.make("wandb", tmp_path, mode="cloud")


def test_wandb_offline_keeps_everything_in_the_folder(tmp_path, caplog):
    """The real wandb: two runs in one process, each in its own folder, without a network."""
    for name in ("one", "two"):
        exercise(tmp_path / name, "wandb", tags=["test"])
    wandb.teardown()  # as at the end of a process: waits for the service to write its files
    assert not [record for record in caplog.records if record.name.startswith("qjax")]
    for name in ("one", "two"):
        (run,) = (tmp_path / name / "wandb").glob("offline-run-*")
        (record,) = run.glob("run-*.wandb")
        content = record.read_bytes()
        assert all(word in content for word in (b"kl_mean", b"loss", b"q_proj", b"bits"))
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


class BrokenRun:
    def __init__(self):
        self.calls = 0

    def log(self, metrics):
        self.calls += 1
        raise ConnectionError("the service is gone")


def test_a_failure_of_wandb_is_reported_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    broken = BrokenRun()
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb raises ImportError
    with caplog.at_level(logging.WARNING, logger="qjax"):
        track = exercise(tmp_path, "wandb")
        assert len(caplog.records) == 1
        assert "the run goes on" in caplog.text
        track._run = broken
        track.log({"x": 1})
        track.log({"x": 2})
    assert broken.calls == 1
    assert "ConnectionError: the service is gone" in caplog.text
    assert len(caplog.records) == 2

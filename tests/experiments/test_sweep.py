"""Sweeps: directories by hash, failures that do not end the sweep, nothing repeated."""

import json
import re
import sys

import pytest

from experiments import _quantize, _sweep
from experiments.quantize import main
from qjax.errors import InputError, RunError

SETTINGS = {"sweep": "s", "bits": 2, "rounding": {"name": "ldlq"}, "out": None, "resume": True}


def test_a_directory_depends_on_what_decides_the_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = _sweep.directory(SETTINGS, ["experiment=e", "rounding=ldlq", "bits=2"])
    assert first.parent.as_posix() == "runs/s" and first.name.startswith("ldlq-bits2-")
    assert _sweep.directory({**SETTINGS, "resume": False}, ["rounding=ldlq", "bits=2"]) == first
    assert _sweep.directory({**SETTINGS, "bits": 3}, ["rounding=ldlq", "bits=3"]).name[-8:] != first.name[-8:]
    first.mkdir(parents=True)
    assert _sweep.directory(SETTINGS, ["bits=2", "rounding=ldlq"]) == first  # found again under another order


def test_failures_are_kept_and_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "s"

    def fails(error):
        def job():
            raise error

        return job

    with pytest.raises(SystemExit) as exit_info, _sweep.Sweep():  # noqa: PT012
        assert _sweep.attempt(lambda: 0.5, folder / "a", folder, ["bits=2"]) == 0.5
        assert _sweep.attempt(fails(RunError("disk full")), folder / "b", folder, ["bits=3"]) is None
        assert _sweep.attempt(fails(InputError("no such width")), folder / "c", folder, ["bits=9"]) is None
        assert _sweep.attempt(fails(ZeroDivisionError("oh")), folder / "d", folder, ["bits=4"]) is None
    printed = capsys.readouterr().out
    assert exit_info.value.code == 1 and "4 jobs: 1 finished, 2 failed, 1 not possible" in printed
    assert "disk full" in printed and "bits=9" in printed
    assert json.loads((folder / "b" / "failure.json").read_text())["status"] == "failed"
    assert "traceback" in json.loads((folder / "d" / "failure.json").read_text())
    with _sweep.Sweep():  # what succeeds now is no failure any more
        _sweep.attempt(lambda: None, folder / "b", folder, ["bits=3"])
    assert not (folder / "b" / "failure.json").exists()


@pytest.mark.slow
def test_a_sweep_goes_on_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = "quantize -m debug=fast hessian=original rounding=nearest codebook=half_integer,d4 bits=2,3".split()
    monkeypatch.setattr(sys, "argv", [*command, f"cache={tmp_path}/cache"])
    main()
    assert "4 jobs: 3 finished, 0 failed, 1 not possible" in capsys.readouterr().out
    results = sorted((tmp_path / "runs" / "sweep").glob("*/results.json"))
    times = [file.stat().st_mtime_ns for file in results]
    results[0].unlink()  # as a kill before its end leaves it
    main()
    assert capsys.readouterr().out.count("finished before") == 2
    assert [file.stat().st_mtime_ns for file in results][1:] == times[1:] and results[0].exists()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ("out={}/a bits=2,3", r"/a is the directory of one job.*: bits=2 and bits=3"),
        ("out={}/a,{}/b bits=2,3", r"/a is .*: out=.*/a bits=2 and out=.*/a bits=3"),
        ("out={}/${{bits}} bits=2,3 seed=0,1", r"/2 is .*: bits=2 seed=0 and bits=2 seed=1"),
        ("out={}/a,{}/b bits=2", None),
        ("out={}/a bits=2,3 dry_run=true", None),
        ("out={}/a bits=2", None),
    ],
)
def test_jobs_with_one_directory_are_found_before_the_first(tmp_path, monkeypatch, capsys, settings, found):
    begun = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_quantize, "carry_out", begun.append)
    monkeypatch.setattr(
        sys, "argv", ["quantize", "-m", f"cache={tmp_path}/c", *settings.replace("{}", str(tmp_path)).format().split()]
    )
    if found is None:
        main()
        assert begun
        return
    with pytest.raises(SystemExit) as exit_info:
        main()
    printed = capsys.readouterr().err
    assert exit_info.value.code == 2 and not begun
    assert re.search(found, printed) and "leave out= away" in printed


@pytest.mark.parametrize("place", ["sweep=deep/er", "hydra.sweep.dir={}/elsewhere", "out={}/jobs/${{bits}}"])
def test_failures_are_listed_wherever_the_sweep_lies(tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_quantize, "carry_out", lambda task: 1 / 0)
    monkeypatch.setattr(
        sys, "argv", ["quantize", "-m", "debug=fast", "bits=2,3", f"cache={tmp_path}/c", place.format(tmp_path)]
    )
    with pytest.raises(SystemExit) as exit_info:
        main()
    printed = capsys.readouterr().out
    assert exit_info.value.code == 1 and "2 jobs: 0 finished, 2 failed, 0 not possible" in printed
    assert printed.count("ZeroDivisionError: division by zero") == 2 and "bits=3" in printed
    assert len(list(tmp_path.rglob("jobs.jsonl"))) == 1  # one list, which later readers find


def test_failures_are_listed_though_the_list_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    def fails():
        raise RunError("disk full")

    with pytest.raises(SystemExit) as exit_info, _sweep.Sweep():
        _sweep.attempt(fails, tmp_path / "a", tmp_path / "file" / "s", ["bits=2"])
    printed = capsys.readouterr()
    assert exit_info.value.code == 1 and "1 failed" in printed.out and "cannot be written" in printed.err

"""`python -m experiments.report`, called in this process."""

import json
import sys

import pytest

from experiments.report import main


def invoke(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    main()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rounding, kl in (("nearest", 8.09), ("ldlq", 0.83)):
        folder = tmp_path / "runs" / rounding
        folder.mkdir(parents=True)
        results = {
            "bits_per_weight": 2.02,
            "perplexity": 30.0,
            "perplexity_reference": 12.48,
            "kl_mean": kl,
            "model": {"name": "tiny"},
            "settings": {"rounding": {"name": rounding}, "bits": 2},
        }
        (folder / "results.json").write_text(json.dumps(results))
    (tmp_path / "runs" / "killed").mkdir()
    (tmp_path / "runs" / "killed" / "fingerprint.json").write_text("{}")
    return tmp_path / "runs"


def test_it_prints_the_table_and_writes_nothing(runs, monkeypatch, capsys):
    before = sorted(runs.parent.rglob("*"))
    invoke(monkeypatch, f"runs={runs}")
    printed = capsys.readouterr()
    header, _, *rows = printed.out.splitlines()
    assert header.split()[0] == "run" and [row.split()[0] for row in rows] == ["tiny", "nearest", "ldlq"]
    assert "killed: unfinished" in printed.err
    assert sorted(runs.parent.rglob("*")) == before


def test_it_saves_the_report(runs, monkeypatch, capsys):
    out = runs / "report"
    invoke(monkeypatch, f"runs={runs}", f"out={out}")
    assert sorted(path.name for path in out.iterdir()) == [
        "figure.png",
        "figure.svg",
        "report.csv",
        "report.html",
        "report.md",
    ]
    assert "](figure.png)" in (out / "report.md").read_text()
    assert sorted(path.name for path in runs.parent.iterdir()) == ["runs"]  # Hydra leaves nothing


def test_a_list_of_runs_without_a_figure(runs, monkeypatch, capsys):
    out = runs / "report"
    invoke(monkeypatch, f"runs=[{runs}/ldlq,{runs}/nearest]", f"out={out}", "figure=false")
    assert sorted(path.name for path in out.iterdir()) == ["report.csv", "report.html", "report.md"]
    assert "killed" not in capsys.readouterr().err


def test_errors_are_one_message_and_exit_code_two(runs, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_info:
        invoke(monkeypatch, f"runs={runs}/nowhere")
    printed = capsys.readouterr()
    assert exit_info.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: runs: ") and "Traceback" not in printed.err
    (runs / "file").write_text("")
    with pytest.raises(SystemExit) as exit_info:
        invoke(monkeypatch, f"runs={runs}", f"out={runs}/file/report")
    assert exit_info.value.code == 2 and "a part of the path is a file" in capsys.readouterr().err


def test_a_page_before_the_first_run_is_finished(runs, monkeypatch, capsys):
    for name in ("nearest", "ldlq"):
        (runs / name / "results.json").rename(runs / name / "fingerprint.json")
    out = runs / "report"
    invoke(monkeypatch, f"runs={runs}", f"out={out}")
    page = (out / "report.html").read_text()
    assert "0 finished, 3 unfinished or failed" in page and "killed: unfinished" in page
    assert "<table" not in page and "none is finished" in (out / "report.md").read_text()
    with pytest.raises(SystemExit) as exit_info:
        invoke(monkeypatch, f"runs={runs}")
    assert exit_info.value.code == 2 and "none of the 3 runs" in capsys.readouterr().err

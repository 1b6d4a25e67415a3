"""`python -m experiments.bench`, called in this process."""

import json
import sys

import pytest

from experiments.bench import main, overrides


def invoke(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *overrides(arguments)])
    main()


@pytest.mark.parametrize(
    ("given", "hydra"),
    [
        ([], ["bench=matrix"]),
        (["matrix", "repeats=2"], ["bench=matrix", "repeats=2"]),
        (["codebook"], ["bench=codebook"]),
        (["bench=codebook", "bits=2"], ["bench=codebook", "bits=2"]),
        (["--help"], ["--help"]),
    ],
)
def test_the_first_word_chooses_the_benchmark(given, hydra):
    assert overrides(given) == hydra


def test_matrix_prints_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    invoke(monkeypatch, "matrix", "sizes=8x16", "tokens=32", "repeats=1", "least_seconds=0", "out=numbers/m.json")
    printed = capsys.readouterr().out
    assert "ldlq_sweep" in printed and "load average" in printed
    record = json.loads((tmp_path / "numbers/m.json").read_text())
    assert [result["size"] for result in record["results"]] == ["8x16"]
    assert {"device", "versions", "load_average_before", "load_average_after"} <= set(record)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers"]  # Hydra leaves nothing


def test_codebook_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    invoke(monkeypatch, "codebook", "names=[lloyd_max]", "bits=2", "shape=[32,64]", "repeats=1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["lloyd_max", "2", "1x1"]
    assert not list(tmp_path.iterdir())


def test_a_bad_size_exits_with_two(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_info:
        invoke(monkeypatch, "matrix", "sizes=[8by8]")
    assert exit_info.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: sizes: '8by8' is not a size; write rows x columns of the weight, such as 576x1536\n"
    )


def test_finetune_compares_steps_with_the_dense_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["book=half_integer", "batch=1", "length=16", "repeats=1", "rank=2", "out=f.json"]
    invoke(monkeypatch, "finetune", *options)
    assert "dense_all" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "f.json").read_text())["results"]
    assert list(result["steps"]) == ["dense", "dense_all", "e2e", "dense_lora", "lora"]
    held = {name: step["argument_bytes"] for name, step in result["steps"].items()}
    assert held["lora"] < held["dense"] < held["dense_all"]

"""The comparison table and its forms: aligned text, Markdown, CSV."""

import csv
import io
import math
import pathlib
import sys

import pytest

from qjax.errors import InputError
from qjax.report import Run, Skipped, Table, aligned, comparison, csv_text, markdown
from qjax.report.parquet import parquet_bytes
from qjax.report.table import differing, number, ordered


def run(name, rounding="ldlq", bits=2.02, kl=0.9, settings=None, **changes):
    flat = {"model": "SmolLM2", "model.dtype": "float32", "rounding": rounding, "codebook": "half_integer", "bits": 2}
    results = {
        "bits_per_weight": bits,
        "whole_model_bytes": 139_700_000,
        "whole_model_bytes_reference": 538_000_000,
        "perplexity": 29.8,
        "perplexity_interval": [28.0, 32.0],
        "perplexity_reference": 12.48,
        "kl_mean": kl,
        "kl_mean_interval": [0.85, 0.95],
        "kl_p99": 4.2,
        "top1_agreement": 0.555,
        "proxy_loss_mean": 0.03,
        "tokens_evaluation": 8192,
        "seconds": {"quantize": 88.3, "evaluate": 3.04},
        "peak_memory_bytes": 2 * 2**30,
        "device": {"platform": "cpu", "cpu_cores": 2, "cpu_model": "A CPU"},
        "versions": {"jax": "0.10.2"},
    }
    return Run(name, pathlib.Path("runs") / name, flat | (settings or {}), results | changes)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (math.inf, "∞"), (0.0, "0.000"), (12.5, "12.50"), (0.9067, "0.9067"), (1234.4, "1234"),
        (45273.0, "45273"), (1.6e6, "1.60e6"), (0.00049, "4.90e-4"), (999.96, "1000"), (-3.5, "-3.500"),
    ],
)  # fmt: skip
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_settings_that_differ_are_found_within_a_choice():
    nearest = run("nearest", "nearest")
    gptq = run("gptq", "gptq", settings={"rounding.order": "natural"})
    assert differing([nearest, gptq]) == ["rounding"]
    descending = run("gptq2", "gptq", settings={"rounding.order": "descending"})
    assert differing([nearest, gptq, descending]) == ["rounding", "rounding.order"]
    assert differing([gptq]) == []


def test_runs_are_ordered_by_bits_and_then_from_the_worst():
    runs = [run("c", bits=3.0), run("a", bits=2.018, kl=0.5), run("b", bits=2.022, kl=0.9)]
    assert [r.name for r in ordered(runs)] == ["b", "a", "c"]


def test_the_first_row_is_the_original_model():
    table = comparison([run("x/ldlq"), run("x/nearest", "nearest", kl=8.09)])
    assert table.headers[:3] == ("run", "rounding", "bits/weight")
    column = {header: index for index, header in enumerate(table.headers)}
    first, worst, best = table.rows
    assert first[0] == "SmolLM2 (reference)" and first[column["perplexity"]] == "12.48"
    assert first[column["model MB"]] == "538.0" and first[column["KL mean"]] == ""
    assert worst[column["rounding"]] == "nearest"
    assert best[column["KL mean"]] == "0.9000 [0.850, 0.950]" and best[column["perplexity"]] == "29.80 [28.0, 32.0]"
    assert (
        best[column["quantize s"]] == "88" and best[column["evaluate s"]] == "3.0" and best[column["total s"]] == "91"
    )
    assert best[column["peak GiB"]] == "2.00" and "hessians s" not in column


def test_a_setting_that_repeats_the_names_is_no_column():
    table = comparison([run("ldlq"), run("nearest", "nearest", kl=8.09)])
    assert "rounding" not in table.headers


def test_another_evaluation_has_its_own_reference_row():
    table = comparison([run("a"), run("b", tokens_evaluation=4096, perplexity_reference=13.0)])
    names = [row[0] for row in table.rows][:2]
    assert names == ["SmolLM2 (reference, 8192 tokens)", "SmolLM2 (reference, 4096 tokens)"]


def test_a_run_without_evaluation_is_reported():
    bare = Run("a", pathlib.Path("a"), {"model": "tiny"}, {"bits_per_weight": 2.0})
    (row,) = comparison([bare]).rows
    assert row[0] == "a" and row[1] == "2.000" and set(row[2:]) == {"–"}


def test_an_overflow_has_no_interval():
    table = comparison([run("a", perplexity=math.inf, perplexity_interval=[1e300, math.inf])])
    assert table.rows[1][table.headers.index("perplexity")] == "∞"


def test_aligned_text_lines_up():
    text = aligned(Table(("name", "n"), (("a", "1"), ("long name", "1234")), (False, True)))
    assert text.splitlines() == ["name          n", "---------  ----", "a             1", "long name  1234"]


def test_markdown_has_the_table_the_figure_and_what_was_left_out():
    runs = [run("a|b")]
    skipped = [Skipped(pathlib.Path("runs/c"), "unfinished: there is no results.json")]
    text = markdown(comparison(runs), runs, skipped, "figure.png")
    assert "| a\\|b |" in text and "](figure.png)" in text and "- `runs/c`: unfinished" in text
    assert "2 cores of A CPU" in text and "jax 0.10.2" in text
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "figure" not in markdown(comparison(runs), runs, [])


def test_csv_holds_every_number_of_every_run():
    runs = [run("a", extra=[1, 2]), run("b", "gptq", settings={"rounding.order": "natural"})]
    first, second = csv.DictReader(io.StringIO(csv_text(runs)))
    assert first["settings.rounding"] == "ldlq" and first["settings.rounding.order"] == ""
    assert second["settings.rounding.order"] == "natural" and second["extra"] == ""
    assert float(first["kl_mean_interval.low"]) == 0.85 and float(first["seconds.quantize"]) == 88.3
    assert first["device.cpu_model"] == "A CPU" and first["extra"] == "[1, 2]"


def test_originals_of_one_name_are_told_apart():
    texts = (
        {"tokens_sha256": "ab" * 32},
        {"tokens_sha256": "cd" * 32},
        {"tokens_sha256": "ef" * 32, "tokens_evaluation": 512},
    )
    runs = [run(f"r{index}", **facts) for index, facts in enumerate(texts)]
    runs += [run("r3", settings={"model.dtype": "bfloat16"}, **texts[0])]
    names = [row[0] for row in comparison(runs).rows if "reference" in row[0]]
    assert len(names) == len(set(names)) == 4
    assert names[0] == "SmolLM2 (reference, float32, 8192 tokens abababab)" and "512 tokens)" in names[2]
    assert "bfloat16" in names[3]
    alone = comparison(runs[:1]).rows[0][0]
    assert alone == "SmolLM2 (reference)"


def test_parquet_holds_what_the_csv_holds():
    polars = pytest.importorskip("polars", reason="needs polars, of the extra `parquet`")
    runs = [
        run("a", settings={"rounding.block": None, "seeds": [1, 2]}),
        run("b", settings={"rounding.block": 8}, kl=math.inf),
    ]
    frame = polars.read_parquet(io.BytesIO(parquet_bytes(runs)))
    rows = list(csv.DictReader(io.StringIO(csv_text(runs))))
    assert frame.columns == list(rows[0]) and frame.height == 2
    assert frame["kl_mean"].to_list() == [0.9, math.inf] and frame["settings.rounding.block"].to_list() == [None, 8]
    assert frame["settings.seeds"].to_list() == ["[1, 2]", None]
    for name in frame.columns:
        for value, text in zip(frame[name].to_list(), (row[name] for row in rows), strict=True):
            assert text == "" if value is None else (text == str(value) or float(text) == value)


def test_parquet_without_polars_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(InputError, match=r"needs polars: pip install -e '\.\[parquet\]'"):
        parquet_bytes([run("a")])

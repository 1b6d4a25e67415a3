"""Reading run directories: what counts as a run, what is left out and why."""

import json
import math

import pytest

from qjax.errors import InputError
from qjax.report import collect
from qjax.report.runs import find


def results(**changes):
    base = {
        "bits_per_weight": 2.02,
        "whole_model_bytes": 10_000_000,
        "perplexity": 30.0,
        "perplexity_interval": [28.0, 32.0],
        "perplexity_reference": 12.5,
        "kl_mean": 0.9,
        "kl_mean_interval": [0.85, 0.95],
        "model": {"name": "SmolLM2"},
        "settings": {
            "model": {"source": "pypi:x", "dtype": "float32"},
            "rounding": {"name": "ldlq", "block": None},
            "scale": {"method": "rms", "granularity": "row"},
            "bits": 2,
            "out": "runs/a",
        },
        "seconds": {"quantize": 10.0},
    }
    return {**base, **changes}


def write(folder, content=None):
    folder.mkdir(parents=True)
    (folder / "fingerprint.json").write_text("{}")
    if content is not None:
        (folder / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_folder_a_pattern_and_a_list_find_the_same_runs(tmp_path):
    for name in ("x/a", "x/b", "y/c"):
        write(tmp_path / name, results())
    by_folder = find(tmp_path)
    assert [path.name for path in by_folder] == ["a", "b", "c"]
    assert find(f"{tmp_path}/*/*") == by_folder
    assert find([str(tmp_path / "x"), str(tmp_path / "y/c"), str(tmp_path / "x/a")]) == by_folder


def test_names_are_relative_to_what_runs_have_in_common(tmp_path):
    for name in ("x/a", "x/b"):
        write(tmp_path / name, results())
    assert [run.name for run in collect(tmp_path)[0]] == ["a", "b"]
    write(tmp_path / "y/a", results())
    assert [run.name for run in collect(tmp_path)[0]] == ["x/a", "x/b", "y/a"]
    assert [run.name for run in collect(tmp_path / "y")[0]] == ["a"]


def test_settings_are_flat_and_conveniences_are_left_out(tmp_path):
    write(tmp_path / "a", results())
    (run,), _ = collect(tmp_path)
    assert run.settings == {
        "model": "SmolLM2",
        "model.dtype": "float32",
        "rounding": "ldlq",
        "rounding.block": None,
        "scale": "rms",
        "scale.granularity": "row",
        "bits": 2,
    }
    assert run.number("kl_mean") == 0.9 and run.interval("kl_mean") == (0.85, 0.95)
    assert run.number("kl_p99") is None and run.interval("kl_p99") is None
    assert run.seconds("quantize") == 10.0 and run.seconds("hessians") is None


def test_null_in_an_evaluated_run_is_an_overflow(tmp_path):
    write(tmp_path / "a", results(perplexity=None, perplexity_interval=[2e300, None]))
    (run,), _ = collect(tmp_path)
    assert run.number("perplexity") == math.inf and run.interval("perplexity") == (2e300, math.inf)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "unfinished: there is no results.json"),
        ('{"bits_per_weight": 2', "damaged: is not JSON"),
        ("[1, 2]", "damaged: results.json holds list"),
        (results(bits_per_weight=None), "bits_per_weight in results.json is None, not a positive number"),
        (results(bits_per_weight=True), "bits_per_weight in results.json is True"),
        (results(kl_mean="0.9"), "kl_mean in results.json is '0.9', not a number"),
        (results(kl_mean_interval=[1.0]), "kl_mean_interval in results.json is [1.0], not [low, high]"),
        (results(seconds=3), "seconds in results.json is 3, not an object"),
    ],
)
def test_unfinished_and_damaged_runs_are_listed(tmp_path, content, reason):
    write(tmp_path / "good", results())
    bad = write(tmp_path / "bad", content)
    runs, skipped = collect(tmp_path)
    assert [run.name for run in runs] == ["good"]
    assert [item.path for item in skipped] == [bad] and reason in skipped[0].reason


def test_no_finished_run_is_an_error_that_says_why(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", "{")
    with pytest.raises(InputError, match="none of the 2 runs that were found is finished") as error:
        collect(tmp_path)
    assert f"{tmp_path / 'a'}: unfinished" in str(error.value) and f"{tmp_path / 'b'}: damaged" in str(error.value)


def test_sources_that_match_nothing_are_errors(tmp_path):
    with pytest.raises(InputError, match="does not exist and matches nothing"):
        find(tmp_path / "absent")
    with pytest.raises(InputError, match="matches nothing"):
        find(f"{tmp_path}/absent*")
    with pytest.raises(InputError, match="there is no run below"):
        find(tmp_path)
    with pytest.raises(InputError, match="an empty list"):
        find([])


def test_a_failed_job_and_an_unfinished_one_say_why(tmp_path):
    write(tmp_path / "good", results())
    failed, killed = tmp_path / "failed", write(tmp_path / "killed")
    failed.mkdir()
    (failed / "failure.json").write_text(json.dumps({"status": "failed", "error": "disk full"}))
    (killed / "layers").mkdir()
    for name in ("layers.0.mlp.up_proj", "block.0", "layers.1.mlp.up_proj"):
        (killed / "layers" / f"{name}.safetensors").write_bytes(b"")
    runs, skipped = collect(tmp_path)
    assert [run.name for run in runs] == ["good"]
    assert [item.path.name for item in skipped] == ["failed", "killed"]
    assert skipped[0].reason == "failed: disk full"
    assert "2 matrices of 1 finished blocks" in skipped[1].reason
    (failed / "failure.json").write_text("{")
    assert "cannot be read" in collect(tmp_path)[1][0].reason


def test_a_sweep_without_a_finished_job_can_be_collected(tmp_path):
    write(tmp_path / "killed")
    with pytest.raises(InputError, match="none of the 1 runs"):
        collect(tmp_path)
    runs, skipped = collect(tmp_path, unfinished=True)
    assert runs == [] and len(skipped) == 1

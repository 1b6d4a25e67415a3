"""Whole runs on the embedded model: what they leave behind, how they resume, and what they refuse."""

import csv
import json
import math
import pickle
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import experiments._quantize as entry_point
from experiments.quantize import main
from qjax import models
from qjax.errors import ArtifactError, InputError, RunError
from qjax.evaluate.compare import compare, reference_states
from qjax.interchange import artifact
from qjax.job import preflight, stages
from qjax.job.run import run
from qjax.matrix.quantized import QuantizedMatrix
from qjax.models.checkpoints.files import sha256_file
from qjax.pipeline.finished import FinishedBlocks
from qjax.pipeline.recipe import LayerRule
from qjax.pipeline.records import Records

SMALL = [
    "model=tiny",
    "data.calibration_sequences=4",
    "data.evaluation_sequences=2",
    "data.length=64",
    "tracker=none",
]


def settings(out, cache, *overrides):
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(entry_point.CONFIGS, version_base="1.3"):
        return compose("quantize", [*SMALL, f"out={out}", f"cache={cache}", *overrides])


def table(out):
    return list(csv.DictReader((out / "layers.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """One finished run at 4 bits, shared by the tests that only look at it."""
    out = tmp_path_factory.mktemp("runs") / "base"
    results = run(entry_point.job_of(settings(out, cache, "bits=4")))
    return out, results


def test_a_run_leaves_what_the_architecture_lists(finished):
    out, results = finished
    assert {p.name for p in out.iterdir()} >= {
        "config.yaml",
        "fingerprint.json",
        "layers.csv",
        "results.json",
        "artifact",
        "log.txt",
    }
    assert json.loads((out / "results.json").read_text()) == results
    needed = "bits_per_weight whole_model_bytes perplexity perplexity_reference kl_mean kl_p99 top1_agreement "
    needed += (
        "proxy_loss_mean tokens_calibration tokens_evaluation context_length seconds peak_memory_bytes versions device"
    )
    assert set(needed.split()) <= set(results) and "compile" in results["seconds"]
    rows = table(out)
    assert len(rows) == results["matrices"] == 7 * 4
    for column in "shape bits_per_weight damping proxy_loss weight_mse seconds peak_memory_bytes".split():
        assert all(row[column] for row in rows), column
    assert np.mean([float(row["proxy_loss"]) for row in rows]) == pytest.approx(results["proxy_loss_mean"])


def test_four_bits_stay_close_to_the_original(finished):
    _, results = finished
    assert 4 <= results["bits_per_weight"] < 4.1
    assert results["perplexity"] < 1.05 * results["perplexity_reference"] and results["kl_mean"] < 0.05
    assert results["whole_model_bytes"] < results["whole_model_bytes_reference"] / 2
    weights = models.open_model("tiny").weights  # stored in bfloat16, and counted so
    assert results["whole_model_bytes_reference"] == 2 * sum(math.prod(weights.shape(name)) for name in weights.names)


def test_the_number_of_compiled_programs_is_small(finished):
    _, results = finished
    assert results["compiled_programs"] <= 12, results["compiled_program_names"]


def test_the_artifact_gives_the_same_numbers(finished, cache):
    out, results = finished
    stored = artifact.load(out / "artifact")
    reference = models.load("tiny")
    task = entry_point.job_of(settings(out, cache, "bits=4"))
    from qjax import data

    tokens = data.load(tokenizer=reference.tokenizer, vocab_size=2048, seed=0, **task.data)
    teacher = reference_states(reference, tokens.evaluation, 8, cache)
    again = compare(reference, stored.params, teacher, tokens.evaluation, 8)
    assert {key: results[key] for key in again} == again
    assert artifact.model_bytes(stored.params) == results["whole_model_bytes"]
    assert stored.tokenizer.encode("The function").tolist() == reference.tokenizer.encode("The function").tolist()


def test_blocks_that_stay_in_their_records_give_the_same_run(finished, cache, tmp_path, monkeypatch):
    """A budget for one block and a half; the artifact is written matrix by matrix."""
    out, results = finished
    one = sum(leaf.stored_bits for leaf in _matrices(artifact.load(out / "artifact").params["blocks"][0])) // 8
    monkeypatch.setattr(stages, "HELD_BYTES", one * 3 // 2)
    kept = []
    save = artifact.save
    monkeypatch.setattr(artifact, "save", lambda *arguments: (kept.append(arguments[2]), save(*arguments)))
    again = run(entry_point.job_of(settings(tmp_path / "streamed", cache, "bits=4")))
    circumstances = "seconds stages peak_memory_bytes compiled_programs compiled_program_names finished sha256 settings"
    assert {key for key in results if results[key] != again[key]} <= set(circumstances.split())
    ours, theirs = (artifact.load(folder / "artifact") for folder in (tmp_path / "streamed", out))
    assert ours.fingerprint == theirs.fingerprint
    blocks = kept[0]["blocks"]
    assert isinstance(blocks, FinishedBlocks) and len(blocks) == 4
    first, last = (lambda: _matrices(blocks[0])[0]), (lambda: _matrices(blocks[3])[0])
    assert first() is first()  # within the budget: held
    assert last() is not last()  # beyond: read anew
    record = tmp_path / "streamed" / "layers" / "layers.3.mlp.up_proj.safetensors"
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"layers\.3\.mlp\.up_proj: its record .* damaged .* start the same command"):
        list(blocks)


def _matrices(block):
    leaves = jax.tree.leaves(block, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
    return [leaf for leaf in leaves if isinstance(leaf, QuantizedMatrix)]


def test_a_finished_run_is_not_repeated(finished, cache, capsys):
    out, results = finished
    before = (out / "layers.csv").stat().st_mtime_ns
    assert run(entry_point.job_of(settings(out, cache, "bits=4"))) == results
    assert "finished before" in capsys.readouterr().out
    assert (out / "layers.csv").stat().st_mtime_ns == before


def test_changed_settings_are_refused_with_what_changed(finished, cache):
    out, _ = finished
    with pytest.raises(RunError, match=r"settings.bits: 4 -> 3.*resume=false"):
        run(entry_point.job_of(settings(out, cache, "bits=3")))


def artifact_bytes(out):
    return json.loads((out / "artifact" / "model.json").read_text())["sha256"]


@pytest.mark.parametrize("stream", ["sequential", "original", "corrected"])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path, cache, stream, monkeypatch):
    overrides = [f"hessian={stream}", "evaluate=none", "bits=2"]
    run(entry_point.job_of(settings(tmp_path / "whole", cache, *overrides)))
    save, saved = Records.save, []

    def failing(self, matrix, report):
        if len(saved) == 9:  # in the middle of the second block
            raise KeyboardInterrupt
        saved.append(report.name)
        save(self, matrix, report)

    monkeypatch.setattr(Records, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        run(entry_point.job_of(settings(tmp_path / "cut", cache, *overrides)))
    assert not (tmp_path / "cut" / "results.json").exists()
    monkeypatch.setattr(Records, "save", save)
    file = tmp_path / "cut" / "layers" / f"{saved[3]}.safetensors"
    file.write_bytes(file.read_bytes()[:-7])  # and one record was torn
    run(entry_point.job_of(settings(tmp_path / "cut", cache, *overrides)))
    assert artifact_bytes(tmp_path / "cut") == artifact_bytes(tmp_path / "whole")


def test_rules_choose_layers_by_name(tmp_path, cache):
    rules = "rules=[{pattern: 'layers.0.self_attn', skip: true}, {pattern: down_proj, bits: 3}]"
    results = run(entry_point.job_of(settings(tmp_path / "r", cache, "evaluate=none", "rounding=nearest", rules)))
    rows = {row["name"]: row for row in table(tmp_path / "r")}
    assert results["matrices"] == 24 and "layers.0.self_attn.q_proj" not in rows
    assert (
        float(rows["layers.1.mlp.down_proj"]["bits_per_weight"])
        > 3
        > float(rows["layers.1.mlp.up_proj"]["bits_per_weight"])
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rules=[{pattern: layres, skip: true}]", "applies to no layer.*layers.0.self_attn.q_proj"),
        ("rules=[{pattern: '.', skip: true}, {pattern: down, bits: 3}]", "applies to no layer"),
        ("rules=[{pattern: '('}]", "not a regular expression"),
        ("rules=[{pattern: down}]", "changes nothing"),
        ("rules=[{patern: down, bits: 3}]", "is not a rule"),
        ("rules=[{pattern: '.', skip: true}]", "nothing is left"),
        ("bits=2.5", "whole"),
        ("bits=9", "1 to 8 whole bits"),
        ("damping=-1", "damping is -1"),
        ("data.length=512", "the model has 256 positions"),
        ("data.calibration_sequences=0", "at least 1"),
        ("data.calibration_sequences=100000", "calibration"),
        ("hessian.batch=0", "hessian.batch"),
        ("seed=-1", "seed"),
        ("memory.host_gb=0.1", "predicted to need"),
        ("memory.disk_gb=1e-6", "predicted to need"),
        ("mesh.data=99", "asks for 99 devices"),
        ("rounding.order=upwards", "natural, ascending"),
        ("hessian.estimator=fisher", "there is: input"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_computed(tmp_path, cache, override, message):
    from qjax.errors import QjaxError

    with pytest.raises(QjaxError, match=message):
        run(entry_point.job_of(settings(tmp_path / "bad", cache, override)))
    assert not (tmp_path / "bad" / "results.json").exists() and not (tmp_path / "bad" / "layers").exists()


def test_an_empty_rule_is_refused():
    with pytest.raises(InputError, match="changes nothing"):
        LayerRule("down")


def test_two_runs_in_one_directory(tmp_path, cache):
    from qjax.runtime.lock import RunLock

    with RunLock(tmp_path / "busy"), pytest.raises(RunError, match="in use by"):
        run(entry_point.job_of(settings(tmp_path / "busy", cache)))


def test_damaged_artifacts_are_refused_by_name(finished, tmp_path):
    out, _ = finished
    with pytest.raises(ArtifactError, match="no model.json"):
        artifact.load(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(out / "artifact", copy)
    manifest = json.loads((copy / "model.json").read_text())
    manifest["sha256"]["embed"] = "0" * 64
    (copy / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"model.json: damaged: its SHA-256 is"):
        artifact.load(copy)
    artifact.seal(copy)
    with pytest.raises(ArtifactError, match="embed does not match its checksum"):
        artifact.load(copy)
    (copy / "model.json").write_text(json.dumps({**manifest, "format": "qjax-artifact-99"}))
    artifact.seal(copy)
    with pytest.raises(ArtifactError, match="format 'qjax-artifact-99'"):
        artifact.load(copy)
    (copy / "checksums.json").unlink()
    (copy / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="has no checksums.json"):
        artifact.load(copy)


def command(*arguments, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_the_command_line_explains_mistakes_without_a_traceback(tmp_path, monkeypatch, capsys):
    """Once as a process, then as the function that it calls."""
    overrides = ["model=hf", f"model.source={tmp_path}/none", f"out={tmp_path}/a"]
    result = command("experiments.quantize", *overrides, QJAX_CACHE=str(tmp_path))
    assert result.returncode != 0 and "there is no model" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.chdir(tmp_path)
    for argument, expected in (("rounding=gtpq", "gptq"), ("roundng=gptq", "roundng")):
        monkeypatch.setattr(sys, "argv", ["quantize", argument])
        with pytest.raises(SystemExit) as info:
            main()
        error = capsys.readouterr().err
        assert info.value.code != 0 and expected in error, error
        assert "Traceback" not in error


def test_a_sweep_shares_its_process_and_reports(tmp_path, cache):
    out = tmp_path / "sweep"
    overrides = [
        *SMALL,
        "evaluate=none",
        "rounding=nearest,ldlq",
        f"out={out}/${{rounding.name}}",
        f"cache={cache}",
        f"hydra.sweep.dir={tmp_path}",
    ]
    result = command("experiments.quantize", "-m", *overrides)
    assert result.returncode == 0, result.stderr
    losses = [json.loads((out / name / "results.json").read_text())["proxy_loss_mean"] for name in ("nearest", "ldlq")]
    assert losses[1] < losses[0]


def test_a_dry_run_only_plans(tmp_path, cache, capsys):
    assert run(entry_point.job_of(settings(tmp_path / "dry", cache, "dry_run=true"))) is None
    assert "28 matrices" in capsys.readouterr().out and not (tmp_path / "dry" / "results.json").exists()


def test_activations_on_disk_and_on_the_device_give_the_same_artifact(finished, tmp_path, cache, monkeypatch, capsys):
    out, results = finished
    expected = json.loads((out / "artifact" / "model.json").read_text())["sha256"]
    hashed = []

    def poisoned(*_, **__):
        raise AssertionError("a run used pickle")

    for name in ("load", "loads", "Unpickler"):  # a whole run, its artifact and its evaluation do without
        monkeypatch.setattr(pickle, name, poisoned)
    monkeypatch.setattr(models.loading, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    for where, words in (("disk", "on disk"), ("device", "on the device")):
        monkeypatch.setattr(preflight, "place_activations", lambda *_, where=where, **options: where)
        hashed.clear()
        other = tmp_path / where
        found = run(entry_point.job_of(settings(other, cache, "bits=4")))
        assert json.loads((other / "artifact" / "model.json").read_text())["sha256"] == expected
        assert len(hashed) == len(set(hashed)) > 0  # the model's files are read for their hash once in a run
        assert found["kl_mean"] == results["kl_mean"] and words in capsys.readouterr().out
        assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in out.iterdir())


def test_the_plan_counts_sketches_and_tuning(tmp_path, cache, capsys):
    from qjax.hessian.sketch_collect import block_bytes

    def predicted(*overrides):
        run(entry_point.job_of(settings(tmp_path / "plan", cache, "dry_run=true", "evaluate=none", *overrides)))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("predicted"))
        return [float(word) for word in line.replace(",", "").split() if word[0].isdigit()]

    plain = predicted("hessian=original")
    model = models.load("tiny")
    blocks = model.config.num_layers * block_bytes(model.config)  # all sums, a pair of float32 for every entry
    narrow, wide = (predicted("hessian=sketch_b", f"hessian.budget_gb={budget}") for budget in (1e-6, 8))
    assert wide[0] - narrow[0] == pytest.approx(blocks * 3 / 4 / 2**30, abs=0.011)  # tiny has four blocks
    assert wide[1] > plain[1] + blocks / 4 / 2**30  # the triangles of the store
    tuned, adapted = predicted("finetune=e2e"), predicted("finetune=lora", "finetune.lora.rank=512")
    assert tuned[0] > plain[0] and adapted[0] > tuned[0]
    device = predicted("memory.device_gb=50")
    assert device == plain or device[0] == pytest.approx(plain[0], abs=0.02)

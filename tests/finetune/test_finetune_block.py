"""Tuning inside each block while it is quantised: it helps, it resumes to the same bytes, it leaves codes alone."""

import json

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import experiments._quantize as entry_point
from qjax import models
from qjax.errors import InputError
from qjax.finetune import BlockTuning, RateRule, tune_block
from qjax.interchange import artifact
from qjax.job.run import run
from qjax.pipeline.records import Records
from qjax.streams.forward import embedded, forward_block

SMALL = [
    "model=tiny",
    "data.calibration_sequences=20",
    "data.evaluation_sequences=8",
    "data.length=64",
    "tracker=none",
    "codebook=half_integer",
    "rounding=nearest",
    "hessian=original",
    "finetune.validation=4",
]


def settings(out, cache, *overrides, finetune="block"):
    GlobalHydra.instance().clear()
    small = SMALL if finetune == "block" else SMALL[:-1]
    with initialize_config_dir(entry_point.CONFIGS, version_base="1.3"):
        return compose("quantize", [*small, f"finetune={finetune}", f"out={out}", f"cache={cache}", *overrides])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("runs") / "tuned"
    return out, run(entry_point.job_of(settings(out, cache)))


def test_it_lowers_the_divergence_and_reports_every_block(finished, tmp_path, cache):
    _, results = finished
    plain = run(entry_point.job_of(settings(tmp_path / "plain", cache, finetune="none")))
    assert plain is not None and results["kl_mean"] < 0.92 * plain["kl_mean"]
    own = run(entry_point.job_of(settings(tmp_path / "own", cache, "finetune.stream=quantized")))
    assert own is not None and own["kl_mean"] < 0.92 * plain["kl_mean"] and own["kl_mean"] != results["kl_mean"]
    reports = results["finetune"]["blocks"]
    assert [entry["block"] for entry in reports] == [i for i in range(4) for _ in range(4)]
    assert all(entry["after"] <= entry["before"] and entry["stopped"] is None for entry in reports)


def test_a_killed_run_continues_to_the_same_bytes(finished, tmp_path, cache, monkeypatch):
    out, _ = finished
    save, saved = Records.save, []

    def failing(self, *arguments):
        if len(saved) == 9:  # in the records of the second block
            raise KeyboardInterrupt
        saved.append(0)
        return save(self, *arguments)

    monkeypatch.setattr(Records, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        run(entry_point.job_of(settings(tmp_path / "cut", cache)))
    monkeypatch.setattr(Records, "save", save)
    run(entry_point.job_of(settings(tmp_path / "cut", cache)))
    digests = [json.loads((o / "artifact" / "model.json").read_text())["sha256"] for o in (out, tmp_path / "cut")]
    assert digests[0] == digests[1]
    norms = artifact.load(out / "artifact").params["blocks"][0]["input_layernorm"]
    assert np.any(np.asarray(norms) != np.asarray(models.load("tiny").params["blocks"][0]["input_layernorm"]))


def test_a_block_without_errors_has_nothing_to_gain():
    model = models.load("tiny")
    parameters = model.params["blocks"][0]
    tokens = np.arange(10 * 16, dtype=np.int32).reshape(10, 16)
    x = embedded(model.params["embed"], tokens, model.config, 4)
    y = forward_block(parameters, x, model.config, 4)
    options = BlockTuning(rules=(RateRule(".", 1e-3),), epochs=2, batch=4, validation=2)
    tuned, report = tune_block(parameters, x, y, model.config, options, seed=0)
    assert report.before < 1e-9 and report.after <= report.before
    for one, other in zip(jax.tree.leaves(tuned), jax.tree.leaves(parameters), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    with pytest.raises(InputError, match="10 calibration windows"):
        tune_block(parameters, x, y, model.config, BlockTuning(rules=(RateRule(".", 1e-3),), batch=9), seed=0)
    with pytest.raises(InputError, match="no rule covers input_layernorm"):
        tune_block(parameters, x, y, model.config, BlockTuning(rules=(RateRule("gain", 1e-3),), validation=2), seed=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hessian=sequential", "needs hessian=original"),
        ("finetune.epochs=0", "at least 1"),
        ("finetune.stream=corrected", "allowed are: original, quantized"),
        ("+finetune.tokens=3", "there is no 'tokens' in finetune"),
        ("data.calibration_sequences=6", "6 calibration windows"),
    ],
)
def test_bad_settings_are_refused(tmp_path, cache, override, message):
    with pytest.raises(InputError, match=message):
        run(entry_point.job_of(settings(tmp_path / "bad", cache, override)))

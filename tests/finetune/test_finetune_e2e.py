"""End-to-end tuning of the embedded model: it helps, resumes to the same bits, stops at a loss that is not finite."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import experiments._quantize as entry_point
from qjax import finetune, models
from qjax.errors import InputError, RunError
from qjax.evaluate.compare import compare, reference_states
from qjax.finetune import loop
from qjax.interchange import artifact
from qjax.job.run import run
from qjax.training.order import windows_at

SMALL = [
    "model=tiny",
    "data.calibration_sequences=8",
    "data.evaluation_sequences=4",
    "data.length=64",
    "tracker=none",
    "codebook=half_integer",
    "rounding=nearest",
    "finetune=e2e",
    "finetune.sequences=24",
    "finetune.validation=4",
    "finetune.tokens=2560",
    "finetune.validate_every=4",
    "finetune.checkpoint_every=3",
]


def settings(out, cache, *overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(entry_point.CONFIGS, version_base="1.3"):
        return compose("quantize", [*SMALL, f"out={out}", f"cache={cache}", *overrides])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("runs") / "tuned"
    return out, run(entry_point.job_of(settings(out, cache)))


def test_it_lowers_the_divergence_and_says_how(finished):
    out, results = finished
    report = results["finetune"]
    assert results["kl_mean"] < 0.9 * report["before"]["kl_mean"]
    assert results["perplexity"] < report["before"]["perplexity"]
    assert report["tokens"] == 2560 and report["steps"] == 10 and report["stopped"] is None
    assert report["validation_after"] < report["validation_before"]
    assert set(report["moved"]) == {"input_gain", "output_gain", "input_layernorm", "post_attention_layernorm", "norm"}
    assert all(0 < entry["rms_change"] < 0.2 for entry in report["moved"].values())
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 0
    assert json.loads((out / "results.json").read_text())["finetune"] == report


def test_the_artifact_holds_the_tuned_model(finished, cache):
    out, results = finished
    stored = artifact.load(out / "artifact")
    reference = models.load("tiny")
    task = entry_point.job_of(settings(out, cache))
    from qjax import data

    tokens = data.load(tokenizer=reference.tokenizer, vocab_size=2048, seed=0, **task.data)
    teacher = reference_states(reference, tokens.evaluation, 8, cache)
    again = compare(reference, stored.params, teacher, tokens.evaluation, 8)
    assert {key: results[key] for key in again} == again
    assert artifact.model_bytes(stored.params) == results["whole_model_bytes"]


@pytest.mark.parametrize("kill_at", [2, 7])
def test_a_killed_run_continues_to_the_same_bits(finished, tmp_path, cache, kill_at, monkeypatch):
    out, _ = finished
    step = loop.train_step

    def failing(state, *arguments, **options):
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        calls.append(0)
        return step(state, *arguments, **options)

    calls = []
    monkeypatch.setattr(loop, "train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        run(entry_point.job_of(settings(tmp_path / "cut", cache)))
    assert not (tmp_path / "cut" / "results.json").exists()
    monkeypatch.setattr(loop, "train_step", step)
    run(entry_point.job_of(settings(tmp_path / "cut", cache)))
    digests = [json.loads((o / "artifact" / "model.json").read_text())["sha256"] for o in (out, tmp_path / "cut")]
    assert digests[0] == digests[1]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(tmp_path, cache, monkeypatch):
    step = loop.train_step

    def failing(state, *arguments, **options):
        state, loss, norm = step(state, *arguments, **options)
        calls.append(0)
        return state, loss * np.float32("nan" if len(calls) == 6 else 1), norm

    calls = []
    monkeypatch.setattr(loop, "train_step", failing)
    results = run(entry_point.job_of(settings(tmp_path / "nan", cache)))
    assert results is not None
    report = results["finetune"]
    assert "step 6" in report["stopped"] and report["best_step"] == 4
    assert results["kl_mean"] < report["before"]["kl_mean"]


def test_top_k_targets_and_accumulation_tune_too(tmp_path, cache):
    overrides = ["finetune.topk=16", "finetune.batch=2", "finetune.accumulate=2"]
    results = run(entry_point.job_of(settings(tmp_path / "topk", cache, *overrides)))
    assert results is not None and results["kl_mean"] < 0.95 * results["finetune"]["before"]["kl_mean"]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = models.load("tiny")
    rates = finetune.assign(
        (finetune.RateRule("norm$", 1e-2), finetune.RateRule(".", None)), finetune.tunable(model.params)
    )
    view = finetune.view(model.params, rates)
    tokens = np.arange(4 * 16, dtype=np.int32).reshape(4, 16)
    results = []
    for accumulate in (1, 2):
        optimizer = finetune.Optimizer(steps=2)
        state = {"tuned": jax.tree.map(jax.numpy.copy, view.tuned), "optimizer": optimizer.init(view.tuned)}
        state, loss, norm = loop.train_step(
            state,
            view.frozen,
            view.rates,
            tokens.reshape(accumulate, -1, 16),
            {},
            None,
            layout=view.layout,
            config=model.config,
            options=finetune.Options(loss="next_token", chunk=16),
            optimizer=optimizer,
        )
        results.append((float(loss), float(norm)))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.rules=[{pattern: gain, rate: 1e-3}]", "no rule covers"),
        ("finetune.rules=[{pattern: gain}]", "give pattern and rate"),
        ("finetune.tokens=10", "0 steps"),
        ("finetune.loss=mse", "allowed are: kl, next_token"),
        ("+finetune.bacth=2", "no .bacth. in finetune; did you mean batch"),
        ("finetune.batch=0", "at least 1"),
        ("finetune.optimizer.clip=0", "finetune.optimizer.clip is 0"),
    ],
)
def test_bad_settings_are_refused(tmp_path, cache, override, message):
    with pytest.raises(InputError, match=message):
        run(entry_point.job_of(settings(tmp_path / "bad", cache, override)))


def test_checkpoints_of_another_task_are_refused(tmp_path):
    finetune.Checkpoints(tmp_path, "a" * 64).close()
    with pytest.raises(RunError, match="another model, text or configuration"):
        finetune.Checkpoints(tmp_path, "b" * 64)


def test_every_window_is_read_once_per_epoch():
    read = windows_at(0, 30, 10, seed=3)
    for epoch in range(3):
        assert sorted(read[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert list(read[:10]) != list(read[10:20])
    assert list(windows_at(7, 9, 10, seed=3)) == list(read[7:16])


def test_a_frozen_layer_of_a_stack_does_not_move():
    model = models.load("tiny")
    rules = (finetune.RateRule(r"layers\.1\.", None), finetune.RateRule("norm$", 1e-2), finetune.RateRule(".", None))
    view = finetune.view(model.params, finetune.assign(rules, finetune.tunable(model.params)))
    tokens = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)
    task = finetune.Task(
        config=model.config,
        model=view,
        optimizer=finetune.Optimizer(steps=2, warmup=0.0),
        options=finetune.Options(loss="next_token", chunk=16),
        tokens=tokens[:6],
        validation=tokens[6:],
        targets=({}, {}),
        teacher=None,
        batch=2,
        accumulate=1,
        seed=0,
        validate_every=1,
        checkpoint_every=1,
    )
    result = finetune.tune(task)
    before, after = (np.asarray(t["layers.0-3.input_layernorm"]) for t in (view.tuned, result.tuned))
    np.testing.assert_array_equal(before[1], after[1])
    assert result.best_step > 0 and np.all(np.any(before[[0, 2, 3]] != after[[0, 2, 3]], axis=1))
    assert dataclasses.asdict(result)["stopped"] is None

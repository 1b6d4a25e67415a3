"""Training of the embedded model: the pure step, the order of the data, resuming, files, refusals."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from qjax.errors import DataError, InputError, ModelFileError, NumericsError, RunError
from qjax.models.checkpoints.export import hugging_face_config, hugging_face_tensors, rounded, write_directory
from qjax.models.config import ModelConfig
from qjax.models.transformer import forward
from qjax.training import completion, loop
from qjax.training.completion import complete
from qjax.training.loop import Task, held_out_loss, train
from qjax.training.step import Schedule, batch_at, initial_state, sum_loss, train_step
from qjax.training.text import END_OF_TEXT, TrainingText, docstrings, documentation, train_tokenizer, windows

CONFIG = ModelConfig("LlamaForCausalLM", 48, 32, 48, 1, 2, 1, 16, max_positions=16, tie_embeddings=True)
SCHEDULE = Schedule(steps=12, learning_rate=0.05, warmup=3)


def make_task(**changes) -> Task:
    random = np.random.default_rng(0)
    period = random.integers(1, CONFIG.vocab_size, 24).astype(np.int32)
    task = Task(
        config=CONFIG,
        schedule=SCHEDULE,
        stream=np.tile(period, 20),
        held_out=windows(np.tile(period, 3), 16),
        batch=2,
        seed=7,
        first_token=0,
        evaluate_every=4,
    )
    return dataclasses.replace(task, **changes)


def digest(params) -> str:
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).hexdigest()


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of the uninterrupted run."""
    return train(make_task(), tmp_path_factory.mktemp("whole"), 3)


# --- the step -------------------------------------------------------------------------------------------------------


def test_sum_loss_is_the_negative_log_probability_of_every_next_token():
    params = initial_state(jax.random.key(1), CONFIG, SCHEDULE).params
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (3, 9)).astype(np.int32)
    scores = np.asarray(jax.jit(forward, static_argnames="config")(params, tokens[:, :-1], CONFIG), np.float64)
    log_sum = np.log(np.exp(scores).sum(-1))
    expected = sum(log_sum[b, i] - scores[b, i, tokens[b, i + 1]] for b in range(3) for i in range(8))
    assert float(sum_loss(params, tokens, CONFIG)) == pytest.approx(expected, rel=1e-5)


def test_untrained_loss_is_near_that_of_the_uniform_distribution():
    task = make_task()
    params = initial_state(jax.random.key(1), CONFIG, SCHEDULE).params
    assert held_out_loss(params, task.held_out, CONFIG) == pytest.approx(math.log(CONFIG.vocab_size), rel=0.05)


def test_a_step_moves_every_parameter_and_reports_the_loss_before_it():
    task = make_task()
    state = initial_state(jax.random.key(1), CONFIG, SCHEDULE)
    tokens = batch_at(task.stream, 0, 2, 16, 0, 0)
    before = jax.device_get(state.params)
    expected = float(sum_loss(before, tokens, CONFIG)) / 32
    for _ in range(2):  # the warm-up starts at rate 0
        state, loss, norm = train_step(state, tokens, CONFIG, SCHEDULE)
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        assert float(norm) > 0
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, state.params)
    assert all(jax.tree.leaves(moved))


def test_a_periodic_text_is_learnt(whole):
    losses = {step: loss for step, _, loss in whole.history}
    assert losses[12] < losses[4] < math.log(CONFIG.vocab_size)
    assert whole.best_step == min(losses, key=losses.__getitem__)
    assert losses[whole.best_step] == pytest.approx(held_out_loss(whole.params, make_task().held_out, CONFIG), rel=1e-6)


# --- the order of the data ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(1, 7), st.integers(0, 5), st.integers(40, 120), st.integers(1, 12))
def test_batches_do_not_depend_on_how_the_reading_is_cut(position, batch, seed, length, context):
    stream = np.arange(1, length + 1, dtype=np.int32)
    whole = batch_at(stream, position, batch, context, seed, 0)
    parts = [batch_at(stream, position + i, 1, context, seed, 0) for i in range(batch)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert whole.shape == (batch, context + 1)
    assert np.array_equal(np.diff(whole[:, 1:], axis=1), np.ones((batch, context - 1)))  # contiguous
    assert np.all((whole[:, 0] == 0) | (whole[:, 0] == whole[:, 1] - 1))


def test_an_epoch_visits_every_window_once_and_the_next_one_in_another_order():
    stream, context = np.arange(1, 402, dtype=np.int32), 10
    per_epoch = 400 // context - 1
    epochs = [batch_at(stream, e * per_epoch, per_epoch, context, 3, 0)[:, 1] for e in range(2)]
    for starts in epochs:
        assert np.array_equal(np.diff(np.sort(starts)), np.full(per_epoch - 1, context))
    assert not np.array_equal(epochs[0] - epochs[0].min(), epochs[1] - epochs[1].min())


def test_windows_predict_every_token_but_the_first_once():
    tokens = np.arange(50, dtype=np.int32)
    cut = windows(tokens, 7)
    assert cut.shape == (7, 8)
    assert np.array_equal(cut[:, 1:].ravel(), np.arange(1, 50))


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_after", [2, 4, 7, 11])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, whole, killed_after):

    def kill(progress):
        if progress.step == killed_after:
            raise Killed

    with pytest.raises(Killed):
        train(make_task(), tmp_path, 3, kill)
    steps = []
    parts = train(make_task(), tmp_path, 3, lambda progress: steps.append(progress.step))
    assert steps[0] == {2: 1, 4: 5, 7: 7, 11: 10}[killed_after]  # checkpoints at 3, 6, 9 and at a new best (4, 8)
    assert digest(parts.params) == digest(whole.params)
    assert (parts.best_step, parts.history) == (whole.best_step, whole.history)


def test_a_finished_run_returns_its_result_without_a_step(tmp_path):
    first = train(make_task(), tmp_path, 5)
    steps = []
    again = train(make_task(), tmp_path, 5, steps.append)
    assert steps == []
    assert digest(again.params) == digest(first.params)


def test_another_task_in_the_same_folder_is_refused(tmp_path):
    train(make_task(), tmp_path, 5)
    with pytest.raises(RunError, match="another configuration or text"):
        train(make_task(seed=8), tmp_path, 5)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    def second(progress):
        with pytest.raises(RunError, match="in use"):
            train(make_task(), tmp_path, 5)
        raise Killed

    with pytest.raises(Killed):
        train(make_task(), tmp_path, 5, second)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_best(tmp_path, monkeypatch):
    real, calls = loop.train_step, []

    def poisoned(state, tokens, config, schedule):
        state, loss, norm = real(state, tokens, config, schedule)
        calls.append(loss)
        return state, (np.float32("nan") if len(calls) == 7 else loss), norm

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(NumericsError, match=r"step 7: .*nan.* of step 4,"):
        train(make_task(), tmp_path, 100)
    monkeypatch.setattr(loop, "train_step", real)
    resumed = []
    train(make_task(), tmp_path, 100, lambda progress: resumed.append(progress.step))
    assert resumed[0] == 5


def test_a_full_disk_stops_with_the_step_and_the_folder(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.v1.training.Checkpointer.save", full)
    with pytest.raises(RunError, match=r"step 3 cannot be saved in .*No space left"):
        train(make_task(), tmp_path, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch": 0}, "batch is 0"), ({"evaluate_every": 0}, "evaluate_every is 0")],
)
def test_counts_below_one_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_task(**changes)


def test_warmup_as_long_as_the_schedule_is_refused():
    with pytest.raises(InputError, match="warmup is 12"):
        make_task(schedule=dataclasses.replace(SCHEDULE, warmup=12))


def test_checkpoint_interval_below_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="checkpoint_every is 0"):
        train(make_task(), tmp_path, 0)


def test_texts_shorter_than_a_window_are_refused():
    with pytest.raises(DataError, match="fewer than two windows"):
        batch_at(np.arange(20, dtype=np.int32), 0, 1, 16, 0, 0)
    with pytest.raises(DataError, match="do not fill one window"):
        windows(np.arange(16, dtype=np.int32), 16)


# --- text and tokenizer ---------------------------------------------------------------------------------------------


def test_held_out_text_is_the_last_part_of_the_topics_and_not_in_the_training_text():
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[key] for key in sorted(topics))
    training, held_out = documentation()
    assert (training, held_out) == (whole[: int(0.85 * len(whole))], whole[int(0.85 * len(whole)) :])


def test_docstrings_are_sorted_unique_and_without_tests(tmp_path):
    long = "A sentence that is long enough to be taken as English text."
    files = {
        "b.py": f'"""{long}"""\ndef f():\n    """{long}"""\n',
        "a/m.py": f'def g():\n    """G. {long}"""\nclass C:\n    """C. {long}"""\n    def h():\n        """short"""\n',
        "test/t.py": f'"""T. {long}"""',
        "config-3.11-linux/c.py": f'"""X. {long}"""',
        "template.py": "def {name}(: not Python",
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    assert docstrings(tmp_path) == [f"G. {long}\n\nC. {long}", long]


def test_a_folder_without_docstrings_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"text\.docstrings=false"):
        docstrings(tmp_path)


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(["the function returns the value of the argument " * 20], 280)


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
@settings(max_examples=50, deadline=None)
def test_tokenizer_round_trips_any_text(small_tokenizer, text):
    ids = small_tokenizer.encode(text.replace(END_OF_TEXT, "")).ids
    assert small_tokenizer.decode(ids) == text.replace(END_OF_TEXT, "")


def test_tokenizer_is_deterministic_and_stream_marks_documents(small_tokenizer):
    again = train_tokenizer(["the function returns the value of the argument " * 20], 280)
    assert again.to_str() == small_tokenizer.to_str()
    text = TrainingText(("the value", "the argument"), "held out")
    stream = text.stream(small_tokenizer)
    assert np.count_nonzero(stream == 0) == 2
    assert stream[0] == 0
    assert small_tokenizer.decode(stream.tolist()) == "the valuethe argument"


def test_vocabularies_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="at least 257"):
        train_tokenizer(["text"], 256)
    with pytest.raises(DataError, match=r"lower model\.vocab_size"):
        train_tokenizer(["text"], 2048)


# --- files ----------------------------------------------------------------------------------------------------------


def test_directory_holds_the_rounded_model_and_is_not_overwritten(tmp_path, small_tokenizer):
    config = dataclasses.replace(CONFIG, vocab_size=280, max_positions=64)
    params = initial_state(jax.random.key(1), config, SCHEDULE).params
    folder = tmp_path / "deep" / "model"
    write_directory(folder, params, config, small_tokenizer.to_str(), {"seed": 1}, 0)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "training.json",
    ]
    assert json.loads((folder / "config.json").read_text()) == hugging_face_config(config, 0)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    stored = load_file(folder / "model.safetensors")
    assert len(stored) == 2 + 9 * config.num_layers
    expected = hugging_face_tensors(params, config)
    assert all(np.array_equal(stored[name], expected[name]) for name in expected)
    back = jax.tree.leaves(hugging_face_tensors(rounded(params), config))
    assert all(np.array_equal(a, b) for a, b in zip(back, jax.tree.leaves(expected), strict=True))
    with pytest.raises(RunError, match="not overwritten"):
        write_directory(folder, params, config, "", {}, 0)
    write_directory(folder, params, config, small_tokenizer.to_str(), {"seed": 2}, 0, replace=True)
    assert json.loads((folder / "training.json").read_text()) == {"seed": 2}
    assert [p.name for p in folder.parent.iterdir()] == ["model"]  # no staging folder is left


def test_a_failed_write_leaves_the_old_directory(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    params = initial_state(jax.random.key(1), CONFIG, SCHEDULE).params
    write_directory(folder, params, CONFIG, "{}", {"seed": 1}, 0)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qjax.models.checkpoints.export.save_file", full)
    with pytest.raises(RunError, match="No space left"):
        write_directory(folder, params, CONFIG, "{}", {"seed": 2}, 0, replace=True)
    assert json.loads((folder / "training.json").read_text()) == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_family_with_other_options_is_not_written_as_llama():
    with pytest.raises(ModelFileError, match="plain LlamaForCausalLM"):
        hugging_face_config(dataclasses.replace(CONFIG, qk_norm=True), 0)


def test_completion_is_greedy_at_temperature_zero_and_seeded_above(small_tokenizer):
    config = dataclasses.replace(CONFIG, vocab_size=280, max_positions=24)
    params = initial_state(jax.random.key(1), config, SCHEDULE).params
    ids = small_tokenizer.encode("the value").ids
    for _ in range(3):  # every length by itself, without padding
        scores = np.asarray(forward(params, jnp.asarray([ids], jnp.int32), config))
        ids.append(int(scores[0, -1].argmax()))
    assert complete(params, config, small_tokenizer, "the value", 3, 0.0, 0) == small_tokenizer.decode(ids)
    warm = [complete(params, config, small_tokenizer, "the value", 8, 1.0, seed) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    with pytest.raises(InputError, match="both fit into 24"):
        complete(params, config, small_tokenizer, "the value", 24, 0.0, 0)


def test_sampling_follows_the_softmax_at_its_temperature(monkeypatch, small_tokenizer):
    config = dataclasses.replace(CONFIG, vocab_size=4, max_positions=8)
    scores = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    monkeypatch.setattr(completion, "_all_logits", lambda *_: np.broadcast_to(scores, (1, 8, 4)))
    first = [complete(None, config, small_tokenizer, "a", 1, 0.5, seed) for seed in range(2000)]
    letters = ["a" + small_tokenizer.decode([token]) for token in range(1, 4)]
    counts = np.array([first.count("a"), *(first.count(letter) for letter in letters)])  # token 0 ends the text
    expected = np.exp(2 * scores) / np.exp(2 * scores).sum()
    assert counts.sum() == 2000
    chi_square = float(((counts - 2000 * expected) ** 2 / (2000 * expected)).sum())
    assert chi_square < 16.3  # the 99.9% point of three degrees of freedom


# --- the entry point ------------------------------------------------------------------------------------------------

SMALL = ["text.docstrings=false", "model.vocab_size=300", "model.hidden_size=32", "model.num_heads=2"]
SMALL += ["model.num_kv_heads=1", "model.head_dim=16", "model.num_layers=1", "model.intermediate_size=32"]
SMALL += ["model.max_positions=64", "schedule.steps=2", "schedule.warmup=1", "batch=1", "evaluate_every=2"]


@pytest.fixture
def compose(tmp_path):
    from hydra import compose, initialize_config_module

    def make(*overrides: str):
        with initialize_config_module("configs", version_base="1.3"):
            return compose("train_tiny", [*SMALL, f"out={tmp_path / 'out'}", *overrides])

    return make


@pytest.fixture
def short_text(monkeypatch):
    from experiments import train_tiny

    words = "the function returns a new object which is the value of its argument "
    monkeypatch.setattr(train_tiny, "documentation", lambda: (words * 60, words * 12))
    monkeypatch.setattr(train_tiny, "train_tokenizer", lambda documents, size: train_tokenizer(documents, 280))
    return train_tiny


def test_run_writes_a_model_whose_record_is_its_measured_loss(compose, short_text, tmp_path, monkeypatch):
    monkeypatch.setattr(short_text, "INSTALLED", tmp_path / "installed" / "tiny")
    options = compose("model.vocab_size=280", "model.max_positions=128")
    folder = short_text.run(options)
    record = json.loads((folder / "training.json").read_text())
    assert record["held_out_perplexity"] == pytest.approx(math.exp(record["held_out_loss"]))
    assert record["tokens_seen"] == 2 * 1 * 128
    assert not (tmp_path / "installed").exists()
    with pytest.raises(RunError, match="finished"):
        short_text.run(options)
    short_text.run(compose("model.vocab_size=280", "model.max_positions=128", "install=true"))
    same = [(p / "model.safetensors").read_bytes() for p in (folder, tmp_path / "installed" / "tiny")]
    assert same[0] == same[1]


def test_out_inside_the_package_is_refused(compose, short_text, tmp_path, monkeypatch):
    monkeypatch.setattr(short_text, "INSTALLED", tmp_path / "out" / "model")
    with pytest.raises(RunError, match="into the package"):
        short_text.run(compose())


def test_errors_of_the_command_line_are_short_and_exit_with_2(tmp_path):
    command = [sys.executable, "-m", "experiments.train_tiny", *SMALL, f"out={tmp_path}", "model.vocab_size=100"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 2
    assert done.stderr.strip().endswith("at least 257 entries")
    assert "Traceback" not in done.stderr

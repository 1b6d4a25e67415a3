"""Training from random weights: the pure step, the order of the data, resuming, refusals."""

import dataclasses
import hashlib
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import DataError, InputError, NumericsError, RunError
from qjax.models.config import ModelConfig
from qjax.models.families.mixture import MixtureConfig
from qjax.models.transformer import forward
from qjax.training import pretrain
from qjax.training.pretrain import Task, held_out_loss, train
from qjax.training.step import Schedule, batch_at, initial_state, routed_loss, sum_loss, train_step
from qjax.training.text import windows

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
    with pytest.raises(
        RunError, match="the training of another model, text or configuration .* or remove it to start again"
    ):
        train(make_task(seed=8), tmp_path, 5)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    def second(progress):
        with pytest.raises(RunError, match="in use"):
            train(make_task(), tmp_path, 5)
        raise Killed

    with pytest.raises(Killed):
        train(make_task(), tmp_path, 5, second)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_best(tmp_path, monkeypatch):
    real, calls = pretrain.train_step, []

    def poisoned(state, tokens, config, schedule):
        state, loss, norm = real(state, tokens, config, schedule)
        calls.append(loss)
        return state, (np.float32("nan") if len(calls) == 7 else loss), norm

    monkeypatch.setattr(pretrain, "train_step", poisoned)
    with pytest.raises(NumericsError, match=r"step 7: .*nan.* of step 4,"):
        train(make_task(), tmp_path, 100)
    monkeypatch.setattr(pretrain, "train_step", real)
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


def test_a_mixture_is_trained_on_its_loss_and_on_the_balance_of_its_routers():
    sizes = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}
    sizes |= {"architecture": "MixtralForCausalLM", "intermediate_size": 8}
    config = MixtureConfig(**sizes, experts=4, active=2)
    state = initial_state(jax.random.key(0), config, SCHEDULE)
    tokens = np.random.default_rng(1).integers(0, 48, (2, 9)).astype(np.int32)
    gate = np.asarray(state.params["blocks"][0]["block_sparse_moe"]["gate"])
    assert len(set(np.round(gate.ravel(), 6).tolist())) == gate.size  # equal ones would send all tokens to two experts
    loss, balance = jax.jit(routed_loss, static_argnames="config")(state.params, tokens, config)
    assert float(loss) == pytest.approx(float(sum_loss(state.params, tokens, config)), rel=1e-5)
    assert 1 <= float(balance) < 4  # 1 is equal use
    before = gate.copy()
    state, mean, _ = train_step(train_step(state, tokens, config, SCHEDULE)[0], tokens, config, SCHEDULE)
    assert float(mean) == pytest.approx(float(loss) / 16, rel=1e-5)  # the first step's rate is 0
    assert np.abs(np.asarray(state.params["blocks"][0]["block_sparse_moe"]["gate"]) - before).max() > 0

"""Tuning in parts on a mesh against tuning on one device: losses, parameters, memory, collectives, checkpoints."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import jax
import numpy as np
import pytest
import small

from qjax import finetune
from qjax.errors import InputError
from qjax.finetune import Checkpoints, loop, lora
from qjax.finetune.sharding import Parts, placing
from qjax.finetune.step import train_step
from qjax.models import head
from qjax.runtime import mesh

CONFIG = small.CONFIG
STEPS, BATCH, LENGTH = 4, 8, 12
RULES = {
    "e2e": (("_gain$", 2e-3), ("norm$", 2e-3), ("^embed", 1e-3), (".", None)),
    "lora": (("lora_[ab]$", 2e-3), (".", None)),
}


def task(kind: str, where=None, accumulate: int = 1) -> loop.Task:
    params = small.model(small.block_local("half_integer"))
    if kind == "lora":
        params = lora.adapted(params, jax.random.key(1), rank=8)
    rules = tuple(finetune.RateRule(*rule) for rule in RULES[kind])
    view = finetune.view(params, finetune.assign(rules, finetune.tunable(params)), placing(where))
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, CONFIG.vocab_size, (20, LENGTH)).astype(np.int32)
    states = rng.standard_normal((20, LENGTH, CONFIG.hidden_size)).astype(np.float32)
    teacher, parts = head(small.model(small.dense)), None
    if where is not None:
        named = {f"teacher.{name}": value for name, value in teacher.items()}
        parts = Parts.of({**view.tuned, **view.frozen, **named}, where)
        teacher = {name.removeprefix("teacher."): value for name, value in parts.placed(named).items()}
    kl = kind == "e2e"
    return loop.Task(
        config=CONFIG,
        model=view,
        optimizer=finetune.Optimizer(steps=STEPS, eps=1e-6),
        options=finetune.Options(loss="kl" if kl else "next_token", chunk=32),
        tokens=tokens[:16],
        validation=tokens[16:],
        targets=({"states": states[:16]}, {"states": states[16:]}) if kl else ({}, {}),
        teacher=teacher if kl else None,
        batch=BATCH // accumulate,
        accumulate=accumulate,
        seed=0,
        validate_every=2,
        checkpoint_every=1,
        parts=parts,
    )


@pytest.fixture(scope="module")
def eight():
    assert len(jax.devices()) == 8
    return mesh.make(8, 1)


@pytest.fixture(scope="module")
def alone():
    return {kind: loop.tune(task(kind)) for kind in RULES}


def agree(found: loop.Result, expected: loop.Result, start) -> None:
    """The same losses, and the same movement of every parameter up to rounding."""
    assert found.best_step == expected.best_step and found.stopped is None
    for ours, theirs in zip(found.history, expected.history, strict=True):
        np.testing.assert_allclose(
            ours[1:] if ours[1] else ours[2:], theirs[1:] if theirs[1] else theirs[2:], rtol=1e-5
        )
    for name, value in expected.tuned.items():
        moved = np.abs(value - np.asarray(start[name])).max()
        assert moved > 1e-4, name
        np.testing.assert_allclose(found.tuned[name], value, atol=0.02 * moved, err_msg=name)


def test_a_run_in_parts_is_the_run_on_one_device(eight, alone):
    own = task("e2e", eight)
    agree(loop.tune(own), alone["e2e"], own.model.tuned)


def test_parameters_and_states_lie_in_parts_and_only_their_gradients_are_scattered(eight):
    own = task("e2e", eight)
    assert own.parts is not None
    tuned, frozen = own.model.tuned, own.model.frozen
    whole = [name for name in (*tuned, *frozen) if own.parts.axis(name) is None]
    assert all(np.size({**tuned, **frozen}[name]) < 64 * 8 for name in whole)  # norms of heads: 2 layers of 16
    state = {"tuned": jax.tree.map(lambda leaf: leaf.copy(), tuned)}
    state["optimizer"] = loop._initial_in_parts(state["tuned"], own.optimizer, own.parts)
    tokens = own.tokens[None, :BATCH]
    targets = {"states": own.targets[0]["states"][None, :BATCH]}
    static = {"layout": own.model.layout, "config": CONFIG, "options": own.options, "optimizer": own.optimizer}
    arguments = (state, frozen, own.model.rates, tokens, targets, own.teacher)
    text = str(train_step.lower(*arguments, **static, parts=own.parts).compile().as_text())
    counts = Counter(re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(", text))
    cut = [name for name in tuned if own.parts.axis(name) is not None]
    assert counts["reduce-scatter"] == len(cut) and counts["all-to-all"] == 0
    stacks = [name for name in (*tuned, *frozen) if name.startswith("layers.") and own.parts.axis(name) is not None]
    assert 2 * len(stacks) <= counts["all-gather"] <= 2 * len(stacks) + 5  # forward, backward; embedding, heads, norms
    new, _, _ = train_step(*arguments, **static, parts=own.parts)
    for leaf in jax.tree.leaves(new):
        if leaf.size >= 64 * 8:
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8}
    assert sum(leaf.size >= 64 * 8 for leaf in jax.tree.leaves(new)) == 3 * sum(
        np.size(value) >= 64 * 8 for value in tuned.values()
    )


def test_a_run_with_adapters_continues_on_another_number_of_devices(eight, alone, tmp_path, monkeypatch):
    step, calls = loop.train_step, []

    def failing(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(0)
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", failing)
    checkpoints = Checkpoints(tmp_path, "a task")
    with pytest.raises(KeyboardInterrupt):
        loop.tune(task("lora", eight), checkpoints)
    checkpoints.close()
    monkeypatch.setattr(loop, "train_step", step)
    reports = []
    own = task("lora", mesh.make(2, 1), accumulate=2)
    checkpoints = Checkpoints(tmp_path, "a task")
    found = loop.tune(own, checkpoints, reports.append)
    checkpoints.close()
    assert [report.step for report in reports] == [3, 4]
    agree(found, alone["lora"], own.model.tuned)


def test_what_does_not_divide_is_refused(eight):
    with pytest.raises(InputError, match=r"finetune\.batch is 4 and mesh\.data 8.* a multiple of 8"):
        dataclasses.replace(task("lora", eight), batch=4)
    with pytest.raises(InputError, match=r"mesh\.model is 2"):
        dataclasses.replace(task("lora"), parts=Parts(mesh.make(4, 2), ()))

"""Greedy continuation against repeated full forwards, and its refusals."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import InputError
from qjax.models import Model, forward, generate, load


@pytest.fixture(scope="module")
def model(fixtures: Path) -> Model:
    return load(fixtures / "qwen3")


def test_agrees_with_repeated_unpadded_forwards(model: Model):
    text = [3, 1, 4, 1, 5]
    for _ in range(3):
        logits = forward(model.params, jnp.asarray([text], jnp.int32), model.config)
        text.append(int(np.argmax(np.asarray(logits)[0, -1])))
    found = generate(model.params, model.config, [3, 1, 4, 1, 5], 3)
    np.testing.assert_array_equal(found, text[5:])
    assert found.dtype == np.int32


def test_stops_after_the_end_token(model: Model):
    free = generate(model.params, model.config, np.asarray([3, 1, 4]), 6)
    end = int(free[2])
    stopped = generate(model.params, model.config, np.asarray([3, 1, 4]), 6, eos_id=end)
    np.testing.assert_array_equal(stopped, free[: list(free).index(end) + 1])


def test_nothing_new(model: Model):
    assert generate(model.params, model.config, [1], 0).size == 0


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 1, "non-empty"),
        ([[1]], 1, "non-empty"),
        ([64], 1, r"allowed is \[0, 63\]"),
        ([-1], 1, r"allowed is \[0, 63\]"),
        ([1], -1, "at least 0"),
        ([1] * 100, 29, "need 129 positions; the model has 128"),
    ],
)
def test_refusals(model: Model, prompt: list, count: int, message: str):
    with pytest.raises(InputError, match=message):
        generate(model.params, model.config, np.asarray(prompt), count)

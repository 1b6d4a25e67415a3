"""Log-likelihoods of continuations against sums over the model's own logits."""

import jax
import numpy as np
import pytest

from qjax import models
from qjax.evaluate.continuations import continuations
from qjax.models import transformer


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny")


def by_hand(model, context, continuation):
    """Token by token, from the logits of the unpadded text."""
    ids = np.asarray([*context, *continuation], np.int32)
    x = transformer.embed(model.params["embed"], ids[None], model.config)
    for block in model.params["blocks"]:
        x = transformer.block(block, x, model.config)
    log_q = np.asarray(jax.nn.log_softmax(transformer.logits(transformer.head(model.params), x, model.config)))[0]
    places = range(len(context) - 1, len(ids) - 1)
    return (
        sum(float(log_q[place, ids[place + 1]]) for place in places),
        all(log_q[place].argmax() == ids[place + 1] for place in places),
    )


def test_sums_of_log_probabilities_in_the_order_of_the_requests(tiny):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 500, a).tolist(), rng.integers(0, 500, b).tolist())
        for a, b in ((5, 3), (70, 20), (1, 1), (9, 40))
    ]
    greedy = models.generate(tiny.params, tiny.config, pairs[0][0], 4).tolist()
    pairs.append((pairs[0][0], greedy))
    found = continuations(tiny.params, tiny.config, pairs, batch=2)
    for (value, likeliest), pair in zip(found, pairs, strict=True):
        expected, expected_likeliest = by_hand(tiny, *pair)
        assert value == pytest.approx(expected, rel=1e-4) and likeliest == expected_likeliest
    assert found[-1][1] and not found[1][1]


def test_a_text_beyond_the_positions_loses_its_beginning(tiny):
    positions = tiny.config.max_positions
    ids = np.random.default_rng(1).integers(0, 500, positions + 20).tolist()
    assert continuations(tiny.params, tiny.config, [(ids[:-5], ids[-5:])], batch=1) == continuations(
        tiny.params, tiny.config, [(ids[20:-5], ids[-5:])], batch=1
    )


def test_errors(tiny):
    with pytest.raises(ValueError, match="request 1 has a context of 0 and a continuation of 1 tokens"):
        continuations(tiny.params, tiny.config, [([1], [2]), ([], [1])])
    with pytest.raises(ValueError, match=r"continuations of 1 to"):
        continuations(tiny.params, tiny.config, [([1], [2] * tiny.config.max_positions)])

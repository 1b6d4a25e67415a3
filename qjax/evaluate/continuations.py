"""Log-likelihoods of given continuations, which multiple-choice tasks compare."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qjax.errors import InputError
from qjax.evaluate.evaluation import hidden_states
from qjax.evaluate.metrics import chunked, predicting
from qjax.evaluate.summary import check_finite
from qjax.models import transformer
from qjax.models.config import ModelConfig

__all__ = ["continuations", "predictions"]

_LENGTH_STEP = 64  # texts of nearly the same length share one compiled set of programs


@functools.partial(jax.jit, static_argnames="config")
def predictions(
    head: dict[str, Any],
    hidden: Float[Array, "batch length width"],
    targets: Int[Array, "batch length-1"],
    config: ModelConfig,
) -> tuple[Float[Array, "batch length-1"], Bool[Array, "batch length-1"]]:
    """(`log q(target)` in nats, whether the target is the likeliest token) of every next token; softmax in float32."""

    def chunk(own: Array, target: Array) -> dict[str, Array]:
        log_q = jax.nn.log_softmax(transformer.logits(head, own, config), axis=-1)
        found = jnp.take_along_axis(log_q, target[..., None], axis=-1)[..., 0]
        return {"found": found, "likeliest": jnp.argmax(log_q, axis=-1) == target}

    flat = chunked(chunk, (predicting(hidden), targets.reshape(-1)), config.vocab_size)
    return flat["found"].reshape(targets.shape), flat["likeliest"].reshape(targets.shape)


def continuations(
    params: Any,
    config: ModelConfig,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch: int = 8,
) -> list[tuple[float, bool]]:
    """`(Σ log q(continuation | context), every token the likeliest)` of (context, continuation) ids, in their order.

    A text longer than the model's positions loses the beginning of its context. Texts of similar length run together,
    padded behind, where a causal model does not look.

    Raises InputError for an empty context or continuation, or a continuation that leaves no place for a context token;
    NumericsError for logits that are not finite.
    """
    texts = []
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation) or len(continuation) >= config.max_positions:
            raise InputError(
                f"request {number} has a context of {len(context)} and a continuation of {len(continuation)} tokens; "
                f"allowed are contexts of at least 1, continuations of 1 to {config.max_positions - 1}"
            )
        texts.append(np.asarray([*context, *continuation], np.int32)[-config.max_positions :])
    found: list[tuple[float, bool]] = [(0.0, False)] * len(texts)
    head = transformer.head(params)
    padded = [min(-(-text.size // _LENGTH_STEP) * _LENGTH_STEP, config.max_positions) for text in texts]
    for length in sorted(set(padded)):
        members = [index for index, own in enumerate(padded) if own == length]
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            tokens = np.zeros((batch, length), np.int32)
            for row, index in zip(tokens, part, strict=False):
                row[: texts[index].size] = texts[index]
            hidden = hidden_states(params, tokens, config, batch)
            likelihood, likeliest = (np.asarray(x) for x in predictions(head, hidden, tokens[:, 1:], config))
            for row, index in enumerate(part):
                end = texts[index].size - 1
                own = slice(end - len(pairs[index][1]), end)
                check_finite({"log-likelihood": likelihood[row, own]}, "the model")
                found[index] = float(likelihood[row, own].sum(dtype=np.float64)), bool(likeliest[row, own].all())
    return found

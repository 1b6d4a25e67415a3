"""Greedy continuation without a cache of keys and values: every step runs the whole padded text again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from qjax.errors import InputError
from qjax.models.config import ModelConfig
from qjax.models.transformer import block, embed, head, logits

__all__ = ["generate"]

_LENGTH_STEP = 32  # texts of nearly the same length share one compiled set of programs


def generate(
    params: Any,
    config: ModelConfig,
    prompt_ids: Sequence[int] | np.ndarray,
    max_new_tokens: int,
    *,
    eos_id: int | None = None,
) -> Int32[np.ndarray, " new"]:
    """The most likely continuation, token by token: at most `max_new_tokens` ids, the last one `eos_id` if it occurred.

    The text is padded at its end to one fixed length, which causal attention makes harmless. Raises InputError for
    an empty prompt, ids outside the vocabulary, or a text longer than the model's positions.
    """
    prompt = np.asarray(prompt_ids, np.int64)
    if prompt.ndim != 1 or prompt.size == 0:
        raise InputError(f"the prompt must be a non-empty sequence of token ids, found shape {list(prompt.shape)}")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise InputError(f"prompt ids lie in [{prompt.min()}, {prompt.max()}]; allowed is [0, {config.vocab_size - 1}]")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}; at least 0 is expected")
    total = prompt.size + max_new_tokens
    if total > config.max_positions:
        raise InputError(
            f"prompt ({prompt.size} tokens) and continuation ({max_new_tokens}) need {total} positions; "
            f"the model has {config.max_positions}"
        )
    tokens = np.zeros((1, min(-(-total // _LENGTH_STEP) * _LENGTH_STEP, config.max_positions)), np.int32)
    tokens[0, : prompt.size] = prompt
    position = prompt.size
    while position < total:
        x = embed(params["embed"], tokens)
        for parameters in params["blocks"]:
            x = block(parameters, x, config)
        # Only the last position goes through the head; the slice is taken on the host and compiles nothing.
        scores = logits(head(params), np.asarray(x)[:, position - 1 : position], config)
        tokens[0, position] = int(np.argmax(np.asarray(scores)[0, 0]))
        position += 1
        if tokens[0, position - 1] == eos_id:
            break
    return tokens[0, prompt.size : position].copy()

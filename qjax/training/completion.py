"""Continue a prompt with a small model, for the record of a training run: no cache, one compiled shape."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from qjax.errors import InputError
from qjax.models.config import ModelConfig
from qjax.models.transformer import forward
from qjax.training.text import END_OF_TEXT_ID

__all__ = ["complete"]

_all_logits = functools.partial(jax.jit, static_argnames="config")(forward)


def complete(
    params: Any, config: ModelConfig, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, seed: int
) -> str:
    """The prompt and up to `tokens` more, greedy at temperature 0; it ends early before a new document.

    Raises InputError when prompt and continuation exceed the model's context.
    """
    ids = list(tokenizer.encode(prompt).ids)
    if not ids or len(ids) + tokens > config.max_positions:
        raise InputError(
            f"the prompt has {len(ids)} tokens and {tokens} are to follow; a prompt is not empty and both fit into "
            f"{config.max_positions}"
        )
    random = np.random.Philox(key=np.array([seed, 0], np.uint64))  # its raw output is stable over numpy versions
    for _ in range(tokens):
        padded = np.zeros((1, config.max_positions), np.int32)  # causal: what follows does not matter
        padded[0, : len(ids)] = ids
        scores = np.asarray(_all_logits(params, padded, config))[0, len(ids) - 1].astype(np.float64)
        if temperature > 0:
            bits = np.asarray(random.random_raw(scores.size)) >> np.uint64(11)
            uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
            scores = scores / temperature - np.log(-np.log(uniform))  # the largest is a sample (Gumbel)
        choice = int(np.argmax(scores))
        if choice == END_OF_TEXT_ID:
            break
        ids.append(choice)
    return tokenizer.decode(ids)

"""Texts and their continuations: what a prompt is as token ids, where a text ends, and the text again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from qjax.models.config import ModelConfig
from qjax.models.generate import generate_batch
from qjax.models.sampling import Sampling
from qjax.models.tokenizers.chat import chat_prompt, stop_ids
from qjax.models.tokenizers.tokenizer import Tokenizer

__all__ = ["continued", "ends", "prompt_ids"]


def prompt_ids(tokenizer: Tokenizer, text: str, *, chat: bool = False) -> Int32[np.ndarray, " tokens"]:
    """The ids of a prompt, behind BOS where the model expects it; a chat's text holds its special tokens itself."""
    ids = tokenizer.encode(text)
    if chat or not tokenizer.adds_bos:
        return ids
    return np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])


def ends(tokenizer: Tokenizer, *, chat: bool = False) -> int | tuple[int, ...] | None:
    """The ids after which a text, or an assistant's message, has ended; None where nothing ends it."""
    return stop_ids(tokenizer) if chat else tokenizer.eos_id


def continued(
    params: Any,
    config: ModelConfig,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    chat_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Every text and what the model makes follow it, as one text each; of a chat's messages the answers alone.

    Args:
      temperature, top_k, top_p, seed: as of `Sampling`; greedy by default.
      chat: take the texts for a user's messages, in the model's own format.
      chat_options: variables of the model's chat template.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    asked = texts
    if chat:
        asked = [chat_prompt([{"role": "user", "content": text}], tokenizer, chat_options) for text in texts]
    prompts = [prompt_ids(tokenizer, text, chat=chat) for text in asked]
    found = generate_batch(
        params, config, prompts, max_new_tokens, sampling=sampling, eos_id=ends(tokenizer, chat=chat)
    )
    new = [tokenizer.decode(ids) for ids in found.tokens]
    return new if chat else [text + more for text, more in zip(texts, new, strict=True)]

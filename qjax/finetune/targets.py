"""Soft targets of the original model: its final states, or its likeliest tokens, kept on disk between runs."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from qjax.evaluate import TeacherCache, hidden_states
from qjax.finetune.losses import topk_teacher
from qjax.models import transformer
from qjax.models.config import ModelConfig

__all__ = ["targets"]


def targets(
    params: Any,
    tokens: Int[np.ndarray, "windows length"],
    config: ModelConfig,
    *,
    model_fingerprint: str,
    batch: int,
    topk: int | None = None,
    cache: pathlib.Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """`{"states": [windows, length, width]}` before the final norm, or `{"index", "log_p"}` `[windows, length, topk]`.

    The states are exact and are turned into logits in every step; the k likeliest tokens spare that product.
    `model_fingerprint` says whose states the `cache` may hold; without a cache they are computed.
    """

    def compute() -> np.ndarray:
        return hidden_states(params, tokens, config, batch, progress)

    key = hashlib.sha256(np.ascontiguousarray(tokens).tobytes() + str(tokens.shape).encode()).hexdigest()
    states = (
        compute()
        if cache is None
        else TeacherCache(cache).get(f"{model_fingerprint}-{batch}", key, compute, jointly=True)
    )
    if topk is None:
        return {"states": states}
    head = transformer.head(params)
    found = [
        topk_teacher(head, np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)]), config, topk)
        for part in (states[start : start + batch] for start in range(0, len(states), batch))
    ]
    index, log_p = (np.concatenate([np.asarray(pair[i]) for pair in found])[: len(tokens)] for i in range(2))
    return {"index": index, "log_p": log_p}

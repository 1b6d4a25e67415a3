"""Continuations of prompts with a cache of keys and values."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from qjax.errors import InputError
from qjax.models.config import ModelConfig
from qjax.models.kv_cache import empty_cache, step
from qjax.models.on_mesh import OverMesh, placed
from qjax.models.sampling import Sampling, next_token
from qjax.models.transformer import embed, head

__all__ = ["Generated", "generate", "generate_batch"]

_LENGTH_STEP = 32  # texts of nearly the same length share one compiled set of programs


@dataclasses.dataclass(frozen=True)
class Generated:
    """Continuations of a batch of prompts.

    Attributes:
      tokens: the new ids of every prompt, the last one the end token if it occurred.
      prompt_tokens: of all prompts together.
      prefill_seconds, decode_seconds: up to the first new tokens, and from there on; compilation included.
      steps: tokens that were decoded one by one, per sequence.
    """

    tokens: list[Int32[np.ndarray, " _"]]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    steps: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding, over all sequences (0 when there was none)."""
        return self.steps * len(self.tokens) / self.decode_seconds if self.steps else 0.0


def _checked(prompts: Sequence[Any], config: ModelConfig, count: int) -> list[np.ndarray]:
    if not prompts:
        raise InputError("there are no prompts; give at least one")
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise InputError(f"max_new_tokens is {count}; a whole number of at least 0 is expected")
    checked = []
    for ids in prompts:
        prompt = np.asarray(ids, np.int64)
        if prompt.ndim != 1 or prompt.size == 0:
            raise InputError(f"the prompt must be a non-empty sequence of token ids, found shape {list(prompt.shape)}")
        if prompt.min() < 0 or prompt.max() >= config.vocab_size:
            raise InputError(
                f"prompt ids lie in [{prompt.min()}, {prompt.max()}]; allowed is [0, {config.vocab_size - 1}]"
            )
        if prompt.size + count > config.max_positions:
            raise InputError(
                f"prompt ({prompt.size} tokens) and continuation ({count}) need {prompt.size + count} positions; "
                f"the model has {config.max_positions}"
            )
        checked.append(prompt.astype(np.int32))
    return checked


def generate_batch(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    eos_id: int | Sequence[int] | None = None,
    on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
    whole: bool | None = None,
) -> Generated:
    """Continue several prompts at once, each by at most `max_new_tokens` or up to `eos_id`, one id or several.

    A sequence's continuation does not depend on the others (but for the rounding of sums in another order).

    Args:
      sampling: how tokens are chosen; sequence i draws with a key of its own.
      on_tokens: called after every step with the new ids and which sequences are still going, `[batch]` each.
      whole: decode by one compiled program instead of one per block; None: except on a CPU, where compiling costs more
        than dispatching.

    Raises InputError for no or empty prompts, ids outside the vocabulary, or texts longer than the model's positions.
    """
    texts = _checked(prompts, config, max_new_tokens)
    count, first = len(texts), params["blocks"][0]
    if isinstance(first, OverMesh):  # every device of the axis has equally many; the surplus ones repeat the last
        texts = [*texts, *[texts[-1]] * (-count % first.rows)]
    lengths = np.array([text.size for text in texts], np.int32)
    batch, longest = len(texts), int(lengths.max())
    rounded = lambda n: min(-(-n // _LENGTH_STEP) * _LENGTH_STEP, config.max_positions)  # noqa: E731
    padded, slots = rounded(longest), rounded(longest + max_new_tokens)
    tokens = np.zeros((batch, padded), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: text.size] = text
    if max_new_tokens == 0:
        return Generated([np.zeros(0, np.int32)] * count, int(lengths[:count].sum()), 0.0, 0.0, 0)
    whole = jax.default_backend() != "cpu" if whole is None else whole
    ends = np.atleast_1d(np.asarray([] if eos_id is None else eos_id, np.int64))
    top, going, new = head(params), np.ones(batch, bool), []
    started = time.perf_counter()
    x = placed(embed(params["embed"], tokens, config), first)
    cache = empty_cache(config, batch, slots, x.dtype, params["blocks"])
    x, cache = step(params["blocks"], x, cache, np.zeros(batch, np.int32), config)
    last = lengths - 1
    first_done, position = started, lengths.copy()
    for number in range(max_new_tokens):
        if number:
            x = placed(embed(params["embed"], new[-1][:, None], config, position), first)
            x, cache = step(params["blocks"], x, cache, position, config, whole=whole)
            position, last = position + 1, np.zeros(batch, np.int32)
        chosen = np.asarray(next_token(top, x, last, np.int32(number), config, sampling))
        if number == 0:
            first_done = time.perf_counter()
        new.append(chosen)
        if on_tokens is not None:
            on_tokens(chosen[:count], going[:count].copy())
        going &= ~np.isin(chosen, ends)
        if not going[:count].any():
            break
    ended = time.perf_counter()
    found = []
    for row in np.stack(new, axis=1)[:count]:
        at = np.flatnonzero(np.isin(row, ends))
        found.append(row[: at[0] + 1 if at.size else row.size].astype(np.int32))
    return Generated(found, int(lengths[:count].sum()), first_done - started, ended - first_done, len(new) - 1)


def generate(
    params: Any,
    config: ModelConfig,
    prompt_ids: Sequence[int] | np.ndarray,
    max_new_tokens: int,
    *,
    eos_id: int | Sequence[int] | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008
) -> Int32[np.ndarray, " new"]:
    """The continuation of one prompt, greedy unless `sampling` says otherwise; see `generate_batch`."""
    return generate_batch(params, config, [prompt_ids], max_new_tokens, eos_id=eos_id, sampling=sampling).tokens[0]

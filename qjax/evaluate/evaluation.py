"""Running a model over evaluation windows, block by block and batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from qjax.data.stream import TokenStream, check_vocabulary
from qjax.errors import InputError
from qjax.evaluate.metrics import token_metrics, token_nll
from qjax.evaluate.summary import Evaluation, check_finite, summarise
from qjax.models import transformer
from qjax.models.config import ModelConfig
from qjax.runtime.ahead import call
from qjax.runtime.mesh import fetched
from qjax.streams.blocks import blocks

__all__ = ["evaluate", "evaluate_alone", "hidden_states", "perplexity", "reference_perplexity"]

Params = Any
Progress = Callable[[int, int], None]  # (steps done, steps in all)

BATCH = 4


def hidden_states(
    params: Params,
    tokens: Int[np.ndarray, "sequences length"],
    config: ModelConfig,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Float[np.ndarray, "sequences length width"]:
    """States after the last block, before the final norm, float32 on the host.

    `params["blocks"]` is iterated once, so it may load its blocks as it goes. Every batch has `batch` windows (the last
    one is filled up with copies of its last window), so that `embed` and `block` are one compiled program each.
    `progress` is called after every block. Raises DataError for an id outside the vocabulary.
    """
    tokens = _checked(tokens, config, batch)
    here = None
    for here in blocks(config, params, tokens, batch=batch, outputs=True):
        if progress is not None:
            progress(here.index + 1, config.num_layers)
    assert here is not None  # a model has blocks: the loop has checked their number
    return np.asarray(here.y).astype(np.float32, copy=False)


def evaluate(
    reference_hidden: Float[np.ndarray, "..."],
    reference_head: dict[str, Any],
    params: Params,
    tokens: TokenStream | Int[np.ndarray, "sequences length"],
    config: ModelConfig,
    *,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
    domains: Mapping[str, np.ndarray] | None = None,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Perplexity, KL to the reference and agreement of the model `params` on windows of tokens.

    Args:
      reference_hidden: [sequences, length, width], the `hidden_states` of the reference on the same windows, e.g. from
        a `TeacherCache`.
      reference_head: `transformer.head` of the reference.
      seed: of the bootstrap's resamples.
      domains: the rows of each domain's windows; with more than one domain their numbers are reported too.
      mesh: where `params` and `reference_head` lie, if on a mesh (`qjax.tensor_parallel.distribute`); its axis "data"
        divides `batch`.

    Raises InputError when the windows and `reference_hidden` differ in shape, NumericsError for non-finite logits.
    """
    stream = tokens if isinstance(tokens, TokenStream) else TokenStream.of(tokens, {})
    expected = (*stream.tokens.shape, config.hidden_size)
    if reference_hidden.shape != expected:
        raise InputError(
            f"reference_hidden must be [sequences, length, width] = {list(expected)} for these windows; "
            f"found {list(reference_hidden.shape)}; compute it with hidden_states from the same tokens"
        )
    hidden = hidden_states(params, stream.tokens, config, batch, progress)
    head = transformer.head(params)
    rows: list[dict[str, np.ndarray]] = []
    parts = (_batches(array, batch) for array in (reference_hidden, hidden, stream.tokens[:, 1:]))
    for reference_part, part, targets in zip(*parts, strict=True):
        found = call(token_metrics, reference_head, head, reference_part, part, targets, config, mesh)
        rows.append(fetched(found))
    metrics = {name: np.concatenate([row[name] for row in rows])[: stream.sequences] for name in rows[0]}
    check_finite({"nll_reference": metrics["nll_reference"]}, "the reference model")
    check_finite({name: metrics[name] for name in ("nll", "kl")}, "the evaluated model")
    protocol = _protocol(stream, seed)
    report = summarise(metrics, **protocol)
    if domains is None or len(domains) < 2:
        return report
    parts = {
        name: summarise({key: values[rows] for key, values in metrics.items()}, **protocol).excerpt()
        for name, rows in domains.items()
    }
    return dataclasses.replace(report, domains=parts)


def perplexity(
    params: Params,
    tokens: TokenStream | Int[np.ndarray, "sequences length"],
    config: ModelConfig,
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> float:
    """`exp(mean nll)` over the `length - 1` predictions of every window. Raises NumericsError for non-finite logits."""
    return evaluate_alone(params, tokens, config, batch=batch, progress=progress, mesh=mesh).perplexity


def evaluate_alone(
    params: Params,
    tokens: TokenStream | Int[np.ndarray, "sequences length"],
    config: ModelConfig,
    *,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> Evaluation:
    """The perplexity of a model without a reference; arguments and errors as of `evaluate`."""
    stream = tokens if isinstance(tokens, TokenStream) else TokenStream.of(tokens, {})
    hidden = hidden_states(params, stream.tokens, config, batch, progress)
    head = transformer.head(params)
    parts = zip(_batches(hidden, batch), _batches(stream.tokens[:, 1:], batch), strict=True)
    found = [fetched(token_nll(head, part, targets, config, mesh)) for part, targets in parts]
    nll = np.concatenate(found)[: stream.sequences]
    check_finite({"nll": nll}, "the model")
    return summarise({"nll": nll}, **_protocol(stream, seed))


def _protocol(stream: TokenStream, seed: int) -> dict[str, Any]:
    return {
        "context_length": stream.length,
        "stride": stream.description.get("stride", stream.length),
        "bos": stream.description.get("bos", "unstated"),
        "tokens_sha256": stream.sha256,
        "seed": seed,
    }


def reference_perplexity(
    hidden: Float[np.ndarray, "sequences length width"],
    head: dict[str, Any],
    tokens: TokenStream,
    config: ModelConfig,
    *,
    batch: int = BATCH,
    mesh: Mesh | None = None,
) -> float:
    """`exp(mean nll)` of a model from its `hidden_states`, infinite where it overflows.

    It runs the program that `evaluate` compiles, with the model on both sides.
    """
    rows = []
    for part, targets in zip(_batches(hidden, batch), _batches(tokens.tokens[:, 1:], batch), strict=True):
        rows.append(fetched(call(token_metrics, head, head, part, part, targets, config, mesh)["nll"]))
    mean = float(np.concatenate(rows)[: tokens.sequences].mean(dtype=np.float64))
    return float(np.exp(mean)) if mean < 700 else float("inf")


def _checked(tokens: np.ndarray, config: ModelConfig, batch: int) -> np.ndarray:
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2 or batch < 1:
        raise InputError(
            f"evaluation needs tokens [sequences >= 1, length >= 2] and batch >= 1; "
            f"found {list(tokens.shape)} and batch {batch}"
        )
    check_vocabulary(tokens, config.vocab_size, "evaluation tokens")
    return np.asarray(tokens, dtype=np.int32)


def _batches(array: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Equal batches of the leading axis; the last is filled up with copies of its last entry."""
    for start in range(0, len(array), batch):
        part = array[start : start + batch]
        missing = batch - len(part)
        yield np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part

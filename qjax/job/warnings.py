"""Warnings before a run starts: too little text, a missing BOS, a broken reference, untested versions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from qjax.codebooks.trellis_codes import COMPUTED
from qjax.data.stream import TokenStream
from qjax.errors import DataError
from qjax.evaluate.evaluation import reference_perplexity
from qjax.models.config import ModelConfig
from qjax.models.structure import structure
from qjax.models.transformer import head

__all__ = ["TESTED_JAX", "check_reference", "codebook_warnings", "run_warnings", "version_warning"]

# Oldest and newest minor version of JAX that the tests have passed on.
TESTED_JAX = ((0, 10), (0, 12))


def version_warning(version: str) -> str | None:
    """A sentence when this version of JAX is outside the tested range, else None."""
    match = re.match(r"(\d+)\.(\d+)", version)
    number = tuple(map(int, match.groups())) if match else (0, 0)
    if TESTED_JAX[0] <= number <= TESTED_JAX[1]:
        return None
    low, high = (".".join(map(str, end)) for end in TESTED_JAX)
    return f"jax {version} is outside the tested versions {low} to {high}; results are not promised, run the tests"


def run_warnings(config: ModelConfig, tokens: TokenStream, tokenizer: Any, bos: str) -> list[str]:
    """Sentences about what will work and may not be meant; none for a usual run.

    `tokens` is the calibration text, `bos` the policy of `qjax.data.load`.
    """
    found = [text] if (text := version_warning(jax.__version__)) else []
    width = max(structure(config).widths.values())
    if tokens.tokens.size < width:
        found.append(
            f"the calibration text has {tokens.tokens.size} tokens, fewer than the {width} inputs of the widest "
            f"matrix: its Hessian has at most rank {tokens.tokens.size} and damping decides the rest; "
            "use more data.calibration_sequences, or a larger damping"
        )
    if getattr(tokenizer, "adds_bos", False) and bos == "none":
        found.append(
            "the model's tokenizer puts BOS before every text and data.bos is none; "
            "many models are much worse without it: data.bos=sequence"
        )
    return found


def codebook_warnings(codebooks: Iterable[Any]) -> list[str]:
    """Sentences about codebooks that are worse than plainer ones: computed trellis codes of so few states have a mean.

    1MAD with L=6 has a mean of −0.45 of its RMS; from L=8 on the mean of every code is below 0.04 of it.
    """
    found = {}
    for codebook in codebooks:
        if getattr(codebook, "name", None) != "trellis" or codebook.L >= 8 or codebook.code not in COMPUTED:
            continue
        values = np.asarray(codebook.values())
        mean = float(values.mean() / np.sqrt(np.mean(values**2)))
        if abs(mean) > 0.1:
            found[codebook.code, codebook.L] = (
                f"codebook.code={codebook.code} with codebook.L={codebook.L}: its {values.size} values have a mean of "
                f"{mean:.2f} of their RMS, so the scalar grid of as many bits may be better; "
                "use codebook.L=8 or more, or codebook.code=mul1"
            )
    return list(found.values())


def check_reference(model: Any, states: np.ndarray, tokens: TokenStream, batch: int, limit: float | None) -> None:
    """Refuse to quantise a model that does not understand the evaluation text, which is what a wrong tokenizer does.

    `states` are the reference's `hidden_states` of `tokens`. One batch of sequences, evenly spaced, shows it.
    Raises DataError when its perplexity is above `limit`.
    """
    if limit is None:
        return
    rows = np.linspace(0, tokens.sequences - 1, min(batch, tokens.sequences)).astype(int)
    sample = TokenStream.of(tokens.tokens[rows], tokens.description)
    found = reference_perplexity(states[rows], head(model.params), sample, model.config, batch=batch)
    if not math.isfinite(found) or found > limit:
        raise DataError(
            f"the original model {model.name} has perplexity {found:.4g} on {len(rows)} windows of the evaluation "
            f"text, above evaluate.sanity_perplexity={limit:g}: the tokenizer is another model's, BOS is missing "
            "(data.bos=sequence), or the text is foreign to it; evaluate.sanity_perplexity=null goes on all the same"
        )

"""From a named source to calibration and evaluation windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from qjax.data.corpus import SOURCES, Corpus
from qjax.data.packing import CHOICES, interleave, shares
from qjax.data.stream import TextModel, Tokenizer, TokenSplit, TokenStream, check_disjoint
from qjax.data.windows import Plan, stream_of
from qjax.errors import DataError, InputError
from qjax.registry import Count, OneOf

__all__ = ["BOS_POLICIES", "PACKINGS", "Mixture", "Windows", "load"]

BOS_POLICIES = ("none", "sequence", "document")
PACKINGS = ("stream", "document_first", "document_random")
# The evaluation windows must not move with the run's seed, or runs could not be compared.
EVALUATION_SEED = 0

Counts = tuple[int | None, int | None]  # calibration and evaluation sequences


@dataclasses.dataclass(frozen=True)
class Windows:
    """The options that all data sources share.

    Attributes:
      calibration_sequences: number of calibration windows; None takes all there are.
      evaluation_sequences: number of evaluation windows; None takes all there are.
      length: tokens per window, BOS included.
      bos: "none"; "sequence": every window begins with BOS; "document": every document does.
      windows: choice of the calibration windows: "random" (the seed's permutation), "even" or "first".
      evaluation_windows: choice of the evaluation windows; "random" has a constant seed.
      packing: "stream" cuts the joined documents without gap or overlap; "document_first" and "document_random" take
        one window of every document that is long enough. None: as the source's protocol says, else "stream".
    """

    calibration_sequences: Count | None = 96
    evaluation_sequences: Count | None = 32
    length: Count = 256
    bos: Annotated[str, OneOf("none", "sequence", "document")] = "none"
    windows: Annotated[str, OneOf("random", "even", "first")] = "random"
    evaluation_windows: Annotated[str, OneOf("random", "even", "first")] = "even"
    packing: Annotated[str, OneOf("stream", "document_first", "document_random")] | None = None


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several domains by weight, interleaved; each part as one of the other sources with a weight.

    Another part, and without one of these: data=mixture '+data.parts.wiki={source: text, path: wiki.txt, weight: 1.0}'
    '~data.parts.kjv'

    Attributes:
      parts: `{name: {source: …, weight: 1.0, …}}`.
    """

    parts: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "pydoc": {"source": "pydoc", "weight": 1.0},
            "kjv": {"source": "kjv", "weight": 1.0},
        }
    )


@dataclasses.dataclass(frozen=True)
class _Options:
    """The options of `load` that all parts of a mixture share."""

    length: int
    bos: str
    seed: int
    windows: str
    evaluation_windows: str
    packing: str | None
    vocab_size: int | None
    bos_id: int | None

    def __post_init__(self) -> None:
        if self.length < 2:
            raise InputError(f"length={self.length}: a window needs at least 2 tokens, one to read and one to predict")
        if self.bos not in BOS_POLICIES:
            raise InputError(f"bos={self.bos!r} is not a BOS policy; there is: {', '.join(BOS_POLICIES)}")
        if self.packing is not None and self.packing not in PACKINGS:
            raise InputError(f"packing={self.packing!r} is unknown; there is: {', '.join(PACKINGS)}")
        for choice in (self.windows, self.evaluation_windows):
            if choice not in CHOICES:
                raise InputError(f"windows can be chosen as {', '.join(CHOICES)}; found {choice!r}")

    def plan(self, source: str, tokenizer: Tokenizer | None, corpus: Corpus) -> Plan:
        """The options completed by what the corpus and the tokenizer say. Raises when they do not fit together."""
        is_text = not isinstance(corpus.calibration, np.ndarray)
        if tokenizer is None and is_text:
            raise InputError(f"data source {source!r} holds text and needs a tokenizer; found none")
        vocab_size, bos_id = self.vocab_size, self.bos_id
        if tokenizer is not None:
            vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
            bos_id = tokenizer.bos_id if bos_id is None else bos_id
        if vocab_size is None:
            raise InputError(f"data source {source!r} needs vocab_size (or a tokenizer) to check the token ids against")
        if self.bos != "none" and bos_id is None:
            raise InputError(
                f"bos={self.bos!r} needs a BOS token and the tokenizer has none; set bos_id, or choose bos='none'"
            )
        if self.bos != "none" and bos_id is not None and not 0 <= bos_id < vocab_size:
            raise DataError(f"bos_id={bos_id} is outside the vocabulary of {vocab_size} (ids 0 to {vocab_size - 1})")
        packing = self.packing or corpus.packing
        if packing != "stream" and not is_text:
            raise InputError(f"packing={packing!r} needs documents of text; for {source!r} choose packing='stream'")
        return Plan(self.length, self.bos, bos_id, packing, vocab_size)


def load(
    source: str,
    tokenizer: Tokenizer | TextModel | None,
    *,
    calibration_sequences: int | None = Windows.calibration_sequences,
    evaluation_sequences: int | None = Windows.evaluation_sequences,
    length: int = Windows.length,
    bos: str = Windows.bos,
    seed: int = 0,
    windows: str = Windows.windows,
    evaluation_windows: str = Windows.evaluation_windows,
    packing: str | None = Windows.packing,
    vocab_size: int | None = None,
    bos_id: int | None = None,
    **options: Any,
) -> TokenSplit:
    """Fixed-length calibration and evaluation windows `[sequences, length]` that never overlap.

    Args:
      source: "pydoc", "kjv", "text", "jsonl", "hf", "tokens" (their options are `options`), or "mixture" with
        `parts={name: {"source": …, "weight": 1.0, …}}`.
      tokenizer: needed by every source of text, or the model whose it is; "tokens" can do with `vocab_size` (and
        `bos_id`) instead.
      calibration_sequences: number of windows; None takes all there are.
      evaluation_sequences: likewise.
      length: tokens per window, BOS included.
      bos: "none"; "sequence": every window begins with BOS; "document": every document does.
      seed: of the random choices among calibration windows.
      windows: choice of the calibration windows: "random" (the seed's permutation), "even" or "first".
      evaluation_windows: likewise; "random" has a constant seed.
      packing: "stream" cuts the joined documents without gap or overlap; "document_first" and "document_random" take
        one window of every document that is long enough. None: as the source's protocol says, else "stream".

    Raises InputError for a wrong option, DataError for data that is missing, damaged, too short, outside the vocabulary
    or the same in calibration and evaluation.
    """
    own: Any = tokenizer
    if isinstance(tokenizer, TextModel):
        vocab_size = tokenizer.config.vocab_size if vocab_size is None else vocab_size
        own = tokenizer.tokenizer
    if not (own is None or isinstance(own, Tokenizer)):
        raise InputError(
            f"tokenizer is {own!r} ({type(own).__name__}); give a tokenizer, a model of qjax.load, or None"
        )
    counts = (calibration_sequences, evaluation_sequences)
    for name, number in (("calibration_sequences", counts[0]), ("evaluation_sequences", counts[1]), ("length", length)):
        if not (isinstance(number, int) or (number is None and name != "length")) or isinstance(number, bool):
            raise InputError(f"{name} is {number!r} ({type(number).__name__}); it is a whole number")
    for side, count in zip(("calibration", "evaluation"), counts, strict=True):
        if count is not None and count < 1:
            raise DataError(f"{side}_sequences={count} leaves zero {side} tokens; ask for at least 1 sequence")
    shared = _Options(length, bos, seed, windows, evaluation_windows, packing, vocab_size, bos_id)
    if source == "mixture":
        split = _mixture(own, counts, shared, options)
    else:
        split = _single(source, own, counts, shared, options)
    check_disjoint(split.calibration.tokens, split.evaluation.tokens, source)
    return split


def _single(
    source: str, tokenizer: Tokenizer | None, counts: Counts, shared: _Options, options: Mapping[str, Any]
) -> TokenSplit:
    corpus = SOURCES.make(source, **options)
    plan = shared.plan(source, tokenizer, corpus)
    calibration = stream_of(corpus, "calibration", counts[0], plan, tokenizer, shared.windows, shared.seed)
    evaluation = stream_of(corpus, "evaluation", counts[1], plan, tokenizer, shared.evaluation_windows, EVALUATION_SEED)
    if calibration.description["text_sha256"] == evaluation.description["text_sha256"]:
        raise DataError(f"{source}: calibration and evaluation data are the same; give different texts")
    return TokenSplit(calibration, evaluation, {source: evaluation})


def _mixture(tokenizer: Tokenizer | None, counts: Counts, shared: _Options, options: Mapping[str, Any]) -> TokenSplit:
    """Parts by weight, interleaved, so that a prefix of the windows keeps the proportions."""
    parts = options.get("parts")
    if not isinstance(parts, Mapping) or not parts or set(options) != {"parts"}:
        raise InputError(
            "data source 'mixture' takes the one option parts={name: {'source': …, 'weight': …, …}} "
            f"with at least one part; found {dict(options)}"
        )
    if None in counts:
        raise InputError("data source 'mixture' needs numbers of sequences; None (all windows) has no proportions")
    weights = {name: float(part.get("weight", 1.0)) for name, part in parts.items()}
    for name, part in parts.items():
        if not weights[name] > 0 or part.get("source", "mixture") == "mixture":
            raise InputError(
                f"mixture part {name!r} needs a source (no mixture) and a weight above 0; found {dict(part)}"
            )
    divided = [shares(count or 0, list(weights.values())) for count in counts]
    splits: dict[str, TokenSplit] = {}
    for name, *part_counts in zip(parts, *divided, strict=True):
        if 0 in part_counts:
            raise InputError(
                f"mixture part {name!r} with weight {weights[name]} gets {part_counts[0]} calibration and "
                f"{part_counts[1]} evaluation sequences; ask for more sequences or raise its weight"
            )
        inner = {key: value for key, value in parts[name].items() if key not in ("source", "weight")}
        splits[name] = _single(parts[name]["source"], tokenizer, (part_counts[0], part_counts[1]), shared, inner)

    def merged(streams: list[TokenStream], side: str) -> TokenStream:
        described = {name: stream.description for name, stream in zip(parts, streams, strict=True)}
        same = {key: next(iter(described.values()))[key] for key in ("bos", "length", "stride")}
        known = [stream.description["documents"] for stream in streams]
        documents = None if None in known else sum(known)
        description = {"source": "mixture", "side": side, **same, "documents": documents}
        description |= {"weights": weights, "parts": described}
        return TokenStream.of(interleave([stream.tokens for stream in streams]), description)

    return TokenSplit(
        merged([split.calibration for split in splits.values()], "calibration"),
        merged([split.evaluation for split in splits.values()], "evaluation"),
        {name: split.evaluation for name, split in splits.items()},
    )

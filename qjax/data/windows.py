"""One half of a corpus as a token stream: BOS policy, packing, choice of windows, and their checks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from qjax.data.corpus import Corpus, Documents, digest
from qjax.data.packing import choose, document_windows, permutation, stream_windows
from qjax.data.stream import Tokenizer, TokenStream, check_vocabulary
from qjax.errors import DataError

__all__ = ["Plan", "stream_of"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The options by which ids become windows, the same for both halves, as in `load`, resolved and checked.

    Attributes:
      length: tokens per window, BOS included.
      bos: "none", "sequence" or "document".
      bos_id: the id of BOS, None where there is none.
      packing: "stream", "document_first" or "document_random".
      vocab_size: ids are below it.
    """

    length: int
    bos: str
    bos_id: int | None
    packing: str
    vocab_size: int

    @property
    def prefix(self) -> int | None:
        """The id in front of every window, if any."""
        return self.bos_id if self.bos == "sequence" else None

    @property
    def stride(self) -> int:
        """Tokens of the source from one window to the next."""
        return self.length - 1 if self.bos == "sequence" else self.length


def stream_of(
    corpus: Corpus, side: str, count: int | None, plan: Plan, tokenizer: Tokenizer | None, how: str, seed: int
) -> TokenStream:
    """The chosen windows of `corpus.calibration` or `corpus.evaluation`; `count` None takes all there are.

    Raises DataError when the half is too short or holds an id outside the vocabulary.
    """
    documents: Documents = getattr(corpus, side)
    name = f"{corpus.description['source']} ({side})"
    description = {
        **corpus.description,
        "side": side,
        "bos": plan.bos,
        "length": plan.length,
        "stride": plan.stride,
        "packing": plan.packing,
        "windows": how,
        "seed": seed if "random" in (how, plan.packing.removeprefix("document_")) else None,
        "documents": len(documents),
        "text_sha256": digest(documents),
    }
    if plan.packing == "stream":
        ids = _joined(documents, corpus.separator, plan, tokenizer, name)
        if isinstance(documents, np.ndarray):
            description["documents"] = int(np.sum(ids == plan.bos_id)) if plan.bos == "document" else None
        available = stream_windows(ids, plan.length, plan.prefix)
        description["tokens_available"] = len(ids)
        _enough(name, len(available), count, plan, f"{len(ids)} tokens")
        chosen = available[choose(len(available), count or len(available), how, seed)]
    else:
        assert tokenizer is not None and not isinstance(documents, np.ndarray)
        chosen = _by_document(documents, plan, tokenizer, how, seed, count, name)
    return TokenStream.of(chosen, description)


def _encode(tokenizer: Tokenizer, text: str, bos: int | None) -> np.ndarray:
    ids = np.asarray(tokenizer.encode(text), dtype=np.int32)
    return ids if bos is None else np.concatenate([np.array([bos], dtype=np.int32), ids])


def _joined(documents: Documents, separator: str, plan: Plan, tokenizer: Tokenizer | None, name: str) -> np.ndarray:
    """All token ids of one half in order, checked against the vocabulary."""
    if isinstance(documents, np.ndarray):
        ids = documents
        if plan.bos == "document" and not np.any(ids == plan.bos_id):
            raise DataError(f"{name}: bos='document', but no token is the BOS {plan.bos_id}; choose bos='sequence'")
    else:
        assert tokenizer is not None
        if plan.bos == "document":
            pieces = [_encode(tokenizer, document, plan.bos_id) for document in documents if document]
            ids = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
        else:
            ids = _encode(tokenizer, separator.join(documents), None)
    check_vocabulary(ids, plan.vocab_size, name)
    return ids


def _by_document(
    documents: tuple[str, ...], plan: Plan, tokenizer: Tokenizer, how: str, seed: int, count: int | None, name: str
) -> np.ndarray:
    """Windows of single documents; no more documents are tokenised than needed, unless they are spread evenly."""
    order = permutation(len(documents), seed) if how == "random" else np.arange(len(documents))
    bos = plan.bos_id if plan.bos == "document" else None

    def encoded() -> Iterator[tuple[int, np.ndarray]]:
        for index in map(int, order):
            ids = _encode(tokenizer, documents[index], bos)
            check_vocabulary(ids, plan.vocab_size, f"{name}, document {index}")
            yield index, ids

    found = document_windows(
        encoded(), plan.length, random_start=plan.packing == "document_random", seed=seed, prefix=plan.prefix
    )
    kept = list(found if how == "even" else itertools.islice(found, count))
    _enough(name, len(kept), count, plan, f"{len(documents)} documents, {len(kept)} of them long enough")
    if how == "even":
        kept = [kept[i] for i in choose(len(kept), count or len(kept), how, seed)]
    return np.stack(kept)


def _enough(name: str, available: int, count: int | None, plan: Plan, found: str) -> None:
    needed = max(count or 1, 1)
    if available < needed:
        raise DataError(
            f"{name}: found {found}, that is {available} windows of length {plan.length}; needed {needed} windows "
            f"({needed * plan.stride} tokens); ask for fewer sequences, a shorter length, or give more text"
        )

"""Token streams: fixed-length windows of token ids with the facts that identify them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qjax.data.packing import interleave
from qjax.errors import DataError, InputError

__all__ = ["TextModel", "TokenSplit", "TokenStream", "Tokenizer", "as_stream", "check_disjoint", "check_vocabulary"]


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer as the data layer uses it. `encode` adds no special tokens: the BOS policy decides about those."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    def encode(self, text: str) -> Sequence[int] | np.ndarray: ...


@runtime_checkable
class TextModel(Protocol):
    """A model as the data layer uses it: its tokenizer, and the size of its vocabulary."""

    @property
    def config(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...


@dataclasses.dataclass(frozen=True, repr=False)
class TokenStream:
    """Windows `tokens [sequences, length]` int32 that a model reads independently of each other.

    Attributes:
      tokens: read-only token ids.
      sha256: hash of the ids and their shape, the identity of the data in fingerprints and caches.
      description: source, bos policy, length, stride, documents and further facts, ready for JSON.
    """

    tokens: np.ndarray
    sha256: str
    description: dict[str, Any]

    @classmethod
    def of(cls, tokens: np.ndarray, description: Mapping[str, Any]) -> TokenStream:
        """A hashed stream of a copy of `tokens [sequences, length]`. Raises InputError unless they are integers."""
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(
                f"a token stream needs integers [sequences, length]; found {tokens.dtype} {list(tokens.shape)}"
            )
        ids = np.ascontiguousarray(tokens, dtype="<i4").copy()
        ids.setflags(write=False)
        shape = f"int32 {ids.shape[0]} {ids.shape[1]}\n".encode()
        return cls(ids, hashlib.sha256(shape + ids.tobytes()).hexdigest(), dict(description))

    @property
    def sequences(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def __repr__(self) -> str:
        source = " ".join(str(self.description[key]) for key in ("source", "side") if key in self.description)
        return f"TokenStream({source + ', ' if source else ''}{self.sequences} × {self.length} tokens)"


@dataclasses.dataclass(frozen=True, repr=False)
class TokenSplit:
    """Calibration and evaluation windows that share no window.

    Attributes:
      calibration: windows to calibrate on.
      evaluation: windows to evaluate on.
      domains: the evaluation windows by domain; one entry, unless the source is a mixture.
    """

    calibration: TokenStream
    evaluation: TokenStream
    domains: dict[str, TokenStream]

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """The rows of the evaluation windows that belong to each domain."""
        sizes = [stream.sequences for stream in self.domains.values()]
        order = interleave([np.full((size, 1), index) for index, size in enumerate(sizes)])[:, 0]
        return {name: np.flatnonzero(order == index) for index, name in enumerate(self.domains)}

    def __repr__(self) -> str:
        sides = {"calibration": self.calibration, "evaluation": self.evaluation}
        sizes = (f"{side} {own.sequences} × {own.length}" for side, own in sides.items())
        return f"TokenSplit({', '.join(self.domains)}: {', '.join(sizes)} tokens)"


def as_stream(tokens: Any, side: str) -> TokenStream:
    """The stream that is meant: the `side` of a split, a stream itself, or that of token ids `[sequences, length]`.

    Raises InputError for anything else.
    """
    if isinstance(tokens, TokenSplit):
        return getattr(tokens, side)
    if isinstance(tokens, TokenStream):
        return tokens
    array = np.asarray(tokens) if hasattr(tokens, "shape") or isinstance(tokens, list | tuple) else None
    if array is None or array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or 0 in array.shape:
        found = type(tokens).__name__ if array is None else f"{array.dtype}{list(array.shape)}"
        raise InputError(
            f"tokens are {found}; give what qjax.data.load returns, or token ids as an array of integers "
            "[sequences, length]"
        )
    return TokenStream.of(array, {"source": "array"})


def check_vocabulary(tokens: np.ndarray, vocab_size: int, name: str) -> None:
    """Raise DataError naming the first position whose id is outside `[0, vocab_size)`."""
    bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if bad.size:
        where = np.unravel_index(bad[0], tokens.shape)
        position = ", ".join(str(int(i)) for i in where)
        raise DataError(
            f"{name}: token id {int(tokens[where])} at position {position} is outside the vocabulary of {vocab_size} "
            f"(ids 0 to {vocab_size - 1}; {bad.size} such tokens); use the tokenizer that belongs to the model"
        )


def check_disjoint(calibration: np.ndarray, evaluation: np.ndarray, name: str) -> None:
    """Raise DataError when some window `[length]` of `evaluation` also occurs in `calibration`."""
    seen = {row.tobytes(): index for index, row in enumerate(calibration)}
    for index, row in enumerate(evaluation):
        if row.tobytes() in seen:
            raise DataError(
                f"{name}: evaluation window {index} has the same tokens as calibration window {seen[row.tobytes()]}, "
                "so the evaluation would not be held out; use other texts, or longer windows if the text repeats itself"
            )

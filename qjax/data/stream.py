"""Token streams: fixed-length windows of token ids with the facts that identify them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qjax.data.packing import interleave
from qjax.errors import DataError, InputError

__all__ = ["TokenSplit", "TokenStream", "Tokenizer", "check_disjoint", "check_vocabulary"]


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer as the data layer uses it. `encode` adds no special tokens: the BOS policy decides about those."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    def encode(self, text: str) -> Sequence[int] | np.ndarray: ...


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
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

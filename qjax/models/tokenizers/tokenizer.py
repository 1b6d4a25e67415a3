"""Text to token ids and back, the same way for every kind of tokenizer file."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer

from qjax.errors import DataError, InputError, ModelFileError
from qjax.models.checkpoints.files import refuse_pointer, sha256_text
from qjax.models.tokenizers.chat_template import ChatTemplate

__all__ = ["Tokenizer", "parsed", "read_tokenizer_json"]


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids that mark the beginning and the end of a text.

    Attributes:
      bos_id, eos_id: special ids, or None where the model has none.
      adds_bos: whether the model expects BOS before every text. `encode` never adds it: the data stage decides.
      chat: the model's own chat template, or None where it came without one.
      vocab_size: number of ids the tokenizer can produce (the model's embedding may have more rows).
      limit: rows of the model's embedding where it has fewer, as with tokens that were added later; else None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | None,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        adds_bos: bool = False,
        chat: ChatTemplate | None = None,
        missing: str = "this model has no tokenizer",
    ):
        """`backend` None makes a tokenizer whose every use raises ModelFileError with the text `missing`."""
        self._backend, self._missing = backend, missing
        self.bos_id, self.eos_id, self.adds_bos = bos_id, eos_id, adds_bos
        self.chat = chat
        self.limit: int | None = None
        self.vocab_size = 0 if backend is None else backend.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens)"

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The underlying tokenizer. Raises ModelFileError where the model came without one."""
        if self._backend is None:
            raise ModelFileError(self._missing)
        return self._backend

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's whole definition and its special ids."""
        definition = "" if self._backend is None else self._backend.to_str()
        return sha256_text([definition, f"{self.bos_id} {self.eos_id} {self.adds_bos}"])

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Token ids of a text, without BOS or EOS.

        Raises DataError for a text that is not valid Unicode, and for a token that the embedding has no row for.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"the text has an unpaired surrogate at character {error.start}; clean it first") from error
        backend = self.backend
        try:
            found = backend.encode(text, add_special_tokens=False)
            ids = np.asarray(found.ids, np.int32)
        except Exception as error:  # the package raises plain Exception
            raise DataError(
                f"the tokenizer cannot encode the text ({error}); take a whole tokenizer.json of the model's revision"
            ) from error
        if self.limit is not None and ids.size and ids.max() >= self.limit:
            place = int(np.argmax(ids >= self.limit))
            token, at = found.tokens[place], found.offsets[place][0]
            raise DataError(
                f"the text has the token {token!r} (id {ids[place]}) at character {at} "
                f"and the model's embedding has {self.limit} rows: it was added to the tokenizer alone; leave it out"
            )
        return ids

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " tokens"], *, skip_special: bool = True) -> str:
        """The text of token ids. Raises InputError for an id outside the vocabulary."""
        array = np.asarray(ids, np.int64).reshape(-1)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            backend = self.backend  # a missing tokenizer is the better message
            raise InputError(
                f"token ids lie in [{array.min()}, {array.max()}]; the vocabulary has {backend.get_vocab_size()}"
            )
        return self.backend.decode(array.tolist(), skip_special_tokens=skip_special)


def parsed(definition: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a definition. Raises ValueError for any damage, also where the package's own code panics."""
    try:
        return tokenizers.Tokenizer.from_buffer(definition)
    except BaseException as error:  # a panic of Rust code arrives as an exception outside Exception
        if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
            raise
        raise ValueError(str(error)) from error


def read_tokenizer_json(path: Path, special: Mapping[str, int | None]) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, with `special` = {"bos_id": ..., "eos_id": ...}.

    Whether the model expects BOS is read off the file's own post-processing. Raises ModelFileError for a damaged file.
    """
    try:
        definition = path.read_bytes()
        refuse_pointer(path, definition[:64])
        backend = parsed(definition)
    except ModelFileError:
        raise
    except Exception as error:  # the package raises plain Exception for any damage
        raise ModelFileError(f"cannot read the tokenizer {path}: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    bos_id = special.get("bos_id")
    try:
        adds_bos = bos_id is not None and backend.encode("a", add_special_tokens=True).ids[:1] == [bos_id]
    except Exception as error:
        raise ModelFileError(f"the tokenizer {path} cannot encode a letter: {error}; fetch the file again") from error
    return Tokenizer(backend, bos_id=bos_id, eos_id=special.get("eos_id"), adds_bos=adds_bos)

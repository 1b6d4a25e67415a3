"""A corpus: calibration and evaluation documents of one source, before any tokenizer is involved."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qjax.errors import DataError, InputError
from qjax.registry import Registry

__all__ = ["SOURCES", "Corpus", "cut_characters", "cut_documents", "digest", "read_utf8", "utf8_lines"]

Documents = tuple[str, ...] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Both halves of a source: texts, or one array of token ids `[tokens]` each.

    Attributes:
      separator: what stands between two documents when they are read as one stream.
      packing: how the source's published protocol cuts windows; used unless the caller chooses another way.
      description: facts that identify the source, ready for JSON.
    """

    calibration: Documents
    evaluation: Documents
    description: dict[str, Any]
    separator: str = "\n\n"
    packing: str = "stream"


SOURCES: Registry[Corpus] = Registry("data source", "qjax.data.SOURCES")


def digest(documents: Documents) -> str:
    """SHA-256 of the documents; a zero byte, which no text holds, ends each of them."""
    if isinstance(documents, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(documents, dtype="<i4").tobytes()).hexdigest()
    hasher = hashlib.sha256()
    for document in documents:
        hasher.update(document.encode("utf-8", "surrogatepass") + b"\0")
    return hasher.hexdigest()


def check_split(split: float) -> None:
    """Raise InputError unless `0 < split < 1`."""
    if not 0.0 < split < 1.0:
        raise InputError(f"split is the fraction of the data used for calibration, above 0 and below 1; found {split}")


def cut_characters(
    documents: Sequence[str], split: float, separator: str = "\n\n"
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Cut the joined text at character `⌊split · length⌋`, inside a document where need be.

    With `(a, b)` the result and `s` the joined text, `separator.join(a) + separator.join(b) = s`.
    """
    check_split(split)
    total = sum(map(len, documents)) + len(separator) * max(len(documents) - 1, 0)
    left = int(split * total)
    for index, document in enumerate(documents):
        if left <= len(document):
            first, rest = document[:left], document[left:]
            return (*documents[:index], first), (rest, *documents[index + 1 :])
        left -= len(document)
        if left < len(separator):
            first, rest = document + separator[:left], separator[left:] + documents[index + 1]
            return (*documents[:index], first), (rest, *documents[index + 2 :])
        left -= len(separator)
    return tuple(documents), ()


def cut_documents(
    documents: Sequence[str], split: float, separator: str = "\n\n"
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Whole documents up to `split` of all characters for calibration; a single document is cut inside instead."""
    check_split(split)
    if len(documents) < 2:
        return cut_characters(documents, split, separator)
    ends = np.cumsum([len(document) for document in documents])
    count = int(np.searchsorted(ends, split * ends[-1], side="right"))
    count = min(max(count, 1), len(documents) - 1)
    return tuple(documents[:count]), tuple(documents[count:])


def _decoded(raw: bytes, path: str | Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8, byte offset {offset + error.start} holds 0x{raw[error.start]:02x}; "
            "convert the file to UTF-8"
        ) from None


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    try:
        with Path(path).expanduser().open("rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; give the path of a UTF-8 text file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the path of a UTF-8 text file") from None


def read_utf8(path: str | Path) -> str:
    """The text of a file, without a byte-order mark. Raises DataError when it is missing, unreadable or not UTF-8."""
    with _opened(path) as file:
        return _decoded(file.read(), path, 0).removeprefix("\ufeff")


def utf8_lines(path: str | Path) -> Iterator[str]:
    """The lines of a file one by one, so that a file larger than memory will do. Raises as `read_utf8`."""
    offset = 0
    with _opened(path) as file:
        for line in file:
            text = _decoded(line, path, offset)
            yield text if offset else text.removeprefix("\ufeff")
            offset += len(line)

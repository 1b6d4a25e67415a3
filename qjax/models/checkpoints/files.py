"""Model files on disk: strict JSON, content hashes, and refusal of what must never be opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qjax.errors import ModelFileError

__all__ = ["check_weight_file", "contained", "parse_json_object", "read_json", "sha256_file", "sha256_text"]

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
_LFS_PREFIX = b"version https://git-lfs"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in pieces of 256 KiB."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(parts: Iterable[str]) -> str:
    """SHA-256 of a sequence of strings (each prefixed with its length, so that no two sequences collide)."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return table


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`; ModelFileError naming `what` for anything else, duplicate keys included."""
    try:
        table = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{what} is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(table, dict):
        raise ModelFileError(f"{what} holds a JSON {type(table).__name__}; an object is expected")
    return table


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelFileError when it is missing, unreadable or not an object."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error
    refuse_pointer(path, data[:64])
    return parse_json_object(data, str(path))


def refuse_pointer(path: Path, start: bytes) -> None:
    """ModelFileError when `start` is the beginning of a Git LFS pointer rather than of the file itself."""
    if start.startswith(_LFS_PREFIX):
        raise ModelFileError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def contained(folder: Path, name: str) -> Path:
    """`folder / name`, refused when the name leaves the model's folder by `..` or an absolute path.

    Names come from files, links from whoever made the folder: a link in it may lead to another disk or a cache.
    """
    if "\0" in name:
        raise ModelFileError(f"{folder} refers to {name!r}, which is no file name; fetch the index again")
    path = folder / name
    inside = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder))
    if Path(name).is_absolute() or not inside:
        raise ModelFileError(f"{folder} refers to {name!r}, which lies outside the model's folder; this is refused")
    return path


def check_weight_file(path: Path) -> int:
    """The size in bytes of a weight file that may be opened. Raises ModelFileError for pickles, pointers and gaps."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelFileError(
            f"{path} is a pickle file, which can run any code when opened; qjax never opens one. "
            "Convert the model to safetensors or take a safetensors revision of it"
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            refuse_pointer(path, stream.read(64))
    except OSError as error:
        raise ModelFileError(f"cannot read the weight file {path}: {error.strerror or error}") from error
    return size

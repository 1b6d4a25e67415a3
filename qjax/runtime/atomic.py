"""Bytes, text, JSON and arrays in durable files, with a SHA-256 that readers verify."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
from ml_dtypes import bfloat16

from qjax.errors import ArtifactError, InputError
from qjax.runtime.durable import open_atomic

__all__ = [
    "read_bytes",
    "read_json",
    "read_safetensors",
    "read_text",
    "verified_metadata",
    "write_bytes",
    "write_json",
    "write_safetensors",
    "write_text",
]

Path = str | os.PathLike[str]

_CHECKSUM = "sha256"
_CHUNK = 1 << 24
_DTYPES = {
    np.dtype(dtype): name
    for dtype, name in [
        (np.bool_, "BOOL"),
        (np.uint8, "U8"),
        (np.int8, "I8"),
        (np.uint16, "U16"),
        (np.int16, "I16"),
        (np.uint32, "U32"),
        (np.int32, "I32"),
        (np.uint64, "U64"),
        (np.int64, "I64"),
        (np.float16, "F16"),
        (bfloat16, "BF16"),
        (np.float32, "F32"),
        (np.float64, "F64"),
    ]
}


def write_bytes(path: Path, data: bytes) -> str:
    """Write `data` durably; returns its SHA-256 in hexadecimal. Raises RunError as `open_atomic` does."""
    with open_atomic(path, len(data)) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write UTF-8 text durably; returns the SHA-256 of the bytes. Raises RunError as `open_atomic` does."""
    return write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> str:
    """Write JSON durably (indented, keys in the order given, NaN refused); returns the SHA-256 of the bytes."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_bytes(path: Path, sha256: str | None = None) -> bytes:
    """The content of a file. Raises ArtifactError when it is missing, unreadable or its SHA-256 is another."""
    try:
        data = pathlib.Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: there is no such file; check the path, or make it again") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ArtifactError(
            f"{path}: damaged: its SHA-256 is {found}, recorded was {sha256}; remove it and make it again"
        )
    return data


def read_text(path: Path, sha256: str | None = None) -> str:
    """UTF-8 text of a file. Raises ArtifactError as `read_bytes` does, or when it is not UTF-8."""
    try:
        return read_bytes(path, sha256).decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); remove it") from error


def read_json(path: Path, sha256: str | None = None) -> Any:
    """The value of a JSON file. Raises ArtifactError as `read_text` does, or when it is not JSON."""
    try:
        return json.loads(read_text(path, sha256))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: is not JSON ({error}); remove it and make it again") from error


def _header(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, array in arrays.items():
        if array.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype) for dtype in _DTYPES)
            raise InputError(
                f"array {name!r} has dtype {array.dtype}; a safetensors file holds: {allowed}; view it as one"
            )
        end = offset + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    return header


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _checksum(header: dict[str, Any], chunks: Iterable[Any]) -> str:
    """SHA-256 over the header without its checksum (keys sorted) and the bytes of all tensors."""
    metadata = {key: value for key, value in header["__metadata__"].items() if key != _CHECKSUM}
    hashed = hashlib.sha256(_compact(sorted((header | {"__metadata__": sorted(metadata.items())}).items())))
    for chunk in chunks:
        hashed.update(chunk)
    return hashed.hexdigest()


def write_safetensors(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> str:
    """Write named arrays and text durably as safetensors; returns the SHA-256 that is stored with them.

    The same arrays and text give the same bytes, whatever their order. Arrays are written one after the other: no
    second copy of them is made. The checksum, the entry `sha256` of the file's metadata, covers names, dtypes, shapes,
    metadata and values. Raises InputError for a dtype that the format lacks or a metadata entry `sha256`, RunError as
    `open_atomic` does.
    """
    text = dict(metadata or {})
    if _CHECKSUM in text:
        raise InputError(f"{path}: the metadata entry {_CHECKSUM!r} is the file's own checksum; rename yours")
    host = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    header = _header(host, text)
    # A view as bytes fails on shape () and on empty arrays; a flat view of them does not.
    raw = [array.reshape(-1).view(np.uint8) for array in host.values()]
    checksum = _checksum(header, (array.data for array in raw))
    header["__metadata__"][_CHECKSUM] = checksum
    encoded = _compact(header)
    encoded += b" " * (-len(encoded) % 8)  # the format wants tensors aligned to 8 bytes
    with open_atomic(path, 8 + len(encoded) + sum(array.nbytes for array in raw)) as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for array in raw:
            file.write(array.data)
    return checksum


def _verified_metadata(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        recorded = header["__metadata__"].pop(_CHECKSUM)
        found = _checksum(header, iter(lambda: file.read(_CHUNK), b""))
    if found != recorded:
        raise ArtifactError(
            f"{path}: damaged: its SHA-256 is {found}, recorded was {recorded}; remove it and make it again"
        )
    return header["__metadata__"]


def read_safetensors(
    path: Path, sha256: str | None = None, *, verify: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of a file of `write_safetensors`, after its checksum was verified (and is `sha256`, if given).

    Without `verify` the checksum is not computed: for a file whose bytes were verified otherwise.
    Raises ArtifactError, naming the file, when it is missing, truncated, damaged, not safetensors or has no checksum.
    """
    with (
        _explained_reading(path),
        safetensors.safe_open(path, framework="numpy") as file,
    ):  # validates lengths and shapes
        recorded = (file.metadata() or {}).get(_CHECKSUM)
        if recorded is None:
            raise ArtifactError(f"{path}: has no checksum in its metadata; it was not written by qjax's runs")
        if sha256 is not None and recorded != sha256:
            raise ArtifactError(f"{path}: its SHA-256 is {recorded}, expected was {sha256}; it is another file")
        metadata = _verified_metadata(path) if verify else {k: v for k, v in file.metadata().items() if k != _CHECKSUM}
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - no iteration


def verified_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file of `write_safetensors` after its checksum was verified; it is read a piece at a time.

    Raises ArtifactError as `read_safetensors` does.
    """
    with _explained_reading(path):
        with safetensors.safe_open(path, framework="numpy") as file:
            if _CHECKSUM not in (file.metadata() or {}):
                raise ArtifactError(f"{path}: has no checksum in its metadata; it was not written by qjax's runs")
        return _verified_metadata(path)


@contextlib.contextmanager
def _explained_reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: there is no such file; check the path, or make it again") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); check the path and its permissions") from error
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path}: truncated or not a safetensors file ({error}); remove it and make it again"
        ) from error

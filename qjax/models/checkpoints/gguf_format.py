"""The header of a GGUF file (versions 2 and 3, little-endian), read with every length checked against the file.

Layout: magic, version, number of tensors, number of metadata entries; the entries (key, type, value); the tensors'
names, dimensions (fastest first), types and offsets; padding to the alignment; the data.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qjax.errors import ModelFileError
from qjax.models.checkpoints.files import check_weight_file

__all__ = ["GgufHeader", "GgufTensor", "read_gguf", "read_gguf_header"]

_MAGIC = b"GGUF"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_PARTS = 10_000
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` slowest dimension first, `start` and `size` in bytes of the file `path`."""

    path: Path

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """Metadata (scalars as Python values, numeric arrays as numpy arrays, strings as lists) and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Sequential reads from a buffer; a read past its end is a truncated file."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.position = data, path, 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ModelFileError(
                f"{self.path} is truncated or damaged: its header asks for {count} bytes at {self.position}, "
                f"the file has {len(self.data)}; fetch it again"
            )
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def integer(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.integer("<Q")).decode("utf-8", "replace")

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.integer("<I"), self.integer("<Q")
            if inner == _STRING:
                # Every string takes at least its eight length bytes, so the bound keeps a false count from looping.
                if 8 * count > len(self.data) - self.position:
                    self.take(8 * count)
                return [self.string() for _ in range(count)]
            return np.frombuffer(self.take(count * self._scalar(inner, key).itemsize), self._scalar(inner, key))
        scalar = self._scalar(kind, key)
        return np.frombuffer(self.take(scalar.itemsize), scalar)[0].item()

    def _scalar(self, kind: int, key: str) -> np.dtype:
        if kind not in _SCALARS:
            raise ModelFileError(f"{self.path}: the metadata entry {key!r} has the unknown type {kind}")
        return np.dtype(_SCALARS[kind])


def _tensor_info(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.string()
    count = cursor.integer("<I")
    if not 1 <= count <= _MAX_DIMENSIONS:
        raise ModelFileError(f"{cursor.path}: tensor {name} has {count} dimensions; 1 to {_MAX_DIMENSIONS} are allowed")
    shape = tuple(cursor.integer("<Q") for _ in range(count))[::-1]
    code = cursor.integer("<I")
    if code not in {int(known) for known in GGML_QUANT_SIZES}:
        raise ModelFileError(
            f"{cursor.path}: tensor {name} has the unknown type number {code}; a newer `gguf` may know it"
        )
    return name, GGMLQuantizationType(code), shape, cursor.integer("<Q")


def _placed(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    if 24 * count > len(cursor.data) - cursor.position:
        cursor.take(24 * count)
    infos = [_tensor_info(cursor) for _ in range(count)]
    origin = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in infos:
        block, bytes_per_block = GGML_QUANT_SIZES[kind]
        if name in tensors:
            raise ModelFileError(f"{cursor.path}: tensor {name} occurs twice")
        if shape[-1] % block:
            raise ModelFileError(f"{cursor.path}: {name} has rows of {shape[-1]}, no multiple of {kind.name}'s {block}")
        size = math.prod(shape) // block * bytes_per_block
        if origin + offset + size > len(cursor.data):
            raise ModelFileError(
                f"{cursor.path} is truncated: tensor {name} ends at byte {origin + offset + size}, "
                f"the file has {len(cursor.data)}; fetch it again"
            )
        tensors[name] = GgufTensor(cursor.path, kind, shape, origin + offset, size)
    return tensors


def read_gguf(path: Path) -> tuple[GgufHeader, tuple[Path, ...]]:
    """(metadata and all tensors, the files) of a GGUF file, or of one in parts (`split.count`) by its first.

    Raises ModelFileError as `read_gguf_header`, for another part than the first, and for a part that is not there.
    """
    header = read_gguf_header(path)
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):
        return header, (path,)
    found = _PART.fullmatch(path.name)
    if type(count) is not int or not 1 < count <= _PARTS or found is None or int(found[3]) != count:
        raise ModelFileError(
            f"{path} says that it is one of {count!r} parts; their names are <name>-00001-of-{count:05}.gguf"
            if type(count) is int
            else f"{path}: split.count is {count!r}; a number of parts is expected"
        )
    if header.metadata.get("split.no", 0) != 0 or int(found[2]) != 1:
        raise ModelFileError(
            f"{path} is part {found[2]} of {count}; give the first, {found[1]}-00001-of-{found[3]}.gguf"
        )
    files = tuple(path.with_name(f"{found[1]}-{number:05}-of-{found[3]}.gguf") for number in range(1, count + 1))
    tensors = dict(header.tensors)
    for file in files[1:]:
        if not file.exists():
            raise ModelFileError(f"{path} is the first of {count} parts and {file.name} is not beside it; fetch it")
        own = read_gguf_header(file).tensors
        if twice := tensors.keys() & own.keys():
            raise ModelFileError(f"{file}: the tensor {min(twice)} is in an earlier part already")
        tensors |= own
    expected = header.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ModelFileError(f"{path}: its {count} parts have {len(tensors)} tensors, of {expected} that it announces")
    return GgufHeader(header.metadata, tensors), files


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata and tensor table of a GGUF file. Raises ModelFileError naming what is wrong with it."""
    size = check_weight_file(path)
    if size < 24:
        raise ModelFileError(f"{path} is truncated or not a GGUF file: it has {size} bytes")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        if (magic := cursor.take(4)) != _MAGIC:
            raise ModelFileError(f"{path} is not a GGUF file: it begins with {magic!r}, not {_MAGIC!r}")
        version = cursor.integer("<I")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
            raise ModelFileError(
                f"{path} is a big-endian GGUF file; little-endian ones are read: take the usual file of the model, or "
                "convert this one with gguf's gguf_convert_endian.py"
            )
        if version not in (2, 3):
            raise ModelFileError(f"{path}: GGUF version {version} is not supported; 2 and 3, little-endian, are")
        tensor_count, entry_count = cursor.integer("<Q"), cursor.integer("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = cursor.string()
            if key in metadata:
                raise ModelFileError(f"{path}: the metadata entry {key!r} occurs twice")
            metadata[key] = cursor.value(cursor.integer("<I"), key)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ModelFileError(f"{path}: general.alignment is {alignment!r}; a power of two is expected")
        return GgufHeader(metadata, _placed(cursor, tensor_count, alignment))

"""Tensors of one or many safetensors files, with every header checked before any data is read.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data, which
the tensors cover without gaps or overlaps.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qjax.errors import ModelFileError, listed
from qjax.models.checkpoints.files import PICKLE_SUFFIXES, check_weight_file, contained, parse_json_object, read_json

__all__ = ["SafetensorsSource", "read_header"]

_HEADER_LIMIT = 100_000_000
_FLOATS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8}
_BITS |= {"U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64}
_CODES: dict[str, Any] = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8}
_CODES |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": np.uint8}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Entry:
    """The place of one tensor: `start` in bytes from the beginning of `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, info: Any, origin: int) -> tuple[Entry, int, int]:
    """One header line as (entry, begin, end), with begin and end in bytes after the header."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(info, dict) or set(info) != keys:
        raise ModelFileError(f"{path}: the header of tensor {name} must have exactly {listed(keys)}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if dtype not in _BITS:
        raise ModelFileError(f"{path}: tensor {name} has the unknown dtype {dtype!r}; known are {listed(_BITS)}")
    if not isinstance(shape, list) or not all(map(_natural, shape)):
        raise ModelFileError(f"{path}: tensor {name} has the shape {shape!r}; a list of integers >= 0 is expected")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise ModelFileError(f"{path}: tensor {name} has data_offsets {offsets!r}; two integers >= 0 are expected")
    begin, end = offsets
    size = math.prod(shape) * _BITS[dtype] // 8
    if end - begin != size:
        raise ModelFileError(
            f"{path}: tensor {name} of dtype {dtype} and shape {shape} needs {size} bytes, "
            f"but its data_offsets {offsets} hold {end - begin}"
        )
    return Entry(path, dtype, tuple(shape), origin + begin), begin, end


def read_header(path: Path) -> dict[str, Entry]:
    """All tensors of one file by name. Raises ModelFileError naming what is wrong with its header or its size."""
    size = check_weight_file(path)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelFileError(
                f"{path} is truncated or not a safetensors file: its header claims {length} bytes, the file has {size}"
            )
        if length > _HEADER_LIMIT:
            raise ModelFileError(f"{path}: a header of {length} bytes exceeds the format's limit of {_HEADER_LIMIT}")
        header = parse_json_object(stream.read(length), f"the header of {path}")
    header.pop("__metadata__", None)
    found = {name: _entry(path, name, info, 8 + length) for name, info in header.items()}
    position = 0
    for name, (_, begin, end) in sorted(found.items(), key=lambda item: item[1][1:]):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise ModelFileError(f"{path}: tensor {name} {what} (begins at {begin}, expected {position})")
        position = end
    if 8 + length + position != size:
        raise ModelFileError(
            f"{path} is truncated or has extra bytes: its header describes {8 + length + position} bytes, "
            f"the file has {size}; fetch it again"
        )
    return {name: entry for name, (entry, _, _) in found.items()}


class SafetensorsSource:
    """The tensors of a Hugging Face folder: `model.safetensors`, or shards listed in `model.safetensors.index.json`."""

    quantised = False

    def __init__(self, folder: Path):
        if (folder / _SINGLE).exists() or (folder / _SINGLE).is_symlink():
            path = contained(folder, _SINGLE)
            self._entries = read_header(path)
            self.files: tuple[Path, ...] = (path,)
        elif (folder / _INDEX).exists():
            self._entries, self.files = _sharded(folder)
        else:
            raise ModelFileError(_nothing_usable(folder))
        self.names = frozenset(self._entries)
        stored = {entry.dtype for entry in self._entries.values() if entry.dtype in _FLOATS}
        self.description = f"safetensors {'/'.join(sorted(stored))}"

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """The stored type, as in the header."""
        return self._entries[name].dtype

    def nbytes(self, name: str) -> int:
        """The bytes that the tensor takes in its file."""
        entry = self._entries[name]
        return math.prod(entry.shape) * _BITS[entry.dtype] // 8

    def readable(self, name: str) -> bool:
        """Whether the tensor is F64, F32, F16 or BF16."""
        return self._entries[name].dtype in _FLOATS

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored floating dtype. Raises ModelFileError when the file was cut short meanwhile."""
        return self._array(name, np.dtype(_FLOATS[self._entries[name].dtype]))

    def raw(self, name: str) -> np.ndarray:
        """The tensor as it is stored, whatever its type; 8-bit floats as those of `ml_dtypes`, E8M0 as bytes."""
        kind = self._entries[name].dtype
        if kind not in _FLOATS and kind not in _CODES:
            raise ModelFileError(f"{self._entries[name].path}: tensor {name} is stored as {kind}, which is not read")
        return self._array(name, np.dtype(_FLOATS.get(kind) or _CODES[kind]))

    def _array(self, name: str, dtype: np.dtype) -> np.ndarray:
        entry = self._entries[name]
        count = math.prod(entry.shape)
        try:
            values = np.fromfile(entry.path, dtype, count, offset=entry.start)
        except OSError as error:
            raise ModelFileError(f"cannot read tensor {name} from {entry.path}: {error}") from error
        if values.size != count:
            raise ModelFileError(f"{entry.path} ended inside tensor {name}: {values.size} of {count} values were there")
        return values.reshape(entry.shape)


def _sharded(folder: Path) -> tuple[dict[str, Entry], tuple[Path, ...]]:
    index = folder / _INDEX
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise ModelFileError(f"{index} has no usable weight_map (tensor name -> file name)")
    entries: dict[str, Entry] = {}
    paths = {file: contained(folder, file) for file in sorted(set(table.values()))}
    for file, path in paths.items():
        if path.suffix.lower() not in PICKLE_SUFFIXES and not path.exists():
            raise ModelFileError(f"{index} names the shard {file}, which is not in the folder; fetch it")
        for name, entry in read_header(path).items():
            if name in entries:
                raise ModelFileError(f"tensor {name} is in two shards: {entries[name].path.name} and {file}")
            if name not in table:
                raise ModelFileError(f"tensor {name} of shard {file} is not listed in {index}")
            entries[name] = entry
    for name, file in table.items():
        if name not in entries:
            raise ModelFileError(f"{index} lists tensor {name} in {file}, but no shard has it")
        if entries[name].path != paths[file]:
            raise ModelFileError(f"{index} lists tensor {name} in {file}, but it is in {entries[name].path.name}")
    return entries, tuple(paths.values())


def _nothing_usable(folder: Path) -> str:
    names = [path.name for path in folder.iterdir()]
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        return (
            f"{folder} has its weights only as pickle files ({listed(pickles)}), which can run any code when opened; "
            "qjax never opens one. Convert the model to safetensors or take a safetensors revision of it"
        )
    return f"{folder} has neither {_SINGLE} nor {_INDEX}; it has: {listed(names)}"

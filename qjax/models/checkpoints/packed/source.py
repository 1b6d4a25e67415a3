"""A checkpoint with quantised linears as a `WeightSource` of their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qjax.errors import ModelFileError
from qjax.models.checkpoints.packed.schemes import Scheme

__all__ = ["QuantisedSource", "Stored"]


@runtime_checkable
class Stored(Protocol):
    """Tensors as they are stored: `SafetensorsSource`."""

    names: frozenset[str]
    files: tuple[Path, ...]
    description: str

    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def readable(self, name: str) -> bool: ...
    def read(self, name: str) -> np.ndarray: ...
    def raw(self, name: str) -> np.ndarray: ...
    def nbytes(self, name: str) -> int: ...


class QuantisedSource:
    """The tensors of a checkpoint of which some linears are quantised: those come as float32, `<linear>.weight`.

    Attributes:
      quantised: always true, see `WeightSource`.
    """

    quantised = True

    def __init__(self, stored: Stored, scheme: Scheme):
        self._stored, self._scheme = stored, scheme
        linears = {n.rpartition(".")[0] for n in stored.names if n.rpartition(".")[2] in scheme.marks}
        if not linears:
            raise ModelFileError(
                f"{scheme.where} has a quantization_config and no tensor of the files ends in "
                f"{' or '.join(scheme.marks)}; take config.json and weights from the same revision"
            )
        self._arrays: dict[str, dict[str, str]] = {
            f"{linear}.weight": {
                part: f"{linear}.{part}" for part in scheme.parts if f"{linear}.{part}" in stored.names
            }
            for linear in sorted(linears)
        }
        used = {name for arrays in self._arrays.values() for name in arrays.values()}
        left = {f"{linear}.{part}" for linear in linears for part in scheme.activations} & stored.names
        self.names = frozenset((stored.names - used - left) | set(self._arrays))
        self.files = stored.files
        self.description = f"dequantised {scheme.title}" + (", activations left as they are" if left else "")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; where only data says it, from there."""
        arrays = self._arrays.get(name)
        if arrays is None:
            return self._stored.shape(name)
        found = self._scheme.shape(name, {part: self._stored.shape(own) for part, own in arrays.items()})
        if found:
            return found
        return tuple(int(size) for size in self._stored.raw(arrays["weight_shape"]).reshape(-1))

    def dtype(self, name: str) -> str:
        """The stored type, for a quantised weight that of its codes."""
        arrays = self._arrays.get(name)
        return self._stored.dtype(name if arrays is None else next(iter(arrays.values())))

    def nbytes(self, name: str) -> int:
        """The bytes that the tensor takes in its file, with its scales and zeros."""
        arrays = self._arrays.get(name)
        return sum(map(self._stored.nbytes, [name] if arrays is None else arrays.values()))

    def readable(self, name: str) -> bool:
        """Whether the tensor can be turned into floating values."""
        return name in self._arrays or self._stored.readable(name)

    def read(self, name: str) -> np.ndarray:
        """The tensor in a floating dtype. Raises ModelFileError for arrays that do not fit together."""
        arrays = self._arrays.get(name)
        if arrays is None:
            return self._stored.read(name)
        linear = name.removesuffix(".weight")
        return self._scheme.values(
            linear, _Parts({part: self._stored.raw(own) for part, own in arrays.items()}, linear)
        )


class _Parts(Mapping[str, np.ndarray]):
    """Arrays by part; asking for one that the linear lacks is a ModelFileError that names it."""

    def __init__(self, arrays: Mapping[str, np.ndarray], linear: str):
        self._arrays, self._linear = arrays, linear

    def __getitem__(self, part: str) -> np.ndarray:
        if part not in self._arrays:
            raise ModelFileError(f"{self._linear} has {', '.join(self._arrays)} and no {part}; the file is incomplete")
        return self._arrays[part]

    def get(self, part: str, default: Any = None) -> Any:
        """The array, or `default` for a part that a linear may lack."""
        return self._arrays.get(part, default)

    def __contains__(self, part: object) -> bool:
        return part in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

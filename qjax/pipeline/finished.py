"""The finished blocks of a model that is being quantised: in memory up to a budget, beyond it in their records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, overload

from qjax.errors import RunError
from qjax.matrix.quantized import QuantizedMatrix
from qjax.models.linear import linears_of, replace_linears
from qjax.pipeline.records import Records

__all__ = ["HELD_BYTES", "FinishedBlocks"]

HELD_BYTES = 256 << 20  # of matrices that a run keeps in memory where its model stays on disk


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """Stands for a matrix that is read from its record."""

    name: str


class FinishedBlocks(Sequence[Any]):
    """`params["blocks"]` of a quantised model whose matrices are all recorded.

    The first blocks, whose matrices take at most `budget` bytes, stay in memory. Of the others what is not quantised
    does; item i reads its matrices anew whenever it is asked for and keeps none, so what iterates holds one block.
    """

    def __init__(self, records: Records, budget: int):
        self._records, self._budget = records, budget
        self._held = 0
        self._blocks: list[Any] = []

    def append(self, block: Any) -> None:
        """Add the next block, every `QuantizedMatrix` of which has its record, `layers.<block>.<linear>`."""
        matrices = {name: weight for name, weight in linears_of(block).items() if isinstance(weight, QuantizedMatrix)}
        size = sum(matrix.stored_bits for matrix in matrices.values()) // 8
        if self._held + size <= self._budget:
            self._held += size
        else:
            index = len(self._blocks)
            block = replace_linears(block, {linear: _Recorded(f"layers.{index}.{linear}") for linear in matrices})
        self._blocks.append(block)

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Block `index`. Raises RunError when a record is gone or damaged since it was written."""
        if isinstance(index, slice):
            raise TypeError("finished blocks are read one at a time; index them by a number")
        block = self._blocks[index]
        recorded = {name: weight for name, weight in linears_of(block).items() if isinstance(weight, _Recorded)}
        return replace_linears(block, {linear: self._read(weight.name) for linear, weight in recorded.items()})

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))  # unlike Sequence's, it does not hold a yielded block

    def _read(self, name: str) -> QuantizedMatrix:
        found = self._records.load(name)
        if found is None:
            raise RunError(
                f"{name}: its record in {self._records.folder} was removed or damaged while the run went on; "
                "start the same command again, it makes this matrix anew"
            )
        return found[0]

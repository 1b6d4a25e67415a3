"""The finished blocks of a model that is being quantised: in memory up to a budget, beyond it in their records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, overload

import jax

from qjax.errors import RunError
from qjax.matrix.operator import LinearOperator, is_operator, operators, place_name
from qjax.pipeline.records import Records

__all__ = ["HELD_BYTES", "FinishedBlocks"]

HELD_BYTES = 256 << 20  # of matrices that a run keeps in memory where its model stays on disk


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """Stands for an operator that is read from its record."""

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
        """Add the next block, every operator of which has its record, `layers.<block>.<linear>`."""
        size = sum(operator.stored_bits for operator in operators(block).values()) // 8
        if self._held + size <= self._budget:
            self._held += size
        else:
            prefix = f"layers.{len(self._blocks)}."

            def recorded(path: Any, leaf: Any) -> Any:
                return _Recorded(prefix + place_name(path).removesuffix(".weight")) if is_operator(leaf) else leaf

            block = jax.tree_util.tree_map_with_path(recorded, block, is_leaf=is_operator)
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
        return jax.tree.map(
            lambda leaf: self._read(leaf.name) if isinstance(leaf, _Recorded) else leaf,
            self._blocks[index],
            is_leaf=is_operator,
        )

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))  # unlike Sequence's, it does not hold a yielded block

    def _read(self, name: str) -> LinearOperator:
        found = self._records.load(name)
        if found is None:
            raise RunError(
                f"{name}: its record in {self._records.folder} was removed or damaged while the run went on; "
                "start the same command again, it makes this matrix anew"
            )
        return found[0]

"""The blocks of a model that stays on disk: read when they are needed, dropped after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import jax

from qjax.models.checkpoints.weights import WeightSource, read_block, read_edges, resolve_dtype
from qjax.models.config import ModelConfig
from qjax.models.loading import Model, model_of, open_model

__all__ = ["StreamedBlocks", "stream"]


class StreamedBlocks(Sequence[Any]):
    """`params["blocks"]` of a model on disk: item i is read anew whenever it is asked for, as device arrays.

    Nothing is kept, so what iterates over it holds one block (the next is read after the last reference to the one
    before is gone, where the loop lets go of it). Raises ModelFileError for a weight that is not finite.
    """

    def __init__(self, source: WeightSource, config: ModelConfig, dtype: str, indices: range | None = None):
        self._source, self._config, self._dtype = source, config, dtype
        self._indices = range(config.num_layers) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> StreamedBlocks: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return StreamedBlocks(self._source, self._config, self._dtype, self._indices[index])
        return jax.device_put(read_block(self._source, self._config, self._indices[index], self._dtype))

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))  # unlike Sequence's, it does not hold a yielded block


def stream(source: str | Path, dtype: str = "float32", fingerprint: dict[str, str] | None = None) -> Model:
    """As `qjax.models.load`, with blocks that stay on disk (`StreamedBlocks`); only embedding, norm and head are read.

    Raises as `load`, for a block's weights when that block is first read.
    """
    resolve_dtype(dtype)
    files = open_model(source)
    params = jax.device_put(read_edges(files.weights, files.config, dtype))
    params["blocks"] = StreamedBlocks(files.weights, files.config, dtype)
    return model_of(files, params, fingerprint or files.fingerprint(dtype))

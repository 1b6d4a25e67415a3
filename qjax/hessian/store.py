"""A content-addressed store of Hessians: the same model, tokens and estimator are never collected twice."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qjax.errors import ArtifactError
from qjax.hessian.moments import block_hessians_and_outputs
from qjax.linalg.kronecker import Hessian
from qjax.models.config import ModelConfig
from qjax.models.transformer import LINEARS, SITES
from qjax.runtime.atomic import read_safetensors, verified_metadata, write_safetensors
from qjax.runtime.distributed import together
from qjax.runtime.fingerprint import digest
from qjax.runtime.mesh import single
from qjax.streams.batches import Spread
from qjax.streams.forward import embedded, forward_block

__all__ = ["HessianStore", "pack_triangle", "unpack_triangle"]

_VERSION = 1


def pack_triangle(matrix: np.ndarray) -> np.ndarray:
    """The lower triangle of a symmetric [n, n], row-major, `n(n+1)/2` values."""
    return np.ascontiguousarray(matrix[np.tril_indices(matrix.shape[0])])


def unpack_triangle(values: np.ndarray) -> np.ndarray:
    """The symmetric matrix of `pack_triangle`."""
    n = int((np.sqrt(8 * values.size + 1) - 1) // 2)
    if n * (n + 1) // 2 != values.size:
        raise ArtifactError(
            f"{values.size} values are not the triangle of a symmetric matrix; the Hessian file is damaged"
        )
    matrix = np.zeros((n, n), values.dtype)
    matrix[np.tril_indices(n)] = values
    return matrix + np.tril(matrix, -1).T


class HessianStore:
    """Hessians on disk, one checksummed file per block under the hash of everything they depend on.

    A killed collection continues at the first block that is missing; a damaged file is collected again.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)

    def key(self, model_fingerprint: Any, tokens_sha256: str, estimator: str, batch: int) -> str:
        """The address of a collection (the batch is part of it: it fixes the order of the float32 sums)."""
        return digest(
            {
                "version": _VERSION,
                "model": model_fingerprint,
                "tokens": tokens_sha256,
                "estimator": estimator,
                "batch": batch,
            }
        )

    def _file(self, key: str, index: int) -> pathlib.Path:
        return self.path / key / f"block_{index:04d}.safetensors"

    def whole(self, key: str, index: int) -> bool:
        """Whether a block is stored, by its checksum and what it is, without making its Hessians."""
        try:
            metadata = verified_metadata(self._file(key, index))
        except ArtifactError:
            return False
        return metadata.get("block", str(index)) == str(index) and metadata.get("key", key) == key

    def load(self, key: str, index: int) -> dict[str, Hessian] | None:
        """The Hessians of one block by linear, or None when they are absent or damaged."""
        file = self._file(key, index)
        if not file.exists():
            return None
        try:
            arrays, metadata = read_safetensors(file)
        except ArtifactError:
            return None
        if metadata.get("block", str(index)) != str(index) or metadata.get("key", key) != key:
            return None  # another block's or collection's file under this name: a copy gone wrong
        tokens = int(metadata["tokens"])
        if metadata.get("kind") == "sketch":
            factor = lambda linear, name: unpack_triangle(arrays[f"{linear}:{name}"])  # noqa: E731
            return {name: Hessian(factor(name, "input"), factor(name, "output"), tokens) for name in LINEARS}
        sites = {site: unpack_triangle(arrays[site]) for site in SITES}
        return {linear: Hessian(sites[site], None, tokens) for linear, site in LINEARS.items()}

    def save(self, key: str, index: int, hessians: dict[str, Hessian]) -> None:
        """Write one block durably, as triangles; without output factors, sites that linears share are stored once."""
        if all(hessian.output is not None for hessian in hessians.values()):
            factors = {
                f"{linear}:{name}": pack_triangle(np.asarray(getattr(hessian, name)))
                for linear, hessian in hessians.items()
                for name in ("input", "output")
            }
            metadata = {"tokens": str(hessians[next(iter(LINEARS))].tokens), "kind": "sketch"}
            write_safetensors(self._file(key, index), factors, {**metadata, "key": key, "block": str(index)})
            return
        shared = {site: hessians[linear] for linear, site in reversed(LINEARS.items())}
        arrays = {site: pack_triangle(np.asarray(shared[site].input)) for site in SITES}
        metadata = {"tokens": str(shared[SITES[0]].tokens), "key": key, "block": str(index)}
        write_safetensors(self._file(key, index), arrays, metadata)

    def collect(
        self,
        key: str,
        config: ModelConfig,
        params: Any,
        tokens: np.ndarray,
        *,
        batch: int,
        progress: Callable[[int, int], None] | None = None,
        mesh: Mesh | None = None,
    ) -> Callable[[int], dict[str, Hessian]]:
        """Make sure that all blocks are stored, collecting what is missing; returns the loader of a block by index.

        `mesh`: as in `qjax.hessian.collect`. It is not part of the key: on another mesh the sums differ in their last
        bits, and what was collected first is kept. Process 0 writes, all processes read.
        """
        present = together(lambda: [self.whole(key, index) for index in range(config.num_layers)])
        if not all(present):
            last = max(index for index, there in enumerate(present) if not there)
            spread = Spread(len(tokens), batch, mesh or single())
            x = embedded(params["embed"], spread.take(tokens), batch)
            for index, parameters in enumerate(params["blocks"][: last + 1]):
                if present[index]:
                    x = forward_block(parameters, x, config, batch, spread=spread)
                else:
                    hessians, x = block_hessians_and_outputs(
                        parameters, x, config, index=index, batch=batch, spread=spread
                    )
                    together(functools.partial(self.save, key, index, hessians))
                if progress is not None:
                    progress(index + 1, config.num_layers)

        return self.loader(key)

    def loader(self, key: str) -> Callable[[int], dict[str, Hessian]]:
        """Loads a block that is there; raises ArtifactError when its file vanished or was damaged meanwhile."""

        def load(index: int) -> dict[str, Hessian]:
            hessians = self.load(key, index)
            if hessians is None:
                raise ArtifactError(
                    f"{self._file(key, index)}: vanished or was damaged while in use; run again to collect it anew"
                )
            return hessians

        return load

"""A content-addressed store of Hessians: the same model, tokens and estimator are never collected twice."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qjax.errors import ArtifactError
from qjax.hessian.moments import block_hessians_and_outputs
from qjax.linalg.kronecker import Hessian
from qjax.linalg.symmetric import mirror
from qjax.models.config import ModelConfig
from qjax.runtime.atomic import read_safetensors, verified_metadata, write_safetensors
from qjax.runtime.distributed import on_primary
from qjax.runtime.fingerprint import digest
from qjax.runtime.mesh import single
from qjax.streams.batches import Spread
from qjax.streams.blocks import blocks

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
    matrix = np.empty((n, n), values.dtype)
    matrix[np.tril_indices(n)] = values
    return mirror(matrix)


def _readable(metadata: Mapping[str, str]) -> bool:
    """Whether a file says which linears share a factor, or is a sketch of 0.1, in which none do."""
    return "sites" in metadata or metadata.get("kind") == "sketch"


class HessianStore:
    """Hessians on disk, one checksummed file per block under the hash of everything they depend on.

    A killed collection continues at the first block that is missing; a damaged file is collected again.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)

    def __repr__(self) -> str:
        return f"HessianStore({str(self.path)!r})"

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
        ours = metadata.get("block", str(index)) == str(index) and metadata.get("key", key) == key
        return ours and _readable(metadata)

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
        if not _readable(metadata):
            return None
        whole = {name: unpack_triangle(values) for name, values in arrays.items()}
        known = {name.partition(":")[0]: name.partition(":")[0] for name in arrays}
        sites, tokens = json.loads(metadata.get("sites", "null")) or known, int(metadata["tokens"])
        experts, pools = (json.loads(metadata.get(key, "{}")) for key in ("expert_tokens", "pools"))
        return {
            name: Hessian(
                whole[f"{site}:input"],
                whole.get(f"{name}:output"),
                experts.get(name, tokens),
                pooled=whole[f"{pools[name]}:pooled"] if name in pools else None,
            )
            for name, site in sites.items()
        }

    def save(self, key: str, index: int, hessians: dict[str, Hessian]) -> None:
        """Write one block durably, as triangles; an input factor that several linears share is stored once."""
        first: dict[int, str] = {}
        sites = {name: first.setdefault(id(hessian.input), name) for name, hessian in hessians.items()}
        arrays = {f"{site}:input": pack_triangle(np.asarray(hessians[site].input)) for site in first.values()}
        for name, hessian in hessians.items():
            if hessian.output is not None:
                arrays[f"{name}:output"] = pack_triangle(np.asarray(hessian.output))
        tokens = next(iter(hessians.values())).tokens
        metadata = {"tokens": str(tokens), "sites": json.dumps(sites), "key": key, "block": str(index)}
        if experts := {name: hessian for name, hessian in hessians.items() if hessian.pooled is not None}:
            first = {}
            pools = {name: first.setdefault(id(hessian.pooled), name) for name, hessian in experts.items()}
            arrays |= {f"{name}:pooled": pack_triangle(np.asarray(experts[name].pooled)) for name in first.values()}
            counts = {name: hessian.tokens for name, hessian in experts.items()}
            metadata |= {"expert_tokens": json.dumps(counts), "pools": json.dumps(pools)}
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
        present = on_primary(lambda: [self.whole(key, index) for index in range(config.num_layers)])
        if not all(present):
            last = max(index for index, there in enumerate(present) if not there)
            spread = Spread(len(tokens), batch, mesh or single())
            for here in blocks(config, params, tokens, batch=batch, spread=spread, stop=last + 1):
                if not present[here.index]:
                    hessians, here.y = block_hessians_and_outputs(
                        here.parameters, here.x, config, index=here.index, batch=batch, spread=spread
                    )
                    on_primary(functools.partial(self.save, key, here.index, hessians))
                if progress is not None:
                    progress(here.index + 1, config.num_layers)

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

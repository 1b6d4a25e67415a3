"""One durable file per finished layer, so that a killed run loses nothing that was done."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.errors import ArtifactError, RunError
from qjax.interchange.serialize import described, operator_of
from qjax.matrix.operator import LinearOperator
from qjax.matrix.quantize import MatrixReport
from qjax.runtime.atomic import read_safetensors, write_safetensors

__all__ = ["Records"]


class Records:
    """Finished layers in a folder, tied to a run by the digest of its fingerprint.

    A file appears whole or not at all. A damaged one counts as absent and is made again; one of another run is refused.
    """

    def __init__(self, folder: str | pathlib.Path, run_digest: str):
        self.folder = pathlib.Path(folder)
        self.run_digest = run_digest

    def _file(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether the layer has a record, whatever its state."""
        return self._file(name).exists()

    def save(self, operator: LinearOperator, report: MatrixReport) -> None:
        """Write the record of one layer durably; it is a piece of the artifact as it stands."""
        arrays, metadata = described(operator)
        about = {"run": self.run_digest, "report": json.dumps(report.values(), sort_keys=True)}
        write_safetensors(self._file(report.name), arrays, {**metadata, **about})

    def load(self, name: str) -> tuple[LinearOperator, MatrixReport] | None:
        """The record of a layer, or None when it is absent or damaged.

        Raises RunError when it belongs to another run, ArtifactError when this qjax cannot build its operator.
        """
        file = self._file(name)
        found = self._own(file)
        if found is None:
            return None
        arrays, metadata = found
        return operator_of(arrays, metadata, file), MatrixReport.of(json.loads(metadata["report"]))

    def save_dense(self, index: int, arrays: Mapping[str, np.ndarray], reports: Sequence[Mapping[str, Any]]) -> None:
        """Write durably what block `index` holds besides its matrices, last of all: it marks the block finished.

        `reports`: of its tuning, plain values.
        """
        metadata = {"run": self.run_digest, "reports": json.dumps(list(reports), sort_keys=True)}
        write_safetensors(self.folder / f"block.{index}.safetensors", dict(arrays), metadata)

    def load_dense(self, index: int) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]] | None:
        """The contents of `save_dense`, or None when it is absent or damaged. Raises RunError for another run's."""
        found = self._own(self.folder / f"block.{index}.safetensors")
        if found is None:
            return None
        arrays, metadata = found
        return arrays, json.loads(metadata.get("reports", "[]"))

    def _own(self, file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
        """The arrays and metadata of a file, None when it is absent or damaged. Raises RunError for another run's."""
        if not file.exists():
            return None
        try:
            arrays, metadata = read_safetensors(file)
        except ArtifactError:
            return None
        if metadata.get("run") != self.run_digest:
            raise RunError(
                f"{file}: belongs to a run with another model, data or configuration; "
                f"choose another out=, or remove the folder {self.folder}"
            )
        return arrays, metadata

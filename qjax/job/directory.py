"""A run's directory: what identifies it, what it leaves behind, and what happens when it is used again."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.errors import ArtifactError, RunError
from qjax.matrix.quantize import MatrixReport
from qjax.pipeline.records import Records
from qjax.runtime.atomic import write_text
from qjax.runtime.durable import remove_leftovers
from qjax.runtime.fingerprint import differences, digest
from qjax.runtime.sealed import SEAL, read_sealed, write_sealed

__all__ = ["RunDirectory"]

_OWNED = (
    "config.yaml",
    "fingerprint.json",
    "layers.csv",
    "results.json",
    "artifact",
    "layers",
    "finetune",
    "metrics.jsonl",
    "log.txt",
    "failure.json",
)


class RunDirectory:
    """`config.yaml`, `fingerprint.json`, `layers/` (records), `layers.csv`, `results.json`, `artifact/`, `log.txt`."""

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)

    @property
    def artifact(self) -> pathlib.Path:
        """The folder of the quantised model."""
        return self.path / "artifact"

    def claim(self, fingerprint: Mapping[str, Any], config_yaml: str, *, resume: bool) -> None:
        """Tie the directory to a run; the caller holds the lock.

        Raises RunError when it belongs to a run with another fingerprint (listing what differs) or holds foreign files.
        """
        identity = self.path / "fingerprint.json"
        if not resume:
            for name in _OWNED:
                target = self.path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        known = None
        if identity.exists():
            try:
                known = {key: value for key, value in read_sealed(identity).items() if key != SEAL}
            except ArtifactError:
                known = None  # torn by a crash of the first moments: nothing can have been recorded under it
        if known is None and (self.path / "layers").exists() and any((self.path / "layers").iterdir()):
            raise RunError(
                f"{self.path}: holds layer records without a readable fingerprint.json; "
                "choose another out=, or resume=false"
            )
        if known is not None and digest(known) != digest(dict(fingerprint)):
            changes = "; ".join(differences(known, dict(fingerprint))[:6])
            raise RunError(
                f"{self.path}: holds a run with other settings ({changes}); "
                "choose another out=, or resume=false to remove it"
            )
        remove_leftovers(self.path)
        write_text(self.path / "config.yaml", config_yaml)
        write_sealed(identity, fingerprint)
        (self.path / "layers").mkdir(exist_ok=True)

    def records(self, fingerprint: Mapping[str, Any]) -> Records:
        """The records of the run with this fingerprint, which has claimed the directory."""
        return Records(self.path / "layers", digest(dict(fingerprint)))

    def results(self) -> dict[str, Any] | None:
        """The results of a finished run, or None; damaged ones are made again from what the run left."""
        file = self.path / "results.json"
        if not file.exists():
            return None
        try:
            return read_sealed(file)
        except ArtifactError:
            return None

    def write_layers(self, reports: Sequence[MatrixReport], peak_memory: Mapping[str, int]) -> None:
        """`layers.csv`: one row per matrix."""
        text = io.StringIO()
        fields = [field.name for field in dataclasses.fields(MatrixReport)] + ["peak_memory_bytes"]
        writer = csv.DictWriter(text, fields, lineterminator="\n")
        writer.writeheader()
        for report in reports:
            row = dataclasses.asdict(report)
            row["shape"], row["padded"] = ("x".join(map(str, row[key])) for key in ("shape", "padded"))
            writer.writerow({**row, "peak_memory_bytes": peak_memory.get(report.name, "")})
        write_text(self.path / "layers.csv", text.getvalue())

    def write_results(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """`results.json`, last of all: a directory that has it is finished. Returns what was written."""
        return write_sealed(self.path / "results.json", json.loads(json.dumps(results, default=str)))

"""Reading run directories; one that is unfinished or damaged becomes a reason, not a failure."""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.errors import ArtifactError, InputError
from qjax.runtime.atomic import read_json
from qjax.runtime.sealed import read_sealed

__all__ = ["METRICS", "Run", "Skipped", "collect", "find", "read"]

METRICS = ("perplexity", "kl_mean", "kl_median", "kl_p99", "top1_agreement")
_NUMBERS = (*METRICS, "perplexity_reference", "proxy_loss_mean", "whole_model_bytes", "peak_memory_bytes")
_MARKS = ("results.json", "fingerprint.json", "failure.json")
# They change where or how a run is carried out, not what it computes.
_CONVENIENCES = ("out", "cache", "dry_run", "resume", "tracker", "memory", "sweep")
# The key that says which entry of a group was chosen.
_CHOICES = ("name", "method", "estimator")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      name: its directory relative to what all runs have in common.
      path: its directory.
      settings: the configuration, flat: `rounding` (the name of the group's choice), `rounding.block`, …
      results: the content of `results.json`; perplexities that overflowed are infinite, metrics of a run without
        evaluation are absent.
    """

    name: str
    path: pathlib.Path
    settings: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The name of the model that was quantised."""
        return str(self.settings.get("model", "?"))

    def number(self, key: str) -> float | None:
        """A number of the results, or None when the run does not have it."""
        value = self.results.get(key)
        return None if value is None else float(value)

    def interval(self, key: str) -> tuple[float, float] | None:
        """The bootstrap interval of a metric, or None."""
        value = self.results.get(f"{key}_interval")
        return None if value is None else (float(value[0]), float(value[1]))

    def seconds(self, stage: str) -> float | None:
        """Seconds spent in a stage, or None when the run did not have it."""
        value = (self.results.get("seconds") or {}).get(stage)
        return None if value is None else float(value)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A directory that cannot be reported, and why."""

    path: pathlib.Path
    reason: str


def find(sources: str | os.PathLike[str] | Sequence[str]) -> list[pathlib.Path]:
    """Run directories of a folder (searched recursively), a glob pattern, or a list of both; sorted, each once.

    A run directory holds `results.json` or `fingerprint.json`. Raises InputError for a source that matches nothing.
    """
    listed = [os.fspath(sources)] if isinstance(sources, str | os.PathLike) else [os.fspath(s) for s in sources]
    found: set[pathlib.Path] = set()
    for source in listed:
        # A folder whose name happens to look like a pattern is that folder.
        roots = [source] if os.path.exists(source) else glob.glob(source, recursive=True)
        if not roots:
            raise InputError(f"runs: {source} does not exist and matches nothing; give a folder, a pattern or a list")
        before = len(found)
        for root in map(pathlib.Path, roots):
            files = [root] if root.name in _MARKS else [file for mark in _MARKS for file in root.rglob(mark)]
            found |= {file.parent for file in files}
        if len(found) == before and len(listed) == 1:
            raise InputError(
                f"runs: there is no run below {source} (no results.json, no fingerprint.json); "
                "make one with qjax quantize … out=<folder>, or check the path"
            )
    if not found:
        raise InputError(f"runs: there is no run below any of {', '.join(listed) or 'an empty list'}; check the paths")
    return sorted(found)


def _fault(results: Any) -> str | None:
    """The first fault in the content of a results.json, or None."""
    if not isinstance(results, Mapping):
        return f"results.json holds {type(results).__name__}, not an object"
    bits = results.get("bits_per_weight")
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not math.isfinite(bits) or bits <= 0:
        return f"bits_per_weight in results.json is {bits!r}, not a positive number"
    for key in _NUMBERS:
        value = results.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{key} in results.json is {value!r}, not a number"
    for key in METRICS:
        pair = results.get(f"{key}_interval")
        if pair is None:
            continue
        numbers = isinstance(pair, list) and all(x is None or isinstance(x, int | float) for x in pair)
        if not numbers or len(pair) != 2:
            return f"{key}_interval in results.json is {pair!r}, not [low, high]"
    for key in ("settings", "seconds", "versions", "device"):
        if not isinstance(results.get(key, {}), Mapping):
            return f"{key} in results.json is {results[key]!r}, not an object"
    return None


def _with_infinities(results: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: in a run that was evaluated, null stands for an overflow."""
    restored = dict(results)
    for key in METRICS:
        if key in results and results[key] is None:
            restored[key] = math.inf
        pair = results.get(f"{key}_interval")
        if pair is not None:
            restored[f"{key}_interval"] = [math.inf if bound is None else bound for bound in pair]
    return restored


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            choice = next((k for k in _CHOICES if k in value), None)
            if choice is not None:
                flat[name] = value[choice]
            flat |= _flat({k: v for k, v in value.items() if k != choice}, f"{name}.")
        else:
            flat[name] = value
    return flat


def _settings(results: Mapping[str, Any]) -> dict[str, Any]:
    flat = _flat({k: v for k, v in (results.get("settings") or {}).items() if k not in _CONVENIENCES})
    model = results.get("model")
    if isinstance(model, Mapping) and "name" in model:
        flat["model"] = model["name"]
        flat.pop("model.source", None)  # where the same model was found
    elif "model.source" in flat:
        flat["model"] = flat.pop("model.source")
    return flat


def _failure(file: pathlib.Path) -> str:
    """The last message of a job of a sweep: "not possible: …" or "failed: …"."""
    try:
        content = read_json(file)
        return f"{content['status']}: {content['error']}"
    except (ArtifactError, KeyError, TypeError):
        return "failed: failure.json cannot be read; the command that started the run tries again"


def _progress(path: pathlib.Path) -> str:
    """Progress of an unfinished run: numbers of stored matrices and blocks, and the time of the last one."""
    files = list((path / "layers").glob("*.safetensors"))
    if not files:
        return ", no matrix is stored"
    blocks = sum(file.name.startswith("block.") for file in files)
    try:
        last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(file.stat().st_mtime for file in files)))
    except OSError:  # a run that goes on removed one meanwhile
        last = "now"
    return f", {len(files) - blocks} matrices of {blocks} finished blocks and the next are stored, the last at {last}"


def read(path: pathlib.Path, name: str | None = None) -> Run:
    """The finished run in a directory. Raises ArtifactError when it is unfinished or its results are damaged."""
    file = path / "results.json"
    if not file.exists() and (path / "failure.json").exists():
        raise ArtifactError(_failure(path / "failure.json"))
    if not file.exists():
        raise ArtifactError(
            f"unfinished: there is no results.json{_progress(path)}; the command that started the run continues it"
        )
    try:
        results = read_sealed(file)
    except ArtifactError as error:
        raise ArtifactError(f"damaged: {str(error).removeprefix(f'{file}: ')}") from error
    if (fault := _fault(results)) is not None:
        raise ArtifactError(f"damaged: {fault}; run it again with resume=false")
    return Run(name or path.name, path, _settings(results), _with_infinities(results))


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    if len(paths) == 1:
        return [paths[0].resolve().name]
    resolved = [path.resolve() for path in paths]
    common = os.path.commonpath(resolved)
    # A run may lie directly in the common folder.
    return [os.path.relpath(path, common) if str(path) != common else path.name for path in resolved]


def collect(
    sources: str | os.PathLike[str] | Sequence[str], *, unfinished: bool = False
) -> tuple[list[Run], list[Skipped]]:
    """(finished runs, directories left out with the reason), sorted by path.

    Raises InputError when a source matches nothing, or no run is finished (listing what is wrong with each) unless
    `unfinished` allows that.
    """
    paths = find(sources)
    runs: list[Run] = []
    skipped: list[Skipped] = []
    for path, name in zip(paths, _names(paths), strict=True):
        try:
            runs.append(read(path, name))
        except ArtifactError as error:
            skipped.append(Skipped(path, str(error)))
    if not runs and not unfinished:
        reasons = "".join(f"\n  {item.path}: {item.reason}" for item in skipped)
        raise InputError(f"runs: none of the {len(skipped)} runs that were found is finished:{reasons}")
    return runs, skipped

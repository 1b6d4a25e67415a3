"""Trackers, which record the numbers of a run while it runs: JSON lines, Weights & Biases, or none."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol, runtime_checkable

from qjax.errors import InputError, RunError
from qjax.registry import OneOf, Registry

__all__ = ["TRACKERS", "JsonLines", "NoTracker", "Tracker", "Wandb", "make"]

_log = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """The contract of trackers. None of the methods raises for a failure of the service behind it."""

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers of one step (a layer, an update)."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the final numbers of the run; nested mappings are allowed."""
        ...

    def artifact(self, path: str | os.PathLike[str], name: str) -> None:
        """Attach a file or folder to the run by reference."""
        ...

    def close(self) -> None:
        """End the record; a second call does nothing."""
        ...


TRACKERS: Registry[Tracker] = Registry("tracker", "qjax.runtime.TRACKERS")
make = TRACKERS.make


def _plain(value: Any) -> Any:
    """JSON values: NumPy and JAX scalars become numbers, what JSON lacks (NaN, infinity) becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@TRACKERS.register("none")
class NoTracker:
    """A tracker that records nothing, beyond the files of the run directory.

    Args:
      folder: the run directory.
      run_name: of the run.
      group: of runs; null is the name of the sweep, with -m.
      config: the settings of the run.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        run_name: str | None = None,
        group: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        del folder, run_name, group, config

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Does nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def artifact(self, path: str | os.PathLike[str], name: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


@TRACKERS.register("jsonl")
class JsonLines:
    """One JSON object per line in `folder/metrics.jsonl`; a run that continues appends.

    Every line has `kind` (`start`, `log`, `summary`, `artifact`) and `time` (seconds since 1970). A line that a killed
    run left unfinished is cut off. Raises RunError when the file cannot be opened.

    Args:
      folder: the run directory.
      run_name: of the run.
      group: of runs; null is the name of the sweep, with -m.
      config: the settings of the run.
      clock: the time of a line, in seconds since 1970.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        run_name: str | None = None,
        group: str | None = None,
        config: Mapping[str, Any] | None = None,
        clock: Callable[[], float] | None = None,
    ):
        path = pathlib.Path(folder) / "metrics.jsonl"
        self._clock = clock or time.time
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+")
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)
        except OSError as error:
            raise RunError(
                f"{path}: cannot be written ({error.strerror}); choose another out=, or tracker=none"
            ) from error
        self._line("start", {"name": run_name, "group": group, "config": config or {}})

    def _line(self, kind: str, content: Mapping[str, Any]) -> None:
        if self._file.closed:
            return
        line = json.dumps({"kind": kind, "time": self._clock(), **_plain(content)}, allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            _log.warning("%s: %s; nothing more is tracked, the run goes on", self._file.name, error.strerror)
            self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes what could not be written
            self._file.close()

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a line with the numbers under `metrics`."""
        self._line("log", {"step": step, "metrics": metrics})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Append a line with the values under `summary`."""
        self._line("summary", {"summary": values})

    def artifact(self, path: str | os.PathLike[str], name: str) -> None:
        """Append a line with the path and the name."""
        self._line("artifact", {"path": os.fspath(path), "name": name})

    def close(self) -> None:
        """Close the file."""
        self._drop()


@TRACKERS.register("wandb")
class Wandb:
    """A Weights & Biases run, kept in `folder/wandb`; offline unless `mode="online"`.

    The first failure of wandb, its absence included, is reported as one warning of the log; the run goes on without it.
    `wandb sync <folder>/wandb/offline-run-*` uploads later. Raises InputError for another mode.

    Args:
      folder: the run directory.
      run_name: of the run.
      group: of runs; null is the name of the sweep, with -m.
      config: the settings of the run.
      project: of W&B.
      mode: "offline" or "online".
      tags: a list; null is model, bits, rounding, codebook and what else was chosen by name.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        run_name: str | None = None,
        group: str | None = None,
        config: Mapping[str, Any] | None = None,
        project: str = "qjax",
        mode: Annotated[str, OneOf("offline", "online")] = "offline",
        tags: list[str] | None = None,
    ):
        if mode not in ("offline", "online"):
            raise InputError(f"tracker 'wandb': mode={mode!r} is unknown; there is: offline, online (or tracker=none)")
        self._run: Any = None

        def start() -> None:
            import wandb  # takes half a second: only for runs that use it

            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                dir=os.fspath(folder),
                project=project,
                name=run_name,
                group=group,
                config=_plain(config or {}),
                mode=mode,
                tags=tags,
                reinit="finish_previous",
                settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

        self._attempt(start)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever wandb does must not end hours of work
            _log.warning("wandb failed (%s: %s); nothing more is tracked, the run goes on", type(error).__name__, error)
            self._run = None

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log the numbers; `step` is a metric of our own that plots use, so that a continued run may repeat one."""
        if (run := self._run) is not None:
            self._attempt(lambda: run.log(_plain(metrics) | ({} if step is None else {"step": step})))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's summary."""
        if (run := self._run) is not None:
            self._attempt(lambda: run.summary.update(_plain(values)))

    def artifact(self, path: str | os.PathLike[str], name: str) -> None:
        """Log an artifact of type `model` that refers to the local path; nothing is copied."""
        if (run := self._run) is None:
            return

        def attach() -> None:
            import wandb

            safe = re.sub(r"[^\w.-]", "-", name)[:128]  # what wandb allows
            artifact = wandb.Artifact(safe, type="model")
            artifact.add_reference(pathlib.Path(path).resolve().as_uri(), checksum=False)
            run.log_artifact(artifact)

        self._attempt(attach)

    def close(self) -> None:
        """Finish the run."""
        if (run := self._run) is not None:
            self._attempt(run.finish)
            self._run = None

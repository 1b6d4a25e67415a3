"""Checkpoints of a training or tuning run: parameters, optimiser state and the best so far, by orbax."""

from __future__ import annotations

import hashlib
import json
import logging
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from qjax.errors import ArtifactError, RunError
from qjax.runtime.atomic import read_json, write_json
from qjax.runtime.distributed import on_primary
from qjax.runtime.mesh import fetched

__all__ = ["Checkpoints"]

_log = logging.getLogger("qjax")


class Checkpoints:
    """The two newest states in a folder that belongs to one task; the newest is whole before the one before it goes."""

    def __init__(
        self,
        folder: str | pathlib.Path,
        task: str,
        *,
        kind: str = "fine-tuning",
        remedy: str = "resume=false to remove it",
    ):
        """Open `folder` for the task with this digest. Raises RunError when it holds another task's.

        `kind` of task and `remedy` are words of the message.
        """
        from orbax.checkpoint import v1 as ocp

        self.folder = pathlib.Path(folder).absolute()
        on_primary(lambda: self._claim(task, kind, remedy))
        keep: Any = ocp.training.preservation_policies.LatestN(2)
        self._store = ocp.training.Checkpointer(
            str(self.folder / "steps"), preservation_policy=keep, cleanup_tmp_directories=True
        )

    def _claim(self, task: str, kind: str, remedy: str) -> None:
        mark = self.folder / "task.json"
        found = self._task(mark) if mark.exists() else None
        if found is not None and found != task:
            raise RunError(
                f"{self.folder} holds the {kind} of another model, text or configuration ({found[:12]}, this "
                f"one is {task[:12]}); choose another out=, or {remedy}"
            )
        if mark.exists() and found is None:  # torn or damaged: what it marked cannot be told apart any more
            shutil.rmtree(self.folder)
        if found is None:
            write_json(mark, {"task": task})

    def save(self, step: int, state: Any, log: dict[str, Any]) -> None:
        """Keep `state` (a pytree of arrays) and `log` (JSON values, those of process 0) as of `step`."""
        try:
            sealed = {"log": log, "sha256": _digest(state, log)}
            self._store.save(step, state, force=True, custom_metadata=sealed)
        except OSError as error:
            raise RunError(
                f"step {step} cannot be saved in {self.folder} ({error}); make room and run again"
            ) from error

    @staticmethod
    def _task(mark: pathlib.Path) -> str | None:
        try:
            return str(read_json(mark)["task"])
        except (ArtifactError, KeyError, TypeError):
            return None

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest whole state, with the structure of `like`, and its log; None when there is none.

        A damaged one is reported in the log and passed over for the one before it, or for the beginning.
        """

        def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        wanted = jax.tree.map(abstract, like)
        for step in sorted((known.step for known in self._store.checkpoints), reverse=True):
            try:
                state: Any = self._store.load(step, wanted)
                sealed: Any = self._store.metadata(step).custom_metadata
                log = dict(sealed["log"])
                if _digest(state, log) == sealed["sha256"]:
                    return state, log
                reason = "its checksum differs"
            except Exception as error:  # orbax raises many kinds; all mean that it cannot be read
                reason = f"{type(error).__name__}: {str(error)[:200]}"
            _log.warning("%s: the checkpoint of step %d is damaged (%s); it is not used", self.folder, step, reason)
        return None

    def close(self) -> None:
        """Wait for what is being written."""
        self._store.close()


def _digest(state: Any, log: dict[str, Any]) -> str:
    """SHA-256 of all arrays, in the order of their paths, and of the log."""
    hasher = hashlib.sha256(json.dumps(log, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(fetched(state))[0]:
        value = np.ascontiguousarray(leaf)
        hasher.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
        hasher.update(value.tobytes())
    return hasher.hexdigest()

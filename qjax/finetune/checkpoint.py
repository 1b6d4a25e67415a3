"""Checkpoints of a tuning run: parameters, optimiser state and the best so far, by orbax."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax

from qjax.errors import RunError
from qjax.run.atomic import write_json

__all__ = ["Checkpoints"]


class Checkpoints:
    """The two newest states in a folder that belongs to one task; the newest is whole before the one before it goes."""

    def __init__(self, folder: str | pathlib.Path, task: str):
        """Open `folder` for the task with this digest. Raises RunError when it holds another task's."""
        from orbax.checkpoint import v1 as ocp

        self.folder = pathlib.Path(folder).absolute()
        mark = self.folder / "task.json"
        if mark.exists():
            found = json.loads(mark.read_text())["task"]
            if found != task:
                raise RunError(
                    f"{self.folder} holds the fine-tuning of another model, text or configuration ({found[:12]}, this "
                    f"one is {task[:12]}); choose another out=, or resume=false to remove it"
                )
        else:
            write_json(mark, {"task": task})
        keep: Any = ocp.training.preservation_policies.LatestN(2)
        self._store = ocp.training.Checkpointer(
            str(self.folder / "steps"), preservation_policy=keep, cleanup_tmp_directories=True
        )

    def save(self, step: int, state: Any, log: dict[str, Any]) -> None:
        """Keep `state` (a pytree of arrays) and `log` (JSON values) as of `step`."""
        try:
            self._store.save(step, state, force=True, custom_metadata=log)
        except OSError as error:
            raise RunError(f"{self.folder}: step {step} cannot be saved ({error}); make room and run again") from error

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state, with the structure of `like`, and its log; None for a fresh folder."""
        if self._store.latest is None:
            return None
        step = self._store.latest.step

        def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        state: Any = self._store.load(step, jax.tree.map(abstract, like))
        log: Any = self._store.metadata(step).custom_metadata
        return state, dict(log)

    def close(self) -> None:
        """Wait for what is being written."""
        self._store.close()

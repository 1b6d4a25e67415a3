"""The reference model's final hidden states on disk, computed once for all runs of a sweep."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from qjax.errors import RunError
from qjax.runtime.distributed import on_all, on_primary
from qjax.runtime.durable import replacing
from qjax.runtime.lock import turn

__all__ = ["TeacherCache"]

log = logging.getLogger(__name__)

# Raised when what the states mean changes, so that older entries are not found any more.
FORMAT = 1


class TeacherCache:
    """Entries `[sequences, length, width]` float32, addressed by the model's fingerprint and the hash of the tokens.

    An entry is an array file and a record with the SHA-256 of its values; the record is written last and marks it
    complete. Each file is replaced whole, so concurrent runs of a sweep see whole files only.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()

    def get(
        self,
        model_fingerprint: str,
        tokens_sha256: str,
        compute: Callable[[], Float[np.ndarray, "sequences length width"]],
        jointly: bool = False,
    ) -> Float[np.ndarray, "sequences length width"]:
        """The stored states, or those of `compute()`, which are then stored.

        `jointly`: all processes of a group call this, and compute together. A damaged entry is reported in the log and
        computed again. Raises RunError when the entry cannot be written.
        """
        name = self._name(model_fingerprint, tokens_sha256)
        if jointly and jax.process_count() > 1:
            if on_primary(lambda: self._read(name) is not None):
                return on_all(lambda: self._found(name))
            states = np.ascontiguousarray(compute(), dtype=np.float32)
            on_primary(lambda: self._store(name, model_fingerprint, tokens_sha256, lambda: states) is None)
            return states
        found = self._read(name)
        if found is not None:
            return found
        with turn(self.folder / f"{name}.lock"):  # jobs of a sweep that start together compute it once
            found = self._read(name)
            return self._store(name, model_fingerprint, tokens_sha256, compute) if found is None else found

    def _store(
        self, name: str, model_fingerprint: str, tokens_sha256: str, compute: Callable[[], np.ndarray]
    ) -> np.ndarray:
        states = np.ascontiguousarray(compute(), dtype=np.float32)
        facts = {"model_fingerprint": model_fingerprint, "tokens_sha256": tokens_sha256, "shape": list(states.shape)}
        try:
            with replacing(self.folder / f"{name}.npy") as file:
                np.save(file, states, allow_pickle=False)
            with replacing(self.folder / f"{name}.json") as file:
                file.write(json.dumps({**facts, "sha256": _digest(states)}, indent=1).encode())
        except OSError as error:
            raise RunError(
                f"{self.folder}: the reference's hidden states ({states.nbytes / 1e6:.0f} MB) cannot be stored "
                f"({error.strerror}); free space or choose another cache folder"
            ) from error
        return states

    def _found(self, name: str) -> np.ndarray:
        states = self._read(name)
        if states is None:
            raise RunError(
                f"{self.folder}: process 0 has an entry that process {jax.process_index()} cannot read; all processes "
                "need the same cache= folder"
            )
        return states

    @staticmethod
    def _name(model_fingerprint: str, tokens_sha256: str) -> str:
        key = f"hidden states {FORMAT}\n{model_fingerprint}\n{tokens_sha256}\n"
        return hashlib.sha256(key.encode()).hexdigest()[:32]

    def _read(self, name: str) -> np.ndarray | None:
        array, record = self.folder / f"{name}.npy", self.folder / f"{name}.json"
        if not record.exists():
            return None
        try:
            states = np.load(array, allow_pickle=False)
            if json.loads(record.read_bytes())["sha256"] == _digest(states):
                return states
            reason = "its checksum differs"
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            reason = str(error)
        log.warning("%s is damaged (%s); the reference's hidden states are computed again", array, reason)
        return None


def _digest(states: np.ndarray) -> str:
    """SHA-256 of type, shape and values, taken from memory: a write that went wrong does not confirm itself."""
    hasher = hashlib.sha256(f"{states.dtype.str} {states.shape}\n".encode())
    hasher.update(np.ascontiguousarray(states).data)
    return hasher.hexdigest()

"""Several processes as one program: JAX's distributed engine, started before any device is touched."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from qjax import errors
from qjax.errors import InputError, QjaxError, RunError
from qjax.registry import Count, Natural

__all__ = ["DistributedSettings", "initialise", "is_primary", "lost", "on_all", "on_primary"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DistributedSettings:
    """Settings of a group of processes. Without a coordinator the program is one process.

    Attributes:
      coordinator: "host:port" of process 0, the same in all processes.
      processes: the number of processes.
      process: the index of this one, 0 to processes − 1.
      start_s: seconds to wait for all processes at the start.
      heartbeat_s: seconds without a sign of life after which a process counts as dead and ends the others.

    Raises InputError for values that do not fit together.
    """

    coordinator: str | None = None
    processes: Count = 1
    process: Natural = 0
    start_s: Count = 300
    heartbeat_s: Count = 100

    def __post_init__(self) -> None:
        for name in ("processes", "process", "start_s", "heartbeat_s"):
            value = getattr(self, name)
            least = 0 if name == "process" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"distributed.{name} is {value!r}; it is a whole number, at least {least}")
        if self.coordinator is None:
            if self.processes != 1 or self.process != 0:
                raise InputError(
                    f"distributed.processes is {self.processes}, distributed.process {self.process} and there is no "
                    "distributed.coordinator; give host:port of process 0 to every process"
                )
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise InputError(f"distributed.coordinator is {self.coordinator!r}; it is host:port, as in 10.0.0.1:9876")
        if self.process >= self.processes:
            raise InputError(
                f"distributed.process is {self.process} and distributed.processes {self.processes}; processes are "
                f"numbered 0 to {self.processes - 1}"
            )


# Processes end together (`on_primary`, `on_all`); one that ends alone should not be waited for.
_SHUTDOWN_S = 30
_started: DistributedSettings | None = None


def initialise(settings: DistributedSettings) -> None:
    """Join the other processes; nothing without a coordinator, and nothing the second time.

    On the CPU collectives go through gloo. Raises RunError when devices were touched before, when this process is part
    of another group, or when not all processes came in `start_s` seconds.
    """
    global _started
    if settings.coordinator is None or settings == _started:
        return
    if jax.distributed.is_initialized():
        raise RunError("this process has joined another group of processes; start a new one for other settings")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            settings.coordinator,
            settings.processes,
            settings.process,
            initialization_timeout=settings.start_s,
            heartbeat_timeout_seconds=settings.heartbeat_s,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
        joined = jax.process_count()
    except RuntimeError as error:
        raise RunError(
            f"process {settings.process} of {settings.processes} could not join {settings.coordinator} "
            f"({str(error).splitlines()[0]}); start all processes within distributed.start_s={settings.start_s} "
            "seconds, with the same coordinator, and let its port through"
        ) from error
    if joined != settings.processes:
        raise RunError(
            f"distributed.processes is {settings.processes} and JAX sees {joined} process"
            f"{'' if joined == 1 else 'es'}; a platform ({os.environ.get('JAX_PLATFORMS', 'the default')}) without "
            "collectives was chosen, or devices were touched before"
        )
    _started = settings


def is_primary() -> bool:
    """Whether this process is the one that writes: process 0, the only one where there are no others."""
    return jax.process_index() == 0


def on_primary(task: Callable[[], Any]) -> Any:
    """The result of `task()`, a JSON value, which process 0 alone carries out; the others wait and get the same.

    What process 0 wrote is there for all when it returns. An error of process 0 is raised in every process: those of
    `qjax.errors` as they are, others as RunError.
    """
    if jax.process_count() == 1:
        return task()
    failure, answer = None, {}
    if is_primary():
        try:
            answer = {"value": task()}
        except BaseException as error:  # the others must not wait for ever
            failure, answer = error, {"error": type(error).__name__, "message": str(error)}
    answer = json.loads(_from(0, json.dumps(answer).encode()))
    if failure is not None:
        raise failure
    if "error" in answer:
        kind = getattr(errors, answer["error"], None)
        if isinstance(kind, type) and issubclass(kind, QjaxError):
            raise kind(answer["message"])
        raise RunError(f"process 0 ended by {answer['error']}: {answer['message']}")
    return answer["value"]


def on_all(task: Callable[[], T]) -> T:
    """The result of this process's own `task()`, when all processes have ended theirs without an error.

    An error in one is raised in all; it is the first process's that failed, and named where it is another's.
    """
    if jax.process_count() == 1:
        return task()
    failure, text, result = None, "", None
    try:
        result = task()
    except BaseException as error:
        failure, text = error, f"{type(error).__name__}: {error}"
    failed = np.asarray(multihost_utils.process_allgather(np.int32(failure is not None)))
    if failed.any():
        source = int(np.argmax(failed))
        message = _from(source, text.encode()).decode()
        raise failure or RunError(f"process {source} ended by {message}")
    return cast(T, result)


def _from(source: int, data: bytes) -> bytes:
    """The bytes that process `source` gives (those of the others are ignored)."""
    mine = jax.process_index() == source
    send = functools.partial(multihost_utils.broadcast_one_to_all, is_source=mine)
    size = int(send(np.int32(len(data))))
    padded = np.zeros(1 << max(size - 1, 255).bit_length(), np.uint8)  # powers of two: few programs
    if mine:
        padded[:size] = np.frombuffer(data, np.uint8)
    return np.asarray(send(padded))[:size].tobytes()


def lost(error: BaseException) -> str:
    """The message for an operation between processes that failed, which is how the end of one shows in the others."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return (
        f"process {jax.process_index()} of {jax.process_count()}: another process is gone or cannot be reached "
        f"({reason}); see its own messages. What was finished is kept: start all processes again with the same "
        "command, in the same number or another"
    )

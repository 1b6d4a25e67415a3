"""Several processes as one program: JAX's distributed engine, started before any device is touched."""

from __future__ import annotations

import dataclasses
import os

import jax

from qjax.errors import InputError, RunError

__all__ = ["DistributedSettings", "initialise"]


@dataclasses.dataclass(frozen=True)
class DistributedSettings:
    """Who takes part. Without a coordinator the program is one process.

    Attributes:
      coordinator: "host:port" of process 0, the same in all processes.
      processes: how many there are.  process: which one this is, 0 to processes − 1.
      start_s: seconds to wait for all processes at the start.
      heartbeat_s: seconds without a sign of life after which a process counts as dead and ends the others.

    Raises InputError for values that do not fit together.
    """

    coordinator: str | None = None
    processes: int = 1
    process: int = 0
    start_s: int = 300
    heartbeat_s: int = 100

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

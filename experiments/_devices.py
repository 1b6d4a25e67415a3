"""One device per job: a process of a parallel launcher takes a free one before JAX starts, and keeps it to its end."""

from __future__ import annotations

import os
import pathlib
import re
import socket
import tempfile
import time
from collections.abc import Callable, MutableMapping, Sequence

from qjax.errors import RunError
from qjax.runtime.lock import FileLock

__all__ = ["available", "claim", "show_only"]

PARALLEL = (
    "joblib",
    "submitit_local",
)  # launchers that start processes on this machine; Slurm hands out devices itself
_held: dict[str, FileLock] = {}  # device -> its lock, for the life of the process


def available(environment: MutableMapping[str, str], root: pathlib.Path = pathlib.Path("/")) -> tuple[str, list[str]]:
    """(platform, names of its devices), found without starting JAX; a platform without a choice has no names.

    CUDA_VISIBLE_DEVICES and TPU_VISIBLE_CHIPS are obeyed. On a CPU these are the devices that
    `--xla_force_host_platform_device_count` makes.
    """
    wanted = environment.get("JAX_PLATFORMS", "")
    if not wanted or "cuda" in wanted or "gpu" in wanted:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = sorted(path.name for path in (root / "proc/driver/nvidia/gpus").glob("*"))
        found = [str(index) for index in range(len(names))] if visible is None else _listed(visible)
        if found:
            return "cuda", found
    if not wanted or "tpu" in wanted:
        visible = environment.get("TPU_VISIBLE_CHIPS")
        chips = [*(root / "dev").glob("accel[0-9]*"), *(root / "dev/vfio").glob("[0-9]*")]
        found = [str(index) for index in range(len(chips))] if visible is None else _listed(visible)
        if found:
            return "tpu", found
    count = _HOST_DEVICES.search(environment.get("XLA_FLAGS", ""))
    return "cpu", [str(index) for index in range(int(count.group(1)))] if count else []


_HOST_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def show_only(platform: str, device: str, environment: MutableMapping[str, str]) -> None:
    """Make `device` the only one that JAX will find; only before its backend starts."""
    if platform == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = device
    elif platform == "tpu":
        bounds = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
        environment.update({"TPU_VISIBLE_CHIPS": device, **bounds})
    else:
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = _HOST_DEVICES.sub("--xla_force_host_platform_device_count=1", flags)


def claim(
    launcher: str,
    *,
    environment: MutableMapping[str, str] = os.environ,
    folder: pathlib.Path | None = None,
    wait_s: float = 86400.0,
    say: Callable[[str], None] = print,
) -> str | None:
    """Take a device for this process: `cuda:1`; None for a launcher of one process, or where there is no choice.

    The kernel holds the lock, so a killed job frees its device. More jobs than devices wait for their turn.
    A process that has a device keeps it, which a launcher that reuses processes needs. Raises RunError after `wait_s`,
    or where the locks cannot be made.
    """
    if launcher not in PARALLEL:
        return None
    if _held:
        return next(iter(_held))
    platform, devices = available(environment)
    if len(devices) < 2:
        return None
    place = folder or pathlib.Path(tempfile.gettempdir()) / f"qjax-devices-{os.getuid()}"
    device = _take(place, platform, devices, wait_s, say)
    show_only(platform, device, environment)
    return f"{platform}:{device}"


def _take(place: pathlib.Path, platform: str, devices: Sequence[str], wait_s: float, say: Callable[[str], None]) -> str:
    end, told = time.monotonic() + wait_s, False
    while True:
        for device in devices:
            name = f"{socket.gethostname()}-{platform}-{re.sub(r'[^0-9A-Za-z-]', '_', device)}.lock"
            lock = FileLock(place / name)
            try:
                free = lock.acquire(wait=False)
            except OSError as error:
                raise RunError(
                    f"{lock.file}: devices cannot be shared out ({error.strerror}); set TMPDIR to a folder on a local "
                    "disk that you can write, or use one job at a time"
                ) from error
            if free:
                _held[f"{platform}:{device}"] = lock
                return device
        if time.monotonic() > end:
            raise RunError(f"none of the {len(devices)} {platform} devices became free in {wait_s:.0f} s ({place})")
        if not told:
            say(f"all {len(devices)} {platform} devices are in use by other jobs; waiting for one")
            told = True
        time.sleep(0.2)

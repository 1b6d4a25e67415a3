"""Block sizes that were found best on a kind of device, as data in `tuned.json`.

The file maps a device kind as JAX names it ("NVIDIA H100 80GB HBM3") to operations, those to keys, those to blocks.
What is not there has the kernel's own default.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from pallas_kernels.dispatch import KernelError

__all__ = ["PATH", "adopt", "blocks", "device_kind", "load", "mosaic_first", "store"]

PATH = pathlib.Path(__file__).resolve().parent / "tuned.json"


def device_kind() -> str:
    """JAX's name for the kind of the default device."""
    return jax.devices()[0].device_kind


@functools.cache
def load(path: pathlib.Path = PATH) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """The whole file. Raises KernelError when it is not of that form."""
    try:
        found = json.loads(path.read_text())
        for operations in found.values():
            for keys in operations.values():
                for own in keys.values():
                    if not own or not all(isinstance(n, int) and n > 0 for n in own.values()):
                        raise ValueError(f"blocks {own} are not positive whole numbers by name")
    except (OSError, ValueError, AttributeError) as error:
        remedy = "restore the file, or write {} to have all defaults"
        raise KernelError(f"{path}: {error}; {remedy}") from error
    return found


def blocks(operation: str, key: str, default: Mapping[str, int], kind: str | None = None) -> dict[str, int]:
    """The default, with what was tuned for this key and the device kind (None: the default device's) in its place."""
    known = load().get(device_kind() if kind is None else kind, {}).get(operation, {}).get(key, {})
    own = {**known, **(_ADOPTED.get(operation, {}).get(key, {}) if kind is None else {})}
    return {**default, **{name: size for name, size in own.items() if name in default}}


_ADOPTED: dict[str, dict[str, dict[str, int]]] = {}


def adopt(operation: str, found: Mapping[str, Mapping[str, int]]) -> None:
    """Use what was just found on the default device in this process, before any file has it."""
    _ADOPTED.setdefault(operation, {}).update({key: dict(own) for key, own in found.items()})


def mosaic_first(operation: str, key: str) -> bool:
    """Whether Mosaic's kernel was measured to be faster than Triton's on the default device's kind."""
    return bool(blocks(f"{operation} first choice", key, {"mosaic_gpu": 0})["mosaic_gpu"])


def store(operation: str, found: Mapping[str, Mapping[str, int]], kind: str, path: pathlib.Path = PATH) -> None:
    """Put the blocks by key of one operation and device kind into the file; all others stay. Replaces it at once."""
    whole: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    keys = whole.setdefault(kind, {}).setdefault(operation, {})
    keys.update({key: dict(own) for key, own in found.items()})
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    new.replace(path)
    load.cache_clear()

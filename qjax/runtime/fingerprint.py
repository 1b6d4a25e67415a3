"""Fingerprint of a run: everything it depends on, as JSON and as one hash."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

import qjax
from qjax.errors import InputError

__all__ = ["device", "differences", "digest", "identity", "versions"]

_PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "ml_dtypes",
    "flax",
    "optax",
    "orbax-checkpoint",
    "safetensors",
    "tokenizers",
)
_ABSENT = "(absent)"
_VECTORS = ("avx512f", "avx2", "avx", "sse4_2")


def _check_keys(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):  # JSON would turn 1 and "1" into the same key
                raise InputError(f"fingerprint: key {key!r} of {where or 'the top level'} is no string; use str keys")
            _check_keys(entry, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _check_keys(entry, f"{where}[{index}]")


def digest(obj: Any) -> str:
    """SHA-256 in hexadecimal of the canonical JSON of a value: sorted keys, no blanks, UTF-8, shortest floats.

    A tuple counts as a list. Raises InputError for what JSON does not have: other types, NaN and infinity, keys that
    are no strings.
    """
    _check_keys(obj, "")
    try:
        text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"fingerprint: {error}; give strings, finite numbers, booleans, None, lists and dicts"
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


def _flat(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {name: leaf for key, entry in value.items() for name, leaf in _flat(entry, f"{where}.{key}").items()}
    if isinstance(value, list | tuple) and value:
        return {name: leaf for i, entry in enumerate(value) for name, leaf in _flat(entry, f"{where}[{i}]").items()}
    return {where.lstrip("."): value}


def differences(old: Any, new: Any) -> list[str]:
    """Lines `path: old -> new` for every entry in which two nested JSON values differ, sorted by path."""
    before, after = _flat(old, ""), _flat(new, "")
    return [
        f"{name}: {before.get(name, _ABSENT)!s} -> {after.get(name, _ABSENT)!s}"
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or before[name] != after[name]
    ]


def versions() -> dict[str, str]:
    """Versions of Python, qjax and the packages that can change a result; what is not installed is left out."""
    found = {"python": platform.python_version(), "qjax": qjax.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _of_processor(field: str) -> str:
    """Linux' entry about the first processor, "" where there is none."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def _instruction_set() -> str:
    """The widest vectors of an x86 processor, "avx512f" to "sse4_2"; the architecture of others."""
    flags = _of_processor("flags").split()
    return next((name for name in _VECTORS if name in flags), platform.machine())


def device() -> dict[str, Any]:
    """The machine: JAX platform, kind and number of devices, processes, CPU, memory in bytes.

    Of the CPU the cores that may be used, model and instruction set: sums on it depend on the first and the last.
    """
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "cpu_model": _of_processor("model name") or platform.processor() or platform.machine(),
        "instruction_set": _instruction_set(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def identity(model_sha256: str) -> str:
    """Identity of a stored result of running a model, besides its inputs: the model, JAX and the platform.

    Not what decides the last bits of its sums alone: mesh, instruction set and number of cores. What was computed first
    is kept and shared, also by machines that would add up otherwise.
    """
    return f"{model_sha256}-{jax.__version__}-{jax.default_backend()}"

"""All kernels on the device at hand: compared with their references, then timed beside dense weights and the limits.

Needs jax alone. Results are written after every case, so that a run that is cut short keeps what it has; what the
time did not allow is listed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels import tuned
from pallas_kernels.bench.benches import Case, benches
from pallas_kernels.bench.checks import checks
from pallas_kernels.bench.rooflines import Rooflines, measure
from pallas_kernels.bench.settings import Settings
from pallas_kernels.bench.timing import HOW, attempt, in_threads
from pallas_kernels.bench.tuning import tune
from pallas_kernels.dispatch import backend

__all__ = ["Settings", "lines", "run"]


def _begun(bench: Callable[[], Case]) -> Case:
    case = bench()
    next(case)
    return case


def _result(case: Case) -> dict[str, Any]:
    try:
        next(case)
    except StopIteration as finished:
        return finished.value
    raise AssertionError("a benchmark yields once")


_TOGETHER, _AT_ONCE = 16, 6
"""Checks that run at once, and benchmarks that are compiled before they run: they hold their weights meanwhile."""


def _batched(items: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """The items in lists of `count`, one at a time where there are no processors to spare."""
    iterator = iter(items)
    while some := list(itertools.islice(iterator, count if (os.cpu_count() or 1) > 4 else 1)):
        yield some


def _surroundings() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        "host": platform.machine(),
        "how": HOW,
    }


def run(settings: Settings) -> dict[str, Any]:
    """All checks and as many benchmarks as the time allows.

    `record["failed"]` names checks beyond their limit and cases that raised; `record["left_out"]` what time forbade.
    """
    begun = time.monotonic()
    record: dict[str, Any] = {**_surroundings(), "checks": [], "benches": [], "failed": [], "left_out": []}

    def save() -> None:
        record["seconds"] = time.monotonic() - begun
        if settings.out is not None:
            new = settings.out.with_name(f".{settings.out.name}.{os.getpid()}")
            new.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
            new.replace(settings.out)

    cases = list(checks()) if settings.part is None else list(checks())[settings.part[0] :: settings.part[1]]
    with tempfile.TemporaryDirectory() as folder, _settings_kept(*_CACHE):
        if settings.processes > 1:
            _side_by_side(settings, pathlib.Path(folder), record)
            cases = []
        return _alone(settings, begun, record, cases, save)


_CACHE = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@contextlib.contextmanager
def _settings_kept(*names: str) -> Iterator[None]:
    """JAX's settings of these names are afterwards what they were."""
    before = {name: getattr(jax.config, name) for name in names}
    try:
        yield
    finally:
        if any(getattr(jax.config, name) != value for name, value in before.items()):
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # whether there is one, and where, was decided before


def _side_by_side(settings: Settings, folder: pathlib.Path, record: dict[str, Any]) -> None:
    """Check everything, and compile benchmarks into a cache, in several processes; what they found goes to `record`."""
    values = dict(zip(_CACHE, (str(folder), 0.0, -1), strict=True))
    cache = {name.upper(): str(value) for name, value in values.items()} | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    count = settings.processes
    command = [sys.executable, "-m", "pallas_kernels.bench", "--seconds", str(0.5 * settings.seconds)]
    command += ["--ring-mib", str(settings.ring_bytes >> 20), *(["--quick"] if settings.quick else [])]
    running = [
        subprocess.Popen(
            [*command, "--part", f"{i}/{count}", "--out", str(folder / f"part{i}.json")], env=os.environ | cache
        )
        for i in range(count)
    ]
    for i, process in enumerate(running):
        process.wait()
        file = folder / f"part{i}.json"
        if not file.exists():
            record["failed"].append(
                {"what": f"process {i} of {count}", "reason": f"it ended with {process.returncode}"}
            )
            continue
        own = json.loads(file.read_text())
        for name in ("checks", "failed", "left_out"):
            record[name] += own[name]
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # whether there is one was decided before


def _alone(settings: Settings, begun: float, record: dict[str, Any], cases: list[Any], save: Any) -> dict[str, Any]:
    until = begun + settings.seconds

    def failed(what: str, raised: Exception) -> None:
        record["failed"].append({"what": what, "reason": f"{type(raised).__name__}: {raised}"[:500]})
        print(f"FAILED {what}: {type(raised).__name__}", flush=True)

    for some in _batched(cases, _TOGETHER):
        if time.monotonic() > until:
            record["left_out"] += [what for what, _ in some]
            continue
        for (what, _), found in zip(
            some, in_threads([check for _, check in some], 0 if settings.part is None else 2), strict=True
        ):
            if isinstance(found, Exception):
                failed(what, found)
                continue
            name, error, limit = found
            known = {"what": what, "implementation": name, "error": min(error, 1e300), "limit": limit}
            record["checks"].append(known)
            if not error <= limit:
                record["failed"].append({"what": what, "reason": f"error {error:.2e}, at most {limit:.0e}"})
                print(f"FAILED {what}: {name}, error {error:.2e}, at most {limit:.0e}", flush=True)
    passed = len(record["checks"]), len(record["failed"]), time.monotonic() - begun
    print("{} checks, {} failed, {:.0f} s".format(*passed), flush=True)
    save()
    if settings.part is not None:
        i, count = settings.part
        for what, bench in list(benches(settings, Rooflines(1.0, 1.0, 1.0)))[i::count]:
            if time.monotonic() > until:
                break  # the process that measures compiles it
            begun_or_error = attempt(functools.partial(_begun, bench))
            if isinstance(begun_or_error, Exception):
                print(f"{what} does not compile: {type(begun_or_error).__name__}", flush=True)
        return record
    if settings.tune:
        record["tuned"] = tune(settings.ring_bytes, begun, begun + 0.6 * settings.seconds)
        for operation, best in record["tuned"].items():
            tuned.adopt(operation, best)
            if settings.out is not None:
                tuned.store(operation, best, tuned.device_kind(), settings.out.with_name("tuned.json"))
        save()
    big = backend() != "cpu" and not settings.quick
    limits = measure(1 << 30 if big else 1 << 22, 1 << 26 if big else 1 << 16)
    record["rooflines"] = dataclasses.asdict(limits)
    for some in _batched(benches(settings, limits), _AT_ONCE):
        if time.monotonic() > until:
            record["left_out"] += [what for what, _ in some]
            continue
        ready = in_threads([functools.partial(_begun, bench) for _, bench in some])
        for i, (what, _) in enumerate(some):
            case, ready[i] = ready[i], None  # its weights are not held any longer
            result = case if isinstance(case, Exception) else attempt(functools.partial(_result, case))
            if isinstance(result, Exception):
                failed(what, result)
                continue
            result["measured_on"] = f"{record['device']}, jax {record['jax']}"
            record["benches"].append(result)
            print(f"{result['what']}: {result['kernel']['microseconds_median']:.1f} µs", flush=True)
            save()
    save()
    return record


def lines(record: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(headers, rows) of the benchmarks, for printing."""
    headers = ("what", "runs on", "µs", "dense µs", "unfused µs", "limit µs", "of limit", "note", "measured on")
    rows = []
    for result in record["benches"]:
        micro = lambda name, result=result: (  # noqa: E731
            f"{result[name]['microseconds_median']:.1f}" if name in result else ""
        )
        limit = result.get("roofline_microseconds")
        rates = result.get("state_evaluations_per_second")
        notes = [] if rates is None else [f"{rates['kernel']:.2e} states/s"]
        if "integer_ops_per_weight" in result:
            allowed = result["instructions"]["budget_per_weight"]
            notes = [
                f"{result['integer_ops_per_weight']:.1f} integer operations a weight, {allowed:.2f} in the bytes' time"
            ]
        others = [name for name in ("pallas_gpu", "mosaic_gpu") if name in result and name != result["implementation"]]
        notes += [f"{name} {micro(name)} µs" for name in others]
        rows.append(
            (
                result["what"],
                result.get("implementation", ""),
                micro("kernel"),
                micro("dense"),
                micro("unfused") or micro("xla"),
                "" if limit is None else f"{max(limit.values()):.1f}",
                f"{result['of_roofline']:.2f}" if "of_roofline" in result else "",
                "; ".join(notes),
                result.get("measured_on", ""),
            )
        )
    return headers, rows

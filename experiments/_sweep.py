"""Jobs of a sweep: directories by the hash of the settings, failures beside the others and listed at the end."""

from __future__ import annotations

import json
import os
import pathlib
import re
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from qjax.configuration.check import Mistyped
from qjax.errors import InputError, QjaxError
from qjax.job.sweep import FOLDER

__all__ = ["FAILURE", "Sweep", "attempt", "directory"]

FAILURE = "failure.json"
_SWEEP = "QJAX_SWEEP"  # identifies one start; processes of the launchers inherit it
_JOBS = "jobs.jsonl"
_CONSTANT = ("experiment", "model", "data", "debug", "tracker", "memory", "cache", "sweep", "out", "resume")
_CONSTANT = (*_CONSTANT, "mesh", "distributed", "dry_run", "plugins")


def _safe(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _readable(overrides: Sequence[str]) -> str:
    """`ldlq-e8p-bits2` of `rounding=ldlq codebook=e8p bits=2`, at most 80 characters."""
    parts = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key.partition(".")[0] in _CONSTANT:
            continue
        named = "." in key or not re.match(r"[a-z]", value)
        parts.append(_safe(f"{key.rpartition('.')[2]}{value}" if named else value))
    return "-".join(filter(None, parts))[:80] or "job"


def directory(settings: Mapping[str, Any], overrides: Sequence[str]) -> pathlib.Path:
    """`runs/<sweep>/<overrides>-<hash>` of a job without `out`.

    The hash is of the resolved settings that decide the result, so neither the launcher nor the job's number matters;
    a directory of that hash is used again whatever its readable part says.
    """
    from qjax.job.settings import IRRELEVANT
    from qjax.runtime.fingerprint import digest

    folder = pathlib.Path("runs") / _safe(str(settings["sweep"]))
    mark = digest({key: value for key, value in settings.items() if key not in IRRELEVANT})[:8]
    known = sorted(folder.glob(f"*-{mark}")) if folder.is_dir() else []
    return known[0] if known else folder / f"{_readable(overrides)}-{mark}"


_ended: list[dict[str, Any]] = []  # jobs of this process: they are listed even where no file can be written


def _record(folder: pathlib.Path, line: dict[str, Any]) -> None:
    """Append a line in one write, which processes that append at the same time do not interleave."""
    _ended.append(line)
    for place in {folder.absolute(), pathlib.Path(os.environ.get(FOLDER) or folder).absolute()}:
        try:
            place.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(place / _JOBS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(descriptor, (json.dumps(line) + "\n").encode())
            finally:
                os.close(descriptor)
        except OSError as problem:
            print(f"{place / _JOBS}: cannot be written ({problem.strerror})", file=sys.stderr, flush=True)


def attempt(
    job: Callable[[], float | None], out: pathlib.Path, sweep: pathlib.Path, overrides: Sequence[str]
) -> float | None:
    """Run one job of a sweep; an error becomes `failure.json` in its directory and None, and the sweep goes on.

    An InputError means that the combination does not exist ("not possible"); all else is a failure.
    """
    begun = time.time()
    failure = out / FAILURE
    facts: dict[str, Any] = {"sweep": os.environ.get(_SWEEP, ""), "job": str(out), "overrides": list(overrides)}
    try:
        failure.unlink(missing_ok=True)
        value = job()
    except Exception as error:
        impossible = isinstance(error, InputError) and not isinstance(error, Mistyped)
        status = "not possible" if impossible else "failed"
        expected = isinstance(error, QjaxError | OmegaConfBaseException)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        facts |= {"status": status, "error": text, "seconds": round(time.time() - begun, 3)}
        _record(sweep, facts)
        print(f"{status}: {out.name}: {text}", file=sys.stderr, flush=True)
        from qjax.runtime.atomic import write_json

        trace = {} if expected else {"traceback": traceback.format_exc()}
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(failure, facts | trace)
        except (OSError, QjaxError) as problem:
            print(f"{failure}: cannot be written ({problem})", file=sys.stderr, flush=True)
        return None
    _record(sweep, {**facts, "status": "finished", "seconds": round(time.time() - begun, 3)})
    return value


class Sweep:
    """Context manager around the start of a Hydra program: afterwards lists what failed and sets the exit status.

    Exit with 1 when a job failed, with 2 when no combination was possible.
    """

    def __enter__(self) -> Sweep:
        self._mark = os.environ[_SWEEP] = secrets.token_hex(8)
        os.environ.pop(FOLDER, None)
        _ended.clear()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        jobs = self.jobs()
        os.environ.pop(_SWEEP, None)
        os.environ.pop(FOLDER, None)
        if not jobs:
            return
        bad = [job for job in jobs if job["status"] != "finished"]
        impossible = sum(job["status"] == "not possible" for job in bad)
        failed = len(bad) - impossible
        print(f"\n{len(jobs)} jobs: {len(jobs) - len(bad)} finished, {failed} failed, {impossible} not possible")
        for job in bad:
            print(f"  {job['status']}  {' '.join(job['overrides'])}\n    {job['error']}\n    {job['job']}")
        sys.stdout.flush()
        if kind is None and bad and (failed or len(bad) == len(jobs)):
            raise SystemExit(1 if failed else 2)

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs of this start that ended, of all processes, in the order in which they ended."""
        found = []
        folder = os.environ.get(FOLDER)
        file = pathlib.Path(folder) / _JOBS if folder else None
        if file is not None and file.is_file():
            for line in file.read_text(errors="replace").splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:  # cut off by a kill
                    continue
        own = [job for job in found if isinstance(job, dict) and job.get("sweep") == self._mark]
        return own + [job for job in _ended if job["sweep"] == self._mark and job not in own]

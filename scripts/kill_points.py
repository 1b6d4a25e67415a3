"""Kill quantisation runs at seeded points, continue them, and compare with a run that was never killed.

    python scripts/kill_points.py --states 2000 --real 20

Two kinds of kill:

*Recorded*: while a run goes on in this process, its folders are copied as they are in the kernel at chosen operations
(before a file is created, renamed, removed; in the middle of a write; before fsync). What a killed process had in its
own buffers is not in the copy, so the copy is what SIGKILL at that operation leaves behind. A second run, with every
program compiled already, continues from the copy. Every fifth of these is itself cut off once more.

*Real*: a process of its own is sent SIGKILL after a random time, again and again until one gets to the end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

_SMALL = [
    "model=tiny",
    "data.calibration_sequences=4",
    "data.evaluation_sequences=2",
    "data.length=64",
    "tracker=jsonl",
    "hessian.batch=2",
]
_TUNED = [
    "rounding=nearest",
    "finetune=e2e",
    "evaluate=none",
    "finetune.sequences=12",
    "finetune.validation=2",
    "finetune.tokens=768",
    "finetune.validate_every=2",
    "finetune.checkpoint_every=2",
]
# Every scenario is a list of runs that share a cache, as in a sweep.
SCENARIOS: dict[str, list[list[str]]] = {
    "sequential": [["hessian=sequential"]],
    "sketch_b": [["hessian=sketch_b", "rounding=nearest", "evaluate=none", "hessian.checkpoint_s=1e-9"]],
    "finetune": [_TUNED],
    "block": [
        [
            "hessian=original",
            "rounding=nearest",
            "evaluate=none",
            "finetune=block",
            "finetune.epochs=1",
            "finetune.batch=1",
            "finetune.validation=2",
        ]
    ],
    "sweep": [["hessian=original", "evaluate=none", "rounding=nearest"], ["hessian=original", "evaluate=none"]],
}
# What two runs of the same settings may differ in.
_CIRCUMSTANCES = {
    "seconds",
    "compiled_programs",
    "compiled_program_names",
    "peak_memory_bytes",
    "device_peak_memory_bytes",
    "stages",
    "finished",
    "settings",
    "sha256",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


class Recorder:
    """Counts the operations that change files below `root`, and copies `root` at those whose number is in `chosen`."""

    _active: Recorder | None = None
    _installed = False

    def __init__(self, root: pathlib.Path, chosen: dict[int, pathlib.Path] | None = None):
        self.root, self.chosen, self.count = str(root), chosen or {}, 0
        self.names: dict[int, str] = {}
        self._lock, self._busy = threading.RLock(), False

    def __enter__(self) -> Recorder:
        if not Recorder._installed:
            sys.addaudithook(Recorder._hook)
            Recorder._installed = True
        self._fdopen, self._fsync = os.fdopen, os.fsync
        os.fdopen, os.fsync = self._torn, self._synced  # type: ignore[assignment]
        Recorder._active = self
        return self

    def __exit__(self, *error: object) -> None:
        Recorder._active = None
        os.fdopen, os.fsync = self._fdopen, self._fsync

    @staticmethod
    def _hook(event: str, arguments: tuple[Any, ...]) -> None:
        active = Recorder._active
        if active is None or not (event == "open" or event in _CHANGES):
            return
        path = arguments[0]
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        folder = arguments[-1] if event in ("os.mkdir", "os.remove", "os.rmdir") else -1
        if isinstance(path, int):
            path = _of_descriptor(path)
        elif isinstance(folder, int) and folder >= 0:  # relative to an open folder, as shutil.rmtree has it
            path = os.path.join(_of_descriptor(folder), os.fsdecode(path))
        with contextlib.suppress(TypeError):
            if os.path.abspath(os.fsdecode(path)).startswith(active.root):
                active.happens(f"{event} {path}")

    def happens(self, what: str) -> None:
        """An operation is about to take place; others of this process wait while the folders are copied."""
        with self._lock:
            if self._busy:
                return
            self.count += 1
            target = self.chosen.get(self.count)
            if target is not None:
                self._busy = True
                try:
                    self.names[self.count] = what
                    if not os.path.isdir(self.root):  # the first operation makes it
                        os.mkdir(target)
                        return
                    shutil.copytree(self.root, target, copy_function=_copied, dirs_exist_ok=True)
                finally:
                    self._busy = False

    def _torn(self, descriptor: int, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = self._fdopen(descriptor, mode, *rest, **options)
        if "w" in mode and _of_descriptor(descriptor).startswith(self.root):
            return _Halves(file, self)
        return file

    def _synced(self, descriptor: int) -> None:
        self.happens("fsync")
        self._fsync(descriptor)


class _Halves(io.RawIOBase):
    """A file whose every write is recorded when half of it is on its way."""

    def __init__(self, file: Any, recorder: Recorder):
        self._file, self._recorder = file, recorder

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        self._file.write(view[:half])
        self._file.flush()
        self._recorder.happens("write")
        self._file.write(view[half:])
        return len(view)

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()


def _of_descriptor(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def _copied(source: str, target: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # what the storage engine's own threads removed meanwhile
        shutil.copyfile(source, target)


@dataclasses.dataclass
class Scenario:
    """The jobs of a scenario, run below any folder: `cache/` and `run-<n>/`."""

    name: str

    def __post_init__(self) -> None:
        from hydra import compose, initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        import experiments._quantize as entry

        self.jobs = []
        for overrides in SCENARIOS[self.name]:
            GlobalHydra.instance().clear()
            with initialize_config_dir(entry.CONFIGS, version_base="1.3"):
                self.jobs.append(entry.job_of(compose("quantize", [*_SMALL, *overrides, "out=o", "cache=c"])))

    def run(self, root: pathlib.Path) -> None:
        """Run, or continue, all jobs."""
        from qjax.job.run import run

        for number, task in enumerate(self.jobs):
            with contextlib.redirect_stdout(io.StringIO()):
                run(dataclasses.replace(task, out=root / f"run-{number}", cache=root / "cache"))

    def outcome(self, root: pathlib.Path) -> list[Any]:
        """All that must be the same: results, manifests and layer records; stored arrays are checked against both."""
        from qjax.interchange import artifact

        found = []
        for number in range(len(self.jobs)):
            folder = root / f"run-{number}"
            artifact.load(folder / "artifact")  # verifies every array against the manifest
            manifest = json.loads((folder / "artifact" / "model.json").read_text())
            results = _lasting(json.loads((folder / "results.json").read_text()))
            found.append([results, manifest, sorted(path.name for path in (folder / "layers").iterdir())])
        leftovers = [str(path) for path in root.rglob("*.qjax-tmp") if "cache" not in path.parts]
        return [*found, leftovers]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(entry) for key, entry in value.items() if key not in _CIRCUMSTANCES}
    return [_lasting(entry) for entry in value] if isinstance(value, list) else value


def recorded(name: str, states: int, seed: int, folder: pathlib.Path, at_once: int = 25) -> Iterator[tuple[str, bool]]:
    """Continue `name` from `states` recorded states; yields (what was going on, whether the outcome is the same)."""
    rng = random.Random(f"{name} {seed}")
    scenario = Scenario(name)
    scenario.run(folder / "warm")  # compiles
    with Recorder(folder / "whole") as counter:
        scenario.run(folder / "whole")
    expected = scenario.outcome(folder / "whole")
    assert scenario.outcome(folder / "warm") == expected, f"{name}: two undisturbed runs differ"
    shutil.rmtree(folder / "warm")
    serial = 0
    while serial < states:
        wanted = min(at_once, states - serial)
        points = rng.sample(range(1, counter.count + 1), min(wanted, counter.count))
        copies = {point: folder / f"state-{point}" for point in points}
        with Recorder(folder / "cut", copies) as recorder:
            scenario.run(folder / "cut")
        shutil.rmtree(folder / "cut")
        for point in points:
            serial += 1
            if not copies[point].exists():  # timing moved the last operations: not a state, not counted as one
                copies[point].mkdir()
            what = f"{name}: operation {point}, {recorder.names.get(point, 'before the first')}"
            state = copies[point]
            if serial % 5 == 0:
                again = {rng.randint(1, max(1, counter.count - point)): folder / "again"}
                with Recorder(state, again):
                    scenario.run(state)
                if (folder / "again").exists():
                    shutil.rmtree(state)
                    state, what = folder / "again", f"{what}, and once more"
            scenario.run(state)
            yield what, scenario.outcome(state) == expected
            shutil.rmtree(state)
    shutil.rmtree(folder / "whole")


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """What differs between two outcomes, each with its path."""
    if type(found) is type(expected) and isinstance(found, dict):
        keys = sorted({*found, *expected})
        return [d for k in keys for d in differences(found.get(k), expected.get(k), f"{where}.{k}")]
    if type(found) is type(expected) and isinstance(found, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]")]
    return [] if found == expected else [f"{where}: {found!r} instead of {expected!r}"]


def real(name: str, kills: int, seed: int, folder: pathlib.Path) -> tuple[int, list[str]]:
    """Processes killed at random times until `kills` were; (how many were killed, what differs in the outcome)."""
    rng = random.Random(f"real {name} {seed}")
    scenario = Scenario(name)
    scenario.run(folder / "whole")
    root, killed = folder / "killed", 0
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, __file__, "--child", name, "--folder", str(root)]
    while True:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        assert child.stdout is not None
        child.stdout.readline()  # the imports are done
        if killed < kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(rng.uniform(0, 2.5))
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                killed += 1
        code = child.wait()
        child.stdout.close()
        if code == 0:
            break
        assert code == -signal.SIGKILL, f"{name}: a process ended by itself with {code}"
    return killed, differences(scenario.outcome(root), scenario.outcome(folder / "whole"))


def main() -> int:
    """Run what the command line asks for; 1 when some outcome differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=200, help="recorded states, over all scenarios")
    parser.add_argument("--real", type=int, default=0, help="processes to kill, over all scenarios")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", choices=[*SCENARIOS, "all"], default="all")
    parser.add_argument("--folder", type=pathlib.Path, default=None, help="where to work instead of /tmp")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        import qjax  # noqa: F401 - the imports take longest; the parent's clock starts after them

        scenario = Scenario(options.child)
        print("ready", flush=True)
        scenario.run(options.folder)
        return 0
    names = list(SCENARIOS) if options.scenario == "all" else [options.scenario]
    bad = 0
    for index, name in enumerate(names):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            share = lambda total: total // len(names) + (index < total % len(names))  # noqa: B023, E731
            begun, done, kinds = time.monotonic(), 0, set()
            for what, same in recorded(name, share(options.states), options.seed, pathlib.Path(folder) / "recorded"):
                done += 1
                kinds.add(what)
                if not same:
                    bad += 1
                    print(f"DIFFERS {what}", flush=True)
                if done % 50 == 0:
                    print(f"{name}: {done} states, {bad} differ, {time.monotonic() - begun:.0f} s", flush=True)
            print(f"{name}: {done} states, {len(kinds)} distinct, in {time.monotonic() - begun:.0f} s", flush=True)
            if share(options.real):
                killed, changed = real(name, share(options.real), options.seed, pathlib.Path(folder) / "real")
                bad += bool(changed)
                what = "DIFFERS: " + "; ".join(changed[:10]) if changed else "the same"
                print(f"{name}: {killed} processes killed, {what}", flush=True)
    print(f"{bad} outcomes differ", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

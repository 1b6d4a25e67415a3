"""What a run tells about itself: standstills, memory and programs by stage, and a log that survives a crash."""

import io
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from qjax.runtime.monitor import CompileCounter, Stopwatch
from qjax.runtime.progress import Progress

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def wait_for(condition):
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_standstill_is_told_once_and_again_after_progress(caplog):
    stream = io.StringIO()
    with Progress("round", 3, stream=stream, stall=0.05) as progress:
        progress.update(1, "layers.0")
        assert wait_for(lambda: "nothing has moved" in stream.getvalue())
        time.sleep(0.2)
        assert stream.getvalue().count("nothing has moved") == 1
        assert "round: nothing has moved for 0:00:00 at 1/3, after layers.0" in stream.getvalue()
        progress.update(2)
        assert wait_for(lambda: stream.getvalue().count("nothing has moved") == 2)
    said = stream.getvalue()
    time.sleep(0.2)
    assert stream.getvalue() == said  # the watch ends with the block


def test_stages_hold_their_programs_and_the_memory_up_to_their_end():
    import jax

    with CompileCounter() as compiles:
        watch = Stopwatch(compiles)
        with watch.stage("a"):
            jax.jit(lambda x: x * 3 + 1)(np.float32(2))
            with watch.stage("b"):
                jax.jit(lambda x: x * 5 - 1)(np.float32(2))
                block = np.ones(64 << 20, np.uint8)
            jax.jit(lambda x: x * 7 - 1)(np.float32(2))
        with watch.stage("c"):
            del block
    stages = watch.stages
    assert {name: stage["compiled_programs"] for name, stage in stages.items()} == {"a": 2, "b": 1, "c": 0}
    assert compiles.count == 3
    assert 64 << 20 < stages["b"]["peak_memory_bytes"] <= stages["a"]["peak_memory_bytes"]
    assert stages["a"]["peak_memory_bytes"] <= stages["c"]["peak_memory_bytes"]


def test_the_log_keeps_what_a_crash_of_native_code_leaves(tmp_path):
    program = (
        "import ctypes, logging, pathlib, sys\n"
        "from qjax.runtime import log\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "log.log_to(path)\n"
        "log.crashes_to(path)\n"
        "logging.getLogger('qjax').info('layer 7 is done')\n"
        "def crashing():\n"
        "    ctypes.string_at(0)\n"
        "crashing()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "log.txt"],
        capture_output=True,
        cwd=REPOSITORY,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.returncode < 0
    log = (tmp_path / "log.txt").read_text()
    assert "layer 7 is done" in log and "Fatal Python error: Segmentation fault" in log and "in crashing" in log

"""Tensor-parallel models and sharded tuning on eight devices of the CPU, which have to be there from the start."""

import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent / "eight_devices"


def test_checks_on_eight_devices():
    """All of `eight_devices/check_*.py`, in one process of its own."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "-o", "python_files=check_*.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]

"""Two processes and one run directory."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from qjax.errors import RunError
from qjax.runtime.lock import RunLock, turn

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from qjax.runtime.lock import RunLock, turn
with RunLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(RunError, match=f"in use by process {holder.pid} on .+ running since 20.+ choose another out="):
        RunLock(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with RunLock(tmp_path):
        pass


def test_the_lock_is_released_and_taken_again(tmp_path):
    lock = RunLock(tmp_path / "new")
    for _ in range(2):
        with lock, pytest.raises(RunError, match=f"process {os.getpid()} "), RunLock(tmp_path / "new"):
            pass


def test_an_error_in_the_block_releases_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    with RunLock(tmp_path):
        pass


def test_an_unreadable_holder_is_still_a_refusal(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text("{")
        with pytest.raises(RunError, match="in use by another process"), RunLock(tmp_path):
            pass


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be used as a run directory"), RunLock(tmp_path / "file"):
        pass


def test_turns_are_taken_one_after_the_other(tmp_path):
    order, inside = [], threading.Event()

    def second():
        inside.wait()
        with turn(tmp_path / "deep" / "entry.lock"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with turn(tmp_path / "deep" / "entry.lock"):
        inside.set()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    (tmp_path / "file").write_text("")
    with turn(tmp_path / "file" / "entry.lock"):  # where nothing can be locked, work is done twice at worst
        order.append("alone")
    assert order[-1] == "alone"

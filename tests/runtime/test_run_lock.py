"""Locks between processes: a run directory, turns, shared holders, file systems that cannot lock."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from qjax.errors import RunError
from qjax.runtime.lock import FileLock, RunLock, turn

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from qjax.runtime.lock import RunLock
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


def test_shared_holders_exclude_an_exclusive_one_and_the_other_way_round(tmp_path):
    file = tmp_path / "deep" / "entry.lock"
    readers = [FileLock(file, shared=True) for _ in range(2)]
    writer = FileLock(file)
    assert all(reader.acquire(wait=False) for reader in readers)
    assert not writer.acquire(wait=False)
    assert writer.holder() == "another process"
    readers[0].release()
    assert not writer.acquire(wait=False)
    readers[1].release()
    assert writer.acquire(wait=False)
    assert not readers[0].acquire(wait=False)
    assert readers[0].holder().startswith(f"process {os.getpid()} on ")
    writer.release()
    writer.release()  # what is not held is not released
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOLCK, "its file system cannot lock files .* local disk"), (errno.EIO, "cannot be used as a run dir")],
)
def test_a_file_system_that_cannot_lock_is_named_and_holds_up_no_turn(tmp_path, monkeypatch, code, message):
    def refused(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refused)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RunError, match=message), RunLock(tmp_path):
        pass
    with turn(tmp_path / "entry.lock"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_leaves_the_holder_without_a_name_and_the_lock_held(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with RunLock(tmp_path), pytest.raises(RunError, match="in use by another process"), RunLock(tmp_path):
        pass

"""Freed memory: kept between steps, counted in page faults, and given back at the end of a phase, both in a process."""

import os
import pathlib
import platform
import subprocess
import sys

import jax
import pytest

from qjax.runtime import freed_memory
from qjax.runtime.freed_memory import keep_between_steps

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """
import resource, sys
import numpy as np
from qjax.runtime.freed_memory import keep_between_steps
if sys.argv[1] == "keep":
    assert keep_between_steps()
def step():
    return np.full(6_000_000, 1.0).sum()  # 48 MB: above glibc's largest threshold for mappings
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, env={})
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library of this machine is not glibc")
def test_freed_memory_is_used_again():
    kept, given_back = faults("keep"), faults("leave")
    assert kept < 50
    assert given_back > 100  # five arrays of 48 MB: 120 pages of 2 MiB, and 58,600 of 4 KiB


def test_an_allocator_that_the_user_tunes_is_left_alone():
    assert not keep_between_steps({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})
    assert not keep_between_steps({"MALLOC_ARENA_MAX": "2"})


def test_what_was_freed_is_given_back_after_a_long_compilation_and_only_then(monkeypatch):
    calls = []
    monkeypatch.setattr(freed_memory, "_trim", lambda: calls.append)
    event = "/jax/core/compile/backend_compile_duration"
    with freed_memory.giving_back():
        jax.monitoring.record_event_duration_secs(event, 0.1)
        jax.monitoring.record_event_duration_secs("/other", 9.0)
        assert calls == []
        jax.monitoring.record_event_duration_secs(event, 9.0)
        assert calls == [0]
    jax.monitoring.record_event_duration_secs(event, 9.0)
    assert calls == [0]
    monkeypatch.setattr(freed_memory, "_trim", lambda: None)  # a C library without it
    freed_memory.give_back()


@pytest.mark.parametrize("how", ["leave", "keep"])
def test_freed_memory_goes_back_to_the_system(how):
    """Many small blocks below one that stays: the C library would keep them, also where it is told to keep all."""
    code = """
import ctypes, sys
from qjax.runtime.freed_memory import give_back, keep_between_steps
if sys.argv[1] == "keep": keep_between_steps()
libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]
size = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [libc.malloc(60_000) for _ in range(2000)]
for block in blocks: ctypes.memset(block, 1, 60_000)
for block in blocks[:-1]: libc.free(block)
before = size(); give_back(grown=1 << 30); print(before - size())
before = size(); give_back(grown=64 << 20); print(before - size())
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert kept < 1e6 and given_back > 60e6

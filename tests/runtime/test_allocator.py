"""Freed memory that stays with the process: counted in page faults of a process of its own."""

import platform
import subprocess
import sys

import pytest

from qjax.runtime.memory import keep_freed_memory

PROGRAM = """
import resource, sys
import numpy as np
from qjax.runtime.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
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
    assert not keep_freed_memory({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})
    assert not keep_freed_memory({"MALLOC_ARENA_MAX": "2"})

"""Counts of programs, peak memory, and the stages of a run."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from qjax.runtime import memory
from qjax.runtime.monitor import CompileCounter, Stopwatch, device_peak_memory_bytes, peak_memory_bytes

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
THREE_PROGRAMS = """
import jax, jax.numpy as jnp, numpy as np
from qjax.runtime.monitor import CompileCounter
f = jax.jit(lambda x: jnp.sin(x) @ x)
x = np.ones((8, 8), np.float32)
with CompileCounter() as counter:
    f(x), f(x), f(np.ones((4, 4), np.float32)), jax.jit(jnp.tanh)(x)
f(np.ones((2, 2), np.float32))
print(counter.count, counter.from_cache, counter.seconds > 0, len(counter.programs))
"""


def test_the_count_does_not_depend_on_the_persistent_cache(tmp_path):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}

    def run():
        command = [sys.executable, "-c", THREE_PROGRAMS]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY, env=environment)

    assert run().stdout.split() == ["3", "0", "True", "3"]
    assert run().stdout.split() == ["3", "3", "True", "3"]


def test_programs_are_named_and_nested_counters_are_independent():
    def a_rare_name(x):
        return x * 2.0

    with CompileCounter() as outer:
        jax.jit(a_rare_name)(np.ones(3, np.float32))
        with CompileCounter() as inner:
            jax.jit(lambda x: x - 1.0)(np.ones(3, np.float32))
    assert [outer.count, inner.count] == [2, 1]
    assert "a_rare_name" in outer.programs[0]


def test_eager_operations_are_programs_too():
    with CompileCounter() as counter:
        x = jnp.asarray(np.ones((7, 3), np.float32))
        jnp.tanh(x)
    assert counter.count >= 1


def test_peak_memory_grows_with_a_large_array_and_never_shrinks():
    before = peak_memory_bytes()
    block = np.ones(before + 2**24, np.uint8)  # larger than all that was ever resident
    after = peak_memory_bytes()
    del block
    assert after >= before + 2**24
    assert peak_memory_bytes() >= after - 2**20  # the kernel sums per-CPU counters, to some hundred KiB
    assert device_peak_memory_bytes() is None or jax.default_backend() != "cpu"


def test_peak_memory_is_not_inherited_from_the_parent():
    ballast = np.ones(2**28, np.uint8)
    program = "from qjax.runtime.monitor import peak_memory_bytes; print(peak_memory_bytes())"
    command = [sys.executable, "-c", program]
    child = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert int(child.stdout) < peak_memory_bytes() - ballast.nbytes // 2


class FakeCompiles(CompileCounter):
    """A counter whose seconds the test sets."""


def test_stages_add_up_to_the_whole_with_compile_time_apart():
    now, compiles = [100.0], FakeCompiles()

    def work(seconds, compiled=0.0):
        now[0] += seconds + compiled
        compiles.seconds += compiled

    watch = Stopwatch(compiles, clock=lambda: now[0])
    with watch.stage("load"):
        work(1.0)
    work(50.0, 50.0)  # outside of all stages
    with watch.stage("quantize"):
        work(2.0, 0.5)
        with watch.stage("hessian"):
            work(4.0, 0.25)
        work(8.0)
    with watch.stage("load"):
        work(16.0)
    assert watch.seconds == {"load": 17.0, "quantize": 10.0, "hessian": 4.0, "compile": 0.75}


def test_a_stage_that_fails_is_booked_and_closed():
    now = [0.0]
    watch = Stopwatch(clock=lambda: now[0])
    with watch.stage("outer"):
        with contextlib.suppress(ZeroDivisionError), watch.stage("inner"):
            now[0] += 3.0
            _ = 1 // 0
        now[0] += 1.0
    assert watch.seconds == {"outer": 1.0, "inner": 3.0, "compile": 0.0}


def test_programs_are_forgotten_before_the_regions_of_memory_are_used_up(monkeypatch):

    assert memory.mapped_regions() > 50
    double = jax.jit(lambda x: 2 * x)
    double(jnp.ones(3))
    assert double._cache_size() == 1
    limit = memory._most_regions()
    monkeypatch.setattr(memory, "mapped_regions", lambda: 0.39 * limit)
    assert not memory.forget_programs() and double._cache_size() == 1
    monkeypatch.setattr(memory, "mapped_regions", lambda: 0.41 * limit)
    assert memory.forget_programs() and double._cache_size() == 0
    assert double(jnp.ones(3)).tolist() == [2, 2, 2]

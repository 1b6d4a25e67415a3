"""Programs that are compiled ahead in threads: the same programs, once, and no error is lost."""

import threading

import jax
import numpy as np
import pytest

from qjax.runtime import ahead
from qjax.runtime.monitor import CompileCounter


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


def test_what_is_begun_ahead_is_compiled_once_and_gives_the_same():
    function = jax.jit(lambda tree, k: tree["x"] @ tree["x"] * k, static_argnames="k")
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    with CompileCounter() as compiles, ahead.compiling(threads=2):
        assert ahead.possible()
        for _ in range(2):
            ahead.ahead(function, {"x": shape(3, 3)}, k=3)
        found = [ahead.call(function, {"x": value}, k=3) for value in (x, jax.device_put(x), x)]
    assert compiles.count == 1
    for value in found:
        np.testing.assert_array_equal(value, x @ x * 3)


def test_only_the_waiting_of_the_counting_thread_is_its_time():
    begun, go_on = threading.Event(), threading.Event()

    def traced(x):
        begun.set()
        go_on.wait(60)
        return x + 1

    function = jax.jit(traced)
    with CompileCounter() as compiles, ahead.compiling(threads=1):
        ahead.ahead(function, shape(2))
        begun.wait(60)
        other = jax.jit(lambda x: x * 2)
        ahead.ahead(other, shape(2))  # behind the first in its thread: the call does not wait for that
        np.testing.assert_array_equal(ahead.call(other, np.ones(2, np.float32)), [2, 2])
        before = compiles.seconds
        threading.Timer(0.2, go_on.set).start()
        np.testing.assert_array_equal(ahead.call(function, np.ones(2, np.float32)), [2, 2])
    assert compiles.count == 2 and compiles.seconds - before >= 0.1


def test_an_error_is_that_of_the_call():
    def refuses(x):
        raise ValueError("refused")

    function = jax.jit(refuses)
    with ahead.compiling(threads=1):
        ahead.ahead(function, shape(2))
        with pytest.raises(ValueError, match="refused"):
            ahead.call(function, np.ones(2, np.float32))
        ahead.ahead(jax.jit(refuses), shape(3))  # never called


def test_a_call_with_other_shapes_than_announced_compiles_for_itself():
    function = jax.jit(lambda x: x + 1)
    with CompileCounter() as compiles, ahead.compiling(threads=1):
        ahead.ahead(function, shape(2))
        np.testing.assert_array_equal(ahead.call(function, np.ones(3, np.float32)), [2, 2, 2])
        ahead.call(function, np.ones(2, np.float32))
    assert compiles.count == 2


def test_nothing_is_begun_outside_of_the_block_or_without_threads():
    def refuses(x):
        raise AssertionError("traced")

    assert not ahead.possible()
    ahead.ahead(jax.jit(refuses), shape(2))
    with ahead.compiling(threads=0), ahead.compiling(threads=2):  # the outer one decides
        assert not ahead.possible()
        ahead.ahead(jax.jit(refuses), shape(2))
        assert float(ahead.call(jax.jit(lambda x: x + 1), np.float32(1))) == 2

"""The timing helpers, with a clock of the test's own."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.bench.timing import Timing, compiled, interleaved, surroundings
from qjax.errors import InputError
from qjax.runtime.monitor import CompileCounter


def test_rounds_run_every_call_after_one_that_is_not_counted():
    order = []
    ticks = itertools.count()
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = interleaved(calls, 3, clock=lambda: float(next(ticks)))
    assert order == list("ab" * 4)
    assert timings["a"].seconds == timings["b"].seconds == (1.0, 1.0, 1.0)


def test_more_rounds_until_they_took_long_enough_but_not_for_ever():
    ticks = itertools.count()
    calls = {"a": lambda: None}
    assert len(interleaved(calls, 2, least_seconds=7.0, clock=lambda: float(next(ticks)))["a"].seconds) == 7
    assert len(interleaved(calls, 2, least_seconds=1e9, clock=lambda: float(next(ticks)))["a"].seconds) == 100


def test_ratios_compare_seconds_of_the_same_round():
    """Everything twice as slow in the second round: the ratio does not notice."""
    base, own = Timing((1.0, 2.0, 1.0)), Timing((4.0, 8.0, 4.0))
    assert own.relative(base) == 0.25
    assert own.to_dict() == {"repeats": 3, "seconds_min": 4.0, "seconds_median": 4.0, "seconds_max": 8.0}


def test_compile_time_is_the_compilers_own_not_the_caches():
    argument = np.ones((5, 5), np.float32)
    for _ in range(2):
        with CompileCounter() as counter:
            program = compiled(lambda x: jnp.sin(x) @ x, argument)
        assert counter.count == 1 and counter.from_cache == 0
    np.testing.assert_allclose(program.call(), np.sin(argument) @ argument, rtol=1e-6)
    assert program.compile_seconds > 0 and program.trace_seconds > 0


def test_fewer_than_one_repeat_is_refused():
    with pytest.raises(InputError, match="repeats is 0"):
        interleaved({"a": lambda: None}, 0)


def test_surroundings_name_the_machine():
    record = surroundings((1.0, 2.0, 3.0))
    assert record["device"]["platform"] == "cpu" and "jax" in record["versions"]
    assert record["load_average_before"] == [1.0, 2.0, 3.0] and len(record["load_average_after"]) == 3

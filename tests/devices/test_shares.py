"""How whole matrices are shared out, how sequences are spread, and one process as a group of one."""

import threading

import jax
import numpy as np
import pytest

from qjax.errors import DataError, RunError
from qjax.runtime import distributed, group, mesh
from qjax.runtime.shares import compute, shares
from qjax.streams.batches import Spread


def test_the_costliest_go_first_to_the_emptiest_place():
    costs = {"a": 1.0, "b": 5.0, "c": 4.0, "d": 3.0, "e": 2.0}
    found = shares(costs, 2)
    assert found == {"b": 0, "c": 1, "d": 1, "e": 0, "a": 0}
    load = [sum(costs[name] for name, place in found.items() if place == p) for p in (0, 1)]
    assert max(load) <= 4 / 3 * sum(costs.values()) / 2  # Graham's bound for longest processing time first
    assert shares(dict(reversed(costs.items())), 2) == found  # whatever the order of visits
    assert set(shares({str(i): 1.0 for i in range(12)}, 5).values()) == set(range(5))


def test_results_come_in_the_order_of_the_tasks_and_errors_are_raised():
    seen = []

    def task(name):
        def run(device):
            seen.append((name, device, threading.current_thread()))
            if name == "bad":
                raise DataError("broken")
            return name.upper()

        return run

    names = ["x", "y", "z"]
    made = compute({n: task(n) for n in names}, {n: float(i) for i, n in enumerate(names)}, mesh.single())
    assert list(made.items()) == [("x", "X"), ("y", "Y"), ("z", "Z")]
    assert {device for _, device, _ in seen} == {jax.devices()[0]}
    with pytest.raises(DataError, match="broken"):
        compute({"bad": task("bad")}, {"bad": 1.0}, mesh.single())


def test_one_device_takes_plain_batches():
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    spread = Spread(7, 3)
    assert np.shares_memory(spread.take(x), x)
    steps = list(spread.feed(x))
    assert [step.mask.tolist() for step in steps] == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert [step.numbers.tolist() for step in steps] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [step.done for step in steps] == [3, 6, 7]
    np.testing.assert_array_equal(np.concatenate([x[step.where] for step in steps]), x)
    np.testing.assert_array_equal(steps[2].parts[0], x[[6, 6, 6]])
    later = Spread(7, 3, start=3)
    assert [step.numbers.tolist() for step in later.feed(later.take(x))] == [[3, 4, 5], [6, 7, 8]]


def test_a_process_alone_is_a_group_of_one(tmp_path):
    assert distributed.is_primary() and distributed.on_primary(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(DataError, match="as it is"):
        distributed.on_all(lambda: (_ for _ in ()).throw(DataError("as it is")))
    with group.leading(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
        with pytest.raises(RunError, match="in use by"), group.leading(tmp_path / "run"):
            pass
        group.visible(tmp_path / "run" / ".lock")
        with pytest.raises(RunError, match=r"process 0 does not see it; all processes need the same folders"):
            group.visible(tmp_path / "nothing")

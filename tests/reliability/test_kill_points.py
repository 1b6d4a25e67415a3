"""Runs killed at seeded points end in the same bytes; `scripts/kill_points.py` has the harness and the longer run."""

import os
import re
import subprocess
import sys

import pytest
from faults import REPOSITORY, script

kill_points = script("kill_points")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "states"), [("sequential", 60), ("sketch_b", 50), ("finetune", 20), ("block", 20), ("sweep", 50)]
)
def test_two_hundred_recorded_states_end_in_the_same_bytes(tmp_path, name, states):
    """In a process of its own, without checked annotations and with its files in memory: a quarter of the time.

    Where few programs run in many states, LLVM's optimisations pay for themselves.
    """
    program = REPOSITORY / "scripts" / "kill_points.py"
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    command = [sys.executable, program, "--scenario", name, "--states", str(states), "--folder", folder]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(name not in ("sequential", "sweep")))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(rf"^{name}: (\d+) states, (\d+) distinct", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    assert int(found[1]) == states and int(found[2]) > states // 2


@pytest.mark.slow
def test_processes_killed_by_the_kernel_end_in_the_same_bytes(tmp_path):
    killed, changed = kill_points.real("sequential", 3, seed=0, folder=tmp_path)
    assert killed >= 1 and changed == []


def test_a_recorded_state_is_what_is_on_the_disk_in_the_middle_of_a_write(tmp_path):
    from qjax.runtime.atomic import read_json, write_json
    from qjax.runtime.durable import remove_leftovers

    root = tmp_path / "root"
    write_json(root / "value.json", "old")
    with kill_points.Recorder(root) as counter:
        write_json(root / "value.json", "new")
    states = {n: tmp_path / f"state-{n}" for n in range(1, counter.count + 1)}
    write_json(root / "value.json", "old")
    with kill_points.Recorder(root, states) as recorder:
        write_json(root / "value.json", "new")
    kinds = {name.split()[0]: number for number, name in sorted(recorder.names.items())}
    assert kinds["write"] < kinds["os.rename"] and "open" in kinds
    torn = [file.read_bytes() for file in states[kinds["write"]].iterdir() if file.name.startswith(".value.json")]
    assert torn == [b'"ne']  # half of the six bytes
    before = [state for number, state in states.items() if number <= kinds["os.rename"]]
    after = [state for number, state in states.items() if number > kinds["os.rename"]]
    assert {read_json(state / "value.json") for state in before} == {"old"}
    assert {read_json(state / "value.json") for state in after} == {"new"} and after
    state = states[kinds["write"]]
    assert len(remove_leftovers(state)) == 1 and list(state.iterdir()) == [state / "value.json"]


def test_before_the_first_operation_there_is_nothing(tmp_path):
    state = tmp_path / "state"
    with kill_points.Recorder(tmp_path / "root", {1: state}):
        (tmp_path / "root").mkdir()
    assert list(state.iterdir()) == []


def test_an_outcome_that_differs_is_seen(tmp_path):
    old, new = {"proxy_loss_mean": 0.1, "seconds": {"a": 1}}, {"proxy_loss_mean": 0.2, "seconds": {"a": 2}}
    assert kill_points._lasting(old) != kill_points._lasting(new)
    assert kill_points.differences([old, 1], [new, 1]) == [
        "[0].proxy_loss_mean: 0.1 instead of 0.2",
        "[0].seconds.a: 1 instead of 2",
    ]
    assert kill_points.differences([old, 1], [old, 1]) == []
    assert kill_points._lasting({"seconds": 1, "x": [{"finished": 2, "y": 3}]}) == {"x": [{"y": 3}]}

"""The mesh's settings and how a process joins others; what several devices and processes do is in tests/devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from experiments._entry import mesh_or_none
from qjax.errors import InputError, RunError
from qjax.runtime import distributed, mesh
from qjax.runtime.distributed import DistributedSettings, initialise


def test_one_device_is_a_mesh_too():
    made = mesh.make(1, 1)
    assert made.axis_names == ("data", "model") and made.shape == {"data": 1, "model": 1}
    assert set(made.axis_types) == {AxisType.Auto}
    assert made == mesh.single() == mesh.MeshSettings().make()
    assert mesh.make(None).size == len(jax.devices())


def test_too_many_devices_are_refused_with_the_remedy():
    there = len(jax.devices())
    with pytest.raises(InputError, match=rf"asks for {3 * there} devices and there .* {there} .*JAX_NUM_CPU_DEVICES"):
        mesh.make(3 * there, 1)
    with pytest.raises(InputError, match=r"mesh\.model=99"):
        mesh.make(1, 99)


@pytest.mark.parametrize(("data", "model"), [(0, 1), (1, -1), (True, 1), (1, False)])
def test_sizes_are_positive_whole_numbers(data, model):
    with pytest.raises(InputError, match="it is a number of devices, at least 1"):
        mesh.MeshSettings(data, model)


def test_one_device_for_several_processes_is_refused_not_used_by_each_of_them(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    one = {"mesh": {"data": 1, "model": 1}}
    for ask in (lambda: mesh.make(1, 1), lambda: mesh_or_none(one)):
        with pytest.raises(InputError, match="asks for 1 devices of 2 processes; .* a multiple of the number"):
            ask()


def test_placing_keeps_values_and_copies_nothing_twice():
    tree = {"a": np.arange(6, dtype=np.float32).reshape(3, 2), "b": [np.int32(4)]}
    placed = mesh.place(tree, mesh.single())
    np.testing.assert_array_equal(placed["a"], tree["a"])
    assert placed["b"][0].sharding.spec == PartitionSpec()
    assert mesh.place(placed, mesh.single())["a"] is placed["a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"processes": 2}, "there is no distributed.coordinator"),
        ({"process": 1}, "there is no distributed.coordinator"),
        ({"coordinator": "localhost", "processes": 2}, "it is host:port"),
        ({"coordinator": "localhost:port", "processes": 2}, "it is host:port"),
        ({"coordinator": "localhost:99999", "processes": 2}, "it is host:port"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "numbered 0 to 1"),
        ({"processes": 0}, "at least 1"),
        ({"process": -1}, "at least 0"),
        ({"heartbeat_s": 0}, "at least 1"),
    ],
)
def test_groups_of_processes_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        DistributedSettings(**settings)


def test_nothing_is_started_without_a_coordinator_nor_twice(monkeypatch):
    initialise(DistributedSettings())
    assert jax.process_count() == 1
    two = DistributedSettings("localhost:9", 2, 0)
    monkeypatch.setattr(distributed, "_started", two)
    initialise(two)  # the same again: nothing to do


def test_devices_that_were_touched_before_end_in_an_error_that_says_so():
    jax.devices()
    with pytest.raises(RunError, match=r"process 0 of 2 could not join localhost:9 .*before any JAX"):
        initialise(DistributedSettings("localhost:9", 2, 0))

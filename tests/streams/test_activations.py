"""Activations between blocks: the same values and the same codes wherever they lie, and nothing left behind."""

import errno
import os
import pathlib

import jax
import numpy as np
import pytest

import qjax
from qjax import models
from qjax.errors import InputError, RunError
from qjax.hessian.store import HessianStore
from qjax.job.preflight import Estimate, place_activations
from qjax.models.checkpoints.weights import DTYPES
from qjax.pipeline.quantize_model import quantize_model
from qjax.pipeline.recipe import Recipe
from qjax.streams import activations
from qjax.streams.activations import DeviceActivations, Place, placed

GIB = 2**30
FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "models" / "llama3"


def places(tmp_path):
    return {"host": Place(), "device": Place("device"), "disk": Place("disk", tmp_path / "scratch")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_what_is_written_is_read_and_no_file_has_a_name(tmp_path, where, dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 3, 4)).astype(DTYPES[dtype])
    with placed(places(tmp_path)[where]):
        x = activations.empty(values.shape, values.dtype)
        y = activations.like(x)
    assert len(x) == 5 and y.shape == values.shape and y.dtype == values.dtype
    for out in (x, y, x):  # the last over what is there
        for start in (0, 2, 4):
            padded = np.concatenate([values[start : start + 2], values[:1]])[:2]
            activations.put(out, start, min(2, 5 - start), jax.device_put(padded))
    for start in (0, 2, 4):
        for out in (x, y):
            np.testing.assert_array_equal(np.asarray(out[start : start + 2]), values[start : start + 2])
    assert isinstance(x, {"device": DeviceActivations, "host": np.ndarray, "disk": np.memmap}[where])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert isinstance(activations.empty((2, 2), np.float32), np.ndarray)  # outside of the block


def test_a_range_that_was_not_written_and_a_place_that_does_not_exist_are_refused(tmp_path):
    x = DeviceActivations((4, 2, 2), np.float32)
    x[0:2] = np.zeros((2, 2, 2), np.float32)
    for where in (slice(2, 4), slice(0, 3)):
        with pytest.raises(InputError, match="were not written as one range"):
            x[where]
    for where, folder in (("tape", None), ("disk", None), ("host", tmp_path)):
        with pytest.raises(InputError, match="allowed are device, host, disk"):
            Place(where, folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_is_full_or_fails_is_named(tmp_path, monkeypatch, code):
    def fails(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fails)
    with placed(Place("disk", tmp_path)), pytest.raises(RunError, match=r"could not write 96 bytes .*disk"):
        activations.empty((2, 3, 4), np.float32)
    assert list(tmp_path.iterdir()) == []


def test_codes_are_the_same_wherever_activations_lie(tmp_path):
    """Five sequences in batches of two: the last batch is filled up."""
    small_model = models.load(FIXTURE)
    tokens = np.random.default_rng(1).integers(0, small_model.config.vocab_size, (5, 16))
    recipe = Recipe({"name": "half_integer"}, 2, qjax.rounding.make("nearest"), qjax.incoherence.make("none"))
    found = {}
    for name, place in places(tmp_path).items():
        with placed(place):
            store = HessianStore(tmp_path / name)
            key = store.key("model", "tokens", "input", 2)
            config, params = small_model.config, small_model.params
            load = store.collect(key, config, params, tokens, batch=2)
            options = {"seed": 0, "batch": 2}
            quantized = quantize_model(config, params, tokens, recipe, **options, stream="corrected")
            found[name] = jax.device_get((quantized.params, load(config.num_layers - 1)["mlp.down_proj"].input))
    for name in ("device", "disk"):
        jax.tree.map(np.testing.assert_array_equal, found[name], found["host"])


NEED = Estimate(1, 1, 1, host_bytes=4 * GIB, disk_bytes=GIB, device_bytes=2 * GIB, activation_bytes=3 * GIB)


@pytest.mark.parametrize(
    ("device", "host", "on_device", "where"),
    [
        (None, 7, True, "host"),  # a CPU's own memory is the host's
        (5, 7, True, "device"),
        (4.9, 7, True, "host"),
        (5, 7, False, "host"),
        (5, 6.9, True, "disk"),  # they would lie in the same memory
        (None, 6.9, True, "disk"),
        (None, 4, True, "disk"),
    ],
)
def test_the_first_place_that_fits_is_taken(tmp_path, monkeypatch, device, host, on_device, where):
    monkeypatch.setattr("qjax.job.preflight._free", lambda _: 4 * GIB)
    options = {"host_gb": host, "device_gb": device, "disk_gb": None, "on_device": on_device}
    assert place_activations(NEED, tmp_path, **options) == where
    assert {"host": "on the host", "device": "on the device", "disk": "on disk"}[where] in NEED.lines(where)[1]


@pytest.mark.parametrize(
    ("device", "host", "disk", "message"),
    [
        (1.9, 9, None, "need 2.00 GiB on the device, memory.device_gb allows 1.90 GiB"),
        (None, 3.9, None, "need 4.00 GiB of memory, memory.host_gb allows 3.90 GiB"),
        (None, 9, 0.9, "need 1.00 GiB of disk and 0.90 GiB may be used"),
        (None, 9, 4 / 2**20, r"need 1.00 GiB of disk and 4.00 KiB may be used"),
        (None, 6, 3.9, "take 3.00 GiB. Memory: 4.00 GiB besides them, .* 6.00 GiB. Disk: 1.00 GiB .* 3.90 GiB"),
    ],
)
def test_a_run_that_fits_nowhere_is_refused_with_the_numbers(tmp_path, monkeypatch, device, host, disk, message):
    monkeypatch.setattr("qjax.job.preflight._free", lambda _: 100 * GIB)
    with pytest.raises(RunError, match=message):
        place_activations(NEED, tmp_path, host_gb=host, device_gb=device, disk_gb=disk, on_device=True)

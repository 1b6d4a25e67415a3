"""The cache of reference states: computed once, whole or not at all, damage noticed."""

import logging

import numpy as np
import pytest

from qjax.errors import RunError
from qjax.evaluate import TeacherCache

STATES = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


class Compute:
    def __init__(self, states=STATES):
        self.calls, self.states = 0, states

    def __call__(self):
        self.calls += 1
        return self.states


def test_computed_once_and_the_same_bytes_after(tmp_path):
    compute = Compute()
    first = TeacherCache(tmp_path / "a" / "b").get("model", "tokens", compute)
    second = TeacherCache(tmp_path / "a" / "b").get("model", "tokens", compute)
    assert compute.calls == 1
    np.testing.assert_array_equal(first, STATES)
    np.testing.assert_array_equal(second, STATES)
    assert second.dtype == np.float32
    assert sorted(path.suffix for path in (tmp_path / "a" / "b").iterdir()) == [".json", ".lock", ".npy"]


def test_model_and_tokens_are_the_address(tmp_path):
    cache, compute = TeacherCache(tmp_path), Compute()
    for model, tokens in [("m", "t"), ("m", "u"), ("n", "t")]:
        cache.get(model, tokens, compute)
    assert compute.calls == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no array", "bad record"])
def test_damage_is_logged_and_repaired(tmp_path, caplog, damage):
    cache, compute = TeacherCache(tmp_path), Compute()
    cache.get("m", "t", compute)
    array, record = next(tmp_path.glob("*.npy")), next(tmp_path.glob("*.json"))
    raw = bytearray(array.read_bytes())
    if damage == "flip":
        raw[-3] ^= 1
        array.write_bytes(raw)
    elif damage == "truncate":
        array.write_bytes(raw[:-8])
    elif damage == "empty":
        array.write_bytes(b"")
    elif damage == "no array":
        array.unlink()
    else:
        record.write_text("{")
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(cache.get("m", "t", compute), STATES)
    assert compute.calls == 2 and "is damaged" in caplog.text
    cache.get("m", "t", compute)
    assert compute.calls == 2


def test_array_without_record_is_an_unfinished_entry(tmp_path):
    cache, compute = TeacherCache(tmp_path), Compute()
    cache.get("m", "t", compute)
    next(tmp_path.glob("*.json")).unlink()
    cache.get("m", "t", compute)
    assert compute.calls == 2


def test_full_disk_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qjax.evaluate.reference_cache.np.save", full)
    with pytest.raises(RunError, match=r"cannot be stored \(No space left on device\); free space"):
        TeacherCache(tmp_path).get("m", "t", Compute())
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]

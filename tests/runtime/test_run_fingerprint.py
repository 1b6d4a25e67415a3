"""One hash of everything a run depends on."""

from __future__ import annotations

import hashlib
import json
import platform

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import InputError
from qjax.runtime import fingerprint

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=8
)


def test_digest_of_a_known_value():
    """The SHA-256 of the 31 bytes written here by hand."""
    expected = hashlib.sha256('{"a":[1,2.5,null,true],"b":"σ"}'.encode()).hexdigest()
    assert fingerprint.digest({"b": "σ", "a": (1, 2.5, None, True)}) == expected


@given(VALUES)
def test_digest_survives_json_and_the_order_of_keys(value):
    def reverse(v):
        if isinstance(v, dict):
            return {k: reverse(v[k]) for k in reversed(list(v))}
        return [reverse(x) for x in v] if isinstance(v, list) else v

    assert fingerprint.digest(value) == fingerprint.digest(json.loads(json.dumps(value)))
    assert fingerprint.digest(value) == fingerprint.digest(reverse(value))
    assert fingerprint.differences(value, reverse(value)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, np.float32(1), b"x", {1: 2}, [{"a": {None: 1}}]])
def test_digest_refuses_what_json_does_not_have(value):
    with pytest.raises(InputError, match="fingerprint: "):
        fingerprint.digest({"x": value})


def test_differences_name_the_path_and_both_values():
    old = {"model": {"sha": "a", "layers": [1, 2]}, "bits": 2, "gone": 1, "empty": {}}
    new = {"model": {"sha": "b", "layers": [1, 2, 3]}, "bits": 2, "come": None, "empty": {"x": 1}}
    assert fingerprint.differences(old, new) == [
        "come: (absent) -> None",
        "empty: {} -> (absent)",
        "empty.x: (absent) -> 1",
        "gone: 1 -> (absent)",
        "model.layers[2]: (absent) -> 3",
        "model.sha: a -> b",
    ]


def test_versions_and_device_are_json_and_describe_this_process():
    versions, device = fingerprint.versions(), fingerprint.device()
    assert json.loads(json.dumps([versions, device])) == [versions, device]
    assert versions["python"] == platform.python_version()
    assert versions["jax"] == jax.__version__
    assert versions["numpy"] == np.__version__
    assert {"qjax", "jaxlib", "flax"} <= versions.keys()
    assert device["platform"] == jax.default_backend()
    assert device["count"] == jax.device_count()
    assert device["cpu_cores"] >= 1
    assert device["memory_bytes"] > 2**28


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: A\nflags\t\t: fpu sse4_2 avx avx2 fma\n\nmodel name\t: B\nflags\t: avx512f\n", ("A", "avx2")),
        ("model name\t: C\nflags\t\t: avx512vl avx512f avx2 avx sse4_2\n", ("C", "avx512f")),
        ("model name\t: D\nvmx flags\t: avx512f\nflags\t\t: fpu sse4_2\n", ("D", "sse4_2")),
        ("Features\t: fp asimd\n", ("some processor", "aarch64")),
        (None, ("some processor", "aarch64")),
    ],
)
def test_the_processor_is_what_linux_says_of_it(monkeypatch, text, expected):
    def read_text(path):
        assert str(path) == "/proc/cpuinfo"
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(fingerprint.pathlib.Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: "some processor")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    found = fingerprint.device()
    assert (found["cpu_model"], found["instruction_set"]) == expected

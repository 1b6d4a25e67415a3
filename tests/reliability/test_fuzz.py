"""The time-boxed part of `scripts/fuzz.py`, and no pickle anywhere."""

import json
import pathlib
import pickle
import random
import re
import subprocess
import tempfile

import numpy as np
import pytest
from faults import REPOSITORY, script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.errors import ModelFileError, QjaxError

fuzz = script("fuzz")


@pytest.fixture(scope="module")
def watch():
    return fuzz.Watch()


@pytest.fixture(scope="module")
def readers():
    with tempfile.TemporaryDirectory(dir=fuzz.in_memory()) as folder:
        yield {reader.name: reader for reader in fuzz.readers(pathlib.Path(folder) / "files")}


@pytest.mark.parametrize("name", ["gguf", "index", "tokenizer", "artifact"])
def test_damaged_inputs_give_typed_errors_in_bounded_time_and_memory(readers, watch, name):
    found = fuzz.fuzz(readers[name], 5000, seed=0, watch=watch, seconds=4)
    assert found["wrong"] == []
    assert found["refused"] > 0.3 * found["inputs"] > 0  # the damage is damage


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_are_no_index(readers, data):
    reader = readers["index"]
    name = data.draw(st.sampled_from(sorted(reader.valid)))
    (reader.folder / name).write_bytes(data.draw(st.binary(max_size=200)))
    try:
        with pytest.raises(QjaxError):
            reader.read()
    finally:
        (reader.folder / name).write_bytes(reader.valid[name])


def test_what_long_fuzzing_found_by_name(readers, capfd):
    """A shard's name with a zero byte; merges that are shorter than the prefix of subwords, where Rust code panics."""
    index, tokenizer = readers["index"], readers["tokenizer"]
    name = "model.safetensors.index.json"
    text = index.valid[name].decode().replace("model-00001", "model\\u0000-00001", 1)
    definition = json.loads(tokenizer.valid["tokenizer.json"])
    definition["model"]["continuing_subword_prefix"] = "a long prefix"
    for reader, file, content, message in (
        (index, name, text.encode(), "which is no file name"),
        (tokenizer, "tokenizer.json", json.dumps(definition).encode(), "cannot read the tokenizer .*out of range"),
    ):
        (reader.folder / file).write_bytes(content)
        try:
            with pytest.raises(ModelFileError, match=message):
                reader.read()
        finally:
            (reader.folder / file).write_bytes(reader.valid[file])
    capfd.readouterr()  # the panic's own message


def test_the_harness_sees_what_is_wrong(readers, watch, tmp_path):
    def read(kind):
        if kind == "error":
            raise KeyError("x")
        if kind == "memory":
            np.zeros(16 << 20, np.uint8)
        if kind == "outside":
            (tmp_path / "secret").read_bytes()
        if kind == "pickle":
            pickle.loads(b"")

    (tmp_path / "secret").write_bytes(b"")
    good = readers["tokenizer"]
    for kind, message in {
        "error": "KeyError",
        "memory": "bytes allocated",
        "outside": "secret",
        "pickle": "pickle was used",
    }.items():
        calls = []

        def bad(kind=kind, calls=calls):
            calls.append(0)
            if len(calls) > 1:  # the first is the harness's own trial
                read(kind)

        reader = fuzz.Reader("tokenizer", good.folder, sorted(good.valid), bad)
        found = fuzz.fuzz(reader, 1, seed=0, watch=watch)
        assert len(found["wrong"]) == 1 and message in found["wrong"][0], found["wrong"]


def test_a_run_in_several_processes_counts_all_inputs_and_sees_crashes_and_hangs(monkeypatch, capsys):
    commands = []

    def run(command, **options):
        commands.append(dict(zip(command[2::2], command[3::2], strict=True)))
        if commands[-1]["--reader"] == "index":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        code = {"tokenizer": -11, "gguf": 1}.get(commands[-1]["--reader"], 0)
        return subprocess.CompletedProcess(command, code, "out", "err")

    monkeypatch.setattr(fuzz.subprocess, "run", run)
    assert fuzz.side_by_side(["gguf", "index", "tokenizer", "artifact"], 100_002, 3, 2, 9.0) == 5
    assert sum(int(command["--inputs"]) for command in commands) == 100_002
    assert len({(command["--reader"], command["--seed"]) for command in commands}) == len(commands) == 6
    text = capsys.readouterr().out
    assert "index, seed 3: a hang" in text and "tokenizer, seed 3: ended by -11: err" in text


def test_damage_is_the_same_for_the_same_seed():
    data = bytes(range(256)) * 4
    first, second = ([fuzz.damaged(data, random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert first == second and sum(entry != data for entry in first) > 45


def test_no_module_imports_pickle_or_lets_numpy_use_it():
    forbidden = re.compile(
        r"^\s*(import|from)\s+(c?pickle|dill|cloudpickle|joblib|shelve|marshal|torch)\b|allow_pickle\s*=\s*True|"
        r"\bpickle\.loads?\(|torch\.load\(|yaml\.(unsafe_|full_)?load\(",
        re.MULTILINE,
    )
    files = [p for folder in ("qjax", "experiments", "pallas_kernels") for p in (REPOSITORY / folder).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        text = path.read_text()
        assert (found := forbidden.search(text)) is None, f"{path}: {found}"
        for call in re.finditer(r"np\.load\(", text):
            assert "allow_pickle=False" in text[call.start() : call.start() + 120], path

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

from qjax.errors import ArtifactError, ModelFileError, QjaxError

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


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 2**20, "1048576 layers and 2. arrays"),  # 2**64 of them took all memory of the machine
        ("num_layers", 1, "'blocks/1/.* are missing or surplus"),
        ("num_layers", 3, "'blocks/2/.* are missing or surplus"),
        ("head_dim", {}, "head_dim is {}"),
        ("head_dim", 16, "blocks/0/self_attn/q_proj/weight has shape .*, the configuration asks for"),
        ("rms_norm_eps", -1, "rms_norm_eps is -1; it is above 0"),
        ("tie_embeddings", 0, "tie_embeddings is 0"),
        ("sliding_window", "4", "sliding_window is '4'"),
        ("rope_scaling", {"factor": True}, "factor is True"),
    ],
)
def test_an_artifact_whose_configuration_is_not_that_of_its_arrays(readers, field, value, message):
    reader = readers["artifact"]
    manifest = json.loads(reader.valid["model.json"])
    manifest["config"][field] = value
    (reader.folder / "model.json").write_text(json.dumps(manifest))
    reader.seal(reader.folder)
    try:
        with pytest.raises(ArtifactError, match=f"does not describe the arrays .*{message}"):
            reader.read()
    finally:
        (reader.folder / "model.json").write_bytes(reader.valid["model.json"])
        reader.seal(reader.folder)


def test_the_harness_sees_what_is_wrong(readers, watch, tmp_path, monkeypatch):
    peak = [fuzz._peak_of_the_process()]
    assert 50 << 20 < peak[0] < 1 << 40  # bytes
    monkeypatch.setattr(fuzz, "_peak_of_the_process", lambda: peak[-1])

    def read(kind):
        if kind == "error":
            raise KeyError("x")
        if kind == "memory":
            np.zeros(16 << 20, np.uint8)
        if kind == "native":  # what Python's tracer does not see; really, it would take more than this process ever had
            peak.append(peak[-1] + (1 << 30))
        if kind == "outside":
            (tmp_path / "secret").read_bytes()
        if kind == "pickle":
            pickle.loads(b"")

    (tmp_path / "secret").write_bytes(b"")
    good = readers["tokenizer"]
    for kind, message in {
        "error": "KeyError",
        "memory": "bytes allocated",
        "native": "raised the peak of the process",
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


def test_a_run_in_several_processes_counts_all_inputs_and_sees_crashes_and_hangs(monkeypatch, capsys, tmp_path):
    commands = []

    def run(command, **options):
        commands.append(dict(zip(command[2::2], command[3::2], strict=True)))
        if commands[-1]["--reader"] == "index":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        code = {"tokenizer": -11, "gguf": 1}.get(commands[-1]["--reader"], 0)
        return subprocess.CompletedProcess(command, code, "out", "err")

    monkeypatch.setattr(fuzz.subprocess, "run", run)
    monkeypatch.setattr(fuzz, "in_memory", lambda: tmp_path)
    assert fuzz.side_by_side(["gguf", "index", "tokenizer", "artifact"], 100_002, 3, 2, 9.0) == 5
    assert sum(int(command["--inputs"]) for command in commands) == 100_002
    assert len({(command["--reader"], command["--seed"]) for command in commands}) == len(commands) == 6
    text = capsys.readouterr().out
    kept = {str(folder) for folder in tmp_path.iterdir()}  # with the inputs that were being read
    ends = re.search(r"index, seed 3: a hang: no end after .*: (.*)\n", text), re.search(r"-11 at (.*): err\n", text)
    assert {end[1] for end in ends if end} <= kept and all(ends)


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

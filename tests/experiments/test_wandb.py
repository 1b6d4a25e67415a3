"""A sweep tracked by the real wandb, offline: what its files hold is what results.json holds."""

import json
import struct
import sys

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from experiments.quantize import main

_BLOCK, _HEADER = 32768, 7  # a LevelDB log: blocks of records with checksum (4), length (2), kind (1)


def records(file):
    """The records of a .wandb file, read without wandb's own reader."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    at, parts, found = _HEADER, b"", []
    while at + _HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER:  # too little left of the block for a header
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += _HEADER + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def put(tree, item):
    keys = list(item.nested_key) or [item.key]
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = json.loads(item.value_json)


@pytest.mark.slow
def test_wandb_holds_what_the_results_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "quantize -m debug=fast hessian=original rounding=nearest bits=2,3 evaluate=none tracker=wandb sweep=s"
    monkeypatch.setattr(sys, "argv", [*command.split(), f"cache={tmp_path}/cache"])
    main()  # two runs in one process
    wandb.teardown()
    folders = sorted(file.parent for file in (tmp_path / "runs" / "s").glob("*/results.json"))
    assert len(folders) == 2
    for folder, bits in zip(folders, (2, 3), strict=True):
        results = json.loads((folder / "results.json").read_text())
        (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
        config, summary, runs, artifacts = {}, {}, [], []
        for record in records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append(record.run)
                for item in record.run.config.update:
                    put(config, item)
            if kind == "config":
                for item in record.config.update:
                    put(config, item)
            if kind == "summary":
                for item in record.summary.update:
                    put(summary, item)
            if kind == "artifact":
                artifacts.append(record.artifact)
        assert runs[0].run_group == "s" and runs[0].display_name == folder.name and runs[0].project == "qjax"
        assert {"tiny", f"{bits} bits", "nearest", "half_integer", "hadamard"} == set(runs[0].tags)
        assert {key: config[key] for key in results["settings"]} == results["settings"]
        shared = {key: value for key, value in results.items() if key in summary}
        assert {key: summary[key] for key in shared} == shared
        assert set(results) - set(summary) <= {"sha256"}  # the seal of the file itself
        (artifact,) = artifacts
        assert artifact.type == "model" and artifact.name == folder.name
        assert any(content.ref.startswith("file://") for content in artifact.manifest.contents)

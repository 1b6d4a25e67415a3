"""`model=` with a folder, file or hub name, in every program."""

import pytest

from experiments import generate, quantize
from experiments._models import spelled


@pytest.mark.parametrize(
    ("entry", "word", "expected"),
    [
        ("quantize", "model=tiny", ["model=tiny"]),
        ("quantize", "model=tiny,smollm2_135m", ["model=tiny,smollm2_135m"]),
        ("quantize", "model=/models/x", ["model=hf", "model.source='/models/x'"]),
        ("quantize", "model=org/name@main", ["model=hf", "model.source='org/name@main'"]),
        ("quantize", "model=it's.gguf", ["model=hf", r"model.source='it\'s.gguf'"]),
        ("hessians", "model=~/x", ["model=hf", "model.source='~/x'"]),
        ("generate", "model=tiny", ["model.source='tiny'"]),
        ("generate", "model=/models/x", ["model.source='/models/x'"]),
        ("evaluate_artifact", "model=tiny", ["model={source: 'tiny'}"]),
        ("evaluate_artifact", "model={source: tiny}", ["model={source: tiny}"]),
        ("quantize", "model.source=/models/x", ["model.source=/models/x"]),
    ],
)
def test_a_source_is_spelled_as_hydra_wants_it(entry, word, expected):
    assert spelled(["bits=2", word], entry) == ["bits=2", *expected]


def test_a_folder_beside_is_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert spelled(["model=mine"], "quantize") == ["model=hf", "model.source='mine'"]
    assert spelled(["model=other"], "quantize") == ["model=other"]


def test_programs_take_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quantize", f"model={tmp_path}/none", "out=/nowhere"])
    with pytest.raises(SystemExit):
        quantize.main()
    assert f"there is no model '{tmp_path}/none'" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["generate", "model=tiny", "max_new_tokens=2", "prompt=One day"])
    generate.main()
    assert "One day" in capsys.readouterr().out

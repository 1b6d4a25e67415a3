"""Folders in the formats of other tools: the values that are read back are those of the operators."""

import json
import typing

import numpy as np
import pytest
from safetensors.numpy import load_file

import qjax
from experiments import export
from qjax import codebooks, incoherence, rounding
from qjax.codebooks.scaling import ScaleRule
from qjax.errors import InputError
from qjax.interchange.exports import EXPORTS
from qjax.interchange.integers import integers
from qjax.job.options import Export
from qjax.linalg.kronecker import Hessian

GROUPS = ScaleRule("minmax", "group", 32)


@pytest.fixture(scope="module")
def model():
    return qjax.load("tiny")


def quantised(weight, codebook, bits, *, scale=None, method="nearest", rotation="none", **options):
    x = np.random.default_rng(0).standard_normal((300, weight.shape[1])).astype(np.float32)
    matrix, _ = qjax.quantize_matrix(
        weight,
        Hessian(x.T @ x / np.float32(300)),
        codebook=codebooks.make(codebook, bits),
        rounding=rounding.make(method, **options),
        incoherence=incoherence.make(rotation),
        scale=scale,
        key=0,
    )
    return matrix


def weight_of(model, name="up_proj"):
    return np.asarray(model.params["blocks"][0]["mlp"][name]["weight"])


CASES = {
    "grid in groups": {"codebook": "grid", "bits": 4, "scale": GROUPS},
    "grid by row": {"codebook": "grid", "bits": 3},
    "activation order": {"codebook": "grid", "bits": 4, "scale": GROUPS, "method": "gptq", "order": "descending"},
    "half-integers": {"codebook": "half_integer", "bits": 2},
    "half-integers in groups": {"codebook": "half_integer", "bits": 3, "scale": ScaleRule("rms", "group", 64)},
}


@pytest.mark.parametrize("case", CASES)
def test_integers_are_the_operator_to_the_bit(model, case):
    operator = quantised(weight_of(model), **CASES[case])
    matrix = integers(operator, "x")
    assert np.array_equal(matrix.values(), np.asarray(operator.dequantize()))
    assert (matrix.bits, matrix.zero is None) == (
        (operator.codebook.bits + 1, True) if "half" in case else (operator.codebook.bits, False)
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rotation": "hadamard"}, "rotated or rescaled matrix: quantise with incoherence=none"),
        ({"codebook": "lloyd_max"}, "codebook=lloyd_max is no grid of equal steps"),
        ({"codebook": "e8p"}, "codebook=.* is no grid of equal steps"),
    ],
)
def test_what_is_no_matrix_of_integers_says_why(model, changes, reason):
    operator = quantised(weight_of(model)[:64], **{"codebook": "half_integer", "bits": 2, **changes})
    with pytest.raises(InputError, match=f"x cannot be stored as integers: .*{reason}"):
        integers(operator, "x")
    assert EXPORTS.make("hf").reason(operator) is None


def with_two(model, one, other):
    """The model with two linears of block 0 quantised."""
    return qjax.replace(model, {"layers.0.mlp.up_proj": one, "layers.0.mlp.gate_proj": other})


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq", "hf"])
def test_a_folder_holds_the_values(model, tmp_path, format):
    order = {"method": "gptq", "order": "descending"} if format == "gptq" else {}
    small = with_two(
        model,
        *(quantised(weight_of(model, name), "grid", 4, scale=GROUPS, **order) for name in ("up_proj", "gate_proj")),
    )
    small.save(tmp_path / "out", format=format)
    read = qjax.load(tmp_path / "out")
    tokens = np.arange(64, dtype=np.int32)[None] + 3
    measured = qjax.evaluate(read, tokens, reference=model)
    assert measured.kl_mean > 0 and (measured.bits_per_weight == 32) is (format == "hf")
    assert read.config == model.config
    assert np.array_equal(read.tokenizer.encode("One day"), model.tokenizer.encode("One day"))
    for name in ("up_proj", "gate_proj"):
        expected = np.asarray(small.params["blocks"][0]["mlp"][name]["weight"].dequantize())
        found = np.asarray(read.params["blocks"][0]["mlp"][name]["weight"])
        if format in ("gptq", "awq"):  # whose scales are float16
            matrix = integers(small.params["blocks"][0]["mlp"][name]["weight"], name)
            half = matrix.scale.astype(np.float16).astype(np.float32)
            group = matrix.groups()
            expected = (matrix.codes - matrix.zeros.astype(np.float32)[:, group]) * half[:, group]
        assert np.array_equal(found, expected)
    for dense in ("embed", "norm"):
        assert np.array_equal(np.asarray(read.params[dense]), np.asarray(model.params[dense]))
    assert np.array_equal(np.asarray(read.params["blocks"][1]["mlp"]["up_proj"]["weight"]),
                          np.asarray(model.params["blocks"][1]["mlp"]["up_proj"]["weight"]))  # fmt: skip


def test_mixed_widths_are_groups_of_the_configuration(model, tmp_path):
    one, other = (
        quantised(weight_of(model), "grid", 4, scale=GROUPS),
        quantised(weight_of(model, "gate_proj"), "half_integer", 2),
    )
    small = with_two(model, one, other)
    small.save(tmp_path / "out", format="compressed-tensors", dtype="bfloat16")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    found = {tuple(group["targets"]): group["weights"] for group in settings["config_groups"].values()}
    up, gate = (found[(f"model.layers.0.mlp.{name}",)] for name in ("up_proj", "gate_proj"))
    assert (up["num_bits"], up["symmetric"], up["group_size"]) == (4, False, 32)
    assert (gate["num_bits"], gate["symmetric"], gate["strategy"]) == (3, True, "channel")
    assert "model.layers.1.mlp.up_proj" in settings["ignore"] and "model.layers.0.mlp.up_proj" not in settings["ignore"]
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    assert str(arrays["model.embed_tokens.weight"].dtype) == "bfloat16"
    with pytest.raises(InputError, match=r"one width and size of groups.*use format=compressed-tensors"):
        small.save(tmp_path / "other", format="gptq")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_written_is_refused_before_anything_is(model, tmp_path):
    rotated = quantised(weight_of(model), "half_integer", 2, rotation="hadamard")
    small = with_two(model, rotated, weight_of(model, "gate_proj"))
    with pytest.raises(InputError, match="model.layers.0.mlp.up_proj cannot be stored in this format"):
        small.save(tmp_path / "out", format="gptq")
    with pytest.raises(InputError, match="a model can be saved as: awq, .*qjax .did you mean .gptq"):
        small.save(tmp_path / "out", format="gtpq")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    with pytest.raises(InputError, match="is there and is not overwritten"):
        small.save(tmp_path / "there", format="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_large_models_are_written_in_parts(model, tmp_path, monkeypatch):
    monkeypatch.setattr("qjax.interchange.folder._SHARD", 1_000_000)
    small = with_two(model, quantised(weight_of(model), "e8p", 2, rotation="hadamard"), weight_of(model, "gate_proj"))
    small.save(tmp_path / "out", format="hf", original=None)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    read = qjax.load(tmp_path / "out")
    expected = np.asarray(small.params["blocks"][0]["mlp"]["up_proj"]["weight"].dequantize())
    assert np.array_equal(np.asarray(read.params["blocks"][0]["mlp"]["up_proj"]["weight"]), expected)
    small.save(tmp_path / "again", format="hf", original=tmp_path / "out")
    files = ("config.json", "tokenizer.json")
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in files)


def test_the_program_offers_every_format_that_is_registered():
    hints = typing.get_type_hints(Export, include_extras=True)
    assert set(hints["format"].__metadata__[0].choices) == set(EXPORTS)


def test_the_program_writes_an_artifact_for_others(model, tmp_path, monkeypatch, capsys):
    small = with_two(model, quantised(weight_of(model), "half_integer", 2), weight_of(model, "gate_proj"))
    small.save(tmp_path / "run" / "artifact")
    out = tmp_path / "exported"
    monkeypatch.setattr("sys.argv", ["export", f"artifact={tmp_path / 'run'}", f"out={out}"])
    export.main()
    assert "tiny as compressed-tensors" in capsys.readouterr().out
    read = qjax.load(out)
    expected = np.asarray(small.params["blocks"][0]["mlp"]["up_proj"]["weight"].dequantize())
    assert np.array_equal(np.asarray(read.params["blocks"][0]["mlp"]["up_proj"]["weight"]), expected)
    monkeypatch.setattr("sys.argv", ["export", f"artifact={out}", f"out={tmp_path / 'other'}"])
    with pytest.raises(SystemExit):
        export.main()
    assert "give the artifact/ folder of a run" in capsys.readouterr().err

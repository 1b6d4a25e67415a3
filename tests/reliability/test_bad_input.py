"""The 36 bad inputs and faults that must give a clear error or a documented recovery, one test each, by number."""

import dataclasses
import itertools
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qjax
from qjax import checks, data, hessian, models
from qjax.codebooks.scaling import ScaleRule
from qjax.errors import ArtifactError, DataError, InputError, ModelFileError, NumericsError, RunError
from qjax.hessian.collect import block_hessians
from qjax.hessian.statistics import Hessian
from qjax.hessian.store import HessianStore
from qjax.models import open_model
from qjax.pipeline import quantize_layer, root_key, suspicious
from qjax.recipe import Recipe
from qjax.run.memory import shrinking

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
FIXTURE = REPOSITORY / "tests" / "fixtures" / "models" / "llama3"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A copy of a model of two blocks, width 32."""
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", WEIGHTS):
        shutil.copyfile(FIXTURE / name, target / name)
    return target


@pytest.fixture
def shards(folder):
    """The copy in two shards."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    (folder / WEIGHTS).unlink()
    table = {}
    for number in range(2):
        file = f"part-{number}.safetensors"
        save_file({name: tensors[name] for name in names[number::2]}, folder / file)
        table |= dict.fromkeys(names[number::2], file)
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    return folder


def edited(folder, **changes):
    table = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in table.items() if v is not ...}))
    return folder


def with_header(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def refused(where, message):
    with pytest.raises(ModelFileError, match=message):
        open_model(where)


def problem(m=16, n=32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * n, n)).astype(np.float32)
    return rng.standard_normal((m, n)).astype(np.float32), x.T @ x / np.float32(len(x))


def quantize(weight, h, *, rounding="ldlq", codebook="half_integer", incoherence="hadamard", **options):
    return qjax.quantize_matrix(
        weight,
        Hessian(h, None),
        codebook=qjax.codebooks.make(codebook, 2),
        rounding=qjax.rounding.make(rounding),
        incoherence=qjax.incoherence.make(incoherence),
        key=root_key(0),
        **{"name": "l7", **options},
    )


def dense(matrix):
    return np.asarray(matrix.dequantize())


# Model files ---------------------------------------------------------------------------------------------------------


def test_case_01_truncated_shard(shards):
    path = shards / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(shards, r"part-1.safetensors is truncated or has extra bytes.*fetch it again")


def test_case_02_missing_shard_listed_in_the_index(shards):
    (shards / "part-1.safetensors").unlink()
    refused(shards, r"names the shard part-1.safetensors, which is not in the folder")


def test_case_03_tensor_in_two_shards_and_in_none(shards):
    table = json.loads((shards / INDEX).read_text())
    table["weight_map"]["ghost"] = "part-0.safetensors"
    (shards / INDEX).write_text(json.dumps(table))
    refused(shards, "lists tensor ghost in part-0.safetensors, but no shard has it")
    shutil.copyfile(shards / "part-0.safetensors", shards / "part-1.safetensors")
    refused(shards, "is in two shards: part-0.safetensors and part-1.safetensors")


def test_case_04_header_longer_than_the_file(folder):
    (folder / WEIGHTS).write_bytes((10**9).to_bytes(8, "little") + b"{}")
    refused(folder, "its header claims 1000000000 bytes, the file has 10")


def test_case_05_header_that_is_no_json_has_duplicates_or_is_too_long(folder):
    with_header(folder / WEIGHTS, b"{nonsense")
    refused(folder, "the header of .* is not valid JSON")
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    with_header(folder / WEIGHTS, b'{"a":' + entry + b',"a":' + entry + b"}", bytes(4))
    refused(folder, "the key 'a' occurs twice")
    with_header(folder / WEIGHTS, b"[" * 100_000)
    refused(folder, "is not valid JSON")
    with (folder / WEIGHTS).open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)  # a hole: takes no disk
    refused(folder, "exceeds the format's limit")


def test_case_06_offsets_that_overlap_or_leave_the_file(folder):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    with_header(folder / WEIGHTS, {"a": entry, "b": {**entry, "data_offsets": [4, 12]}}, bytes(12))
    refused(folder, "tensor b overlaps the tensor before it")
    with_header(folder / WEIGHTS, {"a": entry, "b": {**entry, "data_offsets": [8, 16]}}, bytes(8))
    refused(folder, "is truncated or has extra bytes")


@pytest.mark.parametrize(
    ("shape", "message"), [([2**62, 4], "needs 73786976294838206464 bytes"), ([-1], "shape"), ([True], "shape")]
)
def test_case_07_shapes_that_overflow_are_negative_or_boolean(folder, shape, message):
    with_header(folder / WEIGHTS, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}, bytes(4))
    refused(folder, message)


@pytest.mark.parametrize("kind", ["F8_E4M3", "I64", "F4"])
def test_case_08_dtypes_that_are_not_weights(folder, kind):
    tensors = load_file(folder / WEIGHTS)
    header, body = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes()
        dtype, shape = "BF16", list(value.shape)
        if name == "model.norm.weight":
            dtype, raw = kind, bytes(len(raw) * (4 if kind == "I64" else 1) // (1 if kind == "I64" else 2))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    assert next(iter(tensors.values())).dtype == ml_dtypes.bfloat16
    with_header(folder / WEIGHTS, header, body)
    refused(folder, f"model.norm.weight (has the unknown dtype '{kind}'|is stored as {kind})")


def test_case_09_pickles_are_never_opened(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    refused(folder, "pickle files .pytorch_model.bin.*Convert the model to safetensors")
    refused(folder / "pytorch_model.bin", "is a pickle file")


def test_case_10_git_lfs_pointer_instead_of_weights(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, "Git LFS pointer.*git lfs pull")


def test_case_11_paths_and_links_out_of_the_folder(shards, tmp_path):
    index = json.loads((shards / INDEX).read_text())
    for outside in ("../part.safetensors", "/etc/part.safetensors"):
        changed = {**index["weight_map"], "model.norm.weight": outside}
        (shards / INDEX).write_text(json.dumps({"weight_map": changed}))
        refused(shards, "lies outside the model's folder")
    (shards / INDEX).write_text(json.dumps(index))
    os.replace(shards / "part-0.safetensors", tmp_path / "elsewhere")
    (shards / "part-0.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(shards, "lies outside the model's folder")


def test_case_12_configuration_that_disagrees_with_the_tensors(folder):
    refused(edited(folder, vocab_size=65), r"embed_tokens.weight has shape \[64, 32\].* asks for \[65, 32\]")
    refused(edited(folder, vocab_size=64, num_key_value_heads=4), r"k_proj.weight has shape \[16, 32\]")
    refused(edited(folder, num_key_value_heads=3), "4 attention heads cannot share 3 key/value heads")
    edited(folder, num_key_value_heads=2)
    save_file({k: v for k, v in load_file(folder / WEIGHTS).items() if k != "lm_head.weight"}, folder / WEIGHTS)
    refused(folder, "lm_head.weight .* is missing .or set tie_word_embeddings")


def test_case_13_unsupported_architecture_and_quantised_model(folder):
    refused(edited(folder, architectures=["MambaForCausalLM"]), "MambaForCausalLM is not supported; supported are")
    edited(folder, architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "gptq"})
    refused(folder, "method 'gptq'.*quantised already")


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_case_14_weights_that_are_not_finite(folder, value):
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelFileError, match=rf"tensor {name} has 1 values that are not finite.*\[3, 5\]"):
        models.load(folder)


def test_case_15_zero_rows_columns_and_matrices():
    weight, h = problem()
    for rule in (None, ScaleRule("rms", "row")):
        matrix, report = quantize(np.zeros_like(weight), h, scale=rule)
        assert report.proxy_loss == 0 and np.abs(dense(matrix)).max() < 1e-25
    keep = np.arange(16) != 3
    for zeroed in (weight * keep[:, None], weight * np.tile(keep, 2)):
        matrix, report = quantize(np.ascontiguousarray(zeroed, np.float32), h)
        assert np.isfinite(dense(matrix)).all() and report.proxy_loss < 0.2
    matrix, _ = quantize(
        np.ascontiguousarray(weight * keep[:, None]), h, scale=ScaleRule("rms", "row"), incoherence="none"
    )
    assert np.abs(dense(matrix)[3]).max() < 1e-6 < np.abs(dense(matrix)[2]).min()


def test_case_16_a_huge_outlier_and_overflow(folder):
    weight, h = problem()
    weight[2, 5] = 1e4
    matrix, report = quantize(weight, h)
    assert np.isfinite(dense(matrix)).all() and report.proxy_loss < 0.2
    with pytest.raises(NumericsError, match=r"layer l7: the losses are not finite: weights reach 1e\+34"):
        quantize(weight * np.float32(1e30), h)
    tensors = {name: value.astype(np.float32) for name, value in load_file(folder / WEIGHTS).items()}
    tensors["model.norm.weight"][1] = 1e6
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelFileError, match=r"model.norm.weight has 1 values that are not finite in float16.*float32"):
        models.load(folder, "float16")


@pytest.mark.parametrize(("m", "n", "codebook"), [(7, 92, "half_integer"), (13, 20, "e8p"), (3, 23, "trellis")])
def test_case_17_sizes_without_a_hadamard_matrix_are_padded(m, n, codebook):
    weight, h = problem(m, n)
    matrix, report = quantize(weight, h, codebook=codebook)
    assert dense(matrix).shape == (m, n) and report.padded[1] >= n and report.proxy_loss < 0.3


@pytest.mark.parametrize(("m", "n"), [(1, 32), (32, 1), (1, 1)])
def test_case_18_a_single_row_or_column(m, n):
    weight, h = problem(m, n)
    matrix, report = quantize(weight, h)
    assert dense(matrix).shape == (m, n) and report.proxy_loss < 0.6


def test_case_18_no_rows_at_all():
    with pytest.raises(InputError, match=r"layer l7: .* both positive; found \(0, 4\)"):
        quantize(np.zeros((0, 4), np.float32), np.eye(4, dtype=np.float32))


# Calibration ---------------------------------------------------------------------------------------------------------


def tokens_of(tmp_path, ids, **options):
    np.save(tmp_path / "ids.npy", np.asarray(ids, np.int64))
    common = {"calibration_sequences": 2, "evaluation_sequences": 1, "length": 8, "vocab_size": 64, "split": 0.6}
    return data.load("tokens", None, path=str(tmp_path / "ids.npy"), **{**common, **options})


def test_case_19_no_text_and_too_little(tmp_path):
    with pytest.raises(DataError, match="needed 2 windows .16 tokens.; ask for fewer sequences"):
        tokens_of(tmp_path, [])
    with pytest.raises(DataError, match="found 24 tokens, that is 3 windows of length 8; needed 9 windows"):
        tokens_of(tmp_path, np.arange(40) % 64, calibration_sequences=9)
    with pytest.raises(DataError, match="zero calibration tokens"):
        tokens_of(tmp_path, np.arange(40) % 64, calibration_sequences=0)


def test_a_trellis_of_few_states_whose_values_have_a_mean_is_warned_about():
    books = [qjax.codebooks.make("trellis", 2, L=6, code=code) for code in ("1mad", "3inst", "mul1", "lut")]
    first, second = checks.codebook_doubts([*books, books[0], qjax.codebooks.make("half_integer", 2)])
    assert "code=1mad with codebook.L=6: its 64 values have a mean of -0.45 of their RMS" in first and "3inst" in second
    assert checks.codebook_doubts([qjax.codebooks.make("trellis", 2, L=8, code="1mad")]) == []


def test_case_20_fewer_tokens_than_inputs_are_warned_about_and_damped(tmp_path):
    config = open_model(FIXTURE).config
    few = tokens_of(tmp_path, np.arange(40) % 64).calibration
    assert checks.doubts(config, few, None, "none")[-1].startswith(
        "the calibration text has 16 tokens, fewer than the 44 inputs of the widest matrix: its Hessian has at most"
    )
    enough = tokens_of(tmp_path, np.arange(400) % 61, calibration_sequences=6).calibration
    assert not [line for line in checks.doubts(config, enough, None, "none") if "calibration" in line]
    weight, _ = problem()
    x = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)
    matrix, report = quantize(weight, x.T @ x / 4, damping=0.0)
    assert report.damping > 0 and np.isfinite(dense(matrix)).all()


def test_case_21_dead_input_channels():
    weight, h = problem()
    h[3], h[:, 3] = 0, 0
    matrix, report = quantize(weight, h)
    assert report.dead_columns == 1 and np.isfinite(dense(matrix)).all() and report.damping == pytest.approx(0.01)


def test_case_22_token_ids_outside_the_vocabulary(tmp_path):
    with pytest.raises(DataError, match="token id 64 at position 4 is outside the vocabulary of 64"):
        tokens_of(tmp_path, [1, 2, 3, 4, 64, *range(60)])


def test_case_23_wrong_or_absent_tokenizer_and_missing_bos(folder, tmp_path):
    with pytest.raises(ModelFileError, match="has no tokenizer.json, so text cannot be encoded"):
        open_model(folder).tokenizer.encode("a")
    model = models.load(folder)
    tokens = tokens_of(tmp_path, np.arange(60) % 64).evaluation
    states = np.zeros((*tokens.tokens.shape, 32), np.float32)  # says every token is as likely: perplexity 64
    checks.check_reference(model, states, tokens, 1, 64.01)
    checks.check_reference(model, states, tokens, 1, None)
    with pytest.raises(DataError, match=r"perplexity 64 on .* above evaluate.sanity_perplexity=63.*BOS"):
        checks.check_reference(model, states, tokens, 1, 63)
    expects = models.Tokenizer(None, bos_id=1, adds_bos=True)
    assert "data.bos=sequence" in checks.doubts(model.config, tokens, expects, "none")[-1]
    assert "data.bos" not in " ".join(checks.doubts(model.config, tokens, expects, "sequence"))


@pytest.fixture(scope="module")
def small():
    return models.load(FIXTURE)


def test_case_24_padding_does_not_enter_the_hessian(small):
    """Windows are never padded; a last batch that is filled up counts its real sequences only."""
    tokens = np.random.default_rng(0).integers(0, 64, (3, 8)).astype(np.int32)
    padded, exact = (hessian.collect(small, tokens, batch=batch) for batch in (2, 3))
    for name, h in exact.items():
        assert padded[name].tokens == h.tokens == 24
        np.testing.assert_allclose(padded[name].input, h.input, rtol=1e-5, atol=1e-6 * np.abs(h.input).max())


def test_case_25_activations_that_are_not_finite_name_layer_and_sequence(small):
    x = np.random.default_rng(0).standard_normal((5, 8, 32)).astype(np.float32)
    x[3, 2, 1] = np.nan
    with pytest.raises(NumericsError, match=r"layers.1.self_attn.q_proj: its inputs .* first in sequence 3; drop"):
        block_hessians(small.params["blocks"][1], x, small.config, index=1, batch=2)


def test_case_26_hessians_that_cannot_be(tmp_path, small):
    weight, h = problem()
    for change, message in {
        (0, 1): "not symmetric: .0, 1. and its mirror differ",
        (2, 2): "1 negative values on its diagonal",
    }.items():
        bad = h.copy()
        bad[change] = -50
        with pytest.raises(NumericsError, match=message):
            quantize(weight, bad)
    indefinite = h.copy()
    indefinite[0, 1] = indefinite[1, 0] = 1e6
    with pytest.raises(NumericsError, match="could not be factored with damping up to"):
        quantize(weight, indefinite)
    with pytest.raises(InputError, match=r"the Hessian has shape \(31, 31\).*another layer or model"):
        quantize(weight, h[:31, :31])
    store, tokens = HessianStore(tmp_path), np.random.default_rng(0).integers(0, 64, (2, 8)).astype(np.int32)
    load = store.collect("key", small.config, small.params, tokens, batch=2)
    first = load(0)
    shutil.copyfile(store._file("key", 0), store._file("key", 1))  # another layer's file, whole and of the same sizes
    assert store.load("key", 1) is None and store.load("key", 0) is not None
    with pytest.raises(ArtifactError, match="vanished or was damaged"):
        load(1)
    assert np.array_equal(store.load("key", 0)["self_attn.q_proj"].input, first["self_attn.q_proj"].input)


def test_case_27_stored_hessians_do_not_depend_on_the_signs():
    """Hessians are kept in the layer's own basis; the signs of the seed are applied when a matrix is quantised."""
    weight, h = problem()
    seeds = [quantize(weight, h, name=name) for name in ("a", "b")]
    assert not np.array_equal(dense(seeds[0][0]), dense(seeds[1][0]))
    plain = quantize(weight, h, rounding="nearest")[1].proxy_loss
    for matrix, report in seeds:
        error = (weight - dense(matrix)).astype(np.float64)
        direct = np.sum((error @ h) * error) / np.sum((weight @ h.astype(np.float64)) * weight)
        assert report.proxy_loss == pytest.approx(direct, rel=1e-4) and direct < plain


# Numerics ------------------------------------------------------------------------------------------------------------


def test_case_28_factorisation_that_fails_is_damped_more_and_reported():
    weight, _ = problem()
    x = np.random.default_rng(2).standard_normal((3, 32)).astype(np.float32)
    h = x.T @ x - 1e-3 * np.eye(32, dtype=np.float32)
    np.fill_diagonal(h, np.maximum(np.diagonal(h), 1e-4))
    _, report = quantize(weight, h, damping=1e-6)
    assert 1e-6 < report.damping < 1


def test_case_29_plain_rounding_is_kept_where_feedback_loses(monkeypatch):
    weight, h = problem()
    recipe = Recipe({"name": "half_integer"}, 2, qjax.rounding.make("ldlq"), qjax.incoherence.make("hadamard"))
    plan = recipe.plan(["l7"])["l7"]
    parameters = {"mlp": {"up_proj": {"weight": weight}}}
    _, good = quantize_layer(parameters, Hessian(h, None), plan, "mlp.up_proj", "l7", root_key(0), 0.0)
    assert good.fallback is None and good.alignment < 1 and not suspicious(good)
    from qjax import pipeline

    def harmful(weight, hessian, *, rounding, **options):
        matrix, report = qjax.quantize_matrix(weight, hessian, rounding=rounding, **options)
        if type(rounding).__name__ == "Nearest":
            return matrix, report
        return matrix, dataclasses.replace(report, proxy_loss=0.9, alignment=3.0)

    monkeypatch.setattr(pipeline, "quantize_matrix", harmful)
    matrix, report = quantize_layer(parameters, Hessian(h, None), plan, "mlp.up_proj", "l7", root_key(0), 0.0)
    assert report.fallback == "nearest"
    assert np.array_equal(dense(matrix), dense(quantize(weight, h, rounding="nearest")[0]))


def test_case_30_scale_candidates_that_overflow_are_not_chosen():
    weight, h = problem()
    found = quantize(weight, h, scale=ScaleRule("search", "matrix", candidates=(1e-38, 1.0, 1e38)))[1]
    assert found.proxy_loss == pytest.approx(quantize(weight, h)[1].proxy_loss)
    with pytest.raises(InputError, match="at least one positive factor"):
        ScaleRule("search", "matrix", candidates=())


# System --------------------------------------------------------------------------------------------------------------


def test_case_31_memory_that_runs_out_halves_the_batch_and_then_says_the_numbers():
    tried, told = [], []

    def step(batch):
        tried.append(batch)
        if batch > limit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes.")
        return batch

    limit = 2
    assert shrinking(step, 8, lambda: "layers.3", told.append) == 2 and tried == [8, 4, 2]
    assert told[0] == "memory is used up at layers.3 (asked for 123456 bytes); going on with 4 sequences per step"
    limit = 0
    with pytest.raises(RunError, match=r"used up at layers.3 with one sequence per step .asked for 123456 bytes; peak"):
        shrinking(step, 2, lambda: "layers.3", told.append)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        shrinking(lambda batch: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: x")), 2, str, told.append)


SMALL = ["model=tiny", "data.calibration_sequences=2", "data.evaluation_sequences=1", "data.length=16", "tracker=none"]
SMALL += ["evaluate=none", "rounding=nearest", "incoherence=none", "hessian=original"]


def task(out, cache, *overrides):
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    import experiments.quantize as entry

    GlobalHydra.instance().clear()
    with initialize_config_dir(entry.CONFIGS, version_base="1.3"):
        return entry.job_of(compose("quantize", [*SMALL, f"out={out}", f"cache={cache}", *overrides]))


@pytest.mark.parametrize(("signal", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_case_32_signals_leave_nothing_that_looks_finished(tmp_path, signal, code):
    """SIGKILL at every operation: test_kill_points.py. Here: what a process says when it is asked to stop."""
    program = (
        "import os, signal, sys, qjax.records\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells have their background jobs ignore it
        "save = qjax.records.Records.save\n"
        "def stop(self, matrix, report, incoherence):\n"
        "    save(self, matrix, report, incoherence)\n"
        f"    os.kill(os.getpid(), signal.{signal})\n"
        "qjax.records.Records.save = stop\n"
        "import experiments.quantize\n"
        "experiments.quantize.main()\n"
    )
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", program, *SMALL, f"out={out}", f"cache={tmp_path / 'cache'}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert not (out / "results.json").exists() and not (out / "artifact").exists()
    assert len(list((out / "layers").glob("*.safetensors"))) == 1
    if signal != "SIGKILL":
        assert "what was finished is kept; the same command continues" in done.stderr
        assert "Traceback" not in done.stderr and "ended by" in (out / "log.txt").read_text()


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EROFS"])
def test_case_33_a_disk_that_is_full_failing_or_read_only(tmp_path, monkeypatch, code):
    import errno

    from qjax import job

    replace, calls = os.replace, []

    def failing(source, target, **options):
        calls.append(target)
        if "layers" in str(target) and len([c for c in calls if "layers" in str(c)]) > 2:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        return replace(source, target, **options)

    monkeypatch.setattr(os, "replace", failing)
    remedy = {"ENOSPC": "the disk is full", "EIO": "input/output error", "EROFS": "read-only"}[code]
    out = tmp_path / "run"
    with pytest.raises(RunError, match=f"could not write .*{remedy}"):
        job.run(task(out, tmp_path / "cache"))
    assert not (out / "results.json").exists() and not (out / "artifact").exists()
    assert len(list((out / "layers").iterdir())) == 2  # whole records, no leftovers
    monkeypatch.setattr(os, "replace", replace)
    assert job.run(task(out, tmp_path / "cache"))["matrices"] == 28


def test_case_34_two_jobs_in_one_directory(tmp_path):
    from qjax import job
    from qjax.run.lock import RunLock

    with RunLock(tmp_path / "run"), pytest.raises(RunError, match=f"in use by process {os.getpid()} on"):
        job.run(task(tmp_path / "run", tmp_path / "cache"))
    assert not (tmp_path / "run" / "fingerprint.json").exists()


def test_case_35_another_configuration_in_the_same_directory(tmp_path):
    from qjax.directory import RunDirectory

    directory = RunDirectory(tmp_path)
    directory.claim({"model": "a", "versions": {"jax": "1"}, "calibration": "x"}, "", resume=True)
    for change in ({"model": "b"}, {"versions": {"jax": "2"}}, {"calibration": "y"}):
        now = {"model": "a", "versions": {"jax": "1"}, "calibration": "x"} | change
        with pytest.raises(RunError, match=rf"holds a run with other settings .{next(iter(change))}.*resume=false"):
            directory.claim(now, "", resume=True)


def test_case_36_damaged_checkpoints_clocks_and_commit_markers(tmp_path, monkeypatch):
    import time

    from qjax import artifact, job

    backwards = itertools.count(10**9, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    job.run(task(tmp_path / "whole", tmp_path / "cache"))
    monkeypatch.undo()
    out = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", out)
    (out / "results.json").unlink()
    (out / "artifact" / "model.json").unlink()  # the mark of a whole artifact
    with pytest.raises(ArtifactError, match="no model.json"):
        artifact.load(out / "artifact")
    for number, file in enumerate(sorted((out / "layers").iterdir())[:4]):
        content = bytearray(file.read_bytes())
        content[-1 - number * 5] ^= 4
        file.write_bytes(content[: len(content) - number])
    job.run(task(out, tmp_path / "cache"))
    sums = [json.loads((o / "artifact" / "model.json").read_text())["sha256"] for o in (tmp_path / "whole", out)]
    assert sums[0] == sums[1]


def test_an_untested_version_of_jax_is_named():
    assert checks.version_doubt(jax.__version__) is None
    assert "jax 0.4.30 is outside the tested versions" in checks.version_doubt("0.4.30")

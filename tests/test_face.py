"""The face of the package: what is there after `import qjax`, a whole model in ten lines, the command line's bytes."""

import dataclasses
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import experiments._quantize as entry_point
import qjax
from qjax.errors import ArtifactError, DataError, InputError
from qjax.interchange import artifact
from qjax.job.run import run
from qjax.pipeline.presets import preset

HEAVY = {"tokenizers", "gguf", "hydra", "omegaconf", "rich", "wandb"}
SIZES = {"calibration_sequences": 4, "evaluation_sequences": 2, "length": 32}
# One shape of matrices to compile for; the whole model where nothing is left out.
FEW = ({"pattern": "[kvo]_proj|mlp", "skip": True},)


def loaded(code):
    """The modules that a fresh process has after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture(scope="module")
def model():
    return qjax.load("tiny")


@pytest.fixture(scope="module")
def tokens(model):
    return qjax.data.load("pydoc", model, **SIZES)


@pytest.fixture(scope="module")
def small(model, tokens):
    return qjax.quantize_model(model, tokens, "rtn", bits=3, progress=False)


def test_dir_is_all():
    assert dir(qjax) == sorted(qjax.__all__) and len(set(qjax.__all__)) == len(qjax.__all__)
    for name in qjax.__all__:
        assert getattr(qjax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise_model'"):
        _ = qjax.quantise_model


def test_the_import_is_light():
    assert not loaded("import qjax") & {*HEAVY, "jax", "numpy"}
    assert not loaded("import qjax, qjax.rounding") & {*HEAVY, "flax", "optax", "scipy"}


def test_every_name_is_there_without_importing_its_room():
    code = "\n".join(f"import qjax; qjax.{name}" for name in qjax.__all__)
    assert {f"qjax.{name}" for name in ("report", "job", "finetune")} <= loaded(code)


def test_ten_lines(model, tokens, small, tmp_path, capsys):
    found = qjax.evaluate(small, tokens, reference=model)
    assert found.kl_mean > 0 and found.perplexity > found.perplexity_reference
    assert found.bits_per_weight == pytest.approx(small.bits_per_weight) and 3 < small.bits_per_weight < 3.6
    assert 0 < found.top1_agreement <= 1 and found.kl_mean_interval[0] <= found.kl_mean <= found.kl_mean_interval[1]
    small.save(tmp_path / "tiny")
    text = small.generate("def ", max_new_tokens=4)
    again = qjax.load(tmp_path / "tiny")
    assert isinstance(again, qjax.CompressedModel) and again.fingerprint == small.fingerprint
    assert text.startswith("def ") and len(text) > 4 and again.generate(["def "], max_new_tokens=4) == [text]
    assert again.reports == small.reports and len(small.reports) == 28
    assert again.config == model.config and again.description == small.description
    small.save(tmp_path / "tiny")  # over an artifact
    assert qjax.evaluate(again, tokens, reference=model) == found
    assert capsys.readouterr().out == ""


def test_alone_only_the_perplexity_is_defined(model, tokens, small):
    alone = qjax.evaluate(model, tokens)
    beside = qjax.evaluate(small, tokens, reference=model)
    assert alone.perplexity == pytest.approx(beside.perplexity_reference, rel=1e-6)
    assert alone.perplexity_interval == pytest.approx(beside.perplexity_reference_interval, rel=1e-6)
    assert alone.kl_mean is alone.top1_agreement is alone.perplexity_reference is None
    assert alone.bits_per_weight == 32  # tiny is read as float32
    assert qjax.evaluate.perplexity(model.params, tokens.evaluation, model.config, batch=8) == alone.perplexity


def test_tokens_may_be_an_array(model, tokens, small):
    ids = np.asarray(tokens.evaluation.tokens)
    assert qjax.evaluate(small, ids, model).kl_mean == qjax.evaluate(small, tokens.evaluation, model).kl_mean
    one = qjax.quantize_model(model, np.asarray(tokens.calibration.tokens), "rtn", bits=3, progress=False)
    assert one.fingerprint == small.fingerprint


def test_models_are_compared(model, tokens, small):
    table = qjax.compare({"dense": model, "rtn": small}, tokens, reference=model)
    assert [row["name"] for row in table.rows] == ["dense", "rtn"] and table.rows[0]["kl_mean"] == 0
    assert table.rows[1]["kl_mean"] == qjax.evaluate(small, tokens, reference=model).kl_mean
    lines = repr(table).splitlines()
    assert len(lines) == 3 and lines[1].startswith("dense") and "KL" in lines[0]
    assert table._repr_html_().count("<tr>") == 3 and "<td>rtn</td>" in table._repr_html_()
    assert list(qjax.compare([small, small], tokens).evaluations) == ["tiny 1", "tiny 2"]
    with pytest.raises(InputError, match="no models"):
        qjax.compare([], tokens)


def job_of(folder, *words):
    """A job of the command line on the tokens of these tests."""
    from hydra import compose, initialize_config_dir

    sizes = [f"data.{key}={value}" for key, value in SIZES.items()]
    common = ["tracker=none", "evaluate=none", "bits=2", f"out={folder}/run", f"cache={folder}/cache"]
    few = ["rules=[{pattern: '[kvo]_proj|mlp', skip: true}]"]
    with initialize_config_dir(entry_point.CONFIGS, version_base="1.3"):
        return entry_point.job_of(compose("quantize", [*sizes, *common, *few, *words]))


@pytest.mark.parametrize("name", ["rtn", "gptq", "ldlq", "quip_sharp", "quip"])
def test_the_command_line_gives_the_same_bytes(name, model, tmp_path, capsys):
    job = job_of(tmp_path, f"preset={name}", "seed=3")
    split = qjax.data.load("pydoc", model, seed=3, **SIZES)
    recipe = dataclasses.replace(preset(name), rules=FEW)
    assert recipe == job.recipe
    run(job)
    own = qjax.quantize_model(model, split, recipe, bits=2, key=jax.random.key(3), progress=False)
    assert own.fingerprint == artifact.fingerprint(tmp_path / "run" / "artifact")  # of the SHA-256 of every array
    assert qjax.load(tmp_path / "run").reports == tuple(artifact.reports(tmp_path / "run" / "artifact"))
    assert "quantise run" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block", "e2e"])
def test_tuning_gives_the_same_bytes(name, model, tokens, tmp_path):
    options = {"validation": 2, "batch": 2} | ({"sequences": 2, "tokens": 256} if name == "e2e" else {})
    words = ["rounding=nearest", "hessian=original", f"finetune={name}"]
    run(job_of(tmp_path, *words, *(f"finetune.{key}={value}" for key, value in options.items())))
    recipe = qjax.Recipe(rounding="nearest", hessian="original", finetune={"name": name, **options}, rules=FEW)
    own = qjax.quantize_model(model, tokens, recipe, progress=False)
    assert own.fingerprint == artifact.fingerprint(tmp_path / "run" / "artifact")
    plain = qjax.quantize_model(model, tokens, dataclasses.replace(recipe, finetune=None), progress=False)
    assert own.fingerprint != plain.fingerprint


def test_the_defaults_are_the_command_lines():
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(entry_point.CONFIGS, version_base="1.3"):
        assert qjax.Recipe() == entry_point.job_of(compose("quantize", ["out=o", "cache=c"])).recipe


def test_short_forms_are_what_they_name():
    short = qjax.Recipe("e8p", 2, "ldlq", "hadamard", scale="search", hessian="sketch_b", finetune="block")
    assert short.codebook == {"name": "e8p"} and short.rounding == qjax.rounding.make("ldlq")
    assert short.incoherence == qjax.incoherence.make("hadamard")
    assert short.scale == qjax.codebooks.ScaleRule("search")
    assert short.hessian["estimator"] == "sketch_b" and short.hessian["rounds"] == 1
    assert short.finetune["name"] == "block" and short.finetune["epochs"] == 2
    assert qjax.Recipe(hessian={"name": "sketch_a", "rounds": 4}).hessian["rounds"] == 4
    assert qjax.Recipe(rounding={"name": "ldlq", "passes": 3}).rounding == qjax.rounding.make("ldlq", passes=3)
    assert qjax.Recipe(scale=0.9).scale == 0.9 and qjax.Recipe(incoherence=None) == qjax.Recipe(incoherence="none")
    assert dataclasses.replace(short, bits=2) == short


REFUSED = {
    "rounding": [({"rounding": "ldql"}, "did you mean 'ldlq'"), ({"rounding": 3}, r"rounding is 3 \(int\)")],
    "codebook": [
        ({"codebook": "e8"}, "did you mean 'e8p'"),
        ({"codebook": {"name": "e8p", "bits": 2}}, "bits of a recipe"),
    ],
    "incoherence": [({"incoherence": "hadamrd"}, "did you mean 'hadamard'"), ({"incoherence": True}, "bool")],
    "scale": [({"scale": "serch"}, "did you mean 'search'"), ({"scale": -1}, "positive")],
    "options": [
        ({"scale": {"method": "rms", "granularty": "row"}}, "did you mean 'granularity'"),
        ({"rounding": {"name": "ldlq", "pases": 1}}, "pases"),
        ({"hessian": {"name": "sketch_b", "round": 2}}, "did you mean 'rounds'"),
        ({"rules": [{"patern": "a", "skip": True}]}, "did you mean 'pattern'"),
    ],
    "names": [({"hessian": "orignal"}, "did you mean 'original'"), ({"finetune": "e2"}, "did you mean 'e2e'")],
    "types": [
        ({"hessian": 3}, "hessian is 3"),
        ({"bits": "2"}, "bits is '2'"),
        ({"damping": None}, "damping is None"),
        ({"bits": float("nan")}, "bits is nan"),
        ({"rules": [{"pattern": 3, "skip": True}]}, "rules.pattern is 3"),
        ({"rules": [{"pattern": "a", "bits": "3"}]}, "rules.bits is '3'"),
        ({"rules": [{"pattern": "a", "damping": -1.0}]}, "rules.damping is -1.0; it is not negative"),
        ({"hessian": "sequential", "finetune": "block"}, "needs hessian=original"),
    ],
}


@pytest.mark.parametrize("what", REFUSED)
def test_recipes_refuse_in_words(what):
    for options, words in REFUSED[what]:
        refused_in_words(lambda options=options: qjax.Recipe(**options), words)


def refused_in_words(call, words):
    """With InputError and these words, or before by an annotation, which only tests check."""
    with pytest.raises((InputError, TypeCheckError)) as found:
        call()
    assert found.type is TypeCheckError or re.search(words, str(found.value)), found.value


def test_calls_refuse_in_words(model, tokens, small, tmp_path):
    refused = [
        (lambda: qjax.quantize_model(model, tokens, "quipsharp"), "did you mean 'quip_sharp'"),
        (lambda: qjax.quantize_model(model, tokens, 3), "recipe is 3"),
        (lambda: qjax.quantize_model(small, tokens, "rtn"), "a dense model is quantised"),
        (lambda: qjax.quantize_model(model, "pydoc", "rtn"), "tokens are str"),
        (lambda: qjax.quantize_model(model, np.zeros((2, 8)), "rtn"), "float64"),
        (lambda: qjax.quantize_model(model, tokens, "rtn", key=-1), "key is -1"),
        (lambda: qjax.quantize_model(model, tokens, "rtn", key="a"), "key is 'a'"),
        (lambda: qjax.quantize_model(model, tokens, "rtn", key=jax.random.split(jax.random.key(0))), "one key"),
        (lambda: qjax.quantize_model(model, tokens, "rtn", hessians={"layers.0.mlp.up": 1}), "did you mean"),
        (lambda: qjax.quantize_model(model, tokens, "rtn", hessians={}), "28 of 28 layers have none"),
        (lambda: small.save(tmp_path / "a", format="gtpq"), "can be saved as: awq"),
        (lambda: small.save(tmp_path), "no artifact"),
        (lambda: qjax.load("tiny", adapters="a"), "adapters belong to"),
        (lambda: qjax.replace(model, {"layers.0.mlp.upproj": None}), "did you mean 'layers.0.mlp.up_proj'"),
        (lambda: qjax.replace(model, {"layers.0.mlp.up_proj": np.zeros((2, 3))}), "is of shape"),
        (lambda: qjax.activations(model, tokens, "layers.9"), "no layer's name matches"),
        (lambda: qjax.activations(model, tokens, ["layers.0.mlp.up"]), "did you mean"),
    ]
    weight, hessian = np.ones((4, 8), np.float32), np.eye(8, dtype=np.float32)
    own = {"codebook": ("grid", 2), "rounding": "ldlq", "incoherence": None, "key": 0}
    refused += [
        (lambda: qjax.quantize_matrix(weight.tolist(), hessian, **own), "the weight is .* an array"),
        (lambda: qjax.quantize_matrix(weight * 1j, hessian, **own), "of real numbers"),
        (lambda: qjax.quantize_matrix(weight, qjax.Hessian(hessian.tolist()), **own), "a factor of the Hessian"),
        (lambda: qjax.quantize_matrix(weight, hessian, **own, damping="a"), "damping is 'a'"),
        (lambda: qjax.quantize_matrix(weight, hessian, **own, damping=-1), "damping is -1"),
        (lambda: qjax.quantize_matrix(weight, hessian, **own, name=3), "name is 3"),
        (lambda: qjax.quantize_matrix(weight, hessian, **own, mesh="x"), "mesh is 'x'"),
        (
            lambda: qjax.quantize_matrix(weight, hessian, **own | {"key": jax.random.split(jax.random.key(0))}),
            "one key",
        ),
        (lambda: qjax.quantize_model(model, tokens, "rtn", mesh=3), "mesh is 3"),
        (lambda: qjax.quantize_model(model, tokens, "rtn", cache=3), "cache is 3"),
        (lambda: qjax.quantize_model(model, tokens, "rtn", on_layer=3), "on_layer is 3"),
        (lambda: qjax.quantize_model(model, tokens, "rtn", bits="3"), "bits is '3'"),
        (lambda: qjax.load(None), r"source is None \(NoneType\)"),
        (lambda: qjax.load(""), "found by its name or path"),
        (lambda: qjax.evaluate("tiny", tokens), "model is 'tiny'"),
        (lambda: qjax.evaluate(model, tokens, reference="tiny"), "reference is 'tiny'"),
        (lambda: qjax.activations("tiny", tokens), "model is 'tiny'"),
        (lambda: qjax.activations(model, tokens, batch=0), "batch is 0"),
        (lambda: qjax.activations(model, tokens, 3), "layers is 3"),
        (lambda: qjax.replace(model, [1]), "weights is"),
        (lambda: qjax.replace("tiny", {}), "model is 'tiny'"),
        (lambda: model.generate(None), "prompt is None"),
        (lambda: model.generate("a", 2, temprature=1), "did you mean 'temperature'"),
        (lambda: qjax.data.load("pydoc", 3), "tokenizer is 3"),
        (lambda: qjax.data.load("pydoc", model, calibration_sequences="x"), "calibration_sequences is 'x'"),
        (lambda: qjax.hessian.collect("tiny", np.zeros((1, 8), int)), "model is 'tiny'"),
        (lambda: qjax.rounding.proxy_loss(weight, weight, hessian), "it is a Hessian"),
    ]
    (tmp_path / "fingerprint.json").write_text("{}")
    with pytest.raises(ArtifactError, match="a run that has not finished"):
        qjax.load(tmp_path)
    (tmp_path / "file").write_text("mine")
    for call, words in refused:
        refused_in_words(call, words)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(DataError, match="outside the vocabulary"):
        qjax.quantize_model(model, np.full((2, 8), 10**6), "rtn")


def test_hessians_may_be_given_as_arrays(model, tokens):
    """Those of the original model are what `hessian=original` collects."""
    recipe = qjax.Recipe(rounding="ldlq", hessian="original", rules=FEW)
    collected = qjax.hessian.collect(model, tokens.calibration.tokens, batch=4)
    plain = {name: np.asarray(hessian.input) for name, hessian in collected.items()}
    own, given = (qjax.quantize_model(model, tokens, recipe, hessians=h, progress=False) for h in (None, plain))
    assert own.fingerprint == given.fingerprint


def test_activations_are_what_the_linears_read(model, tokens):
    found = qjax.activations(model, tokens, batch=3)
    assert list(found) == qjax.hessian.layer_names(model.config)
    assert found["layers.0.mlp.up_proj"] is found["layers.0.mlp.gate_proj"]
    hessians = qjax.hessian.collect(model, tokens.calibration.tokens)
    for name in ("layers.0.self_attn.q_proj", "layers.3.mlp.down_proj"):
        x = found[name].reshape(-1, found[name].shape[-1]).astype(np.float64)
        np.testing.assert_allclose(x.T @ x / len(x), hessians[name].input, rtol=2e-3, atol=1e-4)
    some = qjax.activations(model, tokens, r"\.1\.mlp")
    assert list(some) == [f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    np.testing.assert_allclose(some["layers.1.mlp.up_proj"], found["layers.1.mlp.up_proj"], rtol=1e-4, atol=1e-5)


def test_linears_are_replaced(model, tokens, small):
    name = "layers.2.mlp.down_proj"
    matrix = small.params["blocks"][2]["mlp"]["down_proj"]["weight"]
    mixed = qjax.replace(model, {name: matrix})
    assert isinstance(mixed, qjax.CompressedModel) and mixed.fingerprint != model.fingerprint
    assert qjax.models.structure(model.config).shapes["mlp.down_proj"] == matrix.shape
    dense = qjax.replace(model, {name: np.asarray(matrix.dequantize())})
    assert not isinstance(dense, qjax.CompressedModel)
    one, two = (qjax.evaluate(other, tokens, reference=model) for other in (mixed, dense))
    assert one.kl_mean == pytest.approx(two.kl_mean, rel=1e-3) and one.kl_mean > 0
    assert qjax.evaluate(model, tokens).perplexity == one.perplexity_reference  # the original is what it was


def test_matrices_take_short_forms():
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((16, 32)).astype(np.float32), rng.standard_normal((99, 32))
    h = x.T @ x
    whole = {
        "codebook": qjax.codebooks.make("e8p", 2),
        "rounding": qjax.rounding.make("ldlq"),
        "incoherence": qjax.incoherence.make("hadamard"),
        "key": jax.random.key(0),
    }
    expected, _ = qjax.quantize_matrix(w, qjax.Hessian(h.astype(np.float32)), **whole)
    short = {"codebook": "e8p", "rounding": "ldlq", "incoherence": "hadamard", "key": 0}
    matrix, _ = qjax.quantize_matrix(w, h, **short)
    np.testing.assert_array_equal(matrix.packed, expected.packed)
    for codebook in (("e8p", 2), {"name": "e8p", "bits": 2}):
        again, _ = qjax.quantize_matrix(w, h, **{**short, "codebook": codebook})
        np.testing.assert_array_equal(again.packed, expected.packed)
    for change, words in (
        ({"codebook": "half_integer"}, r"for 1, 2 … bits per weight; say which: codebook=\('half_integer', 2\)"),
        ({"codebook": 2}, r"codebook is 2 \(int\)"),
        ({"rounding": qjax.rounding.LDLQ}, "rounding is"),
        ({"key": 1.5}, "key is 1.5"),
        ({"scale": "seach"}, "did you mean 'search'"),
    ):
        with pytest.raises(InputError, match=words):
            qjax.quantize_matrix(w, h, **{**short, **change})
    for hessian in (h[:, :5], [1.0], None):
        with pytest.raises(InputError, match="the Hessian is"):
            qjax.quantize_matrix(w, hessian, **short)


def test_whatever_is_printed_fits_a_line(model, tokens, small, tmp_path):
    matrix = small.params["blocks"][0]["mlp"]["up_proj"]["weight"]
    hessian = qjax.Hessian(np.zeros((64, 64), np.float32))
    things = [model, small, matrix, tokens, tokens.calibration, hessian, qjax.hessian.HessianStore(tmp_path)]
    things += [matrix.scaling, matrix.transform, model.tokenizer, qjax.evaluate(small, tokens, reference=model)]
    for thing in things:
        text = repr(thing)
        assert len(text) < 400 and "\n" not in text and "array(" not in text and "Array(" not in text, text
    assert "3." in repr(small) and "tiny" in repr(model) and "4 × 32" in repr(tokens) and "grid" in repr(matrix)

"""What quantising a model begins ahead is what it comes to: no program more, and the same bytes."""

import pathlib

import jax
import numpy as np
import pytest

import qjax
from qjax import models
from qjax.errors import InputError
from qjax.linalg.kronecker import Hessian
from qjax.models.linear import linear_weight
from qjax.models.structure import abstract_block
from qjax.models.transformer import layer_names
from qjax.pipeline.programs import begin
from qjax.pipeline.quantize_model import quantize_model
from qjax.pipeline.recipe import Recipe
from qjax.pipeline.records import Records
from qjax.runtime.ahead import compiling
from qjax.runtime.monitor import CompileCounter

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "models"
LLAMA = FIXTURES / "llama3"


def recipe(rounding="nearest", codebook="half_integer"):
    return Recipe({"name": codebook}, 2, qjax.rounding.make(rounding), qjax.incoherence.make("none"))


@pytest.fixture(scope="module")
def model():
    return models.load(LLAMA)


@pytest.fixture(scope="module")
def tokens(model):
    return np.random.default_rng(1).integers(0, model.config.vocab_size, (5, 16))


@pytest.mark.parametrize(
    "stream", ["quantized", *(pytest.param(name, marks=pytest.mark.slow) for name in ("corrected", "sketched"))]
)
def test_the_same_programs_and_the_same_bytes(model, tokens, stream):
    def square(index, name):
        size = linear_weight(model.params["blocks"][index], name).shape[0]
        return Hessian(np.eye(size, dtype=np.float32), np.eye(size, dtype=np.float32))

    options = {"stream": stream}
    if stream == "sketched":
        names = {name.split(".", 2)[2] for name in layer_names(model.config)}
        options = {"stream": "quantized", "outputs": lambda index: {name: square(index, name) for name in names}}
    found = {}
    for threads in (0, 2):
        jax.clear_caches()
        with CompileCounter() as compiles, compiling(threads):
            made = quantize_model(model.config, model.params, tokens, recipe(), seed=0, batch=2, **options)
        found[threads] = sorted(compiles.programs), jax.device_get(made.params)
    assert found[0][0] == found[2][0]
    jax.tree.map(np.testing.assert_array_equal, found[0][1], found[2][1])


@pytest.mark.parametrize("folder", sorted(path for path in FIXTURES.iterdir() if path.is_dir()), ids=lambda p: p.name)
def test_the_shapes_of_a_block_are_those_of_its_parameters(folder):
    model = models.load(folder)
    shapes = lambda tree: jax.tree.map(lambda leaf: tuple(leaf.shape), tree)  # noqa: E731
    assert shapes(abstract_block(model.config)) == shapes(model.params["blocks"][0])


def test_what_the_rounding_refuses_is_left_to_the_rounding(model, tokens):
    """Stochastic rounding needs a scalar codebook."""
    plan = recipe("stochastic", "e8p").plan(layer_names(model.config))
    with compiling(threads=1):
        begin(model.config, model.params, tokens, plan, seed=0, stream="quantized", batch=2)
        with pytest.raises(InputError, match="stochastic rounding needs a scalar codebook"):
            quantize_model(
                model.config, model.params, tokens, recipe("stochastic", "e8p"), seed=0, stream="quantized", batch=2
            )


def test_finished_matrices_begin_nothing(model, tokens, monkeypatch, tmp_path):
    records = Records(tmp_path, "run")
    for name in layer_names(model.config):
        (tmp_path / f"{name}.safetensors").touch()

    def refuses(*arguments, **options):
        raise AssertionError("begun")

    monkeypatch.setattr("qjax.pipeline.programs.ahead", refuses)
    plan = recipe().plan(layer_names(model.config))
    with compiling(threads=1):
        begin(model.config, model.params, tokens, plan, seed=0, stream="quantized", records=records, batch=2)
        with pytest.raises(AssertionError, match="begun"):
            begin(model.config, model.params, tokens, plan, seed=0, stream="quantized", batch=2)

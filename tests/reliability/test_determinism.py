"""The same inputs give the same bytes: twice in a row, and in another order of visits."""

import numpy as np

import qjax
from qjax import hessian, models
from qjax.interchange.serialize import to_arrays
from qjax.linalg.prng import root_key
from qjax.models.linear import linear_weight
from qjax.models.transformer import layer_names
from qjax.pipeline.layer import quantize_layer
from qjax.pipeline.quantize_model import quantize_model
from qjax.pipeline.recipe import Recipe

NAME = "tests/fixtures/models/llama3"


def recipe(rounding="stochastic"):
    return Recipe({"name": "half_integer"}, 2, qjax.rounding.make(rounding), qjax.incoherence.make("hadamard"))


def test_layers_may_be_visited_in_any_order(pytestconfig):
    """Rounding that draws random numbers, so that a key which depends on the order would show."""
    model = models.load(pytestconfig.rootpath / NAME)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)
    found = hessian.collect(model, tokens, batch=4)
    plans = recipe().plan(layer_names(model.config))

    def visit(names):
        result = {}
        for name in names:
            _, index, linear = name.split(".", 2)
            weight = linear_weight(model.params["blocks"][int(index)], linear)
            matrix, report = quantize_layer(weight, found[name], plans[name], name, root_key(3), 0.0)
            result[name] = to_arrays(matrix), report.proxy_loss
        return result

    forward = visit(layer_names(model.config))
    backward = visit(layer_names(model.config)[::-1])
    for name, ((arrays, spec), loss) in forward.items():
        (others, other_spec), other_loss = backward[name]
        assert spec == other_spec and loss == other_loss
        for leaf, value in arrays.items():
            assert value.tobytes() == others[leaf].tobytes(), f"{name}: {leaf}"
    same = [to for to in forward if (to.startswith("layers.0") and "k_proj" in to) or "v_proj" in to]
    words = [forward[name][0][0]["packed"].tobytes() for name in same]
    assert len(set(words)) == len(words)  # and no two layers share their numbers


def test_twice_in_a_row(pytestconfig):
    model = models.load(pytestconfig.rootpath / NAME)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)
    runs = [
        quantize_model(model.config, model.params, tokens, recipe("ldlq"), seed=1, stream="quantized", batch=4)
        for _ in range(2)
    ]
    blocks = [run.params["blocks"] for run in runs]
    for index, block in enumerate(blocks[0]):
        for group in ("self_attn", "mlp"):
            for linear in (name for name in block[group] if name.endswith("_proj")):
                first, second = (to_arrays(b[index][group][linear]["weight"])[0] for b in blocks)
                assert all(first[name].tobytes() == second[name].tobytes() for name in first), linear
    timeless = lambda report: {**report.__dict__, "seconds": 0}  # noqa: E731
    assert list(map(timeless, runs[0].reports)) == list(map(timeless, runs[1].reports))

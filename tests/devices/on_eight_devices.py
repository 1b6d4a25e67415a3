"""What tests/devices/test_devices.py checks, in a process with eight devices: every check leaves its findings as JSON.

    python on_eight_devices.py <file to write>

The number of devices is fixed when JAX starts, so all checks share one process.
"""

import dataclasses
import json
import re
import sys

import jax
import numpy as np

import qjax
from qjax import codebooks, hessian, incoherence, models, rounding
from qjax.codebooks.scaling import ScaleRule
from qjax.errors import QjaxError
from qjax.hessian import sketch_collect
from qjax.hessian.moments import (
    accumulate_pair,
    block_hessians,
    block_hessians_of_two_streams,
    empty,
    reduced,
)
from qjax.linalg.kronecker import Hessian
from qjax.models.config import ModelConfig
from qjax.models.structure import structure
from qjax.models.transformer import embed, head
from qjax.pipeline.quantize_model import quantize_model
from qjax.pipeline.recipe import Recipe
from qjax.runtime import mesh
from qjax.streams import gradients
from qjax.streams.batches import Spread

CONFIG = ModelConfig("LlamaForCausalLM", 50, 32, 48, 2, 4, 2, 8)
COLLECTIVES = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
FOUND = {}


def random_model():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32) * np.float32(0.2)  # noqa: E731

    def block():
        sizes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
        mlp = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
        return {
            "input_layernorm": normal(32) + 1,
            "post_attention_layernorm": normal(32) + 1,
            "self_attn": {name: {"weight": normal(*shape)} for name, shape in sizes.items()},
            "mlp": {name: {"weight": normal(*shape)} for name, shape in mlp.items()},
        }

    params = {"embed": normal(50, 32), "norm": normal(32), "blocks": [block(), block()]}
    return models.Model(CONFIG, jax.device_put(params), models.Tokenizer(None), "random", "random", {"sha256": "none"})


def collectives(text):
    """What a compiled program exchanges between devices, as (operation, type): XLA joins several in one operation."""
    found = [(line.split("=", 1)[1], match[1]) for line in text.splitlines() if (match := re.search(COLLECTIVES, line))]
    return [[name, kind] for line, name in found for kind in re.findall(r"\w+\[[\d,]*\]", line.split(f" {name}")[0])]


def distance(a, b):
    """The largest relative difference, of entries to the largest entry, over two dictionaries of Hessians."""
    worst = 0.0
    for name in b:
        for factor in ("input", "output", "cross"):
            x, y = getattr(a[name], factor), getattr(b[name], factor)
            assert (x is None) == (y is None)
            if y is not None:
                worst = max(worst, float(np.max(np.abs(np.asarray(x) - np.asarray(y))) / np.max(np.abs(y))))
    return worst


def identical(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def symmetric(hessians):
    """Whether all factors equal their transposes to the last bit."""
    factors = [f for h in hessians.values() for f in (h.input, h.output) if f is not None]
    return all(np.array_equal(f, np.transpose(f)) for f in factors)


def moments(model, tokens, meshes):
    """E[x xᵀ] of sequences whose number no mesh divides."""
    one = hessian.collect(model, tokens, batch=2)
    found = {name: hessian.collect(model, tokens, batch=2, mesh=m) for name, m in meshes}
    FOUND["moments"] = {name: distance(hessians, one) for name, hessians in found.items()}
    FOUND["symmetric"] = {name: symmetric(hessians) for name, hessians in found.items()}
    eight = dict(meshes)["4x2"]
    twice = [found["4x2"], hessian.collect(model, tokens, batch=2, mesh=eight)]
    FOUND["moments twice"] = identical(*twice)
    FOUND["moments tokens"] = [h.tokens for h in twice[0].values()] == [tokens.size] * 14

    x = np.array(embed(model.params["embed"], tokens, CONFIG))
    z = x + np.random.default_rng(3).standard_normal(x.shape).astype(np.float32) * np.float32(0.1)
    pair = lambda spread: block_hessians_of_two_streams(  # noqa: E731
        model.params["blocks"][0], x, z, CONFIG, index=0, batch=2, spread=spread
    )
    (ours, y), (theirs, other) = pair(Spread(len(x), 2, eight)), pair(None)
    FOUND["two streams"] = distance(ours, theirs)
    FOUND["symmetric"]["two streams"] = symmetric(ours)
    FOUND["outputs"] = float(np.max(np.abs(y - other)))

    spread = Spread(len(x), 2, eight)
    sums, step = empty(CONFIG, spread, pairs=True), next(iter(spread.feed(x, z)))
    arguments = (sums, spread.whole(model.params["blocks"][0]), *step.parts, step.mask, step.numbers, CONFIG)
    add = accumulate_pair.lower(*arguments, mesh=eight).compile().as_text()
    FOUND["adding moments"] = collectives(add)
    FOUND["reducing moments"] = collectives(reduced.lower(sums, mesh=eight).compile().as_text())

    x[5, 3, 1] = np.nan
    try:
        block_hessians(model.params["blocks"][1], x, CONFIG, index=1, batch=2, spread=Spread(len(x), 2, eight))
    except QjaxError as error:
        FOUND["not finite"] = str(error)


def sketches(model, tokens, eight):
    """Both factors of both sketches; labels must not depend on where a sequence is computed."""
    for name in ("sketch_a", "sketch_b"):
        one = hessian.collect(model, tokens, name, batch=2)
        found = hessian.collect(model, tokens, name, batch=2, mesh=eight)
        FOUND[name], FOUND["symmetric"][name] = distance(found, one), symmetric(found)
    spread = Spread(len(tokens), 2, eight)
    parameters, table = spread.whole((model.params["blocks"][0], model.params["embed"]))
    top, step = spread.whole(head(model.params)), next(iter(spread.feed(tokens)))
    x = embed(table, *step.parts, CONFIG)
    y, pull, inputs = gradients.forward(parameters, x, CONFIG)
    arguments = (top, y, *step.parts, np.zeros(2, np.uint32), step.numbers, CONFIG)
    gradient = sketch_collect.label_gradient(*arguments, labels="sampled")
    sums = sketch_collect.empty_sums(CONFIG, "both", spread)
    add = sketch_collect.accumulate_sketch.lower(
        sums,
        pull,
        inputs,
        gradient,
        step.mask,
        step.numbers,
        {},
        sites=tuple(structure(CONFIG).sites.items()),
        per_token=False,
        update="both",
        mesh=eight,
    )
    FOUND["adding a sketch"] = collectives(add.compile().as_text())
    FOUND["reducing a sketch"] = collectives(sketch_collect.reduce_sums.lower(sums, mesh=eight).compile().as_text())
    FOUND["forward"] = collectives(gradients.forward.lower(parameters, x, CONFIG).compile().as_text())


def problem(m, n):
    rng = np.random.default_rng(m * n)
    x = rng.standard_normal((4 * n, n)).astype(np.float32) * np.linspace(0.2, 3, n, dtype=np.float32)
    return rng.standard_normal((m, n)).astype(np.float32), Hessian(x.T @ x / np.float32(4 * n))


def rows(eight):
    """Roundings whose rows are split, on numbers of rows that eight devices do not divide."""
    hadamard, plain = incoherence.make("hadamard"), incoherence.make("none")
    make = codebooks.make
    group = ScaleRule("minmax", "group", group_size=16)
    cases = {
        "ldlq": (50, make("half_integer", 2), rounding.make("ldlq", passes=2), plain, None),
        "gptq": (70, make("grid", 3), rounding.make("gptq", order="descending"), plain, group),
        "quip_sharp": (40, make("e8p", 2), rounding.make("ldlq", passes=10), hadamard, None),
        "qtip": (48, make("trellis", 2, L=6, code="1mad"), rounding.make("ldlq"), hadamard, None),
        "stochastic": (24, make("half_integer", 2), rounding.make("ldlq", stochastic=True), plain, None),
    }
    for name, (m, codebook, algorithm, rotation, scale) in cases.items():
        weight, h = problem(m, 32)
        options = {"codebook": codebook, "rounding": algorithm, "incoherence": rotation, "scale": scale}
        options |= {"key": jax.random.key(1), "name": name}
        (one, report), (split, other) = (qjax.quantize_matrix(weight, h, **options, mesh=m) for m in (None, eight))
        close = {
            field: (a, b)
            for field, a in dataclasses.asdict(report).items()
            if field != "seconds" and a != (b := getattr(other, field)) and not abs(a - b) <= 2e-6 * abs(a)
        }
        FOUND[f"rows {name}"] = {"identical": identical(one, split), "reports": close}


def whole_model(model, tokens, eight):
    """YAQA: the matrices of a block on different devices, from the same Hessians as on one."""
    hessians = hessian.collect(model, tokens, "sketch_b", batch=4)
    of_block = lambda index: {  # noqa: E731
        name.split(".", 2)[2]: h for name, h in hessians.items() if name.startswith(f"layers.{index}.")
    }
    recipe = Recipe({"name": "half_integer"}, 2, rounding.make("yaqa"), incoherence.make("none"))
    made = [
        quantize_model(
            CONFIG, model.params, tokens, recipe, seed=0, stream="original", hessians=of_block, batch=4, mesh=m
        )
        for m in (None, eight)
    ]
    FOUND["yaqa"] = identical(made[0].params, made[1].params)
    FOUND["yaqa reports"] = [r.proxy_loss for r in made[0].reports] == [r.proxy_loss for r in made[1].reports]


def main():
    model, tokens = random_model(), np.random.default_rng(1).integers(0, 50, (21, 12)).astype(np.int32)
    eight = mesh.make(4, 2)
    FOUND["devices"] = [eight.size, len({d.id for d in eight.devices.flat})]
    try:
        mesh.make(3, 4)
    except QjaxError as error:
        FOUND["too many"] = str(error)
    moments(model, tokens, [("1x1", mesh.make(1, 1)), ("3x1", mesh.make(3)), ("4x2", eight), ("8x1", mesh.make(None))])
    sketches(model, tokens, eight)
    rows(eight)
    whole_model(model, tokens, eight)
    with open(sys.argv[1], "w") as file:
        json.dump(FOUND, file)


if __name__ == "__main__":
    main()

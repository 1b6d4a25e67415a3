"""Models on a mesh against the same models on one device: logits, tokens, metrics, memory, and what is communicated."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter

import jax
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec as P

from qjax import incoherence, tensor_parallel
from qjax.errors import InputError
from qjax.evaluate import evaluate, hidden_states
from qjax.finetune import lora
from qjax.matrix import LowRank, Sum
from qjax.models import forward, generate_batch, head
from qjax.models.on_mesh import HIDDEN
from qjax.models.sampling import Sampling
from qjax.models.transformer import block
from qjax.runtime import mesh
from qjax.tensor_parallel import matrices

CONFIG = small.CONFIG
TOKENS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (4, 24)).astype(np.int32)
LINEARS = 7


@pytest.fixture(scope="module")
def eight():
    assert len(jax.devices()) == 8
    return mesh.make(2, 4)


def collectives_of(params) -> Counter[str]:
    """Operations in the compiled program of one block, as it ran."""
    where = params["blocks"][0].sharding(HIDDEN)
    x = jax.ShapeDtypeStruct((4, 24, CONFIG.hidden_size), np.float32, sharding=where)
    text = str(block.lower(params["blocks"][0], x, CONFIG).compile().as_text())
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))


MODELS = {
    "dense": (small.dense, {"all-reduce": 2}),
    "half_integer, blocks": (small.block_local("half_integer"), {"all-reduce": 2}),
    "e8p, whole axes": (small.of_whole_axes("e8p"), {"all-reduce": 2, "all-gather": LINEARS}),
    "trellis, blocks": (small.block_local("trellis"), {"all-reduce": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_one_device_with_one_sum_per_row_parallel_linear(eight, name):
    make, expected = MODELS[name]
    params = small.model(make)
    found = tensor_parallel.distribute(params, CONFIG, eight, packed=False)
    logits = np.asarray(forward(params, TOKENS, CONFIG))
    np.testing.assert_allclose(np.asarray(forward(found, TOKENS, CONFIG)), logits, atol=1e-5 * np.abs(logits).max())
    assert collectives_of(found) == expected
    per_linear = tensor_parallel.collectives(found)
    assert sum((Counter(dict.fromkeys(kinds, 1)) for kinds in per_linear.values()), Counter()) == expected
    assert per_linear["mlp.down_proj"]["all-reduce"] == 64 and "all-reduce" not in per_linear["mlp.up_proj"]


def test_every_device_holds_its_part_of_the_packed_weights(eight):
    params = small.model(small.block_local("half_integer"))
    found = tensor_parallel.distribute(params, CONFIG, eight, packed=False)
    for name, linear in found["blocks"][0].parameters["self_attn"].items():
        if not name.endswith("proj"):
            continue
        words = params["blocks"][0]["self_attn"][name]["weight"].packed
        (part,) = (leaf for leaf in linear["weight"].shards.own.leaves if leaf.dtype == np.uint32)
        assert {shard.data.size for shard in part.addressable_shards} == {words.size // 4}
        assert len({shard.index[0].start for shard in part.addressable_shards}) == 4
    codes = sum(leaf.nbytes for leaf in jax.tree.leaves(params["blocks"]) if leaf.dtype == np.uint32)
    held = tensor_parallel.device_bytes(found["blocks"])
    assert len(set(held.values())) == 1 and len(held) == 8
    others = sum(leaf.nbytes for leaf in jax.tree.leaves(params["blocks"])) - codes
    assert held[0] <= codes / 4 + others + 2 * LINEARS * 64  # signs of whole sides besides
    assert tensor_parallel.device_bytes(found["head"])[0] * 4 == params["head"].nbytes


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 20, 0.95, seed=3)])
def test_tokens_are_those_of_one_device(eight, sampling):
    params = small.model(small.block_local("half_integer"))
    found = tensor_parallel.distribute(params, CONFIG, eight, packed=True)
    prompts = [[3, 1, 4, 1, 5, 9, 2], [7], [2, 7, 1]]  # three: one is added for two devices of the axis "data"
    shown = []
    both = [
        generate_batch(parameters, CONFIG, prompts, 6, sampling=sampling, whole=whole, on_tokens=note)
        for parameters, whole, note in ((params, False, None), (found, False, lambda *step: shown.append(step)))
    ]
    assert [t.tolist() for t in both[0].tokens] == [t.tolist() for t in both[1].tokens]
    assert both[1].prompt_tokens == 11 and all(new.shape == going.shape == (3,) for new, going in shown)


def test_evaluation_is_that_of_one_device(eight):
    reference, params = small.model(small.dense), small.model(small.block_local("half_integer"))
    windows = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (7, 24)).astype(np.int32)
    results = []
    for where in (None, eight):
        own, other = reference, params
        if where is not None:
            own, other = (tensor_parallel.distribute(p, CONFIG, where, packed=False) for p in (reference, params))
        states = hidden_states(own, windows, CONFIG, 4)
        report = evaluate(states, head(own), other, windows, CONFIG, batch=4, mesh=where).to_dict()
        results.append([report[key] for key in ("perplexity", "perplexity_reference", "kl_mean", "kl_p99")])
    np.testing.assert_allclose(results[1], results[0], rtol=2e-5)


TRANSFORMS = {
    "none": incoherence.make("none"),
    "blocks": incoherence.make("block_hadamard", block=16),
    "blocks, scaled": incoherence.make("block_hadamard", rescale=True, block=16),
    "whole": incoherence.make("hadamard"),
    "inputs only": dataclasses.replace(incoherence.make("hadamard"), side="input"),
    "kronecker": incoherence.make("kronecker", rescale=True),
}
KINDS = [
    ("half_integer", "none", (64, 96), {}, (False, False)),
    ("half_integer", "blocks, scaled", (64, 128), {"rows": True, "gains": True}, (False, False)),
    ("grid", "blocks", (64, 128), {"group": 16, "rows": True}, (False, False)),
    ("grid", "inputs only", (64, 96), {"group": 32, "permuted": True}, (False, True)),
    ("e8p", "kronecker", (64, 96), {"gains": True}, (True, True)),
    ("trellis", "whole", (48, 80), {"rows": True}, (True, True)),
    ("hyb", "blocks", (64, 64), {}, (False, False)),
    ("hyb", "blocks", (40, 72), {"gains": True}, (True, True)),  # padded to 48 × 80: parts of 16 × 32, the last empty
]


@pytest.mark.parametrize(("book", "transform", "shape", "options", "gathered"), KINDS)
def test_products_of_every_kind_of_matrix(eight, book, transform, shape, options, gathered):
    rng = np.random.default_rng(5)
    matrix = small.quantized(rng, book, TRANSFORMS[transform], *shape, **options)
    x = rng.standard_normal((2, 3, shape[1])).astype(np.float32)
    weight = np.asarray(jax.jit(type(matrix).dequantize)(matrix), np.float64)
    column = matrices.column_parallel(matrix, 4, packed=False)
    row = matrices.row_parallel(matrix, 4, packed=False)
    assert (column.gathered, row.gathered) == gathered

    @functools.partial(jax.jit)
    def products(column, row, x):
        def own(column, row, x, part):
            return column.matmul(x), row.matmul(part)

        whole, last = P(), P(None, None, "model")
        specs = (_specs(column), _specs(row), whole, last)
        mapped = jax.shard_map(own, mesh=eight, in_specs=specs, out_specs=(last, whole), check_vma=False)
        return mapped(column, row, x, x)

    expected = x.astype(np.float64) @ weight.T
    for found in products(column, row, x):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_sums_are_shared_out_term_by_term(eight):
    """Adapters over packed codes: logits of one device, and r values more per row-parallel linear."""
    make = small.block_local("half_integer")

    def summed(rng, out, inner):
        thin = LowRank(*(rng.standard_normal(s).astype(np.float32) for s in ((out, 4), (4, inner))), inner**-0.5)
        return Sum((make(rng, out, inner), thin))

    params = small.model(summed)
    found = tensor_parallel.distribute(params, CONFIG, eight, packed=False)
    logits = np.asarray(forward(params, TOKENS, CONFIG))
    np.testing.assert_allclose(np.asarray(forward(found, TOKENS, CONFIG)), logits, atol=1e-5 * np.abs(logits).max())
    per_linear = tensor_parallel.collectives(found)
    assert per_linear["mlp.down_proj"]["all-reduce"] == 64 + 4 and not per_linear["mlp.up_proj"]
    thin = found["blocks"][0].parameters["mlp"]["up_proj"]["weight"].terms[1]
    assert {shard.data.shape for shard in thin.b.leaves.addressable_shards} == {(1, 128 // 4, 4)}


def _specs(weight):
    stacked = lambda node: isinstance(node, matrices.Stacked)  # noqa: E731
    return jax.tree.map(
        lambda node: jax.tree.map(lambda _: P("model"), node) if stacked(node) else P(), weight, is_leaf=stacked
    )


def test_what_does_not_divide_is_refused(eight):
    three = dataclasses.replace(CONFIG, num_kv_heads=2)
    with pytest.raises(InputError, match=r"mesh\.model is 4.* 2 key/value heads.*allowed are 1, 2"):
        tensor_parallel.distribute({"blocks": []}, three, eight)
    params = tensor_parallel.distribute(small.model(small.dense), CONFIG, eight)
    with pytest.raises(InputError, match=r"a batch of 3 does not divide among mesh\.data=2"):
        block(params["blocks"][0], np.zeros((3, 8, CONFIG.hidden_size), np.float32), CONFIG)
    adapted = lora.adapted(small.model(small.block_local("half_integer")), jax.random.key(0), rank=2)
    with pytest.raises(InputError, match="Adapted, which has no tensor-parallel form"):
        tensor_parallel.distribute(adapted, CONFIG, eight)

"""The structure of a block as derived from its forward pass, against lists written by hand here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from qjax.errors import InputError
from qjax.models import ModelConfig, layer_names, load, open_model, structure
from qjax.models.context import Context
from qjax.models.families import FAMILIES, family, paths
from qjax.models.families.llama import Llama
from qjax.models.linear import affine, linear, linears_of, recorded, replace_linears
from qjax.models.norms import rms_norm

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=11,
    hidden_size=12,
    intermediate_size=10,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
)
# name: (site, out, in, whether the mesh shares out its inputs)
LLAMA = {
    "self_attn.q_proj": ("self_attn.q_proj", 24, 12, False),
    "self_attn.k_proj": ("self_attn.q_proj", 12, 12, False),
    "self_attn.v_proj": ("self_attn.q_proj", 12, 12, False),
    "self_attn.o_proj": ("self_attn.o_proj", 12, 24, True),
    "mlp.gate_proj": ("mlp.gate_proj", 10, 12, False),
    "mlp.up_proj": ("mlp.gate_proj", 10, 12, False),
    "mlp.down_proj": ("mlp.down_proj", 12, 10, True),
}
OPT = {
    "self_attn.q_proj": ("self_attn.q_proj", 32, 32, False),
    "self_attn.k_proj": ("self_attn.q_proj", 32, 32, False),
    "self_attn.v_proj": ("self_attn.q_proj", 32, 32, False),
    "self_attn.out_proj": ("self_attn.out_proj", 32, 32, True),
    "fc1": ("fc1", 44, 32, False),
    "fc2": ("fc2", 32, 44, True),
}


def derived(config):
    return {own.name: (own.site, own.out, own.inner, own.row_parallel) for own in structure(config).linears}


def test_the_linears_of_a_llama():
    found = structure(CONFIG)
    assert derived(CONFIG) == LLAMA and list(found.sites) == list(LLAMA)
    assert found.groups == tuple(
        tuple(name for name in LLAMA if LLAMA[name][0] == site) for site in dict.fromkeys(v[0] for v in LLAMA.values())
    )
    assert found.widths == {"self_attn.q_proj": 12, "self_attn.o_proj": 24, "mlp.gate_proj": 12, "mlp.down_proj": 10}
    assert layer_names(CONFIG) == [f"layers.{index}.{name}" for index in range(2) for name in LLAMA]


@pytest.mark.parametrize("name", ["opt", "opt_post_norm"])
def test_the_linears_of_opt(fixtures: Path, name: str):
    assert derived(open_model(fixtures / name).config) == OPT


@FAMILIES.register("ParallelForTests")
class Parallel(Llama):
    """Attention and MLP side by side: the MLP's linears read what q, k and v read."""

    model_type = "parallel-for-tests"
    title = "ParallelForTests"
    gguf = None

    def block(self, parameters, x, context):
        attention, mlp = parameters["self_attn"], parameters["mlp"]
        normal = rms_norm(x, parameters["input_layernorm"], 1e-5)
        q, k, v = (
            affine(attention[f"{name}_proj"], normal).reshape(*x.shape[:2], -1, context.config.head_dim)
            for name in "qkv"
        )
        mixed = affine(attention["o_proj"], context.attend(*context.rotary(q, k), v))
        hidden = affine(mlp["gate_proj"], normal) * affine(mlp["up_proj"], normal)
        return x + mixed + affine(mlp["down_proj"], hidden)


@FAMILIES.register("TwiceForTests")
class Twice(Llama):
    """A block that multiplies with one weight twice."""

    model_type = "twice-for-tests"
    title = "TwiceForTests"
    gguf = None

    def block(self, parameters, x, context):
        weight = parameters["self_attn"]["q_proj"]["weight"]
        return x + linear(linear(x, weight), weight)


def test_a_family_of_ones_own_needs_its_forward_pass_alone():
    config = dataclasses.replace(CONFIG, architecture="ParallelForTests")
    sites = {name: site.replace("mlp.gate_proj", "self_attn.q_proj") for name, (site, *_) in LLAMA.items()}
    assert structure(config).sites == sites
    assert {own.name for own in structure(config).linears if own.row_parallel} == {"self_attn.o_proj", "mlp.down_proj"}


def test_a_weight_that_is_used_twice_has_no_one_input():
    with pytest.raises(ValueError, match="multiplies with one weight twice"):
        structure(dataclasses.replace(CONFIG, architecture="TwiceForTests", num_kv_heads=4, head_dim=3))


def test_an_unknown_architecture_names_what_there_is():
    with pytest.raises(InputError, match="unknown model family 'NoSuchLM'; there is: .*LlamaForCausalLM"):
        structure(dataclasses.replace(CONFIG, architecture="NoSuchLM"))


def test_the_record_has_every_product_and_its_answers_stand_for_it():
    weights = [np.eye(3, dtype=np.float32) * scale for scale in (1, 2)]
    x, answer = jax.numpy.ones((1, 2, 3)), jax.numpy.zeros((1, 2, 3))
    with recorded({id(weights[1]): answer}) as record:
        y = linear(x, weights[0])
        assert linear(y, weights[1]) is answer
    assert [id(w) for w in record.weights] == [id(w) for w in weights] and record.inputs[0] is x
    assert record.inputs[1] is y
    assert linear(y, weights[1]).sum() == 12  # outside of the record


def test_gains_without_a_bias_are_arrays_of_their_own():
    names = ["a.norm.weight", "norm.weight", "norm.bias", "fc1.weight", "a.q_norm.weight"]
    assert paths(names) == {
        "a.norm.weight": ("a", "norm"),
        "norm.weight": ("norm", "weight"),
        "norm.bias": ("norm", "bias"),
        "fc1.weight": ("fc1", "weight"),
        "a.q_norm.weight": ("a", "q_norm"),
    }


def test_linears_are_replaced_at_any_depth_without_touching_the_others():
    block = {"norm": {"weight": np.ones(2), "bias": np.ones(2)}, "fc1": {"weight": np.ones((2, 2))}}
    block["a"] = {"b": {"weight": np.zeros((2, 2)), "bias": np.ones(2)}}
    assert set(linears_of(block)) == {"fc1", "a.b"}
    found = replace_linears(block, {"fc1": "x", "a.b": "y"})
    assert found["fc1"] == {"weight": "x"} and found["a"]["b"]["weight"] == "y"
    assert found["a"]["b"]["bias"] is block["a"]["b"]["bias"] and found["norm"] is block["norm"]
    assert block["fc1"]["weight"].shape == (2, 2) and block["a"]["b"]["weight"].shape == (2, 2)


def test_the_linears_of_a_mixture_are_those_of_every_expert(fixtures: Path):
    config = open_model(fixtures / "mixtral").config
    found = structure(config)
    place = "block_sparse_moe.experts"
    wanted = [f"self_attn.{name}_proj" for name in "qkvo"]
    wanted += [f"{place}.{expert}.{name}" for name in ("w1", "w3", "w2") for expert in range(4)]
    assert list(found.sites) == wanted  # the router is none of them
    assert found.sites[f"{place}.2.w3"] == f"{place}.2.w1" != found.sites[f"{place}.1.w3"]
    assert found.experts == {name: int(name.split(".")[2]) for name in wanted[4:]}
    assert found.stacks == {
        f"{place}.{name}": tuple(f"{place}.{expert}.{name}" for expert in range(4)) for name in ("w1", "w2")
    }
    assert found.groups[2:] == (tuple(wanted[4:12]), tuple(wanted[12:]))  # tuned after each, not after each expert
    assert {own.name for own in found.linears if own.row_parallel} == {"self_attn.o_proj", *wanted[12:]}
    assert not structure(CONFIG).stacks and not structure(CONFIG).experts


def test_a_record_sees_of_an_expert_its_tokens_alone(fixtures: Path):
    model = load(fixtures / "mixtral")
    x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((2, 7, 32)), np.float32)
    block = model.params["blocks"][0]
    with recorded() as record:
        y = family(model.config).block(block, x, Context(model.config))
    routed = np.stack([np.asarray(own) for own in record.routed[4:8]], -1)
    assert (routed.sum(-1) == 2).all() and set(record.experts[:4]) == {None}
    for expert in range(4):
        own, other = np.asarray(record.inputs[4 + expert]), ~routed[..., expert]
        assert record.inputs[4 + expert] is record.inputs[8 + expert]  # w1 and w3 share their input
        assert (own[other] == 0).all() and (np.asarray(record.inputs[12 + expert])[other] == 0).all()
        np.testing.assert_array_equal(own[~other], np.asarray(record.every[4])[~other])
    np.testing.assert_array_equal(y, family(model.config).block(block, x, Context(model.config)))

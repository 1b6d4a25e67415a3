"""Models whose blocks stay on disk: the same weights, read anew and kept by nobody."""

import gc
import weakref

import jax
import numpy as np
import pytest

from qjax import models
from qjax.models import structure
from qjax.streams.forward import forward_block


def test_streamed_blocks_are_those_of_the_loaded_model():
    loaded, streamed = models.load("tiny"), models.stream("tiny")
    blocks = streamed.params["blocks"]
    assert streamed.fingerprint == loaded.fingerprint and len(blocks) == loaded.config.num_layers
    for index, block in enumerate(blocks):
        jax.tree.map(np.testing.assert_array_equal, block, loaded.params["blocks"][index])
    tail = blocks[1:][1:]
    assert len(tail) == len(blocks) - 2
    jax.tree.map(np.testing.assert_array_equal, tail[-1], loaded.params["blocks"][-1])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_a_block_is_freed_when_the_loop_lets_go_of_it():
    seen = []
    for block in models.stream("tiny").params["blocks"]:
        seen.append(weakref.ref(block["mlp"]["down_proj"]["weight"]))
        del block
        gc.collect()
        assert all(reference() is None for reference in seen)
    assert len(seen) == 4


def test_a_block_may_overwrite_its_inputs():
    model = models.load("tiny")
    x = np.random.default_rng(0).normal(size=(3, 8, model.config.hidden_size)).astype(np.float32)
    expected = np.asarray(models.block(model.params["blocks"][0], x[:2], model.config))
    y = forward_block(model.params["blocks"][0], x, model.config, 2)
    np.testing.assert_array_equal(y[:2], expected)
    assert forward_block(model.params["blocks"][0], x, model.config, 2, x) is x
    np.testing.assert_array_equal(x, y)


def test_the_shapes_of_the_plan_are_those_of_the_weights():
    model = models.stream("tiny")
    block = model.params["blocks"][0]
    for linear, shape in structure(model.config).shapes.items():
        group, leaf = linear.split(".")
        assert block[group][leaf]["weight"].shape == shape

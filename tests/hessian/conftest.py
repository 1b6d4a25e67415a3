"""A random model of two blocks, and tokens for it."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import models
from qjax.models.config import ModelConfig

CONFIG = ModelConfig("LlamaForCausalLM", 50, 32, 48, 2, 4, 2, 8)


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(np.float32) * 0.2)  # noqa: E731

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
    return models.Model(CONFIG, params, models.Tokenizer(None), "random", "random", {"sha256": "none"})


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 50, (7, 12)).astype(np.int32)

"""A random model of two blocks, and tokens for it."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import models
from qjax.models.config import ModelConfig

CONFIG = ModelConfig("LlamaForCausalLM", 50, 32, 48, 2, 4, 2, 8)
UNEVEN = ModelConfig("LlamaForCausalLM", 50, 37, 172, 2, 4, 2, 8)


def random_model(config):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(np.float32) * 0.2)  # noqa: E731
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))

    def block():
        attention = {
            "q_proj": (queries, width),
            "k_proj": (keys, width),
            "v_proj": (keys, width),
            "o_proj": (width, queries),
        }
        mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        return {
            "input_layernorm": normal(width) + 1,
            "post_attention_layernorm": normal(width) + 1,
            "self_attn": {name: {"weight": normal(*shape)} for name, shape in attention.items()},
            "mlp": {name: {"weight": normal(*shape)} for name, shape in mlp.items()},
        }

    params = {"embed": normal(50, width), "norm": normal(width), "blocks": [block(), block()]}
    return models.Model(config, params, models.Tokenizer(None), "random", "random", {"sha256": "none"})


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module", params=[CONFIG, UNEVEN], ids=["even", "uneven"])
def any_model(request):
    return random_model(request.param)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 50, (7, 12)).astype(np.int32)

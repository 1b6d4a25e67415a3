"""A small model in every kind of matrix, without rounding anything: random codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import codebooks, incoherence
from qjax.codebooks.scaling import Scaling
from qjax.matrix.quantized import QuantizedMatrix
from qjax.models.config import ModelConfig

CONFIG = ModelConfig("Qwen3ForCausalLM", 96, 64, 128, 2, 8, 4, 16, max_positions=64, qkv_bias=True, qk_norm=True)
BOOKS = {
    "half_integer": ("half_integer", 2, {}),
    "grid": ("grid", 3, {}),
    "e8p": ("e8p", 2, {}),
    "trellis": ("trellis", 2, {"L": 8, "code": "1mad"}),
    "hyb": ("trellis", 2, {"L": 9, "code": "hyb", "V": 2, "Q": 6}),
}


@jax.jit
def _stream(codebook: Any, codes: Any) -> Any:
    return codebook.pack(codes)


def random_codes(rng: np.random.Generator, codebook: Any, shape: tuple[int, int]) -> np.ndarray:
    """Codes as `codebook.quantize` gives them; every codeword is as likely as any other."""
    like = jax.eval_shape(codebook.quantize, jax.ShapeDtypeStruct(shape, np.float32))
    bits = round(codebook.bits * shape[0] * shape[1] / like.size)
    return rng.integers(0, 2**bits, like.shape).astype(like.dtype)


def quantized(
    rng: np.random.Generator,
    book: str,
    transform: Any,
    out: int,
    inner: int,
    *,
    group: int | None = None,
    rows: bool = False,
    permuted: bool = False,
    gains: bool = False,
) -> QuantizedMatrix:
    """A matrix whose product with normal inputs is about normal."""
    name, bits, options = BOOKS[book]
    codebook = codebooks.make(name, bits, **options)
    weight, hessian = rng.standard_normal((out, inner)), np.diag(np.linspace(0.5, 2, inner))
    given = tuple(jnp.asarray(x, jnp.float32) for x in (weight, hessian)) if transform.rescale else (None, None)
    made = transform.sample(jax.random.key(int(rng.integers(2**31))), out, inner, *given, multiple=codebook.tile)
    padded = made.padded
    zero, relative = None, None
    if group is not None or rows:
        shape = (padded[0] if rows else 1, 1 if group is None else -(-padded[1] // group))
        relative = rng.uniform(0.5, 2, shape).astype(np.float16)
        zero = rng.integers(2, 5, shape).astype(np.uint8) if book == "grid" else None
    scaling = Scaling(jnp.float32(padded[1] ** -0.5 / codebook.rms), relative, zero, group)
    return QuantizedMatrix(
        _stream(codebook, random_codes(rng, codebook, padded)),
        scaling,
        made,
        codebook,
        rng.permutation(padded[1]).astype(np.uint16) if permuted else None,
        rng.uniform(0.5, 2, out).astype(np.float16) if gains else None,
        rng.uniform(0.5, 2, inner).astype(np.float16) if gains else None,
    )


def dense(rng: np.random.Generator, out: int, inner: int) -> Any:
    return (rng.standard_normal((out, inner)) * inner**-0.5).astype(np.float32)


def model(make: Callable[[np.random.Generator, int, int], Any], config: ModelConfig = CONFIG) -> Any:
    """Parameters whose linears come from `make(rng, out, in)`, with an own head and random norms and biases."""
    rng = np.random.default_rng(0)
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width, middle = config.hidden_size, config.intermediate_size

    def vector(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    def linear(out: int, inner: int, bias: bool = False) -> dict[str, Any]:
        own = {"weight": make(rng, out, inner)}
        return {**own, "bias": vector(out) - np.float32(1)} if bias else own

    blocks = [
        {
            "input_layernorm": vector(width),
            "post_attention_layernorm": vector(width),
            "self_attn": {
                "q_proj": linear(heads, width, config.qkv_bias),
                "k_proj": linear(kv, width, config.qkv_bias),
                "v_proj": linear(kv, width, config.qkv_bias),
                "o_proj": linear(width, heads),
                **({"q_norm": vector(config.head_dim), "k_norm": vector(config.head_dim)} if config.qk_norm else {}),
            },
            "mlp": {
                "gate_proj": linear(middle, width),
                "up_proj": linear(middle, width),
                "down_proj": linear(width, middle),
            },
        }
        for _ in range(config.num_layers)
    ]
    table = dense(rng, config.vocab_size, width) * 8
    return {"embed": table, "head": dense(rng, config.vocab_size, width) * 4, "norm": vector(width), "blocks": blocks}


def block_local(book: str, block: int = 16) -> Callable[[np.random.Generator, int, int], Any]:
    transform = incoherence.make("block_hadamard", block=block)
    return lambda rng, out, inner: quantized(rng, book, transform, out, inner)


def of_whole_axes(book: str) -> Callable[[np.random.Generator, int, int], Any]:
    transform = dataclasses.replace(incoherence.make("hadamard"), rescale=True)
    return lambda rng, out, inner: quantized(rng, book, transform, out, inner, gains=True)

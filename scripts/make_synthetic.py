"""A checkpoint of a published shape with random weights: to show what memory and time a model of that size needs.

    python scripts/make_synthetic.py llama-3.2-1b /tmp/synthetic-1b
    python scripts/make_synthetic.py llama-3-8b /tmp/synthetic-8b --blocks 2

Weights are normal with the deviation `1 / √in` (norms are one), bfloat16, one safetensors file per block, written and
forgotten block by block; the tokenizer is that of `tiny`. The model predicts nothing: use `evaluate=none`, or
`evaluate.sanity_perplexity=null` to evaluate it all the same.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import struct
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = {
    "llama-3.2-1b": {"hidden": 2048, "inner": 8192, "blocks": 16, "heads": 32, "kv": 8, "head": 64, "tied": True},
    "llama-3-8b": {"hidden": 4096, "inner": 14336, "blocks": 32, "heads": 32, "kv": 8, "head": 128, "tied": False},
}
VOCABULARY = 128256


def tensors(shape: dict[str, int], block: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block's tensors."""
    hidden, inner, q, kv = (
        shape["hidden"],
        shape["inner"],
        shape["heads"] * shape["head"],
        shape["kv"] * shape["head"],
    )
    own = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {f"model.layers.{block}.{name}.weight": size for name, size in own.items()}


def edges(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of embedding, last norm and, where it is not tied, head."""
    own: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, shape["hidden"]),
        "model.norm.weight": (shape["hidden"],),
    }
    return own if shape["tied"] else {**own, "lm_head.weight": (VOCABULARY, shape["hidden"])}


def values(size: tuple[int, ...], key: jax.Array) -> np.ndarray:
    """bfloat16 weights; ones for a norm."""
    if len(size) == 1:
        return np.asarray(jnp.ones(size, jnp.bfloat16))
    return np.asarray(jax.random.normal(key, size, jnp.bfloat16) * jnp.bfloat16(size[1] ** -0.5))


def write(path: pathlib.Path, names: dict[str, tuple[int, ...]], key: jax.Array) -> int:
    """A safetensors file, tensor by tensor; its bytes of weights."""
    header, end = {}, 0
    for name, size in names.items():
        start, end = end, end + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for index, size in enumerate(names.values()):
            file.write(values(size, jax.random.fold_in(key, index)).tobytes())
    return end


def make(shape: str, out: pathlib.Path, blocks: int | None = None, seed: int = 0) -> int:
    """Write the folder; the bytes of all weights. Raises FileExistsError when there is something already."""
    own = dict(SHAPES[shape])
    own["blocks"] = own["blocks"] if blocks is None else blocks
    out.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": own["hidden"],
        "intermediate_size": own["inner"],
        "num_hidden_layers": own["blocks"],
        "num_attention_heads": own["heads"],
        "num_key_value_heads": own["kv"],
        "head_dim": own["head"],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": bool(own["tied"]),
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    key = jax.random.key(seed)
    files = {"edges": edges(own)} | {f"block-{index:03d}": tensors(own, index) for index in range(own["blocks"])}
    total, where = 0, {}
    for number, (name, names) in enumerate(files.items()):
        total += write(out / f"{name}.safetensors", names, jax.random.fold_in(key, number))
        where |= dict.fromkeys(names, f"{name}.safetensors")
        print(f"{name}: {total / 1e9:.2f} GB", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    tiny = pathlib.Path(__file__).resolve().parents[1] / "qjax" / "models" / "tiny"
    shutil.copy(tiny / "tokenizer.json", out / "tokenizer.json")
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=pathlib.Path, help="a folder that does not exist yet")
    parser.add_argument("--blocks", type=int, default=None, help="fewer blocks than the published shape")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.out.exists():
        print(f"{options.out} exists; give another folder, or remove it", file=sys.stderr)
        return 2
    make(options.shape, options.out, options.blocks, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())

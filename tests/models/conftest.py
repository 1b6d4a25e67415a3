"""Small models on disk: those of scripts/make_reference_logits.py, and writers that change copies of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import quantize
from gguf_metadata import describe
from safetensors.numpy import save_file

from qjax.models import open_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return ROOT / "tests" / "fixtures" / "models"


@pytest.fixture(scope="session")
def stories() -> Path:
    data = Path(os.environ.get("QJAX_SHARED_DATA", ROOT.parent / "shared" / "data"))
    folder = data / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"the trained model stories260K is not in {folder} (set QJAX_SHARED_DATA)")
    return folder


@pytest.fixture
def folder(fixtures: Path, tmp_path: Path) -> Path:
    """A writable copy of the Llama 3 fixture."""
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(fixtures / "llama3" / name, target / name)
    return target


@pytest.fixture
def tensors(fixtures: Path) -> dict[str, np.ndarray]:
    """The Llama 3 fixture's tensors in float32."""
    source = open_model(fixtures / "llama3").weights
    return {name: source.read(name).astype(np.float32) for name in sorted(source.names)}


@pytest.fixture
def edit_config(folder: Path) -> Callable[..., Path]:
    """Rewrite keys of the copy's config.json; a value of `...` removes the key."""

    def edit(**changes: Any) -> Path:
        path = folder / "config.json"
        table = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))
        return folder

    return edit


@pytest.fixture
def shards(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The copy, split into two shards with an index."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    table = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + dim/2 of every head become neighbours 2i and 2i + 1, written out as loops."""
    out = np.empty_like(values)
    dim = len(values) // heads
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + 2 * i] = values[head * dim + i]
            out[head * dim + 2 * i + 1] = values[head * dim + dim // 2 + i]
    return out


@pytest.fixture
def write_gguf(fixtures: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write one of the fixture models as GGUF: `write(family, arch, kinds={name part: type}, metadata={...})`."""

    def write(
        family: str = "mistral",
        arch: str = "llama",
        *,
        kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
        change: Callable[[gguf.GGUFWriter], None] | None = None,
        rope_factors: np.ndarray | None = None,
    ) -> Path:
        files = open_model(fixtures / family)
        config, source = files.config, files.weights
        path = tmp_path / f"{family}.gguf"
        writer = gguf.GGUFWriter(path, arch)
        describe(writer, config)
        writer.add_value_length(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        if config.sliding_window is not None:
            writer.add_sliding_window(config.sliding_window)
        if change is not None:
            change(writer)
        if rope_factors is not None:
            writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
        for name in sorted(source.names):
            values = source.read(name).astype(np.float32)
            if arch == "llama" and ("q_proj" in name or "k_proj" in name):
                values = interleaved(values, config.num_heads if "q_proj" in name else config.num_kv_heads)
            stem, _, suffix = name.rpartition(".")
            if stem.startswith("model.layers."):
                index, _, part = stem.removeprefix("model.layers.").partition(".")
                target = f"blk.{index}.{GGUF_NAMES[part]}.{suffix}"
            else:
                target = f"{GGUF_NAMES[stem]}.{suffix}"
            kind = next((k for part, k in (kinds or {}).items() if part in name), None)
            if kind is None:
                writer.add_tensor(target, values)
            else:
                writer.add_tensor(target, quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write

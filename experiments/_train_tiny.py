"""The work behind `experiments.train_tiny`, apart from it: it imports JAX, which a typing error need not wait for."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer

import qjax
from qjax.errors import InputError, RunError
from qjax.models.checkpoints.export import rounded, write_directory
from qjax.models.config import ModelConfig
from qjax.models.families.mixture import MixtureConfig
from qjax.models.generate import generate
from qjax.models.sampling import Sampling
from qjax.training.loop import Step
from qjax.training.pretrain import Task, held_out_loss, train
from qjax.training.step import Schedule
from qjax.training.text import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    TrainingText,
    docstrings,
    documentation,
    train_tokenizer,
    windows,
)

__all__ = ["INSTALLED", "run", "start"]

INSTALLED = Path(qjax.__file__).parent / "models" / "tiny"
COMMAND = "python -m experiments.train_tiny"
NOT_RECORDED = ("out", "install", "machine", "log_every")  # they do not decide the result
PROMPTS = ("The function returns", "If the argument is", "A class is")


def gather(options: DictConfig) -> TrainingText:
    """The training documents and the held-out text that the `text` options ask for."""
    topics, held_out = documentation()
    documents = [topics] * options.topic_repeats + (docstrings() if options.docstrings else [])
    return TrainingText(tuple(documents), held_out)


def recorded(whole: dict[str, Any]) -> dict[str, Any]:
    """The options that decide the result; a model without experts has no options of theirs."""
    found = {name: value for name, value in whole.items() if name not in NOT_RECORDED}
    if not found["model"]["experts"]:
        found["model"] = {name: size for name, size in found["model"].items() if name not in ("experts", "active")}
    return found


def config_of(sizes: dict[str, Any]) -> ModelConfig:
    """The model that the `model` options describe. Raises InputError for more experts of a token than there are."""
    plain = {name: value for name, value in sizes.items() if name not in ("experts", "active")}
    if not sizes["experts"]:
        return ModelConfig(architecture="LlamaForCausalLM", tie_embeddings=True, **plain)
    if sizes["active"] > sizes["experts"]:
        raise InputError(f"model.active is {sizes['active']} and model.experts {sizes['experts']}; use at most as many")
    experts = {name: sizes[name] for name in ("experts", "active")}
    return MixtureConfig(architecture="MixtralForCausalLM", tie_embeddings=True, **plain, **experts)


class Lines:
    """Progress as plain lines every `every` steps, or as one line that is rewritten on a terminal."""

    def __init__(self, every: int):
        self.every = every

    def __call__(self, done: Step) -> None:
        if sys.stdout.isatty() or done.validation is not None or done.step % self.every == 0:
            left = _clock((done.steps - done.step) * done.seconds / done.step)
            line = f"step {done.step}/{done.steps}  loss {done.loss:.4f}  {left} left"
            if done.validation is not None:
                line += f"  held-out {done.validation:.4f}"
            rewritten = sys.stdout.isatty() and done.validation is None
            print(f"\r\033[K{line}" if sys.stdout.isatty() else line, end="" if rewritten else "\n", flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def sample(
    params: Any, config: ModelConfig, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, seed: int
) -> str:
    """The prompt and up to `tokens` more; it ends early before a new document."""
    ids, sampling = tokenizer.encode(prompt).ids, Sampling(temperature=temperature, seed=seed)
    new = generate(params, config, ids, tokens, eos_id=END_OF_TEXT_ID, sampling=sampling)
    return tokenizer.decode([*ids, *new.tolist()])


def run(options: DictConfig) -> Path:
    """Train (or continue), write `<out>/model` and, with `install=true`, the model that the package ships.

    Raises RunError when `out` is in use, holds another run, is finished, or lies inside the package.
    """
    out = Path(options.out)
    target, installed = out / "model", INSTALLED.with_name("tiny_moe") if options.model.experts else INSTALLED
    if target.exists() and not options.install:
        raise RunError(f"{target} exists already: this run is finished; choose another out, or install=true to ship it")
    if target.resolve() == installed.resolve():
        raise RunError(f"out={out} would write into the package; choose another out and set install=true")
    text = gather(options.text)
    whole: Any = OmegaConf.to_container(options)
    config = config_of(whole["model"])
    tokenizer = train_tokenizer(text.documents, config.vocab_size)
    held_out_ids = np.array(tokenizer.encode(text.held_out).ids, np.int32)
    task = Task(
        config=config,
        schedule=Schedule(**whole["schedule"]),
        stream=text.stream(tokenizer),
        held_out=windows(held_out_ids, config.max_positions),
        batch=options.batch,
        seed=options.seed,
        first_token=END_OF_TEXT_ID,
        evaluate_every=options.evaluate_every,
    )
    print(f"{len(task.stream)} training tokens, {len(held_out_ids)} held-out tokens, {options.schedule.steps} steps")
    result = train(task, out, options.checkpoint_every, Lines(options.log_every))
    params = rounded(result.params)  # what is on disk is what is measured
    loss = held_out_loss(params, task.held_out, config)
    record: dict[str, Any] = {
        "command": COMMAND,
        "config": recorded(whole),
        "seed": options.seed,
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "machine": options.machine or f"{os.cpu_count()} cores, {platform.machine()}, {jax.default_backend()}",
        "text": {
            "training": "pydoc_data.topics, first 85%"
            + ("; docstrings of the standard library" if options.text.docstrings else ""),
            "held_out": "pydoc_data.topics, last 15%",
            "sha256": text.sha256,
            "held_out_sha256": text.held_out_sha256,
            "documents": len(text.documents),
            "training_tokens": len(task.stream),
            "held_out_tokens": len(held_out_ids),
        },
        "tokenizer": {
            "kind": "byte-level BPE, split as GPT-2 does, no prefix space, no normalisation",
            "vocab_size": config.vocab_size,
            "special": {END_OF_TEXT: END_OF_TEXT_ID},
            "held_out_bytes_per_token": len(text.held_out.encode()) / len(held_out_ids),
        },
        "steps": options.schedule.steps,
        "best_step": result.best_step,
        "tokens_seen": options.schedule.steps * options.batch * config.max_positions,
        "seconds": round(result.seconds, 1),
        "held_out_loss": loss,
        "held_out_perplexity": float(np.exp(loss)),
        "held_out_bits_per_byte": loss / np.log(2) * len(held_out_ids) / len(text.held_out.encode()),
        "history": {"columns": ["step", "training_loss", "held_out_loss"], "rows": result.history},
        "samples": [
            {
                "prompt": prompt,
                "temperature": heat,
                "text": sample(params, config, tokenizer, prompt, 60, heat, options.seed),
            }
            for prompt in PROMPTS
            for heat in (0.0, 0.7)
        ],
    }
    serialised = tokenizer.to_str()
    for folder in [target, installed] if options.install else [target]:
        write_directory(folder, params, config, serialised, record, END_OF_TEXT_ID, replace=options.install)
    bits = record["held_out_bits_per_byte"]
    print(f"held-out loss {loss:.4f}, {bits:.4f} bits per byte, best step {result.best_step}\nwritten: {target}")
    return target


def start(options: DictConfig) -> None:
    """Entry point: errors of qjax are printed without a traceback and exit with 2."""
    run(options)

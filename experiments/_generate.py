"""The work behind `experiments.generate`, apart from it: it imports JAX, which a typing error need not wait for."""

from __future__ import annotations

from typing import Any

import numpy as np
from omegaconf import DictConfig

from qjax import models
from qjax.errors import InputError
from qjax.matrix.kernel_layout import pack_model
from qjax.models.continuation import ends, prompt_ids
from qjax.models.sampling import Sampling
from qjax.models.tokenizers.chat import chat_prompt
from qjax.models.tokenizers.text_stream import TextStream
from qjax.tensor_parallel import distribute, summary

from ._entry import cache_folder, compilation_cache, mesh_or_none, plain
from ._evaluate import opened, stored


def _texts(settings: dict[str, Any], tokenizer: models.Tokenizer) -> list[str]:
    texts = [settings["prompt"]] if settings["prompts"] is None else settings["prompts"]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"prompts is {texts!r}; a list of texts is expected, e.g. 'prompts=[One day,\"The list\"]'")
    if not isinstance(settings["chat_options"], dict | None):
        raise InputError(f"chat_options is {settings['chat_options']!r}; names and values are expected, e.g. {{a: 1}}")
    if not settings["chat"]:
        return texts
    system = [] if settings["system"] is None else [{"role": "system", "content": settings["system"]}]
    options = settings["chat_options"]
    return [chat_prompt([*system, {"role": "user", "content": text}], tokenizer, options) for text in texts]


def start(config: DictConfig) -> None:
    """Print the prompts and their continuations, and how fast they came."""
    settings = plain(config)
    compilation_cache(cache_folder(settings["cache"]))
    sampling = Sampling(*(settings[key] for key in ("temperature", "top_k", "top_p", "seed")))
    mesh = mesh_or_none(settings)
    if settings["artifact"] is not None:
        model = stored(settings["artifact"], settings["adapters"], mesh)
    elif settings["adapters"] is not None:
        raise InputError("adapters belong to an artifact: give artifact= too")
    else:
        model = opened(settings["model"]["source"], settings["model"]["dtype"], mesh)
    params = model.params
    if mesh is not None:
        params = distribute(params, model.config, mesh, packed=settings["packed"])
        print(f"[{summary(params)}]")
    elif settings["packed"] and settings["adapters"] is None:
        params = pack_model(params)
    texts = _texts(settings, model.tokenizer)
    prompts = [prompt_ids(model.tokenizer, text, chat=settings["chat"]) for text in texts]
    streaming = settings["stream"] and len(prompts) == 1
    stream = TextStream(model.tokenizer)

    def show(new: np.ndarray, going: np.ndarray) -> None:
        if going[0]:
            print(stream.add(int(new[0])), end="", flush=True)

    if streaming:
        print(texts[0], end="", flush=True)
    found = models.generate_batch(
        params,
        model.config,
        prompts,
        settings["max_new_tokens"],
        sampling=sampling,
        eos_id=ends(model.tokenizer, chat=settings["chat"]),
        on_tokens=show if streaming else None,
    )
    if streaming:
        print(stream.rest())
    else:
        for text, new in zip(texts, found.tokens, strict=True):
            print(text + model.tokenizer.decode(new))
    print(
        f"[{found.prompt_tokens} tokens read and the first new ones in {found.prefill_seconds:.2f} s; "
        f"{found.tokens_per_second:.1f} new tokens/s]"
    )

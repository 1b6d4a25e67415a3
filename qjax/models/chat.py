"""Chat formats of the instruction-tuned families, told apart by the special tokens of their vocabularies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qjax.errors import InputError
from qjax.models.tokenizer import Tokenizer

__all__ = ["chat_prompt", "stop_ids"]

# (a token that only this format has, before a message, after it)
_FORMATS = {
    "ChatML": ("<|im_start|>", "<|im_start|>{role}\n", "<|im_end|>\n"),
    "Llama 3": ("<|start_header_id|>", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
}
_ROLES = ("system", "user", "assistant")


def chat_prompt(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> str:
    """The text after which the model writes the assistant's next message.

    `messages` are {"role": "system" | "user" | "assistant", "content": text}, the last one not the assistant's.
    ChatML (SmolLM2, Qwen2, Qwen3) and Llama 3 are known. Raises InputError for another vocabulary or role.
    """
    for message in messages:
        if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            raise InputError(f"chat message {dict(message)}: needs a role ({', '.join(_ROLES)}) and a text as content")
    if not messages or messages[-1]["role"] == "assistant":
        raise InputError("a chat needs at least one message, and the last one is not the assistant's")
    backend = tokenizer.backend
    for marker, before, after in _FORMATS.values():
        if backend.token_to_id(marker) is not None:
            start = "<|begin_of_text|>" if marker == "<|start_header_id|>" else ""
            turns = (before.format(role=m["role"]) + m["content"] + after for m in messages)
            return start + "".join(turns) + before.format(role="assistant")
    raise InputError(
        f"chat=true: the vocabulary has the marks of no chat format that is known ({', '.join(_FORMATS)}); "
        "write the model's own format into prompt="
    )


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an assistant's message: the end of text, and the ends of turns that the vocabulary has."""
    ends = [tokenizer.eos_id, *(tokenizer.backend.token_to_id(after.strip()) for *_, after in _FORMATS.values())]
    return tuple(dict.fromkeys(end for end in ends if end is not None))

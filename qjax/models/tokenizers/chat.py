"""The text of a chat: by the model's own template where its files have one, else by a known format.

The known formats are told apart by the special tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qjax.errors import InputError
from qjax.models.tokenizers.tokenizer import Tokenizer

__all__ = ["chat_prompt", "stop_ids"]

# (a token that only this format has, before a message, after it)
_FORMATS = {
    "ChatML": ("<|im_start|>", "<|im_start|>{role}\n", "<|im_end|>\n"),
    "Llama 3": ("<|start_header_id|>", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
}
_ROLES = ("system", "user", "assistant")


def chat_prompt(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, options: Mapping[str, Any] | None = None
) -> str:
    """The text after which the model writes the assistant's next message, special tokens included.

    `messages` are {"role": text, "content": text}, the last one not the assistant's. The model's own template is used
    where it came with one (`qjax.models.tokenizers.chat_template`); `options` are further variables for it. Without
    one, ChatML (SmolLM2, Qwen2, Qwen3) and Llama 3 are known, with the roles system, user and assistant.

    Raises InputError for another vocabulary or role, messages that the template refuses, or options without a template;
    ModelFileError for a template that is malformed or fails.
    """
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InputError(f"chat message {dict(message)}: needs a role ({', '.join(_ROLES)}) and a text as content")
    if not messages or messages[-1]["role"] == "assistant":
        raise InputError("a chat needs at least one message, and the last one is not the assistant's")
    if tokenizer.chat is not None:
        return tokenizer.chat.render(messages, variables=options)
    if options:
        raise InputError(f"chat_options {dict(options)}: this model came without a chat template that could use them")
    for message in messages:
        if message["role"] not in _ROLES:
            raise InputError(f"chat message {dict(message)}: needs a role ({', '.join(_ROLES)}) and a text as content")
    backend = tokenizer.backend
    for marker, before, after in _FORMATS.values():
        if backend.token_to_id(marker) is not None:
            start = "<|begin_of_text|>" if marker == "<|start_header_id|>" else ""
            turns = (before.format(role=m["role"]) + m["content"] + after for m in messages)
            return start + "".join(turns) + before.format(role="assistant")
    raise InputError(
        f"chat=true: the model came without a chat template, and its vocabulary has the marks of no chat format that "
        f"is known ({', '.join(_FORMATS)}); write the model's own format into prompt="
    )


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an assistant's message: the end of text, those that the model's files list, and known ones.

    Known are the ends of turns of ChatML and Llama 3, where the vocabulary has them.
    """
    own: list[int | None] = []
    if tokenizer.chat is not None:
        own = [end for end in tokenizer.chat.ends if end < tokenizer.vocab_size]
        own.append(tokenizer.backend.token_to_id(tokenizer.chat.tokens.get("eos_token", "")))
    known = [tokenizer.backend.token_to_id(after.strip()) for *_, after in _FORMATS.values()]
    return tuple(dict.fromkeys(end for end in (tokenizer.eos_id, *own, *known) if end is not None))

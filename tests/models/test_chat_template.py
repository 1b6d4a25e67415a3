"""Chat templates of model files: prompts against strings written out by hand, and templates that must not get far."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from qjax.errors import InputError, ModelFileError
from qjax.models import Tokenizer, open_model
from qjax.models.tokenizers.chat import chat_prompt, stop_ids
from qjax.models.tokenizers.chat_template import ChatTemplate, folder_template, gguf_template

SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": " Hello. "}
WHY = {"role": "user", "content": "Why?"}

# A block per message, with newlines and indentation that jinja2 must cut off; a default system message.
MARKED = """\
{%- if messages[0].role != 'system' %}
    {{- '<s>system\\nDefault.</s>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
{{ '<s>' + message.role + '\\n' }}{% generation %}{{ message.content | trim }}{% endgeneration %}{{ '</s>\\n' }}
    {%- else %}
{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{- '<s>assistant\\n' }}
    {%- if thinking is defined and not thinking %}{{ '<think></think>' }}{% endif %}
{% endif %}"""

# Turns in brackets, the system message inside the first one, roles that must alternate, special tokens by name.
BRACKETS = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content + '\\n\\n' %}
        {%- continue %}
    {%- endif %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('the role ' + message.role + ' is not supported') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + ns.system + message.content + ' [/INST]' }}
        {%- set ns.system = '' %}
    {%- else %}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""


def template(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, "a/chat_template.jinja", tokens)


@pytest.mark.parametrize(
    ("source", "messages", "generate", "variables", "expected"),
    [
        (MARKED, [HI], True, {}, "<s>system\nDefault.</s>\n<s>user\nHi</s>\n<s>assistant\n"),
        (MARKED, [SYSTEM, HI], True, {}, "<s>system\nBe brief.</s>\n<s>user\nHi</s>\n<s>assistant\n"),
        (
            MARKED,
            [SYSTEM, HI, HELLO, WHY],
            True,
            {"thinking": False},
            "<s>system\nBe brief.</s>\n<s>user\nHi</s>\n<s>assistant\nHello.</s>\n<s>user\nWhy?</s>\n"
            "<s>assistant\n<think></think>",
        ),
        (MARKED, [SYSTEM, HI], False, {}, "<s>system\nBe brief.</s>\n<s>user\nHi</s>\n"),
        (BRACKETS, [HI], True, {}, "<B>[INST] Hi [/INST]"),
        (
            BRACKETS,
            [SYSTEM, HI, HELLO, WHY],
            True,
            {},
            "<B>[INST] Be brief.\n\nHi [/INST] Hello. <E>[INST] Why? [/INST]",
        ),
        (
            "{{ messages | tojson }}",
            [{"role": "user", "content": "<é>"}],
            True,
            {},
            '[{"role": "user", "content": "<é>"}]',
        ),
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", [HI, HELLO, WHY], True, {}, "Hi"),
        ("{{ 'none' if tools is none else tools }}", [HI], True, {}, "none"),
    ],
)
def test_prompts_as_written_by_hand(source, messages, generate, variables, expected):
    made = template(source, bos_token="<B>", eos_token="<E>")
    assert made.render(messages, add_generation_prompt=generate, variables=variables) == expected


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("a\n{% if %}", ModelFileError, "chat_template.jinja: its chat template is malformed, line 2"),
        ("{% for m in messages %}", ModelFileError, "malformed"),
        ("{{ raise_exception('No system role.') }}", InputError, "refuses these messages: No system role"),
        ("{{ missing.part }}", ModelFileError, "fails on messages with the roles user .*UndefinedError"),
        ("{{ messages[0].content + 1 }}", ModelFileError, "TypeError"),
        ("{{ ''.__class__.__mro__ }}", ModelFileError, "SecurityError"),
        ("{{ messages.append(1) }}", ModelFileError, "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", ModelFileError, "SecurityError"),
        ("{% include '/etc/hostname' %}", ModelFileError, "fails"),
        ("{{ 'a' * 10 ** 10 }}", ModelFileError, "too large"),
        ("{{ 7 ** 7 ** 7 ** 7 }}", ModelFileError, "too large"),
        ("{{ range(10 ** 9) | list }}", ModelFileError, "too big"),
    ],
)
def test_templates_that_are_malformed_raise_or_reach_out(source, error, message):
    with pytest.raises(error, match=message):
        template(source).render([HI])


def test_what_a_template_is_given_is_checked():
    with pytest.raises(InputError, match="chat_options may not set messages"):
        template(MARKED).render([HI], variables={"messages": []})
    today = time.strftime("%Y")
    assert template("{{ strftime_now('%Y') }}").render([HI]) in (today, str(int(today) + 1))


def words(*special: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.add_special_tokens(list(special))
    return Tokenizer(backend, eos_id=1)


def test_the_own_template_comes_before_the_known_formats():
    tokenizer = words("<end>", "<|im_start|>", "<|im_end|>", "<turn>")
    assert chat_prompt([HI], tokenizer) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InputError, match="without a chat template"):
        chat_prompt([HI], tokenizer, {"thinking": False})
    tokenizer.chat = ChatTemplate(BRACKETS, "a", {"bos_token": "<B>", "eos_token": "<turn>"}, ends=(2, 99))
    assert chat_prompt([HI], tokenizer) == "<B>[INST] Hi [/INST]"
    assert stop_ids(tokenizer) == (1, 2, 4, 3)  # the tokenizer's, the files' (99 is no id), eos_token's, ChatML's
    with pytest.raises(InputError, match="the role tool is not supported"):
        chat_prompt([{"role": "tool", "content": "x"}], tokenizer)
    with pytest.raises(InputError, match="the last one is not the assistant's"):
        chat_prompt([HI, HELLO], tokenizer)


def test_where_a_folder_keeps_its_template(tmp_path: Path):
    assert folder_template(tmp_path) is None
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "third"}))
    assert folder_template(tmp_path) == ChatTemplate("third", str(tmp_path / "chat_template.json"), {}, (9, 7))
    table = {"bos_token": {"content": "<B>", "special": True}, "eos_token": "<E>", "pad_token": None}
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "second"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table | {"chat_template": several}))
    found = folder_template(tmp_path)
    assert found is not None and (found.source, found.tokens) == ("second", {"bos_token": "<B>", "eos_token": "<E>"})
    (tmp_path / "chat_template.jinja").write_text("first {{ bos_token }}")
    found = folder_template(tmp_path)
    assert found is not None and found.render([HI]) == "first <B>"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "is a int; a text is expected"),
        ([{"name": "tool_use", "template": "x"}], "one called 'default' is expected"),
        ("x" * 1_000_001, "at most 1000000 are read"),
    ],
)
def test_entries_of_another_kind_are_refused(tmp_path: Path, entry, message: str):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(ModelFileError, match=message):
        folder_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match="cannot read the chat template"):
        folder_template(tmp_path)


def test_the_template_of_a_gguf_file():
    metadata = {
        "tokenizer.chat_template": BRACKETS,
        "tokenizer.ggml.tokens": ["<B>", "<E>", "<turn>"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.eom_token_id": 3,  # no such token
    }
    found = gguf_template(metadata, "a.gguf")
    assert found is not None and found.ends == (2,)
    assert found.render([SYSTEM, HI, HELLO, WHY]) == "<B>[INST] Be brief.\n\nHi [/INST] Hello. <E>[INST] Why? [/INST]"
    assert gguf_template({}, "a.gguf") is None


def test_models_bring_their_template(folder: Path, write_gguf):
    (folder / "chat_template.jinja").write_text(BRACKETS)
    chat = open_model(folder).tokenizer.chat
    assert chat is not None and chat.source == BRACKETS
    path = write_gguf(change=lambda writer: writer.add_chat_template(MARKED))
    chat = open_model(path).tokenizer.chat
    assert chat is not None and chat.source == MARKED


def test_an_artifact_keeps_the_template(tmp_path: Path):
    import dataclasses

    from qjax import models
    from qjax.interchange import artifact

    model = models.load("tiny")
    tokenizer = Tokenizer(model.tokenizer.backend, eos_id=model.tokenizer.eos_id)
    tokenizer.chat = ChatTemplate(BRACKETS, "/somewhere/else", {"bos_token": "<B>"}, (3,))
    artifact.save(tmp_path / "a", dataclasses.replace(model, tokenizer=tokenizer), model.params)
    loaded = artifact.load(tmp_path / "a").tokenizer
    assert loaded.chat == ChatTemplate(BRACKETS, str(tmp_path / "a" / "model.json"), {"bos_token": "<B>"}, (3,))
    assert chat_prompt([HI], loaded) == "<B>[INST] Hi [/INST]"
    assert "somewhere" not in (tmp_path / "a" / "model.json").read_text()
    np.testing.assert_array_equal(loaded.encode("Hi"), tokenizer.encode("Hi"))

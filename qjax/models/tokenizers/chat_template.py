"""A model's own chat template: where its files keep it, and its text for a conversation.

Templates are programs of the Jinja language that come with a model. They run in jinja2's sandbox: no attribute of
Python's own is reachable, nothing that is given can be changed, and products that would fill the memory are refused.
The names and filters that a template may use are those of Hugging Face's `apply_chat_template`.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from qjax.errors import InputError, ModelFileError
from qjax.models.checkpoints.files import read_json, refuse_pointer

if TYPE_CHECKING:
    import jinja2

__all__ = ["ChatTemplate", "folder_template", "gguf_template"]

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_LARGEST = 1_000_000  # characters of a template, and entries of a product inside one
_RESERVED = ("messages", "add_generation_prompt")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with what it may refer to.

    Attributes:
      source: the template.
      where: the file that it comes from, for messages.
      tokens: texts of special tokens by name, e.g. {"bos_token": "<s>"}.
      ends: ids that end an assistant's message, as the model's files list them.
    """

    source: str
    where: str
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ends: tuple[int, ...] = ()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, special tokens included (so no BOS is to be added to it).

        `variables` are further names for the template, e.g. {"enable_thinking": False} for Qwen3.

        Raises ModelFileError for a template that is malformed or fails, InputError for messages that it refuses.
        """
        import jinja2

        extra = dict(variables or {})
        if taken := sorted(set(extra) & set(_RESERVED)):
            raise InputError(f"chat_options may not set {', '.join(taken)}; the messages decide them")
        names = {"tools": None, "documents": None, **self.tokens, **extra}
        try:
            template = _compiled(self.source)
            return template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **names
            )
        except _Refused as error:
            raise InputError(f"{self.where}: the model's chat template refuses these messages: {error}") from error
        except jinja2.TemplateSyntaxError as error:
            raise ModelFileError(
                f"{self.where}: its chat template is malformed, line {error.lineno}: {error.message}; fetch the file "
                "again, or use chat=false and write the format into prompt="
            ) from error
        except Exception as error:  # a template can fail in as many ways as a program
            raise ModelFileError(
                f"{self.where}: its chat template fails on {_described(messages)} ({type(error).__name__}: {error}); "
                "it may need chat_options=…, or use chat=false and write the format into prompt="
            ) from error


class _Refused(Exception):
    """An error that a template raises itself by `raise_exception`."""


def _described(messages: Sequence[Mapping[str, Any]]) -> str:
    return f"messages with the roles {', '.join(str(message.get('role')) for message in messages) or 'none'}"


def _raise_exception(message: Any) -> None:
    raise _Refused(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter would escape characters that HTML gives a meaning to."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks the assistant's own text for training; here it is plain text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        """Operators that could fill the memory are looked at first."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
            sequence = any(isinstance(x, str | list | tuple) for x in (left, right))
            if (operator == "*" and sequence and sizes[0] * sizes[1] > _LARGEST) or (
                operator == "**" and (sizes[0] > _LARGEST or sizes[1] > 64)
            ):
                raise SecurityError(f"a product with {operator} that is too large")
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def folder_template(folder: Path) -> ChatTemplate | None:
    """The template of a Hugging Face folder, or None: `chat_template.jinja`, else `tokenizer_config.json`'s.

    Of several named templates the one called "default" is taken. Raises ModelFileError for a damaged file or an entry
    of the wrong kind.
    """
    file = folder / "tokenizer_config.json"
    table = read_json(file) if file.is_file() else {}
    where, source = str(file), table.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        where = str(folder / "chat_template.jinja")
        source = _text(folder / "chat_template.jinja")
    elif source is None and (folder / "chat_template.json").is_file():
        where = str(folder / "chat_template.json")
        source = read_json(folder / "chat_template.json").get("chat_template")
    if source is None:
        return None
    tokens = {name: text for name in _TOKENS if (text := _token_text(table.get(name))) is not None}
    return ChatTemplate(_chosen(source, where), where, tokens, _folder_ends(folder))


def gguf_template(metadata: Mapping[str, Any], where: str) -> ChatTemplate | None:
    """The template in a GGUF file's metadata (`tokenizer.chat_template`), or None."""
    source = metadata.get("tokenizer.chat_template")
    if source is None:
        return None
    pieces = metadata.get("tokenizer.ggml.tokens", [])
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {f"{name}_token": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids.items()}
    tokens = {name: pieces[i] for name, i in found.items() if _whole(i) and i < len(pieces)}
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
    return ChatTemplate(_chosen(source, where), where, tokens, tuple(i for i in ends if _whole(i) and i < len(pieces)))


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        refuse_pointer(path, data[:64])
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"cannot read the chat template {path}: {error}; fetch the file again") from error


def _chosen(source: Any, where: str) -> str:
    """The template out of a text, or out of a list of `{"name", "template"}`."""
    if isinstance(source, list) and all(isinstance(entry, Mapping) for entry in source):
        named = {entry.get("name"): entry.get("template") for entry in source}
        if "default" not in named:
            raise ModelFileError(f"{where}: its chat templates are {list(named)}; one called 'default' is expected")
        source = named["default"]
    if not isinstance(source, str):
        raise ModelFileError(f"{where}: chat_template is a {type(source).__name__}; a text is expected")
    if len(source) > _LARGEST:
        raise ModelFileError(f"{where}: its chat template has {len(source)} characters; at most {_LARGEST} are read")
    return source


def _token_text(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) else None


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _folder_ends(folder: Path) -> tuple[int, ...]:
    """All ids that `generation_config.json` and `config.json` list as ends of a text."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        entry = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        values: Iterable[Any] = entry if isinstance(entry, list) else [entry]
        found += [value for value in values if _whole(value)]
    return tuple(dict.fromkeys(found))

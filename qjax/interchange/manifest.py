"""`model.json` and `tokenizer.json` of an artifact: what a model is beside its weights."""

from __future__ import annotations

import dataclasses
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from qjax.errors import ArtifactError
from qjax.models.config import AttentionKind, ModelConfig, Scaling
from qjax.models.families import FAMILIES
from qjax.models.loading import Model
from qjax.models.tokenizers.chat_template import ChatTemplate
from qjax.models.tokenizers.tokenizer import Tokenizer, parsed
from qjax.runtime.atomic import read_bytes, write_json, write_text

__all__ = ["MODEL", "config_of", "tokenizer_of", "write"]

MODEL = "model.json"
_TOKENIZER = "tokenizer.json"


def write(path: pathlib.Path, model: Model, about: Mapping[str, Any]) -> None:
    """Both files of `model`, the manifest with the entries of `about` besides; no tokenizer where there is none."""
    tokenizer = model.tokenizer
    if tokenizer.vocab_size:
        write_text(path / _TOKENIZER, tokenizer.backend.to_str())
    manifest = {
        "format": about["format"],
        "name": model.name,
        "description": model.description,
        "tokenizer": {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "adds_bos": tokenizer.adds_bos},
        "config": dataclasses.asdict(model.config),
        **about,
    }
    if tokenizer.chat is not None:
        chat = tokenizer.chat
        manifest["chat"] = {"source": chat.source, "tokens": dict(chat.tokens), "ends": list(chat.ends)}
    write_json(path / MODEL, manifest)


def config_of(manifest: Mapping[str, Any]) -> ModelConfig:
    """The architecture. Raises ValueError or TypeError for values of another type or range than its fields have."""
    config = dict(manifest["config"])
    config["rope_scaling"] = _scaling(config.get("rope_scaling"))
    if config.get("attention_kinds") is not None:
        kinds = [{**kind, "rope_scaling": _scaling(kind["rope_scaling"])} for kind in config["attention_kinds"]]
        config["attention_kinds"] = tuple(_typed(AttentionKind, kind) for kind in kinds)
        if len(config["attention_kinds"]) != config["num_layers"]:
            raise ValueError(f"{len(kinds)} kinds of attention for {config['num_layers']} layers")
    return _typed(FAMILIES.make(str(config["architecture"])).Config, config)


def _scaling(values: Any) -> Any:
    """The scaling of rotary frequencies that has fields of these names."""
    if values is None:
        return None
    for kind in typing.get_args(Scaling):
        if {field.name for field in dataclasses.fields(kind)} == set(values):
            lists = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            return _typed(kind, lists)
    raise ValueError(f"rope_scaling is {values!r}")


def _typed(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass from JSON: every value has its field's type, and every number is positive and finite."""
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        allowed = tuple(typing.get_origin(a) or a for a in _members(hints[name]))
        if type(value) is tuple and not all(type(x) is not float or 0 < x < float("inf") for x in value):
            raise ValueError(f"{name} is {value}; its numbers are above 0 and finite")
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            raise ValueError(f"{name} is {value!r}")
        if isinstance(value, int | float) and type(value) is not bool and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; it is above 0 and finite")
    return kind(**values)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def tokenizer_of(path: pathlib.Path, manifest: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer with its chat template. Raises ArtifactError for a file that is none."""
    file = path / _TOKENIZER
    if not file.exists():
        return Tokenizer(None, missing=f"{path}: the quantised model came without a tokenizer")
    definition = read_bytes(file)
    try:
        backend = parsed(definition)
    except ValueError as error:
        raise ArtifactError(f"{file}: is not a tokenizer ({error}); run the quantisation again") from error
    chat = manifest.get("chat")
    if chat is not None:
        chat = ChatTemplate(chat["source"], str(path / MODEL), dict(chat["tokens"]), tuple(chat["ends"]))
    tokenizer, rows = Tokenizer(backend, **manifest["tokenizer"], chat=chat), manifest["config"]["vocab_size"]
    tokenizer.limit = rows if tokenizer.vocab_size > rows else None
    return tokenizer

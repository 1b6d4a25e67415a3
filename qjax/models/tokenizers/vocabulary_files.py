"""Byte-level BPE of folders without tokenizer.json: `vocab.json`, `merges.txt`, and what tokenizer_config.json adds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax.errors import ModelFileError, listed
from qjax.models.checkpoints.files import read_json
from qjax.models.tokenizers.tokenizer import Tokenizer
from qjax.models.tokenizers.vocabularies import CONTROL, byte_level

__all__ = ["read_vocabulary_files"]

_SPLITS = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}  # by tokenizer_class, with or without "Fast"
_NORMAL = 1


def read_vocabulary_files(folder: Path, special: Mapping[str, int | None]) -> Tokenizer:
    """The tokenizer of `vocab.json` (piece: id) and `merges.txt` (a pair a line), with added tokens.

    `tokenizer_class` of tokenizer_config.json says how words are split, GPT-2's where it is absent; of another class
    only what needs text is refused. `special` are BOS and EOS by id.

    Raises ModelFileError for ids that are not 0 … n − 1, and merges that do not fit the vocabulary.
    """
    table: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        table = read_json(folder / "tokenizer_config.json")
    kind = str(table.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if kind not in _SPLITS:
        missing = (
            f"{folder} has vocab.json and merges.txt of a {kind}, whose split into words is not known here (there is: "
            f"{listed(_SPLITS)}); pass token ids, or put the model's tokenizer.json into the folder"
        )
        return Tokenizer(None, missing=missing, bos_id=special.get("bos_id"), eos_id=special.get("eos_id"))
    pieces, controls = _pieces(folder / "vocab.json", table)
    types = [CONTROL if piece in controls else _NORMAL for piece in pieces]
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    metadata = {"tokenizer.ggml.merges": merges, "tokenizer.ggml.pre": _SPLITS[kind]}
    backend = byte_level(metadata, pieces, types, str(folder / "merges.txt"))
    bos_id = special.get("bos_id")
    adds_bos = bool(table.get("add_bos_token", False)) and bos_id is not None
    return Tokenizer(backend, bos_id=bos_id, eos_id=special.get("eos_id"), adds_bos=adds_bos)


def _pieces(path: Path, table: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """(pieces by id, those that stand for themselves wherever they occur)."""
    ids: dict[Any, Any] = dict(read_json(path))
    added = table.get("added_tokens_decoder", {})
    controls = set()
    for number, entry in added.items() if isinstance(added, Mapping) else ():
        content = entry.get("content") if isinstance(entry, Mapping) else None
        if not isinstance(content, str) or not str(number).isdigit() or ids.get(content, int(number)) != int(number):
            raise ModelFileError(
                f"{path.parent}: the added token {number!r} is {entry!r}, which vocab.json contradicts"
            )
        ids[content] = int(number)
        controls.add(content)
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = table.get(key)
        content = token.get("content") if isinstance(token, Mapping) else token
        if content in ids:
            controls.add(content)
    if sorted(map(str, ids.values())) != sorted(map(str, range(len(ids)))):
        raise ModelFileError(
            f"{path}: its ids are not 0 to {len(ids) - 1}, each once; take the file of the same revision"
        )
    return sorted(ids, key=lambda piece: ids[piece]), controls

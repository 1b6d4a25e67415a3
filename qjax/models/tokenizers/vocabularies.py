"""Tokenizers rebuilt from bare vocabularies: a SentencePiece-like list of pieces, or GGUF metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qjax.errors import ModelFileError, listed
from qjax.models.tokenizers.tokenizer import Tokenizer

__all__ = ["CONTROL", "byte_level", "gguf_tokenizer", "read_piece_list", "sentencepiece_bpe"]

_SPACE = "\u2581"  # SentencePiece writes a space as this character
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How many digits stay together is all that tells the Llama 3 split from the Qwen 2 one.
_SPLITS = {
    digits: Regex(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|{_REST}")
    for digits in ("{1,3}", "")
}
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_GPT2_NAMES = ("default", "gpt-2", "olmo", "mpt")
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")
_LLAMA3_LIKE = ("smaug-bpe", "dbrx")  # the split of Llama 3 alone
PRE_TOKENIZERS = (*_GPT2_NAMES, "smollm", *_LLAMA3_NAMES, *_LLAMA3_LIKE, *_QWEN2_NAMES)
"""The names of splits into words that GGUF files give, as llama.cpp knows them, of those that are known here."""
_UNKNOWN, CONTROL, _USER, _UNUSED = 2, 3, 4, 5  # token types of GGUF


def _merges(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of pieces whose concatenation is a piece, best score first: the order in which SentencePiece merges."""
    found = [
        (-scores[index], index, len(piece[:cut]), (piece[:cut], piece[cut:]))
        for piece, index in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [pair for *_, pair in sorted(found)]


def sentencepiece_bpe(
    pieces: Sequence[str], scores: Sequence[float], *, special: Iterable[int], unknown: int, prefix_space: bool = True
) -> tokenizers.Tokenizer:
    """BPE where every pair that makes a piece may merge, best score first, and bytes stand for what no piece covers.

    Source: T. Kudo, J. Richardson, "SentencePiece" (2018), section 3.1 (BPE model), with its byte fallback.
    """
    escaped = [piece.replace(" ", _SPACE) for piece in pieces]
    if len(set(escaped)) != len(escaped):
        raise ModelFileError("the vocabulary has a piece twice")
    control = set(special)
    is_byte = [len(p) == 6 and p.startswith("<0x") and p.endswith(">") for p in escaped]
    vocabulary = {piece: index for index, piece in enumerate(escaped)}
    ordinary = {p: i for p, i in vocabulary.items() if i not in control and not is_byte[i]}
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(ordinary, scores),
        unk_token=escaped[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix_space else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens([AddedToken(escaped[i], special=True, normalized=False) for i in sorted(control)])
    return backend


def read_piece_list(path: Path, special: Mapping[str, int | None]) -> Tokenizer:
    """The tokenizer of a `vocab.json` that is a list of pieces by id: `<unk>`, BOS, EOS, 256 bytes, merges by rank.

    Raises ModelFileError for a list of another kind.
    """
    try:
        pieces = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFileError(f"cannot read the vocabulary {path}: {error}") from error
    usable = isinstance(pieces, list) and all(isinstance(piece, str) for piece in pieces)
    if not usable or len(pieces) < 259 or pieces[3] != "<0x00>" or pieces[258] != "<0xFF>":
        raise ModelFileError(
            f"{path} is not a list of SentencePiece pieces (three special ones, then the 256 bytes); "
            "put the model's tokenizer.json into the folder"
        )
    scores = [-float(index) for index in range(len(pieces))]
    backend = sentencepiece_bpe(pieces, scores, special=(0, 1, 2), unknown=0)
    bos_id, eos_id = special.get("bos_id"), special.get("eos_id")
    return Tokenizer(backend, bos_id=bos_id, eos_id=eos_id, adds_bos=bos_id is not None)


def _split(name: str) -> tuple[pre_tokenizers.PreTokenizer, bool]:
    """(pre-tokenizer, whether whole words of the vocabulary skip the merges) of a GGUF pre-tokenizer's name."""
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name in _GPT2_NAMES:
        return own, False
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own]), False
    digits = "" if name in _QWEN2_NAMES else "{1,3}"
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(_SPLITS[digits], "isolated"), plain])
    return split, name in _LLAMA3_NAMES


def byte_level(metadata: Mapping[str, Any], pieces: list[str], types: list[int], where: str) -> tokenizers.Tokenizer:
    """Byte-level BPE from the entries of a GGUF file: `tokenizer.ggml.merges` and the name of the split, `.pre`.

    Raises ModelFileError for merges that are no pairs or make no piece.
    """
    raw = metadata.get("tokenizer.ggml.merges", [])
    # A piece is never empty, so the separating space is searched from the second character on.
    cuts = [merge.find(" ", 1) if isinstance(merge, str) else -1 for merge in raw]
    if not cuts or min(cuts) < 1:
        raise ModelFileError(f"{where}: tokenizer.ggml.merges is missing or holds an entry that is not a pair")
    merges = [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(raw, cuts, strict=True)]
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    splitter, ignore_merges = _split(pre)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)
    except Exception as error:  # the package raises plain Exception for a merge outside the vocabulary
        raise ModelFileError(f"{where}: its merges do not fit its vocabulary: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    if pre in _QWEN2_NAMES:
        backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(
        [AddedToken(p, special=True, normalized=False) for p, t in zip(pieces, types, strict=True) if t == CONTROL]
    )
    backend.add_tokens(
        [AddedToken(p, special=False, normalized=False) for p, t in zip(pieces, types, strict=True) if t == _USER]
    )
    return backend


def _column(metadata: Mapping[str, Any], key: str, default: float, count: int, where: str) -> list[Any]:
    """One number per token from `tokenizer.ggml.<key>`."""
    values = np.asarray(metadata.get(f"tokenizer.ggml.{key}", [default] * count))
    if values.shape != (count,) or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ModelFileError(f"{where}: tokenizer.ggml.{key} must hold {count} numbers, one per token")
    return values.tolist()


def _token_id(metadata: Mapping[str, Any], key: str, count: int, where: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count):
        raise ModelFileError(f"{where}: tokenizer.ggml.{key} is {value!r}; an id below {count} is expected")
    return value


def gguf_tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

    Raises ModelFileError for another model, an unknown pre-tokenizer, or lists of different lengths.
    """
    kind, pieces = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces) or not pieces:
        return Tokenizer(None, missing=f"{where} has no tokenizer in its metadata; pass token ids")
    types = _column(metadata, "token_type", 1, len(pieces), where)
    scores = _column(metadata, "scores", 0.0, len(pieces), where)
    if len(set(pieces)) != len(pieces):
        raise ModelFileError(f"{where}: tokenizer.ggml.tokens has a piece twice")
    if kind == "gpt2":
        pre = str(metadata.get("tokenizer.ggml.pre", "default"))
        if pre not in PRE_TOKENIZERS:
            return Tokenizer(
                None,
                missing=f"{where}: the pre-tokenizer {pre!r} is not known, so text cannot be encoded; there is: "
                f"{listed(PRE_TOKENIZERS)}. Pass token ids, or take the original model's folder",
                bos_id=_token_id(metadata, "bos_token_id", len(pieces), where),
                eos_id=_token_id(metadata, "eos_token_id", len(pieces), where),
            )
        backend = byte_level(metadata, pieces, types, where)
    elif kind == "llama":
        control = [index for index, t in enumerate(types) if t in (_UNKNOWN, CONTROL, _UNUSED)]
        unknown = _token_id(metadata, "unknown_token_id", len(pieces), where) or 0
        prefix_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend = sentencepiece_bpe(pieces, scores, special=control, unknown=unknown, prefix_space=prefix_space)
        own = [p for p, t in zip(pieces, types, strict=True) if t == _USER]
        backend.add_tokens([AddedToken(p, normalized=False) for p in own if " " not in p])
        if not prefix_space:  # runs of spaces are pieces under their escaped name, in the text as it is after escaping
            backend.add_tokens([AddedToken(p.replace(" ", _SPACE), normalized=True) for p in own if " " in p])
    else:
        raise ModelFileError(f"{where}: the tokenizer model {kind!r} is not supported; there is: gpt2, llama")
    bos_id, eos_id = (_token_id(metadata, key, len(pieces), where) for key in ("bos_token_id", "eos_token_id"))
    wants_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", wants_bos)) and bos_id is not None
    return Tokenizer(backend, bos_id=bos_id, eos_id=eos_id, adds_bos=adds_bos)

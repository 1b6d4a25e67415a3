"""English that every Python installation carries, as token streams: the documentation topics and library docstrings."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qjax.data import SOURCES
from qjax.errors import DataError, InputError

__all__ = ["END_OF_TEXT", "END_OF_TEXT_ID", "TrainingText", "docstrings", "documentation", "train_tokenizer", "windows"]

END_OF_TEXT = "<|endoftext|>"  # begins every document, ends a generation
END_OF_TEXT_ID = 0

# Tests and vendored installers differ between distributions; the encodings hold one sentence many times over.
_EXCLUDED = {"__pycache__", "config", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data"}
_EXCLUDED |= {"site-packages", "test", "tests", "turtledemo"}
_SHORTEST_DOCSTRING = 40  # characters; shorter ones are labels rather than sentences


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """Documents to learn from and the text that is only ever evaluated on."""

    documents: tuple[str, ...]
    held_out: str

    @property
    def sha256(self) -> str:
        """Of the training documents, each ended by a zero byte."""
        return hashlib.sha256("".join(text + "\0" for text in self.documents).encode()).hexdigest()

    @property
    def held_out_sha256(self) -> str:
        """Of the held-out text in UTF-8."""
        return hashlib.sha256(self.held_out.encode()).hexdigest()

    def stream(self, tokenizer: Tokenizer) -> Int[np.ndarray, " tokens"]:
        """All documents in order, each after one END_OF_TEXT."""
        ids = [[END_OF_TEXT_ID, *encoding.ids] for encoding in tokenizer.encode_batch(list(self.documents))]
        return np.concatenate([np.array(document, np.int32) for document in ids])


def documentation() -> tuple[str, str]:
    """`(training, held out)`: the first 85% and the last 15% of the topics, as the data source "pydoc" divides them."""
    corpus = SOURCES.make("pydoc")
    return corpus.separator.join(corpus.calibration), corpus.separator.join(corpus.evaluation)


def docstrings(root: Path | None = None) -> list[str]:
    """One document per module under `root` (the standard library): its docstrings, each text taken once.

    Files are visited in sorted order and docstrings in source order. Raises DataError where `root` has no docstring.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    seen: set[str] = set()
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if any(part in _EXCLUDED or part.startswith("config-") for part in parts):
            continue
        candidates = [text for text in _docstrings_of(path) if len(text) >= _SHORTEST_DOCSTRING]
        fresh = [text for text in dict.fromkeys(candidates) if text not in seen]
        seen.update(fresh)
        if fresh:
            documents.append("\n\n".join(fresh))
    if not documents:
        raise DataError(
            f"no Python source with docstrings under {root}; set text.docstrings=false to train without them"
        )
    return documents


def _docstrings_of(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates that carry the suffix .py
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` entries: END_OF_TEXT, the 256 bytes, then merges by frequency.

    Raises InputError for a vocabulary without room for the bytes, DataError for a text with too few merges.
    """
    if vocabulary < 257:
        raise InputError(f"vocabulary is {vocabulary}; a byte-level vocabulary has at least 257 entries")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocabulary:
        raise DataError(f"the text supports only {found} of {vocabulary} vocabulary entries; lower model.vocab_size")
    return tokenizer


def windows(tokens: Int[np.ndarray, " tokens"], context: int) -> Int[np.ndarray, "windows context_plus_1"]:
    """Consecutive windows of `context + 1` tokens that overlap by one: every token but the first is predicted once.

    The incomplete last window is dropped. Raises DataError when there is no complete one.
    """
    count = (len(tokens) - 1) // context
    if count < 1:
        raise DataError(f"{len(tokens)} tokens do not fill one window of {context} + 1; use a shorter context")
    starts = np.arange(count)[:, None] * context
    return tokens[starts + np.arange(context + 1)[None, :]].astype(np.int32)

"""Inputs that the jobs of one process share: the model that was last read, and the last split of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from qjax import data, models

__all__ = ["Inputs"]


@dataclasses.dataclass
class Inputs:
    """Keeps one model and one token split; another model lets go of the one before it is read.

    A model counts as the same while its source, its dtype and the size and time of its weight files are.
    """

    _model: tuple[Hashable, models.Model] | None = None
    _files: tuple[Hashable, models.ModelFiles] | None = None
    _hashes: tuple[Hashable, dict[str, str]] | None = None
    _tokens: tuple[Hashable, data.TokenSplit] | None = None

    def files(self, source: str) -> models.ModelFiles:
        """The model's checked headers."""
        if self._files is None or self._files[0] != (source, _stamp(self._files[1])):
            files = models.open_model(source)
            self._files = ((source, _stamp(files)), files)
        return self._files[1]

    def fingerprint(self, source: str, dtype: str) -> dict[str, str]:
        """The hashes of the model's files."""
        files = self.files(source)
        key = (source, dtype, _stamp(files))
        if self._hashes is None or self._hashes[0] != key:
            self._hashes = (key, files.fingerprint(dtype))
        return self._hashes[1]

    def model(self, source: str, dtype: str) -> models.Model:
        """The model in memory."""
        key = (source, dtype, _stamp(self.files(source)))
        if self._model is None or self._model[0] != key:
            self._model = None
            self._model = (key, models.load(source, dtype, self.fingerprint(source, dtype)))
        return self._model[1]

    def read(self, source: str, dtype: str, *, streamed: bool) -> models.Model:
        """The model in memory, or `streamed` with its blocks on disk; nothing of that is kept here."""
        return models.stream(source, dtype, self.fingerprint(source, dtype)) if streamed else self.model(source, dtype)

    def tokens(self, source: str, seed: int, options: Mapping[str, Any]) -> data.TokenSplit:
        """The calibration and evaluation windows."""
        files = self.files(source)
        key = (source, _stamp(files), seed, repr(sorted(options.items())))
        if self._tokens is None or self._tokens[0] != key:
            self._tokens = None
            split = data.load(tokenizer=files.tokenizer, vocab_size=files.config.vocab_size, seed=seed, **options)
            self._tokens = (key, split)
        return self._tokens[1]


def _stamp(files: models.ModelFiles) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the weight files."""
    stats = [(path, path.stat()) for path in map(Path, files.weights.files)]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)

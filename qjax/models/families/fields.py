"""Typed access to `config.json`, with errors that name the file and the key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.errors import ModelFileError, listed

__all__ = ["Fields"]


class Fields:
    """A JSON object and where it stands. A key whose value is null counts as absent.

    Every method raises ModelFileError for a value of another kind, and for an absent key without a default.
    """

    def __init__(self, table: Mapping[str, Any], where: str):
        self.table, self.where = table, where

    def _value(self, key: str, default: Any) -> Any:
        value = self.table.get(key)
        if value is None:
            if default is None:
                raise ModelFileError(f"{self.where} has no {key}; take config.json and weights from the same revision")
            return default
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelFileError(f"{self.where}: {key} is {value!r}; an integer of at least 1 is expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ModelFileError(f"{self.where}: {key} is {value!r}; a positive number is expected")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ModelFileError(f"{self.where}: {key} is {value!r}; true or false is expected")
        return value

    def choice(self, key: str, allowed: Sequence[str], default: str) -> str:
        """One of the allowed strings."""
        value = self._value(key, default)
        if value not in allowed:
            kind = "is" if len(allowed) == 1 else "are"
            raise ModelFileError(f"{self.where}: {key} {value!r} is not supported; supported {kind} {listed(allowed)}")
        return value

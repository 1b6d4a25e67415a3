"""Errors a user can act on: each message names the thing, what was found, what is allowed and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "DataError",
    "InputError",
    "ModelFileError",
    "NumericsError",
    "QjaxError",
    "RunError",
    "listed",
    "missing_extra",
    "nearest_name",
    "suggested",
]


class QjaxError(Exception):
    """Base of every error that qjax raises on purpose; entry points print it without a traceback and exit with 2."""


class InputError(QjaxError, ValueError):
    """An argument or option is outside what is allowed."""


class ModelFileError(QjaxError):
    """A model file is missing, damaged, refused or disagrees with its configuration."""


class DataError(QjaxError):
    """A text or token stream cannot serve as calibration or evaluation data."""


class NumericsError(QjaxError):
    """A factorisation or an estimate is not usable (not positive definite, not finite)."""


class RunError(QjaxError):
    """A run directory cannot be used: locked, of another configuration, or not writable."""


class ArtifactError(QjaxError):
    """A stored artifact is damaged, incomplete or of another format version."""


def listed(names: Iterable[object]) -> str:
    """`a, b, c` for a message, in a stable order."""
    return ", ".join(sorted(str(name) for name in names)) or "none"


def missing_extra(extra: str, package: str) -> str:
    """`needs polars: pip install …`, for a message about a package that an extra of `pyproject.toml` brings.

    By the clone's path: the registry's distribution of the name qjax is another project's.
    """
    return f"needs {package}: pip install -e '.[{extra}]' in a clone of qjax"


def suggested(found: object, names: Iterable[str]) -> str:
    """` (did you mean 'ldlq'?)` for a message, the name nearest to what was found; empty where none is near."""
    near = nearest_name(found, names)
    return "" if near is None else f" (did you mean {near!r}?)"


def nearest_name(found: object, names: Iterable[object]) -> str | None:
    """The name that is spelt most like what was found; None where none is near."""
    return next(iter(difflib.get_close_matches(str(found), [str(name) for name in names], n=1)), None)

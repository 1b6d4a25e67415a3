"""Arguments that must be a model, checked where a user hands them over."""

from __future__ import annotations

from typing import Any

from qjax.errors import InputError
from qjax.models.loading import Model
from qjax.typing import brief

__all__ = ["checked_batch", "checked_model"]


def checked_model(value: Any, what: str = "model") -> Model:
    """`value`, which is a model. Raises InputError for a name, a path or anything else."""
    if not isinstance(value, Model):
        raise InputError(
            f"{what} is {brief(value)} ({type(value).__name__}); give a model of qjax.load or qjax.quantize_model"
        )
    return value


def checked_batch(value: Any) -> int:
    """`value`, the number of sequences per step. Raises InputError unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"batch is {brief(value)}; it is the number of sequences per step, at least 1")
    return value

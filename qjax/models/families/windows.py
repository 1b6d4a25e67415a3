"""Sliding windows as configurations state them."""

from __future__ import annotations

from qjax.errors import ModelFileError
from qjax.models.families.fields import Fields

__all__ = ["window_of_layers"]


def window_of_layers(fields: Fields, window: int, *, full: int, layers: int) -> int | None:
    """`window` where all layers have it, None where none has.

    `layer_types` says which have it; where it is absent, all but the first `full` layers do. Raises ModelFileError for
    layers with and without a window in one model.
    """
    kinds = fields.table.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        raise ModelFileError(f"{fields.where}: layers with and without a sliding window in one model are not supported")
    return window

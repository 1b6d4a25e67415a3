"""Sliding windows as configurations state them."""

from __future__ import annotations

from qjax.errors import ModelFileError
from qjax.models.families.fields import Fields

__all__ = ["layer_types", "windows_of_layers"]

_TYPES = ("full_attention", "sliding_attention")


def layer_types(fields: Fields, layers: int, default: list[str]) -> list[str]:
    """`layer_types`, or `default` where it is absent. Raises ModelFileError for other types or another number."""
    found = fields.table.get("layer_types")
    if found is None:
        return default
    if not isinstance(found, list) or len(found) != layers or not set(map(str, found)) <= set(_TYPES):
        raise ModelFileError(
            f"{fields.where}: layer_types is {found!r}; a list of {layers} is expected, of {' and '.join(_TYPES)}"
        )
    return found


def windows_of_layers(fields: Fields, window: int, *, full: int, layers: int) -> list[int | None]:
    """`window` for the layers that have it: by `layer_types`, or where it is absent all but the first `full`.

    One value stands for all layers where they are alike.
    """
    if fields.table.get("layer_types") is None and not 0 < full < layers:
        return [window if full <= 0 else None]
    default = [_TYPES[index >= full] for index in range(layers)]
    return [window if kind == "sliding_attention" else None for kind in layer_types(fields, layers, default)]

"""`config.json` of a Hugging Face model to a configuration: what is not supported is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qjax.errors import ModelFileError
from qjax.models.config import ModelConfig
from qjax.models.families import FAMILIES, Fields

__all__ = ["parse_config"]


def _supported() -> str:
    return ", ".join(known().title for known in FAMILIES.values())


def _architecture(table: Mapping[str, Any], where: str) -> str:
    named = table.get("architectures")
    if isinstance(named, list) and len(named) == 1:
        architecture = str(named[0])
    else:
        by_type = {known().model_type: name for name, known in FAMILIES.items()}
        architecture = by_type.get(str(table.get("model_type")), str(named or table.get("model_type")))
    if architecture not in FAMILIES:
        raise ModelFileError(f"{where}: the architecture {architecture} is not supported; supported are {_supported()}")
    return architecture


def parse_config(table: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model's static description from the contents of `config.json`.

    Raises ModelFileError for an unknown architecture, an option that the forward pass does
    not have (activation, rope type, partial rotation, mixed windows), or numbers that contradict each other.
    """
    architecture = _architecture(table, where)
    return FAMILIES.make(architecture).config(Fields(table, where), architecture)

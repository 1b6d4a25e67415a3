"""JSON objects that carry the SHA-256 of their own content, so that a flipped bit which is still JSON is found."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from qjax.errors import ArtifactError
from qjax.runtime.atomic import read_json, write_json
from qjax.runtime.fingerprint import digest

__all__ = ["SEAL", "read_sealed", "write_sealed"]

SEAL = "sha256"


def write_sealed(path: str | os.PathLike[str], value: Mapping[str, Any]) -> dict[str, Any]:
    """Write `value` durably with the entry `sha256` over all others; returns what was written."""
    content = {key: entry for key, entry in value.items() if key != SEAL}
    sealed = {**content, SEAL: digest(content)}
    write_json(path, sealed)
    return sealed


def read_sealed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object of `write_sealed`, seal included; one written without a seal is taken as it is.

    Raises ArtifactError when it is missing, no JSON object, or does not match its seal.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        found = type(value).__name__
        raise ArtifactError(f"{path}: {pathlib.Path(path).name} holds {found}, not an object; make it again")
    if SEAL in value and digest({key: entry for key, entry in value.items() if key != SEAL}) != value[SEAL]:
        raise ArtifactError(f"{path}: damaged: it does not match its own SHA-256; remove it and make it again")
    return value

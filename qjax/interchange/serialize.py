"""Operators as named arrays and a description in JSON, and back: the one form of records and artifacts."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import qjax
from qjax import codebooks
from qjax.errors import ArtifactError, InputError
from qjax.interchange.serialize_1 import VERSIONS, upgraded
from qjax.matrix.operator import LinearOperator, codebooks_of, leaves, make

__all__ = ["FORMAT_VERSION", "described", "from_arrays", "operator_of", "to_arrays"]

FORMAT_VERSION = 3
_DESCRIPTION = "spec"  # the entry of a file's metadata


def _tables(operator: LinearOperator) -> set[str]:
    """Names of the leaves that are tables of a codebook."""
    return {f"{place}.{name}" for place, book in codebooks_of(operator).items() for name in leaves(book)}


def _fixed_tables(operator: LinearOperator) -> set[str]:
    """Those of them that follow from their codebook's description: tuning has not changed them."""
    found = set()
    for place, book in codebooks_of(operator).items():
        own = leaves(book)
        original = leaves(codebooks.make(**book.spec())) if own else {}
        equal = lambda name: np.array_equal(np.asarray(own[name]), np.asarray(original[name]))  # noqa: B023, E731
        found |= {f"{place}.{name}" for name in own if equal(name)}
    return found


def to_arrays(operator: LinearOperator) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(host arrays by leaf path, description as JSON values) of an operator."""
    fixed = _fixed_tables(operator)
    arrays = {name: np.asarray(leaf) for name, leaf in leaves(operator).items() if name not in fixed}
    description = {
        "format": FORMAT_VERSION,
        "version": qjax.__version__,
        "operator": operator.spec(),
        "leaves": {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()},
    }
    return arrays, description


def from_arrays(arrays: Mapping[str, Any], description: Mapping[str, Any], where: str | pathlib.Path) -> LinearOperator:
    """The operator of `to_arrays`, on the default device. `where` names the record in messages.

    Raises ArtifactError for another format version, an operator of an unknown kind or one that this qjax cannot build,
    or leaves that are missing, surplus or of another dtype or shape.
    """
    version = description.get("format")
    if version not in (*VERSIONS, FORMAT_VERSION):
        raise ArtifactError(
            f"{where}: format version {version!r}; this qjax reads "
            f"{', '.join(map(str, (*VERSIONS, FORMAT_VERSION)))}: quantise again or use the matching release"
        )
    _check_leaves(arrays, description["leaves"], where)
    writer = description.get("version", "0.1.0")
    try:
        spec = description["operator"] if version == FORMAT_VERSION else upgraded(description)
        operator = make(spec, jax.device_put(dict(arrays)))
    except InputError as error:
        raise ArtifactError(
            f"{where}: was written by qjax {writer}, and this qjax ({qjax.__version__}) does not have what it needs, "
            f"or it is damaged: {error}; use the release that wrote it, or import the module that registers it"
        ) from error
    own = set(leaves(operator))
    if other := (set(arrays) - own) | (own - set(arrays) - _tables(operator)):
        raise ArtifactError(f"{where}: {sorted(other)[:4]} are missing or surplus; the record is damaged")
    return operator


def described(operator: LinearOperator) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of the safetensors file that holds an operator; a record has more metadata besides."""
    arrays, description = to_arrays(operator)
    return arrays, {_DESCRIPTION: json.dumps(description, sort_keys=True)}


def operator_of(arrays: Mapping[str, Any], metadata: Mapping[str, str], where: str | pathlib.Path) -> LinearOperator:
    """The operator of a file of `described` arrays. Raises ArtifactError as `from_arrays`."""
    return from_arrays(arrays, json.loads(metadata[_DESCRIPTION]), where)


def _check_leaves(arrays: Mapping[str, Any], expected: Mapping[str, Any], where: str | pathlib.Path) -> None:
    if set(arrays) != set(expected):
        raise ArtifactError(
            f"{where}: holds the arrays {sorted(arrays)}, its description lists {sorted(expected)}; "
            "the record is damaged"
        )
    for name, (dtype, shape) in expected.items():
        found = arrays[name]
        if str(found.dtype) != dtype or list(found.shape) != shape:
            raise ArtifactError(
                f"{where}: {name} is {found.dtype}{list(found.shape)}, described as {dtype}{shape}; "
                "the record is damaged"
            )

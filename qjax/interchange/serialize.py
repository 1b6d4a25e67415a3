"""Quantised matrices as named arrays plus a JSON description, and back: the one format of records and artifacts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, cast

import jax
import numpy as np

from qjax import codebooks, incoherence
from qjax.codebooks.scaling import Scaling
from qjax.errors import ArtifactError, InputError
from qjax.matrix.quantized import QuantizedMatrix

__all__ = ["FORMAT_VERSION", "from_arrays", "to_arrays"]

FORMAT_VERSION = 1
# Of a matrix with gains or tuned tables, which a reader of version 1 would pass over in silence.
TUNED_VERSION = 2


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(str(getattr(key, "name", key)) for key in path): leaf for path, leaf in leaves}


def _named_leaves(matrix: QuantizedMatrix) -> dict[str, Any]:
    """Leaves by path; of the codebook's tables those that tuning changed, the rest follow from its description."""
    named = _by_path(matrix)
    tables = [name for name in named if name.startswith("codebook.")]
    if tables:
        original = _by_path(codebooks.make(**matrix.codebook.spec()))
        for name in tables:
            if np.array_equal(np.asarray(named[name]), np.asarray(original[name.removeprefix("codebook.")])):
                del named[name]
    return named


def _is_tuned(names: Iterable[str]) -> bool:
    return any(name.startswith("codebook.") or name.endswith("_gain") for name in names)


def to_arrays(
    matrix: QuantizedMatrix, incoherence_spec: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(host arrays by leaf path, description as JSON values) of a quantised matrix.

    `incoherence_spec` is the `spec()` of the incoherence object that sampled the matrix's transform.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in _named_leaves(matrix).items()}
    spec = {
        "format": TUNED_VERSION if _is_tuned(arrays) else FORMAT_VERSION,
        "shape": list(matrix.shape),
        "padded": list(matrix.transform.padded),
        "codebook": matrix.codebook.spec(),
        "incoherence": incoherence_spec,
        "scale_group": matrix.scaling.group,
        "leaves": {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()},
    }
    return arrays, spec


def from_arrays(arrays: dict[str, Any], spec: dict[str, Any], where: str) -> QuantizedMatrix:
    """The matrix of `to_arrays`. `where` names the record in messages.

    Raises ArtifactError for another format version, or leaves that are missing, surplus or of another dtype or shape.
    """
    if spec.get("format") not in (FORMAT_VERSION, TUNED_VERSION):
        raise ArtifactError(
            f"{where}: format version {spec.get('format')!r}; this qjax reads {FORMAT_VERSION} and {TUNED_VERSION}: "
            "quantise again or use the matching release"
        )
    expected = spec["leaves"]
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
    arrays = jax.device_put(arrays)
    try:
        codebook = codebooks.make(**spec["codebook"])
        rotation = incoherence.make(**spec["incoherence"])
    except InputError as error:
        raise ArtifactError(
            f"{where}: made with a codebook or incoherence that this qjax does not have: {error}"
        ) from error
    scaling = Scaling(
        arrays["scaling.unit"], arrays.get("scaling.relative"), arrays.get("scaling.zero"), group=spec["scale_group"]
    )
    skeleton = rotation.abstract(*spec["shape"], multiple=codebook.tile)
    structure = jax.tree_util.tree_flatten_with_path(skeleton)
    names = ["transform." + ".".join(str(getattr(k, "name", k)) for k in path) for path, _ in structure[0]]
    if any(name not in expected for name in names):
        raise ArtifactError(f"{where}: lacks {sorted(set(names) - set(expected))}; the record is damaged")
    transform = jax.tree.unflatten(structure[1], [arrays[name] for name in names])
    if list(transform.padded) != spec["padded"]:
        raise ArtifactError(
            f"{where}: was padded to {spec['padded']}, this qjax pads {spec['shape']} to {list(transform.padded)}; "
            "use the matching release"
        )
    tables = {name.removeprefix("codebook."): arrays[name] for name in arrays if name.startswith("codebook.")}
    if tables:
        codebook = dataclasses.replace(cast(Any, codebook), **tables)
    return QuantizedMatrix(
        arrays["packed"],
        scaling,
        transform,
        codebook,
        arrays.get("permutation"),
        arrays.get("output_gain"),
        arrays.get("input_gain"),
    )

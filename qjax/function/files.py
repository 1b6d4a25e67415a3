"""Parameters of a traced function in a folder: one file per operator, one of all dense leaves, and what they fit.

folder/
function.json      linears (name, stack, shape), leaves (name, dtype, shape), files: checked against the trace
dense.safetensors  leaves that are arrays
operators/*.safetensors
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qjax.errors import ArtifactError, InputError
from qjax.function.sites import LinearSite
from qjax.interchange.serialize import described, operator_of
from qjax.runtime.atomic import read_json

__all__ = ["read", "write"]

FORMAT = "qjax-function-1"
_MANIFEST, _DENSE, _OPERATORS = "function.json", "dense.safetensors", "operators"


def structure(sites: Mapping[str, LinearSite], names: Sequence[str], leaves: Sequence[Any]) -> dict[str, Any]:
    """What parameters must fit, as JSON values."""
    return {
        "linears": {name: [*site.stack, *site.shape] for name, site in sites.items()},
        "leaves": {name: [str(leaf.dtype), list(np.shape(leaf))] for name, leaf in zip(names, leaves, strict=True)},
    }


def write(
    folder: str | pathlib.Path, fits: Mapping[str, Any], operators: Mapping[str, Any], dense: Mapping[str, Any]
) -> None:
    """Write operators by linear and dense leaves by name. Raises InputError for a folder with something else in it."""
    folder = pathlib.Path(folder)
    if folder.is_file() or (folder.exists() and any(folder.iterdir()) and not (folder / _MANIFEST).is_file()):
        raise InputError(f"{folder} is there and holds something else; give the path of a new folder")
    (folder / _OPERATORS).mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)  # written last: without it the folder holds nothing
    files = {name: f"{_OPERATORS}/{number:05d}.safetensors" for number, name in enumerate(operators)}
    for name, operator in operators.items():
        arrays, metadata = described(operator)
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / files[name], metadata)
    save_file({k: np.ascontiguousarray(jax.device_get(v)) for k, v in dense.items()}, folder / _DENSE)
    text = json.dumps({"format": FORMAT, **fits, "operators": files}, indent=1)
    (folder / _MANIFEST).write_text(text + "\n")


def read(folder: str | pathlib.Path, fits: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(operators by linear, dense leaves by name).

    Raises ArtifactError for a folder that is none, is damaged, or is of a function with other linears or parameters.
    """
    folder = pathlib.Path(folder)
    if not (folder / _MANIFEST).is_file():
        raise ArtifactError(f"{folder} holds no parameters of a traced function: there is no {_MANIFEST}")
    manifest = read_json(folder / _MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{folder}: format {manifest.get('format')!r}; this qjax reads {FORMAT}")
    for part in ("linears", "leaves"):
        stored, here = manifest[part], fits[part]
        for name in sorted({*stored, *here}):
            if stored.get(name) != here.get(name):
                raise ArtifactError(
                    f"{folder} was written for another function: {name} is {stored.get(name, 'absent')} there and "
                    f"{here.get(name, 'absent')} in the function that was traced"
                )
    operators = {}
    for name, file in manifest["operators"].items():
        try:
            arrays = load_file(folder / file)
            with safe_open(folder / file, "np") as opened:
                metadata = opened.metadata()
        except Exception as error:
            raise ArtifactError(f"{folder / file} cannot be read ({error}); save the parameters again") from error
        operators[name] = operator_of(arrays, metadata, folder / file)
    return operators, load_file(folder / _DENSE)

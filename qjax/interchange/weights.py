"""The weights of an artifact: a safetensors file per operator, its record where there is one, and one per block else.

weights/layers.0.mlp.up_proj.safetensors   an operator as `qjax.interchange.serialize` writes it
weights/block.0.safetensors                the dense leaves of a block by path: norms, biases, linears left as are
weights/edges.safetensors                  those outside of the blocks; both in the smallest form that holds them
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from qjax.errors import ArtifactError
from qjax.interchange.narrow import narrowest
from qjax.interchange.serialize import described
from qjax.matrix.operator import LinearOperator, is_operator, place_name
from qjax.runtime.atomic import read_safetensors, verified_metadata, write_safetensors
from qjax.runtime.durable import link_or_copy, sync

__all__ = ["Stored", "hashes", "named_leaves", "read", "reports", "sha256_of", "write"]

Stored = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Host arrays by leaf path, `path#part` for those of an operator, and the description of every operator by its path."""


def sha256_of(array: np.ndarray) -> str:
    """SHA-256 of the bytes of an array, row-major."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _parts(params: Any) -> Iterator[tuple[str, str, Any]]:
    """(file of dense leaves, what their paths begin with, tree) of every block as it comes, and of what is outside."""
    for index, block in enumerate(params["blocks"]):
        yield f"block.{index}", f"blocks/{index}/", block
    yield "edges", "", {name: value for name, value in params.items() if name != "blocks"}


def _leaves_of(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_operator)
    return ((prefix + place_name(path, "/"), leaf) for path, leaf in flat)


def named_leaves(params: Any) -> Iterator[tuple[str, Any]]:
    """Dense leaves and operators by path, one block after the other: the blocks may be read as they come."""
    for _, prefix, tree in _parts(params):
        yield from _leaves_of(tree, prefix)


def _file_of(path: str) -> str:
    """The name of an operator's file, which is its layer's: `layers.0.mlp.up_proj` of `blocks/0/mlp/up_proj/weight`."""
    if path == "embed/tokens":  # the table of an embedding that has other parts: its name is that of the embedding
        return "embed"
    return path.replace("blocks/", "layers/", 1).removesuffix("/weight").replace("/", ".")


def hashes(params: Any) -> dict[str, str]:
    """The SHA-256 of every array by its name in `Stored`, as `write` finds them."""
    found: dict[str, str] = {}
    for path, leaf in named_leaves(params):
        own = described(leaf)[0] if is_operator(leaf) else None
        found |= {path: sha256_of(np.asarray(leaf))} if own is None else _hashes(path, own)
    return found


def _hashes(path: str, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {f"{path}#{part}": sha256_of(array) for part, array in arrays.items()}


def write(
    folder: pathlib.Path, params: Any, records: pathlib.Path | None, reports: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The files of all leaves; (paths of the operators, SHA-256 of every array by its name in `Stored`, dtypes).

    Dense leaves lie there in the smallest form that holds their values (`qjax.interchange.narrow`): the hashes are of
    what they are in memory, and `dtypes` has the type of those that another holds.

    An operator that has its record in the folder `records`, the same to the byte, gets that file itself; into the
    others goes what `reports` has under its layer's name.
    `params["blocks"]` is iterated once, and no more than the dense leaves of a block are held at a time.
    """
    folder.mkdir()
    operators: list[str] = []
    found: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    for file, prefix, tree in _parts(params):
        dense: dict[str, np.ndarray] = {}
        for path, leaf in _leaves_of(tree, prefix):
            if is_operator(leaf):
                report = (reports or {}).get(_file_of(path))
                arrays = _write_operator(folder, _file_of(path), leaf, records, report)
                operators.append(path)
                found |= _hashes(path, arrays)
            else:
                own = np.asarray(leaf)
                parts, found[path] = narrowest(own), sha256_of(own)
                dense |= {path + end: part for end, part in parts.items()}
                if any(part.dtype != own.dtype for part in parts.values()):
                    dtypes[path] = str(own.dtype)
        if dense:
            write_safetensors(folder / f"{file}.safetensors", dense)
    sync(folder)
    return operators, found, dtypes


def _write_operator(
    folder: pathlib.Path, file: str, operator: LinearOperator, records: pathlib.Path | None, report: str | None
) -> dict[str, np.ndarray]:
    arrays, metadata = described(operator)
    target = folder / f"{file}.safetensors"
    if records is not None and _holds(records / target.name, arrays, metadata):
        link_or_copy(records / target.name, target)
    else:
        write_safetensors(target, arrays, metadata if report is None else {**metadata, "report": report})
    return arrays


def _holds(record: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bool:
    """Whether an undamaged file has these arrays to the byte, and this metadata among its own."""
    if not record.exists():
        return False
    try:
        found, about = read_safetensors(record)
    except ArtifactError:
        return False
    return (
        metadata.items() <= about.items()
        and arrays.keys() == found.keys()
        and all(array.tobytes() == found[name].tobytes() for name, array in arrays.items())
    )


def reports(folder: pathlib.Path, operators: Iterable[str]) -> list[str]:
    """The reports that the files of these operators hold, in their order."""
    files = (folder / f"{_file_of(path)}.safetensors" for path in operators)
    found = (verified_metadata(file).get("report") for file in files if file.exists())
    return [report for report in found if report is not None]


def read(folder: pathlib.Path, operators: Iterable[str]) -> Stored:
    """The arrays and descriptions that `write` wrote; `operators` are the paths of those.

    The bytes of the files must have been verified. Raises ArtifactError for files that are not safetensors, KeyError,
    TypeError or ValueError for what does not describe an operator.
    """
    places = {f"{_file_of(path)}.safetensors": path for path in operators}
    arrays: dict[str, np.ndarray] = {}
    descriptions: dict[str, Any] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        found, metadata = read_safetensors(file, verify=False)
        if file.name in places:
            place = places[file.name]
            descriptions[place] = json.loads(metadata["spec"])
            arrays |= {f"{place}#{part}": array for part, array in found.items()}
        else:
            arrays |= found
    return arrays, descriptions

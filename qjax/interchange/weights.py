"""The weights of an artifact: a safetensors file per operator, its record where there is one, and one per block else.

weights/layers.0.mlp.up_proj.safetensors   an operator as `qjax.interchange.serialize` writes it
weights/block.0.safetensors                the dense leaves of a block by path: norms, biases, linears left as are
weights/edges.safetensors                  those outside of the blocks
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
from qjax.interchange.serialize import described
from qjax.matrix.operator import LinearOperator, is_operator, place_name
from qjax.runtime.atomic import read_safetensors, write_safetensors
from qjax.runtime.durable import link_or_copy, sync

__all__ = ["Stored", "named_leaves", "read", "sha256_of", "write"]

Stored = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Host arrays by leaf path, `path#part` for those of an operator, and the description of every operator by its path."""


def sha256_of(array: np.ndarray) -> str:
    """SHA-256 of the bytes of an array, row-major."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def named_leaves(params: Any) -> Iterator[tuple[str, str, Any]]:
    """(file, path, leaf) of all dense leaves and operators, one block after the other: they may be read as they come.

    The file is the one that the leaf belongs to by itself: of an operator its own, else its block's.
    """
    for index, block in enumerate(params["blocks"]):
        yield from _leaves_of(block, f"blocks/{index}/", f"block.{index}")
    yield from _leaves_of({name: value for name, value in params.items() if name != "blocks"}, "", "edges")


def _leaves_of(tree: Any, prefix: str, file: str) -> Iterator[tuple[str, str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_operator)
    for path, leaf in leaves:
        name = prefix + place_name(path, "/")
        yield _file_of(name) if is_operator(leaf) else file, name, leaf


def _file_of(path: str) -> str:
    """The name of an operator's file, which is its layer's: `layers.0.mlp.up_proj` of `blocks/0/mlp/up_proj/weight`."""
    return path.replace("blocks/", "layers/", 1).removesuffix("/weight").replace("/", ".")


def write(folder: pathlib.Path, params: Any, records: pathlib.Path | None) -> tuple[list[str], dict[str, str]]:
    """The files of all leaves; (the paths of the operators, the SHA-256 of every array by its name in `Stored`).

    An operator that has its record in the folder `records`, the same to the byte, gets that file itself.
    `params["blocks"]` is iterated once, and no more than the dense leaves of a block are held at a time.
    """
    folder.mkdir()
    operators: list[str] = []
    hashes: dict[str, str] = {}
    dense: dict[str, np.ndarray] = {}
    current = ""

    def finish(file: str) -> None:
        nonlocal current
        if dense and file != current:
            write_safetensors(folder / f"{current}.safetensors", dense)
            dense.clear()
        current = file

    for file, name, leaf in named_leaves(params):
        if is_operator(leaf):
            arrays = _write_operator(folder, file, leaf, records)
            operators.append(name)
            hashes |= {f"{name}#{part}": sha256_of(array) for part, array in arrays.items()}
        else:
            finish(file)
            dense[name] = np.asarray(leaf)
            hashes[name] = sha256_of(dense[name])
    finish("")
    sync(folder)
    return operators, hashes


def _write_operator(
    folder: pathlib.Path, file: str, operator: LinearOperator, records: pathlib.Path | None
) -> dict[str, np.ndarray]:
    arrays, metadata = described(operator)
    target = folder / f"{file}.safetensors"
    if records is not None and _holds(records / target.name, arrays, metadata):
        link_or_copy(records / target.name, target)
    else:
        write_safetensors(target, arrays, metadata)
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


def read(folder: pathlib.Path, operators: Iterable[str]) -> Stored:
    """What `write` wrote; `operators` are the paths of those.

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

"""The on-disk quantised model: the records of its matrices, its dense leaves, and a manifest.

    artifact/
      weights/         a safetensors file per operator, which is its run's record, and one of dense leaves per block
      model.json       architecture, format version, paths of the operators, SHA-256 of every array, dtypes in memory
      tokenizer.json   the model's tokenizer (absent when it has none)
      checksums.json   SHA-256 of every other file, and of this list itself: verified before anything is parsed

The list is written last, and the folder takes its name when it is whole. Artifacts of formats 1 and 2 are read as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import qjax
from qjax.errors import ArtifactError
from qjax.interchange import artifact_1, manifest, weights
from qjax.interchange.checksums import CHECKSUMS, seal, verify
from qjax.interchange.narrow import narrowest_bytes, widened
from qjax.interchange.serialize import from_arrays
from qjax.interchange.weights import named_leaves, sha256_of
from qjax.matrix.operator import codebooks_of, is_operator
from qjax.matrix.quantize import MatrixReport
from qjax.models.checkpoints.weights import leaf_shapes, with_kind
from qjax.models.config import ModelConfig
from qjax.models.loading import Model
from qjax.runtime.atomic import read_json
from qjax.runtime.distributed import on_primary
from qjax.runtime.durable import sync

__all__ = ["FORMAT", "fingerprint", "identity", "load", "model_bytes", "reports", "save", "seal"]

FORMAT = "qjax-artifact-3"
_BEFORE = "qjax-artifact-2"  # dense leaves as they are in memory
_WEIGHTS = "weights"


def model_bytes(params: Any) -> int:
    """Bytes of all parameters as stored: packed codes, scales, signs, dense leaves, and every codebook table once.

    Dense leaves count in the smallest form that holds them, in which artifacts store them.
    """
    total, tables = 0, {}
    for _, leaf in named_leaves(params):
        if not is_operator(leaf):
            total += narrowest_bytes(np.asarray(leaf))
            continue
        total += leaf.stored_bits // 8
        for book in codebooks_of(leaf).values():
            own = jax.tree.leaves(book)
            content = [sha256_of(np.asarray(table)) for table in own]
            size = sum(table.size * table.dtype.itemsize for table in own)
            tables[json.dumps([book.spec(), content], sort_keys=True)] = size
    return total + sum(tables.values())


def save(
    path: str | pathlib.Path,
    model: Model,
    params: Any,
    records: str | pathlib.Path | None = None,
    reports: Sequence[MatrixReport] = (),
) -> None:
    """Write `params` (dense leaves and operators) of `model`'s architecture to `path`, replacing what is there.

    `records` is the folder of the run's finished layers: an operator that is the same there becomes a hard link to its
    file, or a copy where the file system has none; the report of any other goes into its file. Written beside and
    renamed: `path` is always whole.
    `params["blocks"]` is iterated once and written as it comes, so that blocks which are read one at a time
    (`qjax.pipeline.finished`) need no more memory than one. All processes of a group call this with the same
    parameters; process 0 writes.
    """
    path = pathlib.Path(path).absolute()
    texts = {report.name: json.dumps(report.values(), sort_keys=True) for report in reports}
    on_primary(lambda: _save(path, model, params, None if records is None else pathlib.Path(records), texts))


def _save(path: pathlib.Path, model: Model, params: Any, records: pathlib.Path | None, reports: dict[str, str]) -> None:
    scratch, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    for leftover in (scratch, old):  # of a process that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    operators, hashes, dtypes = weights.write(scratch / _WEIGHTS, params, records, reports)
    about = {"format": FORMAT, "version": qjax.__version__, "operators": operators, "sha256": hashes}
    about["dtypes"] = dtypes
    manifest.write(scratch, model, about)
    seal(scratch)
    if path.exists():
        os.replace(path, old)
    os.replace(scratch, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def fingerprint(path: str | pathlib.Path) -> dict[str, str]:
    """The hash of all arrays of an artifact that was just saved, as `load` gives it, from its manifest alone."""
    return _fingerprint(read_json(pathlib.Path(path) / manifest.MODEL))


def identity(params: Any) -> dict[str, str]:
    """The fingerprint that an artifact of these parameters will have."""
    return _fingerprint({"sha256": weights.hashes(params)})


def reports(path: str | pathlib.Path) -> list[MatrixReport]:
    """The reports of the matrices of an artifact, in order; those of format 1 hold none.

    Raises ArtifactError for a file that is damaged.
    """
    path = pathlib.Path(path)
    texts = weights.reports(path / _WEIGHTS, read_json(path / manifest.MODEL).get("operators", ()))
    return [MatrixReport.of(json.loads(text)) for text in texts]


def _fingerprint(about: dict[str, Any]) -> dict[str, str]:
    return {"sha256": hashlib.sha256(json.dumps(about["sha256"], sort_keys=True).encode()).hexdigest()}


def load(path: str | pathlib.Path, device: bool = True) -> Model:
    """The model of an artifact, its operators in place, on the default device or, without `device`, on the host.

    Raises ArtifactError when the folder is not a whole artifact of a known format, when an array's checksum is wrong
    (naming it), or when this qjax cannot build one of its operators (naming its kind and the version that wrote it).
    """
    path = pathlib.Path(path).absolute()
    file = path / manifest.MODEL
    if not file.is_file():
        raise ArtifactError(
            f"{path}: no model.json; not an artifact, or a run that has not finished: "
            "give the artifact/ folder of a run"
        )
    if (path / CHECKSUMS).exists():
        verify(path)
    about = read_json(file)
    found = about.get("format") if isinstance(about, dict) else about
    if found not in (FORMAT, _BEFORE, artifact_1.FORMAT):
        by = f", written by qjax {about['version']}" if isinstance(about, dict) and "version" in about else ""
        raise ArtifactError(
            f"{path}: format {found!r}{by}; this qjax reads {artifact_1.FORMAT}, {_BEFORE} and {FORMAT}: use the "
            "matching release"
        )
    if (found != artifact_1.FORMAT or about.get("checksums")) and not (path / CHECKSUMS).exists():
        raise ArtifactError(f"{path}: has no checksums.json; the copy is incomplete: copy the whole folder again")
    try:
        if found != artifact_1.FORMAT:
            arrays, descriptions = weights.read(path / _WEIGHTS, about["operators"])
            arrays = widened(arrays, about["dtypes"] if found == FORMAT else {})
        else:
            arrays, descriptions = artifact_1.read(path / _WEIGHTS, about["matrices"])
        _check_arrays(path, about["sha256"], arrays)
        model = _assemble(path, about, arrays, descriptions)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise ArtifactError(
            f"{file}: does not describe the arrays that are there ({type(error).__name__}: {error}); "
            "run the quantisation again"
        ) from error
    return dataclasses.replace(model, params=jax.device_put(model.params)) if device else model


def _check_arrays(path: pathlib.Path, expected: dict[str, str], arrays: dict[str, np.ndarray]) -> None:
    if set(arrays) != set(expected):
        raise ArtifactError(
            f"{path}: arrays {sorted(set(arrays) ^ set(expected))[:4]} are missing or surplus; "
            "run the quantisation again"
        )
    for name, array in arrays.items():
        if sha256_of(array) != expected[name]:
            raise ArtifactError(
                f"{path}: the array {name} does not match its checksum; the file is damaged, run the quantisation again"
            )


def _assemble(
    path: pathlib.Path, about: dict[str, Any], arrays: dict[str, np.ndarray], descriptions: dict[str, Any]
) -> Model:
    config = manifest.config_of(about)
    leaves: dict[str, Any] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        if "#" in name:
            place, part = name.split("#")
            parts.setdefault(place, {})[part] = array
        else:
            leaves[name] = array
    for place, description in descriptions.items():
        leaves[place] = from_arrays(parts[place], description, f"{path}: {place}")
    _check_leaves(config, leaves)
    params: dict[str, Any] = {"norm": {}, "blocks": [{} for _ in range(config.num_layers)]}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node: Any = params
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[last] = leaf
    params["blocks"] = [with_kind(block, config, index) for index, block in enumerate(params["blocks"])]
    return Model(
        config=config,
        params=params,
        tokenizer=manifest.tokenizer_of(path, about),
        name=about["name"],
        description=f"quantised from {about['description']}",
        fingerprint=_fingerprint(about),
    )


def _check_leaves(config: ModelConfig, leaves: dict[str, Any]) -> None:
    if config.num_layers > len(leaves):  # before a false number of layers costs memory
        raise ValueError(f"{config.num_layers} layers and {len(leaves)} arrays")
    expected = leaf_shapes(config)
    if "head" in leaves:  # tuning may have untied it
        expected.setdefault("head", next(expected[name] for name in ("embed", "embed/tokens") if name in expected))
    if other := sorted(expected.keys() ^ leaves.keys()):
        raise ValueError(f"{other[:4]} are missing or surplus")
    for name, shape in expected.items():
        if tuple(leaves[name].shape) != shape:
            raise ValueError(f"{name} has shape {list(leaves[name].shape)}, the configuration asks for {list(shape)}")

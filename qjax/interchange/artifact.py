"""The on-disk quantised model: an orbax checkpoint with a manifest that versions and checksums it.

    artifact/
      weights/         orbax checkpoint: {leaf path: array}, packed codes and dense parameters alike
      model.json       architecture, format version, description of every quantised matrix, SHA-256 of every leaf
      tokenizer.json   the model's tokenizer (absent when it has none)
      checksums.json   SHA-256 of every other file, and of this list itself: verified before anything is parsed

The list is written last, and the folder takes its name when it is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import typing
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qjax.errors import ArtifactError
from qjax.interchange.serialize import from_arrays, to_arrays
from qjax.matrix.quantized import QuantizedMatrix
from qjax.models.checkpoints.files import sha256_file
from qjax.models.checkpoints.weights import leaf_shapes
from qjax.models.config import ModelConfig, RopeScaling
from qjax.models.loading import Model
from qjax.models.tokenizers.chat_template import ChatTemplate
from qjax.models.tokenizers.tokenizer import Tokenizer, parsed
from qjax.runtime.atomic import read_bytes, read_json, write_json, write_text
from qjax.runtime.distributed import together
from qjax.runtime.fingerprint import digest

__all__ = ["FORMAT", "incoherence_spec", "load", "model_bytes", "save", "seal"]

FORMAT = "qjax-artifact-1"


_PIECE = 256 << 20  # bytes of leaves that are written at once: one piece for small models, some blocks for large ones


def _leaves(params: Any) -> Iterator[tuple[str, Any]]:
    """Dense leaves and quantised matrices by path, one block after the other: the blocks may be read as they come."""
    for index, block in enumerate(params["blocks"]):
        yield from _leaves_of(block, f"blocks/{index}/")
    yield from _leaves_of({name: value for name, value in params.items() if name != "blocks"})


def _leaves_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, QuantizedMatrix))
    return ((prefix + _path(path), leaf) for path, leaf in leaves)


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def model_bytes(params: Any) -> int:
    """Bytes of all parameters as stored: packed codes, scales, signs, dense leaves, and every codebook table once."""
    total, tables = 0, {}
    for _, leaf in _leaves(params):
        if isinstance(leaf, QuantizedMatrix):
            total += leaf.stored_bits // 8
            content = [_sha256(np.asarray(table)) for table in jax.tree.leaves(leaf.codebook)]
            tables[json.dumps([leaf.codebook.spec(), content], sort_keys=True)] = leaf.table_bits // 8
        else:
            total += leaf.size * leaf.dtype.itemsize
    return total + sum(tables.values())


def save(path: str | pathlib.Path, model: Model, params: Any, incoherence: dict[str, Any]) -> None:
    """Write `params` (dense leaves and QuantizedMatrix) of `model`'s architecture to `path`, replacing what is there.

    `incoherence` is the spec of the run's incoherence object. Written beside and renamed: `path` is always whole.
    `params["blocks"]` is iterated once and written piece by piece, so that blocks which are read as they come
    (`qjax.pipeline.finished`) need no more memory than a piece. All processes of a group call this with the same
    parameters; process 0 writes.
    """
    path = pathlib.Path(path).absolute()
    scratch, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")

    def begin() -> None:
        for leftover in (scratch, old):  # of a process that was killed here
            shutil.rmtree(leftover, ignore_errors=True)
        scratch.mkdir(parents=True)

    together(begin)
    matrices, hashes = _write(scratch / "weights", params, incoherence)
    together(lambda: _complete(path, scratch, old, model, matrices, hashes))


def _write(folder: pathlib.Path, params: Any, incoherence: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The checkpoint of all leaves; what describes the matrices, and the SHA-256 of every array.

    In all processes: orbax lets one write and has the others wait.
    """
    from orbax.checkpoint import v1 as ocp

    matrices: dict[str, Any] = {}
    hashes: dict[str, str] = {}
    arrays: dict[str, np.ndarray] = {}
    size, pieces = 0, 0
    for name, leaf in _leaves(params):
        if isinstance(leaf, QuantizedMatrix):
            parts, matrices[name] = to_arrays(leaf, incoherence)
            found = {f"{name}#{part}": np.atleast_1d(value) for part, value in parts.items()}
        else:
            found = {name: np.asarray(leaf)}
        hashes |= {key: _sha256(array) for key, array in found.items()}
        arrays |= found
        size += sum(array.nbytes for array in found.values())
        if size >= _PIECE:
            ocp.partial.save(str(folder), arrays)
            arrays, size, pieces = {}, 0, pieces + 1
    if not pieces:
        ocp.save(str(folder), arrays)
        return matrices, hashes
    if arrays:
        ocp.partial.save(str(folder), arrays)
    ocp.partial.finalize(str(folder))
    return matrices, hashes


def _complete(
    path: pathlib.Path,
    scratch: pathlib.Path,
    old: pathlib.Path,
    model: Model,
    matrices: dict[str, Any],
    hashes: dict[str, str],
) -> None:
    """Everything beside the arrays, and the names changed last."""
    tokenizer = model.tokenizer
    if tokenizer.vocab_size:
        write_text(scratch / "tokenizer.json", tokenizer.backend.to_str())
    manifest = {
        "format": FORMAT,
        "name": model.name,
        "description": model.description,
        "tokenizer": {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "adds_bos": tokenizer.adds_bos},
        "config": dataclasses.asdict(model.config),
        "matrices": matrices,
        "checksums": True,
        "sha256": hashes,
    }
    if tokenizer.chat is not None:
        chat = tokenizer.chat
        manifest["chat"] = {"source": chat.source, "tokens": dict(chat.tokens), "ends": list(chat.ends)}
    write_json(scratch / "model.json", manifest)
    seal(scratch)
    if path.exists():
        os.replace(path, old)
    os.replace(scratch, path)
    shutil.rmtree(old, ignore_errors=True)


def _files(path: pathlib.Path) -> list[str]:
    found = [file for file in path.rglob("*") if file.is_file() or file.is_symlink()]
    return sorted(str(file.relative_to(path)) for file in found if file != path / "checksums.json")


def seal(path: str | pathlib.Path) -> None:
    """Write `checksums.json` of an artifact's folder."""
    path = pathlib.Path(path)
    table = {name: sha256_file(path / name) for name in _files(path)}
    write_json(path / "checksums.json", {"files": table, "sha256": digest(table)})


def _verify(path: pathlib.Path) -> None:
    """Compare every file with the list; ArtifactError names the first that is another, missing or surplus."""
    file = path / "checksums.json"
    listed = read_json(file)
    table = listed.get("files") if isinstance(listed, dict) else None
    if not isinstance(table, dict) or digest(table) != listed.get("sha256"):
        raise ArtifactError(f"{file}: is damaged, it does not match its own checksum; run the quantisation again")
    if surplus := sorted(set(table) ^ set(_files(path))):
        raise ArtifactError(f"{path}: the files {surplus[:4]} are missing or surplus; run the quantisation again")
    for name, expected in table.items():
        try:
            found = sha256_file(path / name)
        except OSError as error:
            raise ArtifactError(f"{path / name}: cannot be read ({error.strerror}); check the disk") from error
        if found != expected:
            raise ArtifactError(
                f"{path / name}: damaged: its SHA-256 is {found}, recorded was {expected}; run the quantisation again"
            )


def incoherence_spec(path: str | pathlib.Path) -> dict[str, Any]:
    """The spec of the incoherence object that an artifact was saved with; {} for one without quantised matrices."""
    file = pathlib.Path(path) / "model.json"
    manifest = read_json(file)
    try:
        return next((spec["incoherence"] for spec in manifest["matrices"].values()), {})
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file}: is damaged ({error!r}); run the quantisation again") from error


def load(path: str | pathlib.Path, device: bool = True) -> Model:
    """The model of an artifact, with QuantizedMatrix leaves, on the default device or, without `device`, on the host.

    Raises ArtifactError when the folder is not a whole artifact of this format, or when an array's checksum is wrong
    (naming it).
    """
    from orbax.checkpoint import v1 as ocp

    path = pathlib.Path(path).absolute()
    file = path / "model.json"
    if not file.is_file():
        raise ArtifactError(
            f"{path}: no model.json; not an artifact, or a run that has not finished: "
            "give the artifact/ folder of a run"
        )
    if (path / "checksums.json").exists():
        _verify(path)
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ArtifactError(f"{path}: format {found!r}; this qjax reads {FORMAT}: use the matching release")
    if manifest.get("checksums") and not (path / "checksums.json").exists():
        raise ArtifactError(f"{path}: has no checksums.json; the copy is incomplete: copy the whole folder again")
    try:
        arrays = ocp.load(str(path / "weights"))
    except Exception as error:  # orbax raises many kinds; all mean that the stored arrays cannot be read
        raise ArtifactError(
            f"{path}/weights: cannot be read ({type(error).__name__}: {error}); run the quantisation again"
        ) from error
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    try:
        _check_arrays(path, manifest["sha256"], arrays)
        model = _assemble(path, manifest, arrays)
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
        if _sha256(array) != expected[name]:
            raise ArtifactError(
                f"{path}: the array {name} does not match its checksum; the file is damaged, run the quantisation again"
            )


def _assemble(path: pathlib.Path, manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> Model:
    config = dict(manifest["config"])
    if config.get("rope_scaling") is not None:
        config["rope_scaling"] = _typed(RopeScaling, config["rope_scaling"])
    config = _typed(ModelConfig, config)
    leaves: dict[str, Any] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        if "#" in name:
            matrix, part = name.split("#")
            scalar = not manifest["matrices"][matrix]["leaves"][part][1]
            parts.setdefault(matrix, {})[part] = array.reshape(()) if scalar else array
        else:
            leaves[name] = array
    for name, spec in manifest["matrices"].items():
        leaves[name] = from_arrays(parts[name], spec, f"{path}: {name}")
    _check_leaves(config, leaves)
    params: dict[str, Any] = {"blocks": [{} for _ in range(config.num_layers)]}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node: Any = params
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[last] = leaf
    digest = hashlib.sha256(json.dumps(manifest["sha256"], sort_keys=True).encode()).hexdigest()
    return Model(
        config=config,
        params=params,
        tokenizer=_tokenizer(path, manifest),
        name=manifest["name"],
        description=f"quantised from {manifest['description']}",
        fingerprint={"sha256": digest},
    )


def _typed(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass from JSON: every value has its field's type, and every number is positive and finite."""
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        allowed = typing.get_args(hints[name]) or (hints[name],)
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            raise ValueError(f"{name} is {value!r}")
        if type(value) in (int, float) and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; it is above 0 and finite")
    return kind(**values)


def _check_leaves(config: ModelConfig, leaves: dict[str, Any]) -> None:
    if config.num_layers > len(leaves):  # before a false number of layers costs memory
        raise ValueError(f"{config.num_layers} layers and {len(leaves)} arrays")
    expected = leaf_shapes(config)
    if "head" in leaves:  # tuning may have untied it
        expected.setdefault("head", expected["embed"])
    if other := sorted(expected.keys() ^ leaves.keys()):
        raise ValueError(f"{other[:4]} are missing or surplus")
    for name, shape in expected.items():
        if tuple(leaves[name].shape) != shape:
            raise ValueError(f"{name} has shape {list(leaves[name].shape)}, the configuration asks for {list(shape)}")


def _tokenizer(path: pathlib.Path, manifest: dict[str, Any]) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        return Tokenizer(None, missing=f"{path}: the quantised model came without a tokenizer")
    definition = read_bytes(file)
    try:
        backend = parsed(definition)
    except ValueError as error:
        raise ArtifactError(f"{file}: is not a tokenizer ({error}); run the quantisation again") from error
    chat = manifest.get("chat")
    if chat is not None:
        chat = ChatTemplate(chat["source"], str(path / "model.json"), dict(chat["tokens"]), tuple(chat["ends"]))
    return Tokenizer(backend, **manifest["tokenizer"], chat=chat)

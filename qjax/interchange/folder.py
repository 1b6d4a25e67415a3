"""A compressed model as a Hugging Face folder in the format of another tool."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qjax.errors import InputError, ModelFileError, RunError
from qjax.interchange.exports import EXPORTS, Export
from qjax.matrix.operator import is_operator
from qjax.models.checkpoints.export import described
from qjax.models.checkpoints.files import read_json
from qjax.models.checkpoints.hf_config import parse_config
from qjax.models.checkpoints.weights import resolve_dtype, tensor_leaves
from qjax.models.families import family
from qjax.models.linear import linears_of
from qjax.models.loading import Model
from qjax.runtime.durable import WholeFolder

__all__ = ["write"]

_SHARD = 2_000_000_000  # bytes of tensors before a file is begun anew
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)


def write(
    path: str | pathlib.Path,
    model: Model,
    format: str,
    original: str | pathlib.Path | None = None,
    dtype: str = "float32",
) -> None:
    """Write `model` as the folder `path` in a format of `EXPORTS`; what is dense is stored as `dtype`.

    `original` is the unquantised model's Hugging Face folder, whose configuration, tokenizer and templates are copied;
    without it they are made from what qjax knows. Blocks are written as they come. The folder appears whole or not at
    all.

    Raises InputError for an unknown format, a linear that the format cannot hold (the first, with the reason), an
    original of another configuration, and a folder that is there; RunError where it cannot be written.
    """
    export, target = EXPORTS.make(format), pathlib.Path(path)
    resolve_dtype(dtype)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise InputError(f"{target} is there and is not overwritten; give the path of a new folder")
    source = None if original is None else pathlib.Path(original)
    table = _config(model, source)
    operators, dense = _linears(model)
    _refuse(export, operators)
    settings = export.settings(operators, dense) if operators else None
    table |= {"torch_dtype": dtype} | ({} if settings is None else {"quantization_config": settings})
    try:
        with WholeFolder(target) as staging:
            _texts(staging, model, source, table)
            _shards(staging, _tensors(model, export, dtype))
    except OSError as error:
        raise RunError(
            f"{target} cannot be written ({error.strerror or error}); make room or choose another out"
        ) from error


def _config(model: Model, original: pathlib.Path | None) -> dict[str, Any]:
    if original is None:
        try:
            table = described(model.config)
        except ModelFileError as error:
            raise InputError(str(error)) from error
        ends = {"bos_token_id": model.tokenizer.bos_id, "eos_token_id": model.tokenizer.eos_id}
        return table | {key: value for key, value in ends.items() if value is not None}
    table = read_json(original / "config.json")
    if parse_config(table, str(original / "config.json")) != model.config:
        raise InputError(f"{original} is the folder of another model: its config.json has other sizes or options")
    for key in ("dtype", "torch_dtype", "quantization_config"):
        table.pop(key, None)
    return table


def _name(model: Model, layer: str) -> str:
    """The name of a linear's module in the model's checkpoints."""
    _, index, linear = layer.split(".", 2)
    return family(model.config).prefix.format(index=index) + linear


def _linears(model: Model) -> tuple[dict[str, Any], list[str]]:
    """(operators by the name of their module, names of dense linears)."""
    operators: dict[str, Any] = {}
    dense: list[str] = []
    for index, block in enumerate(model.params["blocks"]):
        for linear, weight in linears_of(block).items():
            name = _name(model, f"layers.{index}.{linear}")
            if is_operator(weight):
                operators[name] = weight
            else:
                dense.append(name)
    return operators, dense


def _refuse(export: Export, operators: dict[str, Any]) -> None:
    for name, operator in operators.items():
        if (why := export.reason(operator)) is not None:
            raise InputError(f"{name} cannot be stored in this format: {why}")


def _texts(staging: pathlib.Path, model: Model, original: pathlib.Path | None, table: dict[str, Any]) -> None:
    (staging / "config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    if original is not None:
        for name in _COPIED:
            if (original / name).is_file():
                shutil.copyfile(original / name, staging / name)
        return
    if model.tokenizer.vocab_size:
        (staging / "tokenizer.json").write_text(model.tokenizer.backend.to_str(), encoding="utf-8")
    if model.tokenizer.chat is not None:
        (staging / "chat_template.jinja").write_text(model.tokenizer.chat.source, encoding="utf-8")


def _tensors(model: Model, export: Export, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors by name, block by block."""
    kind = resolve_dtype(dtype)
    places = tensor_leaves(model.config)
    edges = {name: path.split("/") for name, path in places.items() if not path.startswith("blocks/")}
    for name, path in edges.items():
        yield name, np.asarray(_at(model.params, path)).astype(kind)
    if "head" in model.params and "head" not in places.values():  # tuning may have untied it
        yield "lm_head.weight", np.asarray(model.params["head"]).astype(kind)
    of_block: dict[int, dict[str, list[str]]] = {}
    for name, path in places.items():
        if path.startswith("blocks/"):
            _, index, *rest = path.split("/")
            of_block.setdefault(int(index), {})[name] = rest
    for index, block in enumerate(model.params["blocks"]):
        for name, path in of_block[index].items():
            leaf = _at(block, path)
            if not is_operator(leaf):
                yield name, np.asarray(leaf).astype(kind)
                continue
            module = name.removesuffix(".weight")
            for part, array in export.arrays(leaf, module).items():
                yield f"{module}.{part}", array.astype(kind) if part == "weight" else array


def _at(tree: Any, path: list[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _shards(staging: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """`model.safetensors`, or several files and their index where one would be large."""
    files: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        file = staging / f"part-{len(files)}"
        save_file(held, file, metadata={"format": "pt"})
        file.chmod(0o644)  # the writer makes it private
        files.append(list(held))
        held.clear()

    for name, array in tensors:
        if held and sum(a.nbytes for a in held.values()) + array.nbytes > _SHARD:
            flush()
        held[name] = np.ascontiguousarray(array)
        total += array.nbytes
    flush()
    if len(files) == 1:
        (staging / "part-0").rename(staging / "model.safetensors")
        return
    names = [f"model-{index + 1:05}-of-{len(files):05}.safetensors" for index in range(len(files))]
    for index, name in enumerate(names):
        (staging / f"part-{index}").rename(staging / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: name for name, own in zip(names, files, strict=True) for tensor in own},
    }
    (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

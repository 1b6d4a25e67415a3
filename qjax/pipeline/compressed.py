"""A quantised model in memory: what `qjax.quantize_model` makes, and `qjax.load` of an artifact."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.errors import InputError, listed, suggested
from qjax.finetune import lora
from qjax.interchange import artifact
from qjax.interchange import folder as export
from qjax.interchange.exports import EXPORTS
from qjax.matrix.operator import is_operator
from qjax.matrix.quantize import MatrixReport
from qjax.models.edges import edge_operators
from qjax.models.given import checked_model
from qjax.models.linear import bits_per_weight, linears_of, replace_linears
from qjax.models.loading import Model
from qjax.models.transformer import layer_names
from qjax.runtime.distributed import on_primary

__all__ = ["ADAPTERS", "ARTIFACT", "CompressedModel", "is_artifact", "replace", "save_adapters"]

ARTIFACT, ADAPTERS = "artifact", "adapters.safetensors"  # of a run directory


@dataclasses.dataclass(frozen=True, repr=False)
class CompressedModel(Model):
    """A model with operators in the place of linears' weights; all that a `Model` can do, it can.

    Attributes:
      reports: of its matrices, in the order of the forward pass; empty where they are not known.
    """

    reports: tuple[MatrixReport, ...] = ()

    @classmethod
    def of(cls, model: Model, params: Any, reports: Sequence[MatrixReport] = ()) -> CompressedModel:
        """The architecture and tokenizer of `model` with these parameters."""
        description = model.description if isinstance(model, CompressedModel) else f"quantised from {model.description}"
        fingerprint = artifact.identity(lora.stripped(params))
        return cls(model.config, params, model.tokenizer, model.name, description, fingerprint, None, tuple(reports))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the matrices that are operators, without shared tables and adapters."""
        return bits_per_weight(lora.stripped(self.params))

    def save(
        self,
        path: str | pathlib.Path,
        format: str = "qjax",
        original: str | pathlib.Path | None = None,
        dtype: str = "float32",
    ) -> None:
        """Write the model to the folder `path`, which `qjax.load` and the command line read.

        As "qjax" a folder that is there is replaced if it is an artifact, and with adapters `path` holds `artifact/`
        and, beside it, `adapters.safetensors`. Every other format is a Hugging Face folder (see
        `qjax.interchange.folder.write`), with what is dense as `dtype` and the files of `original` beside the weights,
        the unquantised model's folder.

        Raises InputError for an unknown format, a folder with something else in it, and what the format cannot hold.
        """
        if format != "qjax" and format not in EXPORTS:
            known = ("qjax", *EXPORTS)
            raise InputError(
                f"format is {format!r}; a model can be saved as: {listed(known)}{suggested(format, list(known))}"
            )
        if format != "qjax":
            export.write(path, self, format, original, dtype)
            return
        folder = pathlib.Path(path)
        if folder.exists() and not is_artifact(folder) and (folder.is_file() or any(folder.iterdir())):
            raise InputError(f"{folder} is there and no artifact; give the path of a new folder, or of an artifact")
        target = folder / ARTIFACT if lora.adapters(self.params) else folder
        artifact.save(target, self._original, lora.stripped(self.params), reports=self.reports)
        save_adapters(folder, self.params)

    @property
    def _original(self) -> Model:
        """What the manifest is about: the description is that of the original model."""
        return dataclasses.replace(self, description=self.description.removeprefix("quantised from "))

    def __repr__(self) -> str:
        operators = [*edge_operators(self.params).values()]
        operators += [w for block in self.params["blocks"] for w in linears_of(block).values() if is_operator(w)]
        return (
            f"CompressedModel({self.name}: {self.config.architecture}, {self.config.num_layers} blocks, "
            f"{len(operators)} matrices with {self.bits_per_weight:.3f} bits per weight)"
        )


def is_artifact(folder: pathlib.Path) -> bool:
    """Whether a folder holds a quantised model of ours."""
    return (folder / "model.json").is_file()


def save_adapters(folder: pathlib.Path, params: Any) -> None:
    """`adapters.safetensors` beside `artifact/`, when the model has adapters. All processes of a group call this."""
    if lora.adapters(params):
        own = folder / ARTIFACT
        on_primary(lambda: lora.save(folder / ADAPTERS, params, artifact.fingerprint(own)["sha256"]))


def replace(model: Model, weights: Mapping[str, Any]) -> Model:
    """The model with other weights, operators or arrays `[out, in]`, in the place of some linears, by layer name.

    It is a `CompressedModel` where one of its linears is an operator. Raises InputError for a name that no layer has,
    with the nearest, and for another shape.
    """
    names = layer_names(checked_model(model).config)
    if not isinstance(weights, Mapping):
        raise InputError(
            f"weights is {weights!r} ({type(weights).__name__}); give operators or arrays [out, in] by layer name, "
            f"such as {names[0]!r}"
        )
    for name in weights:
        if name not in names:
            raise InputError(
                f"there is no layer {name!r}{suggested(name, names)}; names look like {names[0]} … {names[-1]}"
            )
    blocks = []
    for index, block in enumerate(model.params["blocks"]):
        own = linears_of(block)
        found = {linear: weights[f"layers.{index}.{linear}"] for linear in own if f"layers.{index}.{linear}" in weights}
        for linear, weight in found.items():
            shape, expected = tuple(getattr(weight, "shape", ())), tuple(own[linear].shape)
            if shape != expected:
                raise InputError(
                    f"layers.{index}.{linear} is of shape {list(expected)}, [out, in]; what shall stand in its place "
                    f"is {list(shape) if shape else type(weight).__name__}"
                )
        blocks.append(replace_linears(block, found))
    params = {**model.params, "blocks": blocks}
    if any(is_operator(weight) for block in blocks for weight in linears_of(block).values()):
        reports = [report for report in getattr(model, "reports", ()) if report.name not in weights]
        return CompressedModel.of(model, params, reports)
    return Model(model.config, params, model.tokenizer, model.name, model.description, artifact.identity(params))

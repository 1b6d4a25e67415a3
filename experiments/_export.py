"""The work behind `experiments.export`, apart from it: it imports JAX, which a typing error need not wait for."""

from __future__ import annotations

import pathlib

from omegaconf import DictConfig

from qjax.errors import InputError
from qjax.pipeline.compressed import ARTIFACT, CompressedModel, is_artifact
from qjax.pipeline.stored import load

from ._entry import plain

__all__ = ["start"]


def start(config: DictConfig) -> None:
    """Write the folder, and say where it lies and what it takes."""
    settings = plain(config)
    path = pathlib.Path(settings["artifact"]).expanduser()
    path = path / ARTIFACT if is_artifact(path / ARTIFACT) else path
    if not is_artifact(path):
        raise InputError(f"artifact is {settings['artifact']}; give the artifact/ folder of a run, or the run's folder")
    model = load(path)
    assert isinstance(model, CompressedModel)
    original = settings["original"]
    model.save(settings["out"], settings["format"], None if original is None else original, settings["dtype"])
    out = pathlib.Path(settings["out"])
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {model.name} as {settings['format']}, {size / 1e6:.1f} MB in {len(list(out.iterdir()))} files")

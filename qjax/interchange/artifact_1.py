"""The weights of an artifact of format 1, of qjax 0.1.0: one orbax checkpoint, descriptions in `model.json`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.errors import ArtifactError
from qjax.interchange.weights import Stored

__all__ = ["FORMAT", "read"]

FORMAT = "qjax-artifact-1"


def read(folder: pathlib.Path, descriptions: Mapping[str, Any]) -> Stored:
    """The arrays of the checkpoint `folder`, and `descriptions` as they are. In all processes of a group.

    Raises ArtifactError when the checkpoint cannot be read.
    """
    from orbax.checkpoint import v1 as ocp

    try:
        arrays = ocp.load(str(folder))
    except Exception as error:  # orbax raises many kinds; all mean that the stored arrays cannot be read
        raise ArtifactError(
            f"{folder}: cannot be read ({type(error).__name__}: {error}); run the quantisation again"
        ) from error
    found = {name: np.asarray(array) for name, array in arrays.items()}
    for name in found:
        if "#" in name:  # orbax has no scalars: they were stored with one entry
            matrix, part = name.split("#")
            if not descriptions[matrix]["leaves"][part][1]:
                found[name] = found[name].reshape(())
    return found, dict(descriptions)

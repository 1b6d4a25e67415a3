"""Descriptions of quantised matrices as qjax 0.1.0 wrote them: versions 1 and, with tuned gains or tables, 2.

They name the family of the incoherence processing where a spec has the rotations that it drew; the arrays are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qjax import codebooks, incoherence
from qjax.errors import InputError
from qjax.matrix.operator import checked_shape
from qjax.matrix.quantized import transform_spec

__all__ = ["VERSIONS", "upgraded"]

VERSIONS = (1, 2)


def upgraded(description: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of the `QuantizedMatrix` of a description of version 1 or 2.

    Raises InputError for a codebook or a family of rotations that does not exist, or another padding than today's.
    """
    shape, codebook = checked_shape(description["shape"]), codebooks.make(**description["codebook"])
    transform = incoherence.make(**description["incoherence"]).abstract(*shape, multiple=codebook.tile)
    if list(transform.padded) != description["padded"]:
        raise InputError(
            f"was padded to {description['padded']}, this qjax pads {list(shape)} to {list(transform.padded)}"
        )
    return {
        "kind": "quantized",
        "format": 1,
        "shape": list(shape),
        **transform_spec(transform),
        "codebook": codebook.spec(),
        "scale_group": description["scale_group"],
    }

"""Model families, one file each: config keys, tensor names, the forward pass of a block."""

from qjax.models.families.base import FAMILIES, KIND, Family, Residual, family, paths
from qjax.models.families.fields import Fields

__all__ = ["FAMILIES", "KIND", "Family", "Fields", "Residual", "family", "paths"]

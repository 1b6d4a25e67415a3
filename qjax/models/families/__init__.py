"""Model families, one file each, all imported here: config keys, tensor names, the forward pass of a block."""

import importlib
import pkgutil

from qjax.models.families.base import FAMILIES, Family, family, paths
from qjax.models.families.fields import Fields

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "Family", "Fields", "family", "paths"]

"""Hessians of linear layers: estimation from text, and storage."""

from qjax.hessian.collect import collect
from qjax.hessian.fisher import alignment, exact_fisher
from qjax.hessian.sketch import Sketch
from qjax.hessian.store import HessianStore
from qjax.linalg.kronecker import Hessian
from qjax.models.transformer import layer_names

__all__ = ["Hessian", "HessianStore", "Sketch", "alignment", "collect", "exact_fisher", "layer_names"]

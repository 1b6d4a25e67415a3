"""Hessians of linear layers: estimation from text, and storage."""

from qjax.hessian.collect import collect, layer_names
from qjax.hessian.fisher import alignment, exact_fisher
from qjax.hessian.sketch import Sketch
from qjax.hessian.statistics import Hessian
from qjax.hessian.store import HessianStore

__all__ = ["Hessian", "HessianStore", "Sketch", "alignment", "collect", "exact_fisher", "layer_names"]

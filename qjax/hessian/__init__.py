"""Hessians of linear layers: estimation from text, and storage."""

from qjax.hessian.collect import collect, layer_names
from qjax.hessian.statistics import Hessian
from qjax.hessian.store import HessianStore

__all__ = ["Hessian", "HessianStore", "collect", "layer_names"]

"""Any JAX function as a model: its linears found in its program, measured, and replaced by operators."""

from qjax.function.sites import LinearSite
from qjax.function.traced import Traced, trace

__all__ = ["LinearSite", "Traced", "trace"]

"""Rounding algorithms: from a weight matrix, a Hessian and a codebook to codes."""

from qjax.rounding.base import ROUNDINGS, Coded, Problem, Rounded, Rounding, RoundingAlgorithm
from qjax.rounding.descent import Greedy
from qjax.rounding.gptq import GPTQ
from qjax.rounding.guarded import GuardedLDLQ
from qjax.rounding.ldlq import LDLQ
from qjax.rounding.losses import proxy_loss, quadratic, weight_mse
from qjax.rounding.nearest import Nearest, Stochastic
from qjax.rounding.yaqa import YAQA

__all__ = [
    "GPTQ",
    "LDLQ",
    "ROUNDINGS",
    "YAQA",
    "Coded",
    "Greedy",
    "GuardedLDLQ",
    "Nearest",
    "Problem",
    "Rounded",
    "Rounding",
    "RoundingAlgorithm",
    "Stochastic",
    "make",
    "proxy_loss",
    "quadratic",
    "weight_mse",
]


def make(name: str, **options) -> Rounding:
    """Build a rounding algorithm by name, e.g. `make("ldlq", block=8)`. Raises InputError listing names and options."""
    return ROUNDINGS.make(name, **options)

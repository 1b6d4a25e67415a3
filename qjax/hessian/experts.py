"""The input factor of an expert, of the tokens that are routed to it and of all others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from qjax.errors import InputError
from qjax.linalg.kronecker import Hessian
from qjax.registry import Natural, OneOf, check_options

__all__ = ["ExpertFactor", "pools"]


@dataclasses.dataclass(frozen=True)
class ExpertFactor:
    """How one factor is made of R, over an expert's own t tokens, and P, over all tokens.

    Attributes:
      routing: "routed": R; "all": P (as if every token passed every expert); "blend": the mean of both, each with mean
        diagonal 1.
      expert_tokens: T; an expert with t < T of these tokens takes `t/T R + (1 − t/T) P` in the place of R. None is
        twice as many as its matrix has inputs, 0 shrinks nothing. An expert without any token has P.
    """

    routing: Annotated[str, OneOf("routed", "all", "blend")] = "routed"
    expert_tokens: Natural | None = None

    def __post_init__(self) -> None:
        """Check the options. Raises InputError for a value of another kind or out of its range."""
        check_options(self, "hessian")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ExpertFactor:
        """That of the `hessian` group, in which these are options."""
        return cls(**{field.name: settings[field.name] for field in dataclasses.fields(cls) if field.name in settings})

    def __call__(self, hessian: Hessian, name: str) -> Hessian:
        """The Hessian with one input factor; that of a linear which is no expert's as it is.

        Raises InputError, with the layer's `name`, for an expert without tokens and without P.
        """
        pooled = hessian.pooled
        if pooled is None:
            return hessian
        if self.routing == "all" or hessian.tokens == 0:
            return dataclasses.replace(hessian, input=pooled, pooled=None)
        factor = hessian.input
        enough = 2 * len(factor) if self.expert_tokens is None else self.expert_tokens
        if hessian.tokens < enough:
            share = np.float32(hessian.tokens / enough)
            factor = share * factor + (1 - share) * pooled
        if self.routing == "blend":
            factor = (_normal(factor, name) + _normal(pooled, name)) / 2
        return dataclasses.replace(hessian, input=factor, pooled=None)


def pools(own: np.ndarray, counts: np.ndarray, every: np.ndarray | None) -> list[np.ndarray]:
    """P of every expert: `every`, or where all experts read the same input one for all, from their R and token counts.

    Every token is in as many experts' means: that over all tokens is theirs, weighted by their counts.
    """
    if every is not None:
        return list(every)
    whole = np.tensordot(counts.astype(np.float64) / counts.sum(), own, 1)
    return [whole.astype(np.float32)] * len(own)


def _normal(factor: Any, name: str) -> Any:
    mean = np.float32(np.trace(np.asarray(factor, np.float64)) / len(factor))
    if not mean > 0:
        raise InputError(f"{name}: its inputs are all 0; use hessian.routing=routed")
    return factor / mean

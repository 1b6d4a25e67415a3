"""Which codebook, rounding, incoherence and scale every layer of a model gets: one recipe with ordered exceptions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qjax import codebooks
from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import ScaleRule
from qjax.errors import InputError
from qjax.incoherence.families import Incoherence
from qjax.rounding.base import Rounding

__all__ = ["LayerPlan", "LayerRule", "Recipe"]


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """An exception for the layers whose name contains a match of `pattern` (a regular expression).

    Attributes:
      skip: leave the layer as it is.
      bits: other bits per weight.
      codebook: another codebook, as `{"name": …, **options}`.
      damping: another damping.
      scale: another scale (a number: the RMS the codebook sees).
    """

    pattern: str
    skip: bool = False
    bits: float | None = None
    codebook: Mapping[str, Any] | None = None
    damping: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError(
                f"rules: {self.pattern!r} is not a regular expression ({error}); fix the pattern"
            ) from error
        if not self.skip and self.bits is self.codebook is self.damping is self.scale is None:
            raise InputError(f"rules: {self.pattern!r} changes nothing; give skip, bits, codebook, damping or scale")


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The treatment of one layer."""

    codebook: Codebook
    rounding: Rounding
    incoherence: Incoherence
    scale: float | ScaleRule | None
    damping: float


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a run; `rules` are tried in order and the first that matches a layer's name applies."""

    codebook: Mapping[str, Any]
    bits: float
    rounding: Rounding
    incoherence: Incoherence
    scale: float | ScaleRule | None = None
    damping: float = 0.01
    rules: Sequence[LayerRule] = ()

    def plan(self, names: Sequence[str]) -> dict[str, LayerPlan | None]:
        """The plan of every layer, None for layers that are left as they are.

        Raises InputError for a rule that applies to no layer (a typing error, or one shadowed by an earlier rule),
        for unknown codebooks, options or bits, and when nothing is left to quantise.
        """
        if not self.damping >= 0:
            raise InputError(f"damping is {self.damping}; it is a fraction of the mean diagonal, 0 or more")
        used: set[int] = set()
        books: dict[str, Codebook] = {}
        plans: dict[str, LayerPlan | None] = {}
        for name in names:
            index = next((i for i, rule in enumerate(self.rules) if re.search(rule.pattern, name)), None)
            rule = None if index is None else self.rules[index]
            used |= set() if index is None else {index}
            plans[name] = None if rule is not None and rule.skip else self._layer(rule, books)
        for i, rule in enumerate(self.rules):
            if i not in used:
                raise InputError(
                    f"rules: {rule.pattern!r} applies to no layer (no name matches, or earlier rules take them all); "
                    f"names look like {names[0]} … {names[-1]}"
                )
        if not any(plans.values()):
            raise InputError("rules: every layer is skipped; nothing is left to quantise")
        return plans

    def _layer(self, rule: LayerRule | None, books: dict[str, Codebook]) -> LayerPlan:
        bits = self.bits if rule is None or rule.bits is None else rule.bits
        options = self.codebook if rule is None or rule.codebook is None else rule.codebook
        known = repr((dict(options), bits))
        if known not in books:
            books[known] = codebooks.make(bits=bits, **options)
        return LayerPlan(
            codebook=books[known],
            rounding=self.rounding,
            incoherence=self.incoherence,
            scale=self.scale if rule is None or rule.scale is None else rule.scale,
            damping=self.damping if rule is None or rule.damping is None else rule.damping,
        )

"""Ordered rules: which parameters are tuned, and at which learning rate."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qjax.errors import InputError

__all__ = ["RateRule", "assign"]


@dataclasses.dataclass(frozen=True)
class RateRule:
    """The peak learning rate of the parameters whose name contains a match of `pattern`; None freezes them."""

    pattern: str
    rate: float | None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError(
                f"finetune.rules: {self.pattern!r} is not a regular expression ({error}); fix the pattern"
            ) from error
        if self.rate is not None and not self.rate > 0:
            raise InputError(f"finetune.rules: the rate of {self.pattern!r} is {self.rate}; above 0, or null to freeze")

    @classmethod
    def several(cls, settings: Iterable[Any]) -> tuple[RateRule, ...]:
        """Rules from plain values, `{pattern: …, rate: …}` each. Raises InputError for anything else."""
        rules = []
        for rule in settings:
            if not isinstance(rule, Mapping) or set(rule) != {"pattern", "rate"}:
                raise InputError(f"finetune.rules: {rule!r} is not a rule; give pattern and rate (null freezes)")
            rules.append(cls(**rule))
        return tuple(rules)


def assign(rules: Sequence[RateRule], names: Iterable[str]) -> dict[str, float]:
    """The rate of every name by the first rule that matches it, 0 for a frozen one.

    Raises InputError listing the names that no rule covers, and when nothing is left to tune.
    """
    rates: dict[str, float] = {}
    uncovered = []
    for name in names:
        rule = next((rule for rule in rules if re.search(rule.pattern, name)), None)
        if rule is None:
            uncovered.append(name)
        else:
            rates[name] = rule.rate or 0.0
    if uncovered:
        shown = ", ".join(uncovered[:12]) + (f" and {len(uncovered) - 12} more" if len(uncovered) > 12 else "")
        raise InputError(
            f"finetune.rules: no rule covers {shown}; add a rule for them, or a last rule "
            "{pattern: '.', rate: null} that freezes what is left"
        )
    if not any(rates.values()):
        raise InputError("finetune.rules: every parameter is frozen; give at least one matching rule a rate")
    return rates

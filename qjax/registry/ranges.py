"""Ranges of numbers and choices of texts, as types of options: `passes: Natural = 0`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, TypeAlias

__all__ = ["Count", "Decay", "Natural", "NotNegative", "OneOf", "Part", "Positive", "Range", "Share"]


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of numbers.

    Attributes:
      low: the lower end, None without one.
      high: the upper end, None without one.
      low_open: whether the lower end itself is left out.
      high_open: whether the upper end itself is left out.
      words: the interval in words, for a message.
    """

    words: str
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` lies inside; never for NaN."""
        above = self.low is None or (value > self.low if self.low_open else value >= self.low)
        below = self.high is None or (value < self.high if self.high_open else value <= self.high)
        return value == value and above and below


class OneOf:
    """The texts that there are for an option: `order: Annotated[str, OneOf("natural", "ascending")]`."""

    def __init__(self, *choices: str):
        self.choices = choices


Count: TypeAlias = Annotated[int, Range("a number of things, at least 1", 1)]
Natural: TypeAlias = Annotated[int, Range("not negative", 0)]
NotNegative: TypeAlias = Annotated[float, Range("not negative", 0)]
Positive: TypeAlias = Annotated[float, Range("greater than 0", 0, low_open=True)]
Share: TypeAlias = Annotated[float, Range("a share, 0 to 1", 0, 1)]
Part: TypeAlias = Annotated[float, Range("a share, greater than 0 and less than 1", 0, 1, True, True)]
Decay: TypeAlias = Annotated[float, Range("at least 0 and less than 1", 0, 1, False, True)]

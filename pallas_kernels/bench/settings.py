"""Settings of a run of the suite."""

from __future__ import annotations

import dataclasses
import pathlib

__all__ = ["Settings"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run of the suite.

    Attributes:
      seconds: after which no new case begins.
      quick: the shapes of the tests in place of the benchmarks'.
      tune: try block sizes first, and write the best ones as `tuned.json` beside `out`.
      ring_bytes: of weights that a timing loop cycles through, more than the caches.
      out: the JSON file, None for none.
      processes: that check and compile side by side before this one measures; they share a compilation cache.
      part: (i, n): be the i-th of n such processes.
    """

    seconds: float = 480.0
    quick: bool = False
    tune: bool = False
    ring_bytes: int = 256 << 20
    out: pathlib.Path | None = None
    processes: int = 1
    part: tuple[int, int] | None = None

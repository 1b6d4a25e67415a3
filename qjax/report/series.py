"""Runs as series of points and places of their labels: the content of the figure, without drawing it."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.report.runs import Run
from qjax.report.table import differing, ordered

__all__ = [
    "PANELS",
    "WEIGHT_ERROR",
    "Point",
    "Series",
    "label_positions",
    "limits",
    "series",
    "ticks",
    "varied_bits",
]

PANELS = (("kl_mean", "KL(original ‖ quantised), nats per token"), ("perplexity", "perplexity"))
WEIGHT_ERROR = ("weight_mse_mean", "mean of ‖E‖² / ‖W‖², dashed: Shannon bound 2^(−2R)")


@dataclasses.dataclass(frozen=True)
class Point:
    """One run in one panel: bits per weight, the metric, its interval or None, and the run's name."""

    bits: float
    value: float
    interval: tuple[float, float] | None
    run: str = ""


@dataclasses.dataclass(frozen=True)
class Series:
    """Runs that differ in bits (and seed) only.

    Attributes:
      label: the settings that tell it from the other series, in one or more lines.
      rounding: the rounding algorithm, which decides colour and marker.
      points: by metric, in ascending bits; values that are absent or infinite are left out.
    """

    label: str
    rounding: str
    points: Mapping[str, tuple[Point, ...]]


def varied_bits(runs: Sequence[Run]) -> bool:
    """Whether bits per weight differ by more than scales and signs make (0.15)."""
    bits = [run.results["bits_per_weight"] for run in runs]
    return max(bits) - min(bits) > 0.15


def _point(run: Run, metric: str) -> Point | None:
    value, interval = run.number(metric), run.interval(metric)
    if value is None or not math.isfinite(value) or value <= 0:
        return None
    finite = interval is not None and all(math.isfinite(bound) and bound > 0 for bound in interval)
    return Point(run.results["bits_per_weight"], value, interval if finite else None, run.name)


def _plain(value: Any) -> str:
    return "–" if value is None else str(value)


def _label(run: Run, keys: Sequence[str]) -> str:
    """Names of choices stand alone; other values get the last part of their key; lines of at most 34 characters."""
    parts = []
    for key in keys:
        value = run.settings.get(key)
        bare = isinstance(value, str) and "." not in key
        parts.append(value if bare else f"{key.rpartition('.')[2]} {_plain(value)}")
    text = ", ".join(part.replace(" ", "\u00a0") for part in parts)  # break between parts only
    return textwrap.fill(text, 34).replace("\u00a0", " ") or str(run.settings.get("rounding", run.name))


def _telling(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """Few of the settings `keys`, chosen greedily, that tell the same groups of runs apart as all of them."""

    def groups(chosen: Sequence[str]) -> int:
        return len({tuple(_plain(run.settings.get(key)) for key in chosen) for run in runs})

    chosen: list[str] = []
    while groups(chosen) < groups(keys):
        chosen.append(max((key for key in keys if key not in chosen), key=lambda key: groups([*chosen, key])))
    return [key for key in keys if key in chosen]


def series(runs: Sequence[Run], *, join_bits: bool = True) -> list[Series]:
    """Group runs into series; without `join_bits` every run is one."""
    runs = ordered(runs)
    keys = [key for key in differing(runs) if not join_bits or key not in ("bits", "seed")]
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        identity = tuple(_plain(run.settings.get(key)) for key in keys)
        groups.setdefault(identity if join_bits else run.name, []).append(run)
    made = []
    telling = _telling(runs, keys)
    for members in groups.values():
        points = {
            metric: tuple(sorted(filter(None, (_point(run, metric) for run in members)), key=lambda point: point.bits))
            for metric, _ in (*PANELS, WEIGHT_ERROR)
        }
        first = members[0]
        # A run that differs in many settings is better known by its directory than by a list of them.
        label = first.name if len(members) == 1 and len(keys) > 3 else _label(first, telling)
        made.append(Series(label, str(first.settings.get("rounding", "?")), points))
    return made


def label_positions(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the order of the wanted ones and as near to them as a sweep gets.

    Neighbours that are too near form a cluster, which is spread around the mean of what its members wanted.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    clusters: list[list[int]] = []

    def start(cluster: list[int]) -> float:
        return sum(wanted[i] for i in cluster) / len(cluster) - gap * (len(cluster) - 1) / 2

    for index in order:
        clusters.append([index])
        while len(clusters) > 1 and start(clusters[-2]) + gap * len(clusters[-2]) > start(clusters[-1]):
            last = clusters.pop()
            clusters[-1] += last
    placed = [0.0] * len(wanted)
    for cluster in clusters:
        for offset, index in enumerate(cluster):
            placed[index] = start(cluster) + gap * offset
    return placed


def limits(values: Sequence[float], pad: float) -> tuple[float, float]:
    """Limits of a logarithmic axis with `pad` of its length free at both ends; at least a factor of two."""
    low, high = math.log(min(values)), math.log(max(values))
    widen = max(0.0, (math.log(2) - (high - low)) / 2)
    low, high = low - widen, high + widen
    return math.exp(low - pad * (high - low)), math.exp(high + pad * (high - low))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers inside the limits of a logarithmic axis: between three and about eight."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(d / 4 for d in range(4, 40))):
        found = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
        if len(found) >= 3:
            return found[:: max(1, len(found) // 7)]
    return [low, math.sqrt(low * high), high]

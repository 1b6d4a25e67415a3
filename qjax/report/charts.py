"""Charts of the page as SVG and HTML text: numbers against bits, losses by layer, time and memory by run."""

from __future__ import annotations

import csv
import html
import math
import pathlib
from collections.abc import Mapping, Sequence

from qjax.report.runs import Run
from qjax.report.series import limits, ticks
from qjax.report.table import number

__all__ = ["COLOURS", "bars", "heat_map", "layer_losses", "legend", "method", "scatter"]

COLOURS = 8
"""The page's style has `--c0` … `--c7`."""
_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "M-4-4h8v8h-8z",
    "M0-5L5 4H-5z",
    "M0-5L5 0L0 5L-5 0z",
)
_W, _H, _LEFT, _TOP, _BOTTOM = 420, 300, 62, 12, 40
_NEAR = 0.04  # bits; nearer points are drawn side by side
_STAGES = ("load", "reference", "hessians", "quantize", "finetune", "evaluate", "save")


def method(run: Run) -> str:
    """The recipe, if any, the rounding and the codebook, by which points have their colour and shape."""
    parts = f"{run.settings.get('rounding', '?')} · {run.settings.get('codebook', '?')}"
    recipe = run.settings.get("recipe")
    return parts if recipe in (None, "none") else f"{recipe}: {parts}"


def _look(methods: Sequence[str], name: str) -> tuple[str, str]:
    index = methods.index(name)
    return f"var(--c{index % COLOURS})", _SHAPES[index // COLOURS % len(_SHAPES)]


def _mark(methods: Sequence[str], name: str, x: float, y: float, extra: str = "") -> str:
    colour, shape = _look(methods, name)
    return f'<path class="mark" d="{shape}" transform="translate({x:.1f} {y:.1f})" style="fill:{colour}"{extra}/>'


def legend(methods: Sequence[str]) -> str:
    """A line per method with its mark."""
    entries = (
        f'<li><svg viewBox="-7 -7 14 14" width="14" height="14" aria-hidden="true">{_mark(methods, name, 0, 0)}</svg>'
        f"{html.escape(name)}</li>"
        for name in methods
    )
    return f'<ul class="legend" aria-label="methods">{"".join(entries)}</ul>'


def scatter(runs: Sequence[Run], methods: Sequence[str], key: str, title: str, *, shannon: bool = False) -> str:
    """Bits per weight against a result, logarithmic, with its interval; "" when no run has it.

    A point leads to the settings of its run. With `shannon` the bound `2^(−2R)` is drawn too.
    """
    points = []
    for index, run in enumerate(runs):
        value = run.number(key)
        if value is not None and math.isfinite(value) and value > 0:
            low, high = run.interval(key) or (value, value)
            ends = (low, high) if low > 0 and math.isfinite(high) else (value, value)
            points.append((index, run, float(run.results["bits_per_weight"]), value, ends))
    if not points:
        return ""
    left, right = min(p[2] for p in points) - 0.25, max(p[2] for p in points) + 0.25
    extra = [4.0**-left, 4.0**-right] if shannon else []
    low, high = limits([bound for p in points for bound in p[4]] + extra, 0.05)

    def x(bits: float) -> float:
        return _LEFT + (bits - left) / (right - left) * (_W - _LEFT - 10)

    def y(value: float) -> float:
        return _TOP + math.log(high / value) / math.log(high / low) * (_H - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_W} {_H}" role="group" aria-label="{html.escape(title)}">']
    for tick in ticks(low, high):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_W - 10}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for half in range(math.ceil(2 * left), math.floor(2 * right) + 1):
        parts.append(f'<text x="{x(half / 2):.1f}" y="{_H - 22}" text-anchor="middle">{half / 2:g}</text>')
    parts.append(f'<text x="{(_W + _LEFT) / 2}" y="{_H - 5}" text-anchor="middle">bits per weight</text>')
    if shannon:
        parts.append(f'<path class="bound" d="M{x(left):.1f} {y(extra[0]):.1f}L{x(right):.1f} {y(extra[1]):.1f}"/>')
    shifts = _side_by_side([p[2] for p in points])
    for (index, run, bits, value, (below, above)), shift in zip(points, shifts, strict=True):
        across = min(max(x(bits) + shift, _LEFT + 6), _W - 14)
        label = html.escape(f"{run.name}: {bits:.3f} bits, {number(value)} [{number(below)}, {number(above)}]")
        colour, _ = _look(methods, method(run))
        parts.append(
            f'<a href="#run-{index}" aria-label="{label}"><title>{label}</title>'
            f'<path class="bar" style="stroke:{colour}" d="M{across:.1f} {y(below):.1f}V{y(above):.1f}"/>'
            + _mark(methods, method(run), across, y(value), f' data-value="{value!r}"')
            + "</a>"
        )
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(parts)}</svg></figure>"


def _side_by_side(bits: Sequence[float]) -> list[float]:
    """Shifts in pixels that set apart the points of nearly the same bits."""
    shifts = [0.0] * len(bits)
    order = sorted(range(len(bits)), key=lambda i: bits[i])
    start = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and bits[order[end]] - bits[order[start]] <= _NEAR:
            continue
        group = order[start:end]
        step = min(9.0, 80.0 / len(group))
        for place, index in enumerate(sorted(group)):
            shifts[index] = step * (place - (len(group) - 1) / 2)
        start = end
    return shifts


def layer_losses(path: pathlib.Path) -> dict[str, dict[int, float]]:
    """Relative proxy losses of a run's `layers.csv`, by linear and block; {} where there is none that can be read."""
    found: dict[str, dict[int, float]] = {}
    try:
        with (path / "layers.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                _, block, linear = row["name"].split(".", 2)
                found.setdefault(linear, {})[int(block)] = float(row["proxy_loss"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, UnicodeDecodeError, csv.Error):
        return {}
    return found


def heat_map(losses: Mapping[str, Mapping[int, float]], low: float, high: float) -> str:
    """Blocks across, linears down, the loss by how strong the colour is, logarithmic from `low` to `high`."""
    blocks = sorted({block for own in losses.values() for block in own})
    if not blocks:
        return ""
    cell = 14
    width, height = 84 + cell * len(blocks), cell * len(losses) + 20
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    parts = [f'<svg class="heat" {size} role="group" aria-label="proxy loss by layer">']
    for row, (linear, own) in enumerate(losses.items()):
        parts.append(
            f'<text x="78" y="{cell * row + 11}" text-anchor="end">{html.escape(linear.rpartition(".")[2])}</text>'
        )
        for block, value in own.items():
            share = math.log(max(value, low) / low) / math.log(high / low) if high > low > 0 else 1.0
            label = html.escape(f"layers.{block}.{linear}: {value:.4g}")
            strength = 0.06 + 0.94 * min(share, 1.0)
            parts.append(
                f'<rect x="{84 + cell * blocks.index(block)}" y="{cell * row}" width="{cell - 1}" height="{cell - 1}" '
                f'fill-opacity="{strength:.2f}" data-loss="{value!r}"><title>{label}</title></rect>'
            )
    for place, block in enumerate(blocks):
        if block % 5 == 0:
            parts.append(f'<text x="{84 + cell * place + 6}" y="{height - 4}" text-anchor="middle">{block}</text>')
    return "".join(parts) + "</svg>"


def bars(runs: Sequence[Run], methods: Sequence[str]) -> str:
    """Seconds by stage and peak memory of every run, as bars."""
    totals = [sum(float(s) for s in (run.results.get("seconds") or {}).values()) for run in runs]
    peaks = [(run.number("peak_memory_bytes") or 0.0) / 2**30 for run in runs]
    most, largest = max(totals, default=0.0), max(peaks, default=0.0)
    if most <= 0:
        return ""
    rows = []
    for index, (run, total, peak) in enumerate(zip(runs, totals, peaks, strict=True)):
        seconds = {stage: run.seconds(stage) or 0.0 for stage in _STAGES}
        pieces = "".join(
            f'<i style="width:{100 * value / most:.2f}%;opacity:{1 - 0.12 * place:.2f}" '
            f'title="{stage} {value:.1f} s"></i>'
            for place, (stage, value) in enumerate(seconds.items())
            if value > 0
        )
        colour, _ = _look(methods, method(run))
        share = 100 * peak / largest if largest else 0
        rows.append(
            f'<tr><th scope="row"><a href="#run-{index}">{html.escape(run.name)}</a></th>'
            f'<td class="track" style="--own:{colour}"><span>{pieces}</span></td><td>{total:.0f} s</td>'
            f'<td class="track" style="--own:{colour}"><span><i style="width:{share:.2f}%">'
            f"</i></span></td><td>{peak:.2f} GiB</td></tr>"
        )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="time and memory"><table class="bars"><thead><tr>'
        '<th scope="col">run</th><th scope="col">time by stage</th><th></th><th scope="col">peak memory</th><th></th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )

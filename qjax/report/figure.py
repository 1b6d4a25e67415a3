"""The comparison as a figure: bits per weight against KL and perplexity, or dots when all runs have the same bits."""

from __future__ import annotations

import io
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from qjax.errors import InputError, missing_extra
from qjax.report.runs import Run
from qjax.report.series import PANELS, WEIGHT_ERROR, Point, Series, label_positions, limits, series, ticks, varied_bits
from qjax.report.table import number, references
from qjax.runtime.atomic import write_bytes

__all__ = ["FAINT", "INK", "RULE", "draw", "page_svg"]

INK, FAINT, RULE = "#222222", "#6f6f6f", "#e3e3e3"
# Okabe and Ito's palette, which colour-blind readers can tell apart, and one marker each for print.
_STYLES = {
    "nearest": ("#7a7a7a", "X"),
    "stochastic": ("#CC79A7", "v"),
    "gptq": ("#D55E00", "s"),
    "ldlq": ("#0072B2", "o"),
    "greedy": ("#009E73", "^"),
    "yaqa": ("#A6761D", "D"),
}
_SPARE = (("#56B4E9", "P"), ("#8B5FBF", "<"), ("#B8860B", ">"), ("#444444", "h"))


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    spare = itertools.cycle(_SPARE)
    return {name: _STYLES.get(name) or next(spare) for name in dict.fromkeys(names)}


def _short(value: float) -> str:
    if value >= 1e7:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}".replace(",", "\u2009") if value >= 1e4 else f"{value:.4g}"


def _dress(axes: Any, which: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, which="both", length=3)
    axes.grid(True, which="major", axis=which, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)


def _log_axis(axis: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    places = ticks(low, high)
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FixedFormatter([_short(tick) for tick in places]))
    axis.set_minor_locator(NullLocator())


def _bars(points: Sequence[Point]) -> list[list[float]]:
    """Lengths of the interval bars, below and above; 0 without an interval."""
    ends = [point.interval or (point.value, point.value) for point in points]
    below = [max(0.0, p.value - low) for p, (low, _) in zip(points, ends, strict=True)]
    return [below, [max(0.0, high - p.value) for p, (_, high) in zip(points, ends, strict=True)]]


def _reference_values(runs: Sequence[Run], metric: str) -> list[float]:
    if metric != "perplexity":
        return []
    found = (run.number("perplexity_reference") for run in references(runs).values())
    return [value for value in found if value is not None and math.isfinite(value)]


def _shannon(metric: str, bits: Sequence[float]) -> list[float]:
    """The least relative error of a Gaussian's quantisation at each of the rates, 2^(−2R); of the weights only."""
    return [4.0**-rate for rate in bits] if metric == WEIGHT_ERROR[0] else []


def _spread(all_series: Sequence[Series], metric: str, extra: Sequence[float]) -> list[float]:
    points = [point for s in all_series for point in s.points[metric]]
    return [*(bound for p in points for bound in (p.value, *(p.interval or ()))), *extra]


def _curves(axes: Any, lines: Sequence[Series], runs: Sequence[Run], metric: str, title: str) -> None:
    """Bits per weight against a metric, a curve per series, labelled at its right end."""
    from matplotlib.ticker import MultipleLocator

    styles = _styles([s.rounding for s in lines])
    original = _reference_values(runs, metric)
    bits = [run.results["bits_per_weight"] for run in runs]
    left, right = min(bits), max(bits)
    bound = _shannon(metric, [left, right])
    low, high = limits(_spread(lines, metric, [*original, *bound]), 0.07)
    shapes = itertools.cycle(("-", "--", ":", "-."))
    dashes = {s.label: next(shapes) if len(styles) < len(lines) else "-" for s in lines}
    ends = []
    for s in lines:
        points = s.points[metric]
        if not points:
            continue
        colour, marker = styles[s.rounding]
        axes.errorbar(
            [p.bits for p in points], [p.value for p in points], yerr=_bars(points), color=colour, marker=marker,
            markersize=6.5, markeredgecolor="white", linewidth=1.6, elinewidth=1.3, capsize=2.5,
            linestyle=dashes[s.label],
        )  # fmt: skip
        ends.append((s.label, points[-1], colour))
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    _dress(axes, "y")
    _log_axis(axes.yaxis, low, high)
    if bound:
        axes.plot([left, right], bound, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(left - 0.06 * (right - left), right + 0.06 * (right - left))
    axes.xaxis.set_major_locator(MultipleLocator(1 if right - left >= 2 else 0.5 if right - left >= 1 else 0.1))
    axes.set_xlabel("bits per weight", color=INK)
    lost = sum(not math.isfinite(run.number(metric) or 0.0) for run in runs)
    if lost:
        text = f"{lost} {'run' if lost == 1 else 'runs'} beyond the axis (infinite)"
        axes.annotate(text, (0.99, 0.99), xycoords="axes fraction", ha="right", va="top", fontsize=8.5, color=FAINT)
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    scale = math.log(high / low)
    wanted = [math.log(point.value / low) / scale for _, point, _ in ends]
    for value in original:
        axes.axhline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((f"original {number(value)}", Point(right, value, None), INK))
        wanted.append(math.log(value / low) / scale)
    gap = 0.052 * max(len(text.splitlines()) for text, _, _ in ends) if ends else 0.0
    for (text, point, colour), height in zip(ends, label_positions(wanted, gap), strict=True):
        axes.annotate(
            text, xy=(point.bits, point.value), xytext=(1.025, height), textcoords="axes fraction", va="center",
            fontsize=9, color=colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 5, "alpha": 0.5},
        )  # fmt: skip


def _dots(axes: Any, rows: Sequence[Series], runs: Sequence[Run], metric: str, title: str) -> None:
    """A row per run, the metric to the right with its interval and its value."""
    styles = _styles([s.rounding for s in rows])
    original = _reference_values(runs, metric)
    bound = _shannon(metric, [min(run.results["bits_per_weight"] for run in runs)])
    low, high = limits(_spread(rows, metric, [*original, *bound]), 0.1)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.4, -0.75)
    axes.set_yticks(range(len(rows)), [s.label for s in rows])
    for row, s in enumerate(rows):
        for point in s.points[metric]:
            colour, marker = styles[s.rounding]
            axes.errorbar(
                [point.value], [row], xerr=_bars([point]), color=colour, marker=marker, markersize=6,
                markeredgecolor="white", markeredgewidth=0.6, elinewidth=1.6, capsize=5,
            )  # fmt: skip
            axes.annotate(
                number(point.value, 3), (point.value, row), xytext=(0, 8), textcoords="offset points", ha="center",
                fontsize=9, color=colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
        if not s.points[metric]:
            axes.annotate(
                "not finite, or not measured", (0.5, row), xycoords=("axes fraction", "data"), ha="center", color=FAINT
            )
    for name, value in [*(("original", value) for value in original), *(("bound", value) for value in bound)]:
        axes.axvline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{name} {number(value)}", (value, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -2),
            textcoords="offset points", va="top", fontsize=9, color=INK,
        )  # fmt: skip
    _dress(axes, "x")
    _log_axis(axes.xaxis, low, high)
    axes.tick_params(axis="y", length=0)
    for text, s in zip(axes.get_yticklabels(), rows, strict=False):  # a shared axis labels the first panel only
        text.set_color(styles[s.rounding][0])
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)


def _layout(figure: Any, **spacing: float) -> None:
    figure.get_layout_engine().set(**spacing)


def _heading(runs: Sequence[Run]) -> str:
    models = list(dict.fromkeys(run.model for run in runs))
    bits = sorted({round(run.results["bits_per_weight"], 2) for run in runs})
    text = ", ".join(models)
    return (
        text if varied_bits(runs) else f"{text}, {bits[0]:g}{f'–{bits[-1]:g}' if len(bits) > 1 else ''} bits per weight"
    )


def _drawn(runs: Sequence[Run], panels: Sequence[tuple[str, str]], *, hover: bool = False) -> Any:
    """The matplotlib figure of those `panels` (metric, title) that a run has a value for.

    With `hover` an invisible mark, `METRIC of i` by its id, lies over the point of `runs[i]`. Raises InputError
    when no run has any.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = varied_bits(runs)
    lines, names = series(runs, join_bits=curves), [run.name for run in runs]
    panels = [(metric, title) for metric, title in panels if any(s.points[metric] for s in lines)]
    if not panels:
        raise InputError("the figure needs runs with KL or perplexity, and none was evaluated; use figure=false")
    longest = max(len(part) for s in lines for part in s.label.splitlines())
    tallest = max(s.label.count("\n") for s in lines)
    width = 5.75 * max(2, len(panels))
    size = (width, 4.6) if curves else (width, 1.7 + (0.52 + 0.12 * tallest) * len(lines))
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_heading(runs), x=0.012, ha="left", fontsize=11.5, color=INK)
    if curves:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        _layout(figure, wspace=min(0.3, 0.012 * longest))
    else:
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        _layout(figure, wspace=0.05)
    for axes, (metric, title) in zip(grid, panels, strict=True):
        (_curves if curves else _dots)(axes, lines, runs, metric, title)
        for row, point in ((row, point) for row, s in enumerate(lines) for point in s.points[metric] if hover):
            place = (point.bits, point.value) if curves else (point.value, row)
            gid = f"{metric} of {names.index(point.run)}"
            axes.plot(*place, marker="o", markersize=16, linestyle="none", alpha=0, gid=gid)
    return figure


def _saved(figure: Any, name: str) -> bytes:
    """The content of the figure's file; the same for the same runs: an SVG without date and random names."""
    kind = name.rpartition(".")[2]
    options: dict[str, Any] = {"dpi": 160} if kind == "png" else {"metadata": {"Date": None}}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, bbox_inches="tight", **options)
    return buffer.getvalue()


def _style() -> Any:
    """The settings under which a figure is made and saved. Raises InputError when matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise InputError(f"the figure {missing_extra('plots', 'matplotlib')}, or figure=false") from error
    return mpl.rc_context(
        {"font.family": "DejaVu Sans", "font.size": 9.5, "svg.hashsalt": "qjax", "svg.fonttype": "path"}
    )


def draw(runs: Sequence[Run], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write `figure.png` and `figure.svg` into `folder`; returns their paths.

    Panels: mean KL and perplexity, logarithmic, with 95% intervals. Raises InputError when matplotlib is not installed
    or no run was evaluated, RunError when the files cannot be written.
    """
    files = [folder / "figure.png", folder / "figure.svg"]
    with _style():
        figure = _drawn(runs, PANELS)
        for file in files:
            write_bytes(file, _saved(figure, file.name))
    return files


def page_svg(runs: Sequence[Run]) -> bytes:
    """The figure for the page, an SVG file: the error of the weights too, and an invisible mark over every point.

    The mark of `runs[i]` is a group with the id `METRIC of i`. Raises InputError as `draw` does.
    """
    with _style():
        return _saved(_drawn(runs, (*PANELS, WEIGHT_ERROR), hover=True), "page.svg")

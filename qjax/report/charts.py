"""Charts of the page as SVG and HTML text: losses by layer, time and memory by run."""

from __future__ import annotations

import csv
import html
import math
import pathlib
from collections.abc import Mapping, Sequence

from qjax.report.runs import Run

__all__ = ["bars", "heat_map", "layer_losses"]

_STAGES = ("load", "reference", "hessians", "quantize", "finetune", "evaluate", "save")


def layer_losses(path: pathlib.Path) -> dict[str, dict[int, float]]:
    """Relative proxy losses of a run's `layers.csv`, by linear and block; {} where there is none that can be read."""
    found: dict[str, dict[int, float]] = {}
    try:
        with (path / "layers.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if not row["name"].startswith("layers."):  # embedding and head are in no block
                    continue
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


def bars(runs: Sequence[Run]) -> str:
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
        share = 100 * peak / largest if largest else 0
        rows.append(
            f'<tr><th scope="row"><a href="#run-{index}">{html.escape(run.name)}</a></th>'
            f'<td class="track"><span>{pieces}</span></td><td>{total:.0f} s</td>'
            f'<td class="track"><span><i style="width:{share:.2f}%">'
            f"</i></span></td><td>{peak:.2f} GiB</td></tr>"
        )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="time and memory"><table class="bars"><thead><tr>'
        '<th scope="col">run</th><th scope="col">time by stage</th><th></th><th scope="col">peak memory</th><th></th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )

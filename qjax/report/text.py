"""The comparison as Markdown, CSV and aligned text."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.report.runs import Run, Skipped
from qjax.report.table import Table, references

__all__ = ["aligned", "columns", "csv_text", "left_out", "markdown"]


def aligned(table: Table) -> str:
    """Columns padded with blanks, two between columns, a rule below the headers."""
    lines = [table.headers, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.headers))]

    def render(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, table.numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([render(table.headers), "  ".join("-" * width for width in widths), *map(render, table.rows)])


def left_out(skipped: Sequence[Skipped]) -> list[str]:
    """A line per directory that could not be reported."""
    return [f"left out: {item.path}: {item.reason}" for item in skipped]


def _escaped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _circumstances(runs: Sequence[Run]) -> list[str]:
    lines = []
    for run in references(runs).values():
        results = run.results
        lines.append(
            f"- {run.model}: {results.get('tokens_calibration', '?')} calibration tokens, "
            f"{results.get('tokens_evaluation', '?')} evaluation tokens, context {results.get('context_length', '?')}"
        )
    machines = {_machine(run.results.get("device") or {}) for run in runs} - {""}
    lines += [f"- measured on: {machine}" for machine in sorted(machines)]
    versions = {
        ", ".join(f"{name} {version}" for name, version in (run.results.get("versions") or {}).items()) for run in runs
    }
    lines += [f"- versions: {text}" for text in sorted(versions - {""})]
    return lines


def _machine(device: Mapping[str, Any]) -> str:
    if not device:
        return ""
    if device.get("platform") == "cpu":
        memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in device else ""
        return f"{device.get('cpu_cores', '?')} cores of {device.get('cpu_model', 'an unknown CPU')}{memory}"
    return f"{device.get('count', 1)} × {device.get('kind', device.get('platform', '?'))}"


def _left_out(skipped: Sequence[Skipped]) -> list[str]:
    return [f"- `{item.path}`: {item.reason}" for item in skipped]


def markdown(table: Table, runs: Sequence[Run], skipped: Sequence[Skipped], figure: str | None = None) -> str:
    """The report: the table, the figure (a relative path), what was measured how, and what was left out."""
    rule = [("---:" if right else "---") for right in table.numeric]
    parts = ["# Comparison of runs", ""]
    if not runs:
        return "\n".join([*parts, "Of the runs that were found none is finished:", "", *_left_out(skipped)]) + "\n"
    parts += [_escaped(table.headers), _escaped(rule), *map(_escaped, table.rows), ""]
    if figure is not None:
        parts += [f"![bits per weight against KL and perplexity]({figure})", ""]
    parts += [
        "Brackets: 95% bootstrap intervals over sequences. KL is that of the original model's predictions to the "
        "quantised model's, in nats per token; agreement is that of the most likely tokens; proxy loss is the mean "
        "over matrices of `tr(E H Eᵀ) / tr(W H Wᵀ)`. Bits per weight count codes, scales, zeros, signs and "
        "permutations of the quantised matrices; MB (10⁶ bytes) count the whole model.",
        "",
        *_circumstances(runs),
    ]
    if skipped:
        parts += ["", "Left out:", "", *_left_out(skipped)]
    return "\n".join(parts) + "\n"


def columns(run: Run) -> dict[str, Any]:
    """A run's settings and results, flat, under dotted names; intervals as two numbers."""
    found: dict[str, Any] = {"run": run.name, "path": os.fspath(run.path)}
    found |= {f"settings.{key}": value for key, value in run.settings.items()}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, entry in value.items():
                add(f"{name}.{key}", entry)
        elif name.endswith("_interval") and isinstance(value, list):
            found[f"{name}.low"], found[f"{name}.high"] = value
        else:
            found[name] = value

    for key, value in run.results.items():
        if key != "settings":
            add(key, value)
    return found


def csv_text(runs: Sequence[Run]) -> str:
    """All settings and all results, a row per run, nested values under dotted names; lists as JSON."""
    rows = [columns(run) for run in runs]
    fields = list({key: None for row in rows for key in row})
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()})
    return text.getvalue()

"""The comparison as a table of text cells: the settings that differ between runs, and their results."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.report.runs import Run

__all__ = ["Table", "comparison", "differing", "number", "ordered", "reference_names", "references"]

_ABSENT = "–"
_STAGES = ("hessians", "quantize", "evaluate")


@dataclasses.dataclass(frozen=True)
class Table:
    """Headers and rows of text; `numeric` says which columns are aligned to the right."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits, without an exponent between 0.001 and 100 000; – for None, ∞ for an overflow."""
    if value is None:
        return _ABSENT
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    size = abs(value)
    if size and not 1e-3 <= size < 1e5:
        return f"{value:.{digits - 2}e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    if size >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def _plain(value: Any) -> str:
    if value is None:
        return _ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differing(runs: Sequence[Run]) -> list[str]:
    """Settings that tell the runs apart, in the order of the configuration.

    An option of a group, `rounding.block`, counts only when it differs between runs that chose the same entry of the
    group: that LDLQ has a block and GPTQ has none is said by `rounding` already.
    """
    keys: dict[str, None] = {key: None for run in runs for key in run.settings}
    found = []
    for key in keys:
        group = key.rpartition(".")[0]
        values: dict[str, set[str]] = {}
        for run in runs:
            values.setdefault(_plain(run.settings.get(group)), set()).add(_plain(run.settings.get(key)))
        if any(len(seen) > 1 for seen in values.values()):
            found.append(key)
    return found


def ordered(runs: Sequence[Run]) -> list[Run]:
    """By model, bits per weight (to a tenth: scales and signs make small differences), then the worst KL first."""

    def place(run: Run) -> tuple[Any, ...]:
        divergence = run.number("kl_mean")
        return (
            run.model,
            round(run.results["bits_per_weight"], 1),
            -(divergence if divergence is not None else 0),
            run.name,
        )

    return sorted(runs, key=place)


def references(runs: Sequence[Run]) -> dict[tuple[Any, ...], Run]:
    """One run per original model and evaluation: (model, dtype, tokens hash, context length) -> a run that has it."""
    found: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        if run.number("perplexity_reference") is not None:
            tokens = run.results.get("tokens_sha256", run.results.get("tokens_evaluation"))
            key = (run.model, run.settings.get("model.dtype"), tokens, run.results.get("context_length"))
            found.setdefault(key, run)
    return found


def _with_interval(run: Run, key: str) -> str:
    value, interval = run.number(key), run.interval(key)
    text = number(value)
    if interval is None or not math.isfinite(value or 0.0):
        return text
    return f"{text} [{number(interval[0], 3)}, {number(interval[1], 3)}]"


def _megabytes(value: float | None) -> str:
    return _ABSENT if value is None else f"{value / 1e6:.1f}"


def _total(run: Run) -> float | None:
    seconds = run.results.get("seconds") or {}
    return float(sum(seconds.values())) if seconds else None


def _seconds(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def reference_names(found: Mapping[tuple[Any, ...], Run]) -> list[str]:
    """`tiny (reference)`; originals of one name get what tells them apart: type, evaluation tokens, context."""
    names = []
    for model, dtype, tokens, context in found:
        rivals = [key for key in found if key[0] == model]
        run = found[model, dtype, tokens, context]
        parts = [str(dtype)] if len({key[1] for key in rivals}) > 1 else []
        if len({key[2] for key in rivals}) > 1:
            count, length = run.results.get("tokens_evaluation"), f" of context {context}" if context else ""
            same = [key for key in rivals if found[key].results.get("tokens_evaluation") == count and key[3] == context]
            mark = f" {str(tokens)[:8]}" if len({key[2] for key in same}) > 1 else ""
            parts.append(f"{count if count else 'other'} tokens{length}{mark}")
        elif len({key[3] for key in rivals}) > 1:
            parts.append(f"context {context}")
        names.append(f"{model} ({', '.join(['reference', *parts])})")
    return names


def _reference_cells(name: str, run: Run, headers: Sequence[str]) -> tuple[str, ...]:
    cells = {
        "run": name,
        "model": run.model,
        "model MB": _megabytes(run.number("whole_model_bytes_reference")),
        "perplexity": _with_interval(run, "perplexity_reference"),
    }
    return tuple(cells.get(header, "") for header in headers)


def comparison(runs: Sequence[Run]) -> Table:
    """One row per original model and per run.

    Columns: run, the settings that differ, bits per weight, megabytes (10⁶) of the whole model, perplexity and mean KL
    with 95% intervals, 99th percentile of KL (nats), top-1 agreement, mean relative proxy loss, seconds by stage and
    in all, peak memory (GiB).
    """
    runs = ordered(runs)
    names = [run.name for run in runs]
    settings = [key for key in differing(runs) if [_plain(run.settings.get(key)) for run in runs] != names]
    stages = [stage for stage in _STAGES if any(run.seconds(stage) is not None for run in runs)]
    headers = [
        *("run", *settings),
        *("bits/weight", "model MB", "perplexity", "KL mean", "KL p99", "agreement", "proxy loss"),
        *(f"{stage} s" for stage in stages),
        *("total s", "peak GiB"),
    ]
    originals = references(runs)
    named = zip(reference_names(originals), originals.values(), strict=True)
    rows = [_reference_cells(name, run, headers) for name, run in named]
    for run in runs:
        peak = run.number("peak_memory_bytes")
        rows.append(
            (
                run.name,
                *(_plain(run.settings.get(key)) for key in settings),
                f"{run.results['bits_per_weight']:.3f}",
                _megabytes(run.number("whole_model_bytes")),
                _with_interval(run, "perplexity"),
                _with_interval(run, "kl_mean"),
                number(run.number("kl_p99"), 3),
                number(run.number("top1_agreement"), 3),
                number(run.number("proxy_loss_mean"), 3),
                *(_seconds(run.seconds(stage)) for stage in stages),
                _seconds(_total(run)),
                _ABSENT if peak is None else f"{peak / 2**30:.2f}",
            )
        )
    numeric = tuple(index > len(settings) for index in range(len(headers)))
    return Table(tuple(headers), tuple(rows), numeric)

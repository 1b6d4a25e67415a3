"""The comparison as Parquet: the columns of the CSV, with types."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from qjax.errors import InputError, missing_extra
from qjax.report.runs import Run
from qjax.report.text import columns

__all__ = ["parquet_bytes"]


def _typed(values: Sequence[Any]) -> list[Any]:
    """One type per column: numbers, truth values or text; what is mixed or nested becomes JSON text."""
    present = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in present) or all(isinstance(value, str) for value in present):
        return list(values)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        whole = all(isinstance(value, int) and abs(value) < 2**63 for value in present)
        return list(values) if whole else [None if value is None else float(value) for value in values]
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]


def parquet_bytes(runs: Sequence[Run]) -> bytes:
    """All settings and all results, a row per run, nested values under dotted names; lists as JSON, absent as null.

    Raises InputError where polars is not installed.
    """
    try:
        import polars  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"parquet=true {missing_extra('parquet', 'polars')}; report.csv holds the same columns"
        ) from error
    rows = [columns(run) for run in runs]
    names = list({key: None for row in rows for key in row})
    frame = polars.DataFrame({name: _typed([row.get(name) for row in rows]) for name in names}, strict=False)
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()
